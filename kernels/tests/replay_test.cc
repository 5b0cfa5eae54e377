// SPDX-License-Identifier: MIT
#include "core/replay.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "core/replay_trace.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

constexpr uint64_t kPage = 4096;
constexpr int kRules[] = {EDGEMOE_EVICT_LRU,     EDGEMOE_EVICT_LFU_DECAY, EDGEMOE_EVICT_LEAST_STALE,
                          EDGEMOE_EVICT_UTILITY, EDGEMOE_EVICT_AUTO,      EDGEMOE_REPLAY_BELADY};

// A trace and the ways to fill it; three projections of a page each unless told otherwise.
struct ToyTrace {
  ToyTrace(int n_layers, int n_experts, int n_used_in) : n_used(n_used_in) {
    edgemoe_replay_layer layer = {n_experts, n_used_in, 3, 0, {kPage, kPage, kPage, 0}};
    layers.assign(static_cast<size_t>(n_layers), layer);
  }
  void AddBatch(int n_tokens, const std::function<std::vector<int32_t>(int layer)>& choose) {
    const int32_t batch = batch_of_token.empty() ? 0 : batch_of_token.back() + 1;
    for (int t = 0; t < n_tokens; ++t) {
      batch_of_token.push_back(batch);
      for (size_t l = 0; l < layers.size(); ++l) {
        const std::vector<int32_t> ids = choose(static_cast<int>(l));
        for (int k = 0; k < n_used; ++k) {
          const bool has = static_cast<size_t>(k) < ids.size();
          experts.push_back(static_cast<int16_t>(has ? ids[static_cast<size_t>(k)] : -1));
        }
      }
    }
  }
  // Each layer keeps most of its experts from token to token.
  void AddLocal(std::mt19937* rng, int n_tokens, double keep) {
    std::vector<std::vector<int32_t>> last(layers.size());
    for (int t = 0; t < n_tokens; ++t) {
      AddBatch(1, [&](int layer) {
        std::vector<int32_t>& ids = last[static_cast<size_t>(layer)];
        std::vector<int32_t> next;
        for (int32_t e : ids) {
          if ((*rng)() % 1000 < 1000 * keep) next.push_back(e);
        }
        const int n_experts = layers[static_cast<size_t>(layer)].n_experts;
        while (next.size() < static_cast<size_t>(n_used)) {
          const int32_t e = static_cast<int32_t>((*rng)() % static_cast<unsigned>(n_experts));
          if (std::find(next.begin(), next.end(), e) == next.end()) next.push_back(e);
        }
        return ids = next;
      });
    }
  }
  int n_layers() const { return static_cast<int>(layers.size()); }
  edgemoe_replay_trace View() const {
    edgemoe_replay_trace view = {};
    view.n_layers = n_layers();
    view.max_used = n_used;
    view.n_tokens = static_cast<int64_t>(batch_of_token.size());
    view.layers = layers.data();
    view.batch_of_token = batch_of_token.data();
    view.experts = experts.data();
    view.foreseen = foreseen.empty() ? nullptr : foreseen.data();
    view.max_foreseen = n_used;
    return view;
  }
  uint64_t CycleBytes() const {
    uint64_t bytes = 0;
    for (const auto& l : layers) {
      for (int i = 0; i < l.n_slices; ++i) bytes += l.slice_bytes[i] * static_cast<uint64_t>(l.n_used);
    }
    return bytes;
  }
  // Distinct experts that a decode of the trace asks for and did not use in the token before.
  int64_t Changed() const {
    int64_t n = 0;
    const int64_t stride = static_cast<int64_t>(layers.size()) * n_used;
    for (int64_t i = 0; i < static_cast<int64_t>(experts.size()); ++i) {
      const int64_t first = i / n_used * n_used - stride;
      const auto begin = experts.begin() + std::max<int64_t>(first, 0);
      n += first < 0 || std::find(begin, begin + n_used, experts[static_cast<size_t>(i)]) == begin + n_used ? 1 : 0;
    }
    return n;
  }

  int n_used;
  std::vector<edgemoe_replay_layer> layers;
  std::vector<int32_t> batch_of_token;
  std::vector<int16_t> experts;
  std::vector<int16_t> foreseen;  // of single tokens: [token][layer][2][n_used]
};

edgemoe_replay_options Options(uint64_t slots_bytes, int policy = EDGEMOE_EVICT_LRU) {
  edgemoe_replay_options o = {};
  o.struct_size = sizeof(o);
  o.policy = policy;
  o.slots_bytes = slots_bytes;
  o.disk_bytes_per_s = kPage * 1e6;  // a page in a microsecond
  o.latency_us = 0.5;
  o.change_token = -1;
  o.change_factor = 1.0;
  o.dense_us = 4.0;
  o.expert_us = 3.0;
  o.row_share = 0.5;
  o.recall = 1.0;
  o.n_readers = 4;
  return o;
}

edgemoe_replay_result RunReplay(const ToyTrace& trace, const edgemoe_replay_options& options,
                                std::vector<double>* batch_us = nullptr, std::vector<int32_t>* depths = nullptr) {
  edgemoe_replay_result result;
  const size_t n = static_cast<size_t>(trace.batch_of_token.back()) + 1;
  if (batch_us != nullptr) batch_us->resize(n);
  if (depths != nullptr) depths->resize(n);
  const Status s = Replay(trace.View(), options, &result, batch_us != nullptr ? batch_us->data() : nullptr,
                          depths != nullptr ? depths->data() : nullptr);
  EXPECT_TRUE(s.ok()) << s.message();
  return result;
}

// Guards against: a clock that forgets a cost, or counts one that overlaps with another.
TEST(ReplayTest, TimesAreThoseComputedByHand) {
  ToyTrace trace(1, 4, 1);
  const auto use = [&](int32_t e) { trace.AddBatch(1, [e](int) { return std::vector<int32_t>{e}; }); };
  use(0);
  std::vector<double> us;
  // Dense 4. Reads of gate, up and, ahead of time, down begin at once: latency 0.5, then the bytes of one after the
  // other, so they end 1.5, 2.5 and 3.5 later. Gate 1.5-2.5, up 2.5-3.5, down 3.5-4.5.
  RunReplay(trace, Options(12 * kPage), &us);
  EXPECT_DOUBLE_EQ(us[0], 4.0 + 4.5);
  use(0);
  edgemoe_replay_result r = RunReplay(trace, Options(12 * kPage), &us);
  EXPECT_DOUBLE_EQ(us[1], 4.0 + 3.0);
  EXPECT_DOUBLE_EQ(r.all.stall_us, 1.5);
  EXPECT_DOUBLE_EQ(r.all.total_us, 15.5);
  EXPECT_DOUBLE_EQ(r.decode.total_us, 15.5);
  EXPECT_EQ(r.all.hits, 1u);
  EXPECT_EQ(r.all.misses, 1u);
  EXPECT_EQ(r.all.bytes_read, 3 * kPage);
  // One reader, whose latencies do not overlap: 1.5, 3, 4.5; down ends at 5.5.
  edgemoe_replay_options slow = Options(12 * kPage);
  slow.n_readers = 1;
  RunReplay(trace, slow, &us);
  EXPECT_DOUBLE_EQ(us[0], 4.0 + 5.5);
  // Ten times as fast from the token on that changes it: all has arrived by 0.35, and gate begins at 0.15.
  slow = Options(12 * kPage);
  slow.change_token = 0;
  slow.change_factor = 10.0;
  RunReplay(trace, slow, &us);
  EXPECT_NEAR(us[0], 4.0 + 0.15 + 3.0, 1e-9);
}

// Guards against: hits that wait for misses.
TEST(ReplayTest, HitsAreComputedWhileMissesLoad) {
  ToyTrace trace(1, 4, 2);
  trace.AddBatch(1, [](int) { return std::vector<int32_t>{0, 1}; });
  trace.AddBatch(1, [](int) { return std::vector<int32_t>{2, 1}; });
  edgemoe_replay_options o = Options(12 * kPage);
  o.expert_us = 30.0;
  const edgemoe_replay_result once = RunReplay(trace, o);
  EXPECT_DOUBLE_EQ(once.all.stall_us, 1.5) << "only the first token's first slice is waited for";
}

// Guards against: reads whose ends are not in the order of their beginnings, and a result that depends on anything but
// trace and options.
TEST(ReplayTest, IsDeterministicWithJitterAndPrefetch) {
  std::mt19937 rng(1);
  ToyTrace trace(6, 32, 4);
  trace.AddLocal(&rng, 100, 0.5);
  edgemoe_replay_options o = Options(2 * trace.CycleBytes());
  o.jitter = 0.5;
  o.recall = 0.8;
  o.prefetch_depth = 2;
  o.seed = 7;
  const edgemoe_replay_result a = RunReplay(trace, o), b = RunReplay(trace, o);
  EXPECT_EQ(std::memcmp(&a, &b, sizeof(a)), 0);
  o.seed = 8;
  EXPECT_NE(RunReplay(trace, o).all.total_us, a.all.total_us);
  EXPECT_GT(a.prefetch.used_bytes, 0u);
  EXPECT_NEAR(static_cast<double>(a.prefetch.predicted_right) / static_cast<double>(a.prefetch.chosen), 0.8, 0.03);
}

// The fewest reads by trying everything: the best over all sets that may be kept after each step.
uint64_t FewestReads(const std::vector<std::set<int>>& steps, size_t n_slots) {
  std::map<std::set<int>, uint64_t> best = {{{}, 0}};
  for (const std::set<int>& step : steps) {
    std::map<std::set<int>, uint64_t> next;
    for (const auto& [kept, reads] : best) {
      std::vector<int> all(kept.begin(), kept.end());
      uint64_t n = reads;
      for (int s : step) {
        if (kept.count(s) == 0) {
          all.push_back(s);
          ++n;
        }
      }
      for (uint32_t mask = 0; mask < (1u << all.size()); ++mask) {
        std::set<int> subset;
        for (size_t i = 0; i < all.size(); ++i) {
          if ((mask >> i & 1) != 0) subset.insert(all[i]);
        }
        if (subset.size() > n_slots) continue;
        const auto [it, is_new] = next.emplace(subset, n);
        if (!is_new) it->second = std::min(it->second, n);
      }
    }
    best = next;
  }
  uint64_t least = UINT64_MAX;
  for (const auto& [kept, reads] : best) least = std::min(least, reads);
  return least;
}

// Guards against: a bound that is not the optimum: too high, it calls good rules impossible; too low, it says nothing.
TEST(ReplayTest, BoundIsTheOptimumOfAllChoices) {
  std::mt19937 rng(2);
  for (int round = 0; round < 60; ++round) {
    ToyTrace trace(2, 3, 2);
    for (auto& layer : trace.layers) layer.n_slices = 1;
    std::vector<std::set<int>> steps;
    for (int batch = 0; batch < 7; ++batch) {
      std::vector<std::set<int>> chosen(2);
      trace.AddBatch(1 + static_cast<int>(rng() % 2), [&](int layer) {
        std::vector<int32_t> ids = RandomIds(&rng, 1, 2, 3);
        if (rng() % 3 == 0) ids.pop_back();
        for (int32_t e : ids) chosen[static_cast<size_t>(layer)].insert(layer * 3 + e);
        return ids;
      });
      steps.insert(steps.end(), chosen.begin(), chosen.end());
    }
    for (size_t n_slots = 2; n_slots <= 6; ++n_slots) {
      EXPECT_EQ(RunReplay(trace, Options(n_slots * kPage)).bound_reads, FewestReads(steps, n_slots))
          << "round " << round;
    }
  }
}

// Traces that are random, local, a scan in a circle (the worst for LRU), mixed with prompts, in one class and in
// several.
std::vector<ToyTrace> ManyTraces(std::mt19937* rng) {
  std::vector<ToyTrace> traces;
  for (int kind = 0; kind < 6; ++kind) {
    ToyTrace trace(3, 12, 3);
    if (kind % 2 == 1) trace.layers[1].slice_bytes[2] = 2 * kPage;
    if (kind < 2) {
      trace.AddLocal(rng, 80, 0.5);
    } else if (kind < 4) {
      for (int t = 0; t < 80; ++t) {
        trace.AddBatch(1, [t](int) { return std::vector<int32_t>{3 * t % 12, (3 * t + 1) % 12, (3 * t + 2) % 12}; });
      }
    } else {
      for (int b = 0; b < 30; ++b) {
        const int n_tokens = b % 4 == 0 ? 1 + static_cast<int>((*rng)() % 20) : 1;
        trace.AddBatch(n_tokens, [&](int) { return RandomIds(rng, 1, 3, 12); });
      }
    }
    traces.push_back(trace);
  }
  return traces;
}

// Guards against: a bound that real caching passes, by another order of requests, by waves or by reading ahead.
TEST(ReplayTest, NoRuleReadsLessThanTheBound) {
  std::mt19937 rng(3);
  for (const ToyTrace& trace : ManyTraces(&rng)) {
    const bool is_mixed = trace.layers[1].slice_bytes[2] != kPage;
    for (uint64_t n_pages : {6, 9, 14, 27, 40, 70, 108}) {
      if (is_mixed && n_pages < 20) continue;  // fewer than two slots of a size
      for (int policy : kRules) {
        for (int depth : {0, 2}) {
          edgemoe_replay_options o = Options(n_pages * kPage, policy);
          o.prefetch_depth = depth;
          o.recall = 0.9;
          const edgemoe_replay_result r = RunReplay(trace, o);
          EXPECT_GE(r.all.reads, r.bound_reads) << n_pages << " pages, policy " << policy << ", depth " << depth;
          EXPECT_GE(r.all.bytes_read, r.bound_bytes);
          EXPECT_LE(r.slots_bytes, n_pages * kPage);
          EXPECT_GE(r.all.total_us, r.all.stall_us);
        }
      }
    }
  }
}

// Guards against: a simulation in which knowing the future does not help, on the scan that defeats LRU.
TEST(ReplayTest, BeladyReachesItsBoundWhereLruHitsNothing) {
  ToyTrace trace(1, 12, 3);
  for (int t = 0; t < 200; ++t) {
    trace.AddBatch(1, [t](int) { return std::vector<int32_t>{3 * t % 12, (3 * t + 1) % 12, (3 * t + 2) % 12}; });
  }
  const edgemoe_replay_result lru = RunReplay(trace, Options(27 * kPage));
  EXPECT_EQ(lru.all.hits, 0u);
  EXPECT_EQ(lru.all.reads, 3 * 3 * 200u);
  const edgemoe_replay_result best = RunReplay(trace, Options(27 * kPage, EDGEMOE_REPLAY_BELADY));
  EXPECT_LT(best.all.reads, 0.55 * static_cast<double>(lru.all.reads));
  // 9 of the 27 slots hold what is in use, which the bound need not keep: 2 of 3 others hit, for the bound 3 of 4.
  EXPECT_LE(static_cast<double>(best.all.reads), 1.35 * static_cast<double>(best.bound_reads));
  EXPECT_LT(best.all.total_us, lru.all.total_us);
}

// ReMoE's bound (arXiv 2605.27081): a token fetches at most what the token before did not use. For one pool over all
// layers it holds for LRU from a token cycle on, as what a layer used a token ago is among the last cycle's slices.
// Guards against: the experts of the last token evicted for each other.
TEST(ReplayTest, FetchesAtMostWhatChangedFromATokenCycleOn) {
  std::mt19937 rng(4);
  for (int round = 0; round < 40; ++round) {
    ToyTrace trace(1 + static_cast<int>(rng() % 5), 16, 2 + static_cast<int>(rng() % 5));
    if (round % 2 == 1) trace.layers[0].slice_bytes[2] = 3 * kPage;
    trace.AddLocal(&rng, 60, (rng() % 10) / 10.0);
    for (double more : {1.0, 1.5, 2.0}) {
      const auto slots_bytes = static_cast<uint64_t>(more * static_cast<double>(trace.CycleBytes()));
      for (int policy : {EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LEAST_STALE}) {
        const edgemoe_replay_result r = RunReplay(trace, Options(slots_bytes, policy));
        EXPECT_LE(static_cast<int64_t>(r.all.misses + r.all.late_hits), trace.Changed()) << "round " << round;
        EXPECT_LE(static_cast<int64_t>(r.all.reads), 3 * trace.Changed()) << "round " << round;
      }
    }
  }
}

// Guards against: ages by the token, by which each layer gives up what the layers after it are about to use: a pool
// that is one expert short of a token cycle would hit nothing while a text repeats itself.
TEST(ReplayTest, APoolOneExpertShortOfATokenCycleStillHits) {
  ToyTrace trace(6, 16, 4);
  for (int t = 0; t < 100; ++t) {
    trace.AddBatch(1, [](int) { return std::vector<int32_t>{1, 5, 6, 9}; });
  }
  for (int policy : kRules) {
    const edgemoe_replay_result r = RunReplay(trace, Options(trace.CycleBytes() - 3 * kPage, policy));
    EXPECT_EQ(r.all.hits + r.all.misses + r.all.late_hits, 2400u);
    // 2022 with knowledge of the future; 1880 by frequency, of which layers that come later have a use less.
    EXPECT_GT(r.all.hits, 1800u) << "policy " << policy;
  }
}

// Guards against: time behind the layers, or what reading costs, that is charged twice, too early or not at all.
TEST(ReplayTest, ReadingHoldsComputingUp) {
  ToyTrace trace(1, 4, 1);
  for (int i = 0; i < 2; ++i) trace.AddBatch(1, [](int) { return std::vector<int32_t>{0}; });
  edgemoe_replay_options o = Options(12 * kPage);
  o.batch_us = 2.0;
  o.hold_up_us_per_mib = static_cast<double>((1 << 20) / kPage);  // a microsecond for each page
  std::vector<double> us;
  const edgemoe_replay_result r = RunReplay(trace, o, &us);
  // Dense 4. Reads end 1.5, 2.5 and 3.5 later. Gate takes 1, and 1 more for itself: 1.5-3.5; up 1, and 2 more for up
  // and down: 3.5-6.5; down 6.5-7.5; the head.
  EXPECT_DOUBLE_EQ(us[0], 4.0 + 7.5 + 2.0);
  EXPECT_DOUBLE_EQ(us[1], 4.0 + 3.0 + 2.0);
  EXPECT_DOUBLE_EQ(r.all.stall_us, 1.5);
}

// Guards against: predictions that are drawn where the trace has them, first layers that nobody foresees, and hints of
// another layer.
TEST(ReplayTest, PredictionsAreThoseOfTheTrace) {
  constexpr int kLayers = 4, kUsed = 2;
  std::mt19937 rng(3);
  ToyTrace trace(kLayers, 16, kUsed);
  trace.AddLocal(&rng, 80, 0.5);
  edgemoe_replay_options o = Options(trace.CycleBytes());
  o.dense_us = 40.0;  // time to read ahead
  o.prefetch_depth = 1;
  o.recall = 0.0;
  const edgemoe_replay_result drawn = RunReplay(trace, o);
  EXPECT_EQ(drawn.prefetch.predicted_right, 0u);
  EXPECT_EQ(drawn.prefetch.predicted, 80u * (kLayers - 1) * kUsed);
  for (size_t step = 0; step < 80u * kLayers; ++step) {
    const auto chosen = trace.experts.begin() + static_cast<std::ptrdiff_t>(step * kUsed);
    trace.foreseen.insert(trace.foreseen.end(), chosen, chosen + kUsed);
    trace.foreseen.insert(trace.foreseen.end(), kUsed, int16_t{-1});
  }
  const edgemoe_replay_result known = RunReplay(trace, o);
  EXPECT_EQ(known.prefetch.predicted_right, 80u * kLayers * kUsed);
  EXPECT_EQ(known.prefetch.predicted, known.prefetch.predicted_right);
  EXPECT_EQ(known.prefetch.wasted_bytes, 0u);
  EXPECT_EQ(known.all.misses, 0u) << "all is read in time";
  // Where nobody looked they are drawn.
  const auto middle = trace.foreseen.begin() + static_cast<std::ptrdiff_t>(trace.foreseen.size() / 2);
  std::fill(middle, trace.foreseen.end(), int16_t{-1});
  const edgemoe_replay_result half = RunReplay(trace, o);
  EXPECT_EQ(half.prefetch.predicted_right, 40u * kLayers * kUsed);
  EXPECT_EQ(half.prefetch.predicted, 40u * (2 * kLayers - 1) * kUsed);
  trace.foreseen[5] = 16;
  edgemoe_replay_result none;
  const Status s = Replay(trace.View(), o, &none, nullptr, nullptr);
  EXPECT_EQ(s.code(), EDGEMOE_INVALID_ARGUMENT);
  EXPECT_NE(s.message().find("expert 16 foreseen of layer 1"), std::string::npos) << s.message();
}

// Guards against: a replay that no longer asks the cache as MoeLayer does.
TEST(ReplayTest, CountsWhatMoeLayerCounts) {
  for (edgemoe_eviction rule : {EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY, EDGEMOE_EVICT_LEAST_STALE,
                                EDGEMOE_EVICT_UTILITY, EDGEMOE_EVICT_AUTO}) {
    for (int64_t n_slots : {26, 34, 48}) {
      ToyModel model({});
      RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots * 3), 2, rule));
      ToySession session(runtime.get(), &model);
      ToyTrace trace(3, 16, 4);
      const auto& tensors = runtime->cache.file().tensors();
      for (int l = 0; l < 3; ++l) {
        for (int i = 0; i < 3; ++i)
          trace.layers[static_cast<size_t>(l)].slice_bytes[i] = SlotBytes(tensors[static_cast<size_t>(3 * l + i)]);
      }
      std::mt19937 rng(6);
      trace.AddBatch(3, [&](int) { return RandomIds(&rng, 1, 4, 16); });
      // The prompt's last layer sees its last token alone, as llama.cpp does it.
      for (int t = 0; t < 2; ++t) std::fill_n(trace.experts.begin() + (t * 3 + 2) * 4, 4, int16_t{-1});
      trace.AddLocal(&rng, 60, 0.6);
      for (int32_t first = 0; first < static_cast<int32_t>(trace.batch_of_token.size());) {
        int n_tokens = 0;
        const int32_t batch = trace.batch_of_token[static_cast<size_t>(first)];
        for (int32_t b : trace.batch_of_token) n_tokens += b == batch ? 1 : 0;
        const std::vector<float> x = RandomRows(&rng, n_tokens, 16);
        for (int l = 0; l < 3; ++l) {
          const int n_seen = l == 2 ? 1 : n_tokens;
          std::vector<int32_t> ids;
          for (int t = first + n_tokens - n_seen; t < first + n_tokens; ++t) {
            const auto begin = trace.experts.begin() + (t * 3 + l) * 4;
            ids.insert(ids.end(), begin, begin + 4);
          }
          ASSERT_EQ(session.RunLayer(l, ids, n_seen, x), EDGEMOE_OK);
        }
        first += n_tokens;
      }
      edgemoe_stats stats;
      edgemoe_runtime_stats(runtime.get(), &stats);
      const edgemoe_replay_result r = RunReplay(trace, Options(stats.slots_bytes, rule));
      EXPECT_EQ(r.n_slots, stats.n_slots);
      EXPECT_EQ(r.all.hits + r.all.misses + r.all.late_hits, stats.hits + stats.misses + stats.late_hits);
      EXPECT_EQ(r.all.hits, stats.hits) << "rule " << rule << ", " << n_slots << " slots";
      EXPECT_EQ(r.all.misses + r.all.late_hits, stats.misses + stats.late_hits)
          << "rule " << rule << ", " << n_slots << " slots";
      EXPECT_EQ(r.all.reads, stats.reads) << "rule " << rule << ", " << n_slots << " slots";
      EXPECT_EQ(r.evictions, stats.evictions) << "rule " << rule << ", " << n_slots << " slots";
    }
  }
}

double Sum(const std::vector<double>& us, size_t begin, size_t end) {
  double sum = 0.0;
  for (size_t i = begin; i < end; ++i) sum += us[i];
  return sum;
}

// Recall of the predictions, by how much the disk becomes faster in the middle.
class ControllerTest : public testing::TestWithParam<std::tuple<double, double>> {};

// Guards against: a controller of prefetch that keeps changing its mind, that sticks to what paid on another disk, or
// lets reading ahead hold up what a layer waits for.
TEST_P(ControllerTest, FollowsADiskWhoseSpeedChangesTenfold) {
  const auto [recall, factor] = GetParam();
  constexpr size_t kTokens = 1600, kChange = 800;
  std::mt19937 rng(9);
  ToyTrace trace(8, 32, 4);
  trace.AddLocal(&rng, kTokens, 0.5);
  edgemoe_replay_options o = Options(3 * trace.CycleBytes());
  o.recall = recall;
  o.jitter = 0.2;
  o.change_token = kChange;
  o.change_factor = factor;
  if (factor > 1.0) o.disk_bytes_per_s /= factor;  // slow, then as fast as in the other case at first
  std::vector<double> off, fixed[2], adaptive;
  std::vector<int32_t> depths;
  RunReplay(trace, o, &off);
  for (int depth = 1; depth <= 2; ++depth) {
    o.prefetch_depth = depth;
    RunReplay(trace, o, &fixed[depth - 1]);
  }
  o.adaptive = 1;
  const edgemoe_replay_result r = RunReplay(trace, o, &adaptive, &depths);
  EXPECT_EQ(r.decode.n_tokens, static_cast<int64_t>(kTokens));
  for (const size_t begin : {size_t{0}, kChange}) {
    const size_t end = begin + kChange;
    const double off_us = Sum(off, begin, end), us = Sum(adaptive, begin, end);
    // Finding out costs 1 to 2 % of 800 tokens where nothing pays (0.977 with a recall of 0.6 on a disk that became
    // slow).
    EXPECT_GE(off_us / us, 0.97) << "from token " << begin;
    const size_t later = begin + kChange / 2;
    EXPECT_GE(Sum(off, later, end) / Sum(adaptive, later, end), 0.98) << "from token " << later;
    // Where reading ahead pays, it is done, once there was time to find out.
    const double best_us =
        std::min(Sum(off, later, end), std::min(Sum(fixed[0], later, end), Sum(fixed[1], later, end)));
    EXPECT_LE(Sum(adaptive, later, end), 1.05 * best_us) << "from token " << later;
    EXPECT_LE(*std::max_element(adaptive.begin() + static_cast<std::ptrdiff_t>(begin),
                                adaptive.begin() + static_cast<std::ptrdiff_t>(end)),
              1.5 * *std::max_element(off.begin() + static_cast<std::ptrdiff_t>(begin),
                                      off.begin() + static_cast<std::ptrdiff_t>(end)));
    // Depths that stood for 32 tokens, which none does within a trial: the later 400 tokens have room for two
    // decisions.
    std::vector<int32_t> stood;
    for (size_t t = later, first = later; t <= end; ++t) {
      if (t < end && depths[t] == depths[first]) continue;
      if (t - first >= 32 && (stood.empty() || stood.back() != depths[first])) stood.push_back(depths[first]);
      first = t;
    }
    EXPECT_LE(stood.size(), 3u) << "from token " << later;
    RecordProperty("gain_percent_" + std::to_string(begin), static_cast<int>(100.0 * (off_us / us - 1.0)));
  }
}

INSTANTIATE_TEST_SUITE_P(All, ControllerTest,
                         testing::Combine(testing::Values(0.0, 0.6, 0.9), testing::Values(0.1, 10.0)));

// Guards against: a rule that is chosen for good, or by chance, or for the wrong text.
TEST(ReplayTest, AutoFollowsTheRuleThatSuitsTheText) {
  std::mt19937 rng(4);
  const auto drift = [&](ToyTrace* trace) { trace->AddLocal(&rng, 1000, 0.85); };
  // Half of the uses go to six experts of each layer, the others to any.
  const auto favourites = [&](ToyTrace* trace) {
    for (int t = 0; t < 1000; ++t) {
      trace->AddBatch(1, [&](int layer) {
        std::vector<int32_t> ids;
        while (ids.size() < 4) {
          const int32_t e =
              static_cast<int32_t>(rng() % 2 == 0 ? (rng() % 6 + static_cast<unsigned>(layer)) : rng()) & 31;
          if (std::find(ids.begin(), ids.end(), e) == ids.end()) ids.push_back(e);
        }
        return ids;
      });
    }
  };
  const auto reads = [](const ToyTrace& trace, int policy) {
    return static_cast<double>(RunReplay(trace, Options(2 * trace.CycleBytes(), policy)).all.reads);
  };
  ToyTrace drifting(8, 32, 4), favouring(8, 32, 4), both(8, 32, 4);
  drift(&drifting);
  favourites(&favouring);
  for (int i = 0; i < 2; ++i) {
    drift(&both);
    favourites(&both);
  }
  ASSERT_LT(reads(drifting, EDGEMOE_EVICT_LRU), 0.9 * reads(drifting, EDGEMOE_EVICT_LFU_DECAY));
  ASSERT_LT(reads(favouring, EDGEMOE_EVICT_LFU_DECAY), 0.97 * reads(favouring, EDGEMOE_EVICT_LRU));
  EXPECT_LE(reads(drifting, EDGEMOE_EVICT_AUTO), 1.03 * reads(drifting, EDGEMOE_EVICT_LRU));
  EXPECT_LE(reads(favouring, EDGEMOE_EVICT_AUTO), 1.03 * reads(favouring, EDGEMOE_EVICT_LFU_DECAY));
  EXPECT_LT(reads(both, EDGEMOE_EVICT_AUTO),
            std::min(reads(both, EDGEMOE_EVICT_LRU), reads(both, EDGEMOE_EVICT_LFU_DECAY)));
}

// Guards against: nonsense taken for a trace or for options.
TEST(ReplayTest, RefusesWhatMakesNoSense) {
  ToyTrace good(2, 8, 2);
  good.AddBatch(1, [](int) { return std::vector<int32_t>{0, 1}; });
  const auto refused = [](const ToyTrace& trace, const edgemoe_replay_options& options, edgemoe_code code,
                          const char* part) {
    edgemoe_replay_result result;
    const Status s = Replay(trace.View(), options, &result, nullptr, nullptr);
    EXPECT_EQ(s.code(), code) << s.message();
    EXPECT_NE(s.message().find(part), std::string::npos) << s.message();
  };
  const uint64_t enough = 24 * kPage;
  ToyTrace bad = good;
  bad.experts[1] = 8;
  refused(bad, Options(enough), EDGEMOE_INVALID_ARGUMENT, "selects expert 8 in layer 0");
  bad = good;
  bad.batch_of_token[0] = 1;
  refused(bad, Options(enough), EDGEMOE_INVALID_ARGUMENT, "in batch 1");
  bad = good;
  bad.layers[1].n_slices = 5;
  refused(bad, Options(enough), EDGEMOE_INVALID_ARGUMENT, "layer 1");
  bad = good;
  bad.batch_of_token.clear();
  refused(bad, Options(enough), EDGEMOE_INVALID_ARGUMENT, "trace of 0 tokens");
  refused(good, Options(kPage), EDGEMOE_BUDGET, "at least 2");
  refused(good, Options(enough, 5), EDGEMOE_INVALID_ARGUMENT, "policy of 5");
  edgemoe_replay_options o = Options(enough);
  o.disk_bytes_per_s = 0.0;
  refused(good, o, EDGEMOE_INVALID_ARGUMENT, "disk_bytes_per_s");
  o = Options(enough);
  o.recall = 1.5;
  refused(good, o, EDGEMOE_INVALID_ARGUMENT, "recall of 1.5");
}

}  // namespace
}  // namespace edgemoe::test
