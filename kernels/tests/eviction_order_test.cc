// SPDX-License-Identifier: MIT
// The order over all layers against an oracle that keeps every use and counts ages by each layer's own clock.
#include "core/eviction_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "tests/eviction_oracle.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

class EvictionOrderTest : public testing::TestWithParam<edgemoe_eviction> {
 protected:
  void Start(const ToyShape& shape) {
    ToyModel model(shape);
    ASSERT_TRUE(ExpertFile::Describe(model.Options(0), &tensors_).ok());
    ASSERT_TRUE(pool_.Reserve(tensors_).ok());
    order_.Start(GetParam(), tensors_, pool_);
    for (size_t t = 0; t < tensors_.size(); ++t) {
      for (int e = 0; e < tensors_[t].n_experts; ++e) {
        layer_of_.push_back(tensors_[t].layer);
        class_of_.push_back(pool_.ClassOfTensor(static_cast<int>(t)));
      }
    }
  }
  // The first slice of a layer, and `n` more.
  int64_t Slice(int layer, int n) const {
    return std::find(layer_of_.begin(), layer_of_.end(), layer) - layer_of_.begin() + n;
  }
  // A layer uses slices and ends.
  void RunLayer(int layer, double time, const std::vector<int64_t>& slices, int64_t n_tokens = 1) {
    order_.EnterLayer(layer, time, n_tokens);
    for (int64_t s : slices) {
      order_.Touch(s, time + static_cast<double>(n_tokens - 1), 1);
      if (!order_.Contains(s)) order_.Insert(s);
    }
    order_.LeaveLayer(layer);
  }
  // All in the order in which they would be evicted.
  std::vector<int64_t> Drain(int class_idx = 0) {
    std::vector<int64_t> slices;
    for (int64_t s; (s = order_.Coldest(class_idx)) >= 0;) {
      slices.push_back(s);
      order_.Erase(s);
    }
    return slices;
  }

  std::vector<ExpertTensor> tensors_;
  SlotPool pool_;
  EvictionOrder order_;
  std::vector<int> layer_of_, class_of_;  // [slice]
};

INSTANTIATE_TEST_SUITE_P(Rules, EvictionOrderTest,
                         testing::Values(EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY, EDGEMOE_EVICT_LEAST_STALE,
                                         EDGEMOE_EVICT_UTILITY));

// Guards against: victims that depend on the order in which reads happened to end, where several slices have one age.
TEST_P(EvictionOrderTest, EqualsGoExpertByExpertHoweverTheyCame) {
  Start({});
  const double time = order_.BeginPass(1, false);
  std::vector<int64_t> slices, expected;
  for (int expert : {1, 3, 6, 9}) {
    for (const ExpertTensor& t : tensors_) {
      if (t.layer == 1 && pool_.ClassOfTensor(static_cast<int>(&t - tensors_.data())) == 0) {
        expected.push_back(t.first_slice + expert);
      }
    }
  }
  slices = expected;
  std::mt19937 rng(1);
  for (int round = 0; round < 20; ++round) {
    std::shuffle(slices.begin(), slices.end(), rng);
    RunLayer(1, time, slices);
    EXPECT_EQ(Drain(), expected);
  }
}

// Guards against: ages by the token, which call what a layer used a token ago old just before that layer comes again.
TEST_P(EvictionOrderTest, WhatComesNextOutlivesWhatWasJustPassed) {
  Start({});
  const int64_t a = Slice(0, 0), b = Slice(1, 0), c = Slice(2, 0), old = Slice(2, 1);
  double time = order_.BeginPass(1, false);
  EXPECT_EQ(time, 1.0);
  RunLayer(2, time, {old});
  for (int token = 0; token < 3; ++token) {
    time = order_.BeginPass(1, false);
    RunLayer(0, time, token > 0 ? std::vector<int64_t>{a} : std::vector<int64_t>{});
    RunLayer(1, time, {b});
    RunLayer(2, time, {c});
  }
  time = order_.BeginPass(1, false);
  RunLayer(0, time, {a});
  // Each in the last three passes of its layer; by the token c and b are older than a.
  EXPECT_EQ(Drain(), (std::vector<int64_t>{old, a, c, b}));
}

// Guards against: the experts of a layer that has not come yet counted as a token older than they are, so that they go
// before others that are older by their own clocks.
TEST_P(EvictionOrderTest, AgesAreThoseOfTheOwnLayer) {
  Start({});
  const int64_t a = Slice(0, 0), older = Slice(0, 1), c = Slice(2, 0), d = Slice(2, 1);
  double time = order_.BeginPass(1, false);
  RunLayer(0, time, {older});
  RunLayer(2, time, {});
  time = order_.BeginPass(1, false);
  RunLayer(0, time, {a});
  RunLayer(2, time, {c});
  time = order_.BeginPass(1, false);
  RunLayer(0, time, {});
  RunLayer(2, time, {d});
  time = order_.BeginPass(1, false);
  RunLayer(0, time, {});
  // Layer 0 has run three times since `older`, twice since `a`; layer 2 once since `c`, and not since `d`.
  EXPECT_EQ(Drain(), (std::vector<int64_t>{older, a, c, d}));
}

// Guards against: a layer whose experts stay for ever because it runs no more, as heads for drafts may.
TEST_P(EvictionOrderTest, WhatALayerHoldsThatRunsNoMoreAgesToo) {
  Start({});
  const int64_t left = Slice(2, 0), a = Slice(0, 0), b = Slice(1, 0);
  double time = order_.BeginPass(1, false);
  RunLayer(2, time, {left});
  for (int token = 0; token < 40; ++token) {
    time = order_.BeginPass(1, false);
    if (token < 38) RunLayer(0, time, {a});
    RunLayer(1, time, {b});
  }
  EXPECT_EQ(Drain(), (std::vector<int64_t>{left, a, b}));
}

// Guards against: a slot taken from what the layer in progress has asked for, however rarely that was used.
TEST_P(EvictionOrderTest, WhatALayerInProgressAskedForGoesLast) {
  Start({});
  const int64_t often = Slice(1, 0), fresh = Slice(0, 0);
  double time = 0.0;
  for (int token = 0; token < 20; ++token) {
    time = order_.BeginPass(1, false);
    RunLayer(0, time, {});
    RunLayer(1, time, {often});
  }
  time = order_.BeginPass(1, false);
  order_.EnterLayer(0, time, 1);
  order_.Touch(fresh, time, 1);
  order_.Insert(fresh);
  EXPECT_TRUE(order_.Needed(fresh));
  EXPECT_FALSE(order_.Needed(often));
  EXPECT_EQ(order_.Coldest(0), often);
  order_.LeaveLayer(0);
  EXPECT_FALSE(order_.Needed(fresh));
  EXPECT_EQ(order_.Coldest(0), fresh);
}

// Guards against: a long prompt that makes the clocks of two layers differ by more than what an earlier run has left is
// colder, so that it outlives what was used.
TEST_P(EvictionOrderTest, WhatOnlyAnEarlierRunUsedIsColdestInTheMiddleOfAPrompt) {
  Start({});
  const int64_t used = Slice(0, 0), hottest = Slice(2, 0), next = Slice(2, 1);
  order_.Remember(hottest, 0);
  order_.Remember(next, 1);
  order_.Remember(used, 0);
  order_.Insert(hottest);
  order_.Insert(next);
  double time = order_.BeginPass(1, false);
  RunLayer(0, time, {used});
  order_.Remember(used, 7);
  time = order_.BeginPass(5000, true);
  RunLayer(0, time, {}, 5000);
  EXPECT_EQ(Drain(), (std::vector<int64_t>{next, hottest, used}));
}

// Guards against: a heap out of order, another layer's clock, a layer's clock that a prompt moves by one, ties that
// give up what comes next, by chance or in a case that nobody thought of.
TEST_P(EvictionOrderTest, EvictsWhatTheOracleWould) {
  ToyShape shape;
  shape.n_layers = 5;
  shape.mixed = true;  // two classes in layer 0
  Start(shape);
  const edgemoe_eviction rule = GetParam();
  std::mt19937 rng(11);
  struct Used {
    History history;
    double pass = 0.0;
    bool passed = false;
  };
  std::map<int64_t, Used> used;
  std::set<int64_t> in;
  std::map<int, std::pair<double, double>> clocks;  // [layer] last token and pass
  std::map<int, int> begun;
  int n_begun = 0, n_passes = 0, n_checked = 0, in_progress = -1;
  double pass_time = 0.0;

  const auto weight = [&](int64_t s) {
    const std::pair<double, double> own = clocks[layer_of_[static_cast<size_t>(s)]];
    const double now = std::max(own.first, pass_time - 1.0), pass = std::max<double>(own.second, n_passes - 1);
    const Used& u = used.at(s);
    if (rule == EDGEMOE_EVICT_LEAST_STALE) return std::make_pair(u.pass - pass, 0.0);
    if (rule == EDGEMOE_EVICT_LFU_DECAY) return std::make_pair(std::log2(Frequency(u.history, now)), 0.0);
    const std::pair<double, double> w = Weight(rule, u.history, now);
    return std::make_pair(rule == EDGEMOE_EVICT_UTILITY ? w.first : w.first - now, w.second - now);
  };
  // Below 0: a is colder; the sums of an oracle are not exact.
  const auto compare = [&](int64_t a, int64_t b) {
    if (used.at(a).passed != used.at(b).passed) return used.at(a).passed ? -1 : 1;
    const auto x = weight(a), y = weight(b);
    if (std::abs(x.first - y.first) > 1e-9) return x.first < y.first ? -1 : 1;
    return x.second == y.second ? 0 : x.second < y.second ? -1 : 1;
  };
  const auto needed = [&](int64_t s) {
    const Used& u = used.at(s);
    return layer_of_[static_cast<size_t>(s)] == in_progress && !u.passed && u.history.back().time >= pass_time;
  };
  const auto check = [&](int class_idx) {
    const int64_t coldest = order_.Coldest(class_idx);
    std::map<int, std::vector<int64_t>> candidates;  // [layer] the coldest of its heap, and equals
    for (int64_t s : in) {
      if (class_of_[static_cast<size_t>(s)] != class_idx) continue;
      auto& best = candidates[layer_of_[static_cast<size_t>(s)]];
      const int order = best.empty() ? -1 : compare(s, best.front());
      if (order < 0) best.clear();
      if (order <= 0) best.push_back(s);
    }
    ASSERT_EQ(coldest < 0, candidates.empty());
    if (coldest < 0) return;
    const int layer = layer_of_[static_cast<size_t>(coldest)];
    ASSERT_NE(std::count(candidates[layer].begin(), candidates[layer].end(), coldest), 0) << "pass " << n_passes;
    for (const auto& [other_layer, others] : candidates) {
      const bool is_needed = needed(others.front());
      const bool alike = std::all_of(others.begin(), others.end(), [&](int64_t s) { return needed(s) == is_needed; });
      if (other_layer == layer || !alike) continue;
      ++n_checked;
      if (needed(coldest) != is_needed) {
        ASSERT_TRUE(is_needed) << "pass " << n_passes;
        continue;
      }
      const int order = compare(coldest, others.front());
      ASSERT_LE(order, 0) << "pass " << n_passes << ", layers " << layer << " and " << other_layer;
      ASSERT_TRUE(order < 0 || begun[layer] > begun[other_layer]) << "pass " << n_passes;
    }
  };

  for (n_passes = 1; n_passes <= 300; ++n_passes) {
    const bool is_scan = rng() % 12 == 0;
    const int64_t n_tokens = is_scan ? 9 + rng() % 20 : 1 + rng() % 4 / 3 * (rng() % 4);
    for (auto& [_, u] : used) u.passed = false;
    pass_time = order_.BeginPass(n_tokens, is_scan);
    for (int layer = 0; layer < shape.n_layers; ++layer) {
      if (rng() % 10 == 0) continue;  // not part of this pass
      order_.EnterLayer(layer, pass_time, n_tokens);
      in_progress = layer;
      clocks[layer] = {pass_time + static_cast<double>(n_tokens) - 1.0, n_passes};
      begun[layer] = ++n_begun;
      for (int64_t s = 0; s < static_cast<int64_t>(layer_of_.size()); ++s) {
        // A few of each layer are used often.
        if (layer_of_[static_cast<size_t>(s)] != layer || rng() % (s % 5 == 0 ? 3 : 40) != 0) continue;
        const double time = pass_time + static_cast<double>(rng() % static_cast<unsigned>(n_tokens));
        order_.Touch(s, time, 1);
        used[s].history.push_back({time, 1});
        used[s].pass = n_passes;
        if (in.insert(s).second) order_.Insert(s);
        if (is_scan && rng() % 2 == 0) {
          order_.Pass(s);
          used[s].passed = true;
        }
      }
      for (int class_idx = 0; class_idx < 2; ++class_idx) {
        for (int i = 0; i < 3; ++i) {
          ASSERT_NO_FATAL_FAILURE(check(class_idx));
          const int64_t coldest = order_.Coldest(class_idx);
          if (coldest < 0 || needed(coldest)) break;
          order_.Erase(coldest);
          in.erase(coldest);
        }
      }
      order_.LeaveLayer(layer);
      in_progress = -1;
      ASSERT_NO_FATAL_FAILURE(check(0));
    }
  }
  EXPECT_GT(n_checked, 5000);
}

}  // namespace
}  // namespace edgemoe::test
