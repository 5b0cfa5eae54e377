// SPDX-License-Identifier: MIT
// Which experts are hinted where choosers have a say: against docs/routing.md's rules, written here from there, by sets
// and sorted keys. The cache has no reader threads: the test makes the reads itself, so every run is the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <set>

#include "core/expert_count.h"
#include "core/on_miss.h"
#include "core/prefetch.h"
#include "core/reuse_bias.h"
#include "tests/fakes.h"
#include "tests/own_model.h"

namespace edgemoe::test {
namespace {

constexpr int kExperts = 16, kUsed = 4, kCols = 64, kLayers = 3;
constexpr double kFree = 1e9;  // a bound that binds nothing

edgemoe_reuse MadeReuse(int method, double strength, int top_j, double max_mass_moved = kFree, double max_kl = kFree) {
  const edgemoe_reuse_options o = {
      sizeof(edgemoe_reuse_options), method, kLayers, kExperts, top_j, 0, strength, max_mass_moved, max_kl};
  EXPECT_TRUE(ReuseBias::Check(o).ok());
  return {ReuseBias(o)};
}

edgemoe_count MadeCount(int rule, int k, double top_p, int n_min = 1, int n_max = kUsed) {
  const std::vector<int32_t> n_of_layer(kLayers, k);
  const edgemoe_count_options o = {
      sizeof(edgemoe_count_options), rule, kLayers, kExperts, n_of_layer.data(), top_p, n_min, n_max};
  EXPECT_TRUE(ExpertCount::Check(o).ok());
  return {ExpertCount(o)};
}

edgemoe_miss MadeMiss(bool has_copies, double wait_mass, double copy_mass) {
  const edgemoe_miss_options o = {
      sizeof(edgemoe_miss_options), has_copies ? 1 : 0, kLayers, kExperts, wait_mass, copy_mass};
  EXPECT_TRUE(OnMiss::Check(o).ok());
  return {OnMiss(o)};
}

// A router that gives a state of ones these logits, to within a thousandth: blocks with one number lose nothing in 8
// bits but what their scale, a half, rounds.
struct ToldRouter {
  ToldRouter(int layer, const std::vector<double>& logits, const std::vector<float>& bias_in, bool sigmoid)
      : weights(logits.size() * kCols), bias(bias_in) {
    constexpr size_t kBlock = 32, kBlocks = kCols / kBlock;
    for (size_t i = 0; i < logits.size() * kBlocks; ++i) {
      weights[i * kBlock] = static_cast<float>(logits[i / kBlocks] / kBlocks);
    }
    router = {layer,   static_cast<int32_t>(logits.size()),  kCols,           weights.data(),
              nullptr, bias.empty() ? nullptr : bias.data(), sigmoid ? 1 : 0, 0};
  }
  std::vector<float> weights, bias;
  edgemoe_router router;
};

// One token's scores in a layer, as docs/routing.md names things: z ranks, m is the mixing weight. Scores lie at equal
// distances, so that no comparison of a rule is decided by 8 bits.
struct Scores {
  Scores(std::mt19937* rng, bool is_sigmoid, int n_experts = kExperts) : sigmoid(is_sigmoid) {
    const double offset = static_cast<double>((*rng)() % 4);  // logits that are positive: from most to few
    std::vector<int> ranks(static_cast<size_t>(n_experts)), others(ranks);
    std::iota(ranks.begin(), ranks.end(), 0);
    std::shuffle(ranks.begin(), ranks.end(), *rng);
    std::iota(others.begin(), others.end(), 0);
    std::shuffle(others.begin(), others.end(), *rng);
    for (size_t e = 0; e < ranks.size(); ++e) {
      const int rank = ranks[e];
      if (sigmoid) {
        logits.push_back(0.25 * others[e] - 1.95 - 0.5 * offset);
        m.push_back(1.0 / (1.0 + std::exp(-logits.back())));
        z.push_back(0.3 + 0.05 * rank);
        bias.push_back(static_cast<float>(z.back() - m.back()));
      } else {
        logits.push_back(0.37 * rank - 2.03 - 1.1 * offset);
        m.push_back(std::exp(logits.back()));
        z.push_back(logits.back());
      }
    }
  }
  std::vector<int> Ranked() const {
    std::vector<int> order(z.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) { return At(z, a) > At(z, b); });
    return order;
  }
  static double At(const std::vector<double>& v, int e) { return v[static_cast<size_t>(e)]; }

  bool sigmoid;
  std::vector<double> logits, z, m;
  std::vector<float> bias;
};

// The rules.
std::vector<int> WithBias(const Scores& s, int method, double strength, int k, int top_j, const std::set<int>& here) {
  const std::vector<int> order = s.Ranked();
  top_j = std::min(top_j, k);
  const int n = static_cast<int>(order.size());
  std::vector<int> others(order.begin() + top_j, order.end());
  if (method == EDGEMOE_REUSE_CACHE_PRIOR) {
    const double delta = Scores::At(s.z, order.front()) - Scores::At(s.z, order.back());
    const auto key = [&](int e) { return Scores::At(s.z, e) + strength * delta * static_cast<double>(here.count(e)); };
    std::sort(others.begin(), others.end(), [&](int a, int b) { return key(a) > key(b); });
  } else {
    int n_candidates = k + static_cast<int>(strength * (n - k));
    if (method == EDGEMOE_REUSE_CUMULATIVE) {
      const double total = std::accumulate(s.m.begin(), s.m.end(), 0.0);
      double mass = 0.0;
      for (n_candidates = 0; mass < strength * total; ++n_candidates) {
        mass += Scores::At(s.m, order[static_cast<size_t>(n_candidates)]);
      }
      n_candidates = std::max(n_candidates, k);
    }
    others.resize(static_cast<size_t>(n_candidates - top_j));
    std::stable_sort(others.begin(), others.end(), [&](int a, int b) { return here.count(a) > here.count(b); });
  }
  std::set<int> chosen(order.begin(), order.begin() + top_j);
  chosen.insert(others.begin(), others.begin() + (k - top_j));
  std::vector<int> ordered;
  std::copy_if(order.begin(), order.end(), std::back_inserter(ordered), [&](int e) { return chosen.count(e) > 0; });
  return ordered;
}

// A missing expert behind more than `wait` of the chosen's mass is left out, or its copy taken up to `copy`: as n + e.
std::vector<int> OnAMiss(const Scores& s, const std::vector<int>& chosen, double wait, double copy, bool has_copies,
                         const std::set<int>& here) {
  double total = 0.0;
  for (int e : chosen) total += Scores::At(s.m, e);
  std::vector<int> ids;
  for (int e : chosen) {
    double before = 0.0;
    for (int o : chosen) before += Scores::At(s.m, o) > Scores::At(s.m, e) ? Scores::At(s.m, o) : 0.0;
    if (here.count(e) > 0 || before <= wait * total) {
      ids.push_back(e);
    } else if (has_copies && before <= copy * total) {
      ids.push_back(static_cast<int>(s.z.size()) + e);
    }
  }
  return ids;
}

class ForeseenChoiceTest : public testing::TestWithParam<bool> {  // sigmoid
 protected:
  void SetUp() override {
    std::unique_ptr<ExpertFile> file;
    ASSERT_TRUE(ExpertFile::Open(model_.Options(0), model_.storage().Opener(), &file).ok());
    cache_ = std::make_unique<ExpertCache>(std::move(file), EDGEMOE_EVICT_LRU);
    ASSERT_TRUE(cache_->Start(model_.SlotsBytes(36), 0).ok());
  }
  int64_t ReadOne() {
    CacheRead read;
    if (!cache_->NextRead(&read)) return -1;
    cache_->FinishRead(read, cache_->file().ReadSlice(read.slice, read.to));
    return read.slice;
  }
  void Use(int64_t slice) {
    cache_->TouchSlice(slice, time_ += 1.0, 1);
    ASSERT_NE(cache_->Acquire(slice), Acquired::kNoRoom);
    while (ReadOne() >= 0) continue;
    cache_->Release(slice);
  }
  // Layer 1 with other experts resident than before, some of them by half.
  std::set<int> SetResidents() {
    cache_->SetHints({});
    std::set<int> here;
    for (int e = 0; e < kExperts; ++e) {
      for (int32_t t : {model_.Gate(2), model_.Up(2), model_.Down(2)}) Use(Slice(t, e));  // of another layer
    }
    for (int e = 0; e < kExperts; ++e) {
      const unsigned what = rng_() % 3;
      if (what == 0 || here.size() == 6) continue;
      Use(Slice(model_.Gate(1), e));
      if (what == 1) continue;
      Use(Slice(model_.Up(1), e));
      Use(Slice(model_.Down(1), e));
      here.insert(e);
    }
    return here;
  }
  int64_t Slice(int32_t tensor_idx, int e) const {
    return cache_->file().tensors()[static_cast<size_t>(tensor_idx)].first_slice + e;
  }
  // What is named of layer 1, from layer 0.
  std::vector<int> Named(const Scores& s, const edgemoe_choosers& choosers) {
    std::vector<ToldRouter> told;
    told.reserve(2);
    for (int layer : {0, 1}) told.emplace_back(layer, s.logits, s.bias, s.sigmoid);
    const edgemoe_router routers[] = {told[0].router, told[1].router};
    prefetch_ = std::make_unique<Prefetch>();
    EXPECT_TRUE(prefetch_->Start(cache_->file(), routers, 2, 1, false).ok());
    const std::vector<float> x(kCols, 1.0f);
    foresight_ = std::make_unique<Foresight>();
    prefetch_->SeeResidents(cache_.get(), 0, 1, choosers, foresight_.get());
    prefetch_->Foresee(0, 1, reinterpret_cast<const char*>(x.data()), kCols * sizeof(float), 1, {}, choosers,
                       foresight_.get());
    EXPECT_EQ(foresight_->n_layers, 1);
    EXPECT_EQ(foresight_->layers[0].layer, 1);
    return {foresight_->layers[0].experts.begin(), foresight_->layers[0].experts.end()};
  }

  ToyModel model_{ToyShape()};
  std::unique_ptr<ExpertCache> cache_;
  std::unique_ptr<Prefetch> prefetch_;
  std::unique_ptr<Foresight> foresight_;
  std::mt19937 rng_{5};
  double time_ = 0.0;
};

// Guards against: hints that name others than before where the model chooses.
TEST_P(ForeseenChoiceTest, WithoutChoosersTheBestAreNamed) {
  for (int i = 0; i < 20; ++i) {
    const Scores s(&rng_, GetParam());
    SetResidents();
    std::vector<int> best = s.Ranked();
    best.resize(kUsed);
    EXPECT_EQ(Named(s, {}), best);
  }
}

// Guards against: reading what a resident expert would be taken for; another range, top-J, mass or residency than the
// rule's.
TEST_P(ForeseenChoiceTest, ABiasNamesWhomItWouldChoose) {
  int n_other = 0;
  for (int i = 0; i < 120; ++i) {
    const Scores s(&rng_, GetParam());
    const std::set<int> here = SetResidents();
    const int method = i % 3, top_j = 1 + i / 3 % kUsed;
    const double strength = std::vector<double>{0.11, 0.37, 0.83}[static_cast<size_t>(i / 12 % 3)];
    edgemoe_reuse reuse = MadeReuse(method, strength, top_j);
    const std::vector<int> expected = WithBias(s, method, strength, kUsed, top_j, here);
    EXPECT_EQ(Named(s, {nullptr, &reuse, nullptr}), expected) << "method " << method << ", case " << i;
    std::vector<int> best = s.Ranked();
    best.resize(kUsed);
    n_other += expected != best ? 1 : 0;
    EXPECT_EQ(reuse.bias.Stats().n_selections, 0u) << "predictions are no selections";
  }
  EXPECT_GT(n_other, 30);
}

// Guards against: hints for slices that are not read, and reads of slices that are there or not needed.
TEST_P(ForeseenChoiceTest, HintsKeepResidentsAndReadTheRest) {
  for (int i = 0; i < 20; ++i) {
    const Scores s(&rng_, GetParam());
    const std::set<int> here = SetResidents();
    edgemoe_reuse reuse = MadeReuse(EDGEMOE_REUSE_CACHE_PRIOR, 0.37, 2);
    const std::vector<int> named = Named(s, {nullptr, &reuse, nullptr});
    prefetch_->SetHints(cache_.get(), *foresight_, true);
    std::set<int64_t> hinted, absent, read;
    for (int32_t t : {model_.Gate(1), model_.Up(1), model_.Down(1)}) {
      for (int e : named) {
        hinted.insert(Slice(t, e));
        if (cache_->Absent(Slice(t, e))) absent.insert(Slice(t, e));
      }
    }
    for (int64_t slice = 0; slice < cache_->file().n_slices(); ++slice) {
      EXPECT_EQ(cache_->Hinted(slice), hinted.count(slice) > 0) << "slice " << slice;
    }
    for (int64_t slice; (slice = ReadOne()) >= 0;) read.insert(slice);
    EXPECT_EQ(read, absent);
    for (int64_t slice : hinted) EXPECT_TRUE(cache_->Resident(slice));
    for (int e : here)
      EXPECT_TRUE(!cache_->Absent(Slice(model_.Up(1), e)) || hinted.count(Slice(model_.Up(1), e)) == 0);
  }
}

// Guards against: reading ahead K experts where fewer are used; masses with the bias of the selection in them.
TEST_P(ForeseenChoiceTest, ACountNamesFewer) {
  std::set<size_t> sizes;
  for (int i = 0; i < 60; ++i) {
    const Scores s(&rng_, GetParam());
    SetResidents();
    const std::vector<int> order = s.Ranked();
    double total = 0.0;
    for (int r = 0; r < kUsed; ++r) total += Scores::At(s.m, order[static_cast<size_t>(r)]);
    size_t n = 2;
    std::optional<edgemoe_count> count(MadeCount(EDGEMOE_COUNT_OF_LAYER, 2, 1.0));
    if (i % 3 == 1) {
      const double p = 0.55 + 0.01 * (i % 7);
      double mass = 0.0;
      bool is_clear = true;
      for (n = 0; mass < p * total; ++n) {
        mass += Scores::At(s.m, order[n]);
        is_clear &= std::fabs(mass - p * total) > 0.003 * total;
      }
      if (!is_clear) continue;
      count.emplace(MadeCount(EDGEMOE_COUNT_TOP_P, 0, p));
    } else if (i % 3 == 2) {
      const auto n_positive = std::count_if(s.logits.begin(), s.logits.end(), [](double l) { return l > 0.0; });
      const int n_max = 9, n_min = i % 2 == 0 ? 1 : 3;
      n = static_cast<size_t>(std::min<int64_t>(std::clamp<int64_t>(n_positive, n_min, n_max), kUsed));
      count.emplace(MadeCount(EDGEMOE_COUNT_MAP, 0, 1.0, n_min, n_max));
    }
    EXPECT_EQ(Named(s, {&*count, nullptr, nullptr}),
              std::vector<int>(order.begin(), order.begin() + static_cast<int>(n)))
        << "case " << i;
    EXPECT_EQ(count->count.stats().n_selections, 0u);
    sizes.insert(n);
  }
  EXPECT_GE(sizes.size(), 3u);
}

// Guards against: reading ahead what would be left out if it is not there.
TEST_P(ForeseenChoiceTest, WhatAMissLeavesOutIsNotNamed) {
  int n_left_out = 0;
  for (int i = 0; i < 60; ++i) {
    const Scores s(&rng_, GetParam());
    const std::set<int> here = SetResidents();
    const double wait = 0.05 + 0.1 * (i % 9);
    edgemoe_miss miss = MadeMiss(false, wait, wait);
    std::vector<int> best = s.Ranked();
    best.resize(kUsed);
    const std::vector<int> expected = OnAMiss(s, best, wait, wait, false, here);
    EXPECT_EQ(Named(s, {nullptr, nullptr, &miss}), expected) << "case " << i;
    EXPECT_EQ(miss.rule.stats().n_selections, 0u);
    n_left_out += expected.size() < kUsed ? 1 : 0;
  }
  EXPECT_GT(n_left_out, 10);
}

// Guards against: choosers asked in another order than the engine asks them.
TEST_P(ForeseenChoiceTest, AllOfThemInTheirOrder) {
  for (int i = 0; i < 30; ++i) {
    const Scores s(&rng_, GetParam());
    const std::set<int> here = SetResidents();
    edgemoe_count count = MadeCount(EDGEMOE_COUNT_OF_LAYER, 3, 1.0);
    edgemoe_reuse reuse = MadeReuse(EDGEMOE_REUSE_CACHE_PRIOR, 0.11, 1);
    edgemoe_miss miss = MadeMiss(false, 0.45, 0.45);
    const std::vector<int> biased = WithBias(s, EDGEMOE_REUSE_CACHE_PRIOR, 0.11, 3, 1, here);
    EXPECT_EQ(Named(s, {&count, &reuse, &miss}), OnAMiss(s, biased, 0.45, 0.45, false, here)) << "case " << i;
  }
}

// Guards against: reads for a choice that the guard would not allow, and a guard that takes predictions for choices.
TEST_P(ForeseenChoiceTest, TheGuardIsAskedAndNotTold) {
  const Scores s(&rng_, GetParam());
  std::vector<int> best = s.Ranked();
  best.resize(kUsed);
  std::set<int> here;
  for (std::vector<int> expected = best; expected == best;) {
    here = SetResidents();
    expected = WithBias(s, EDGEMOE_REUSE_MAX_RANK, 1.0, kUsed, 1, here);
  }
  edgemoe_reuse none = MadeReuse(EDGEMOE_REUSE_MAX_RANK, 1.0, 1, 0.0, 0.0);
  EXPECT_EQ(Named(s, {nullptr, &none, nullptr}), best) << "nothing is affordable";
  // Two of a kind, of which one foresees as well: they choose the same, and their guards are at the same strength.
  edgemoe_reuse one = MadeReuse(EDGEMOE_REUSE_MAX_RANK, 1.0, 1, 0.05, 0.05);
  edgemoe_reuse other = MadeReuse(EDGEMOE_REUSE_MAX_RANK, 1.0, 1, 0.05, 0.05);
  int n_exact = 0, n_biased = 0;
  for (int i = 0; i < 60; ++i) {
    const Scores now(&rng_, GetParam());
    std::vector<float> z(now.z.begin(), now.z.end()), m(now.m.begin(), now.m.end());
    std::vector<uint8_t> resident(kExperts);
    for (int e : here) resident[static_cast<size_t>(e)] = 1;
    const std::vector<int> foreseen = Named(now, {nullptr, &one, nullptr});
    std::vector<int32_t> orders[2];
    for (int which : {0, 1}) {
      for (int e : now.Ranked()) orders[which].push_back(e);
      const edgemoe_selection selection = {
          1, kExperts, kUsed, 0, 0, 0, z.data(), m.data(), resident.data(), orders[which].data(), nullptr};
      ASSERT_TRUE((which == 0 ? one : other).bias.Select(selection).ok());
    }
    ASSERT_EQ(orders[0], orders[1]);
    // The scores were foreseen rightly, so the choice was.
    EXPECT_EQ(foreseen, std::vector<int>(orders[0].begin(), orders[0].begin() + kUsed)) << "case " << i;
    std::vector<int> exact = now.Ranked();
    exact.resize(kUsed);
    (foreseen == exact ? n_exact : n_biased) += 1;
  }
  EXPECT_EQ(one.bias.Stats().mean_strength, other.bias.Stats().mean_strength);
  EXPECT_LT(one.bias.Stats().mean_strength, 1.0);
  EXPECT_GT(n_exact, 5);
  EXPECT_GT(n_biased, 5);
}

INSTANTIATE_TEST_SUITE_P(All, ForeseenChoiceTest, testing::Bool());

// Guards against: experts read ahead where their low-bit copies would be used, and the other way round.
TEST(ForeseenCopiesTest, TheCopyIsHintedWhereItWouldBeUsed) {
  OwnModel model({{simd::kQ4_0, 256, 256}, {simd::kQ4_0, 256, 256}}, 4096, {simd::kQ2_K, simd::kQ2_K});
  if (!model.TryToOpen().ok()) GTEST_SKIP() << "this CPU has only the portable kernels";
  std::mt19937 rng(3);
  const Scores s(&rng, false, kOwnExperts);
  const ToldRouter told(0, s.logits, {}, false);
  const std::vector<float> embedding(kCols, 3.0f);
  // Of a cold cache.
  const auto hinted = [&](double wait, double copy) {
    RuntimePtr runtime = model.Open(4);
    EXPECT_EQ(edgemoe_runtime_set_prefetch(runtime.get(), &told.router, 1, 1, 0, nullptr), EDGEMOE_OK);
    edgemoe_miss miss = MadeMiss(true, wait, copy);
    const edgemoe_choosers choosers = {nullptr, nullptr, &miss};
    edgemoe_runtime_foresee_tokens(runtime.get(), embedding.data(), 1, kCols, &choosers);
    std::set<int> ids;
    std::lock_guard<std::mutex> lock(runtime->cache.mutex());
    const auto& tensors = runtime->cache.file().tensors();
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (int e = 0; e < kOwnExperts; ++e) {
        if (runtime->cache.Hinted(tensors[t].first_slice + e)) ids.insert(t < 2 ? e : kOwnExperts + e);
      }
    }
    return ids;
  };
  const int first = s.Ranked()[0], second = s.Ranked()[1];
  // Of two, the second comes behind 1 / (1 + exp(-0.37)) = 0.59 of the mass.
  EXPECT_EQ(hinted(0.7, 1.0), (std::set<int>{first, second}));
  EXPECT_EQ(hinted(0.3, 1.0), (std::set<int>{first, kOwnExperts + second}));
  EXPECT_EQ(hinted(0.3, 0.4), (std::set<int>{first}));
}

// A model whose next router sees the state through noise, decoding with a bias and with storage that is quick enough
// for all hints: read for hints that were evicted unused, and all that was read.
struct ReadBytes {
  uint64_t wasted, all;
  double recall;
};
ReadBytes DecodedWithBias(bool foresees_bias) {
  constexpr int kTokens = 400;
  ToyModel model({});
  std::unique_ptr<ExpertFile> file;
  EXPECT_TRUE(ExpertFile::Open(model.Options(0), model.storage().Opener(), &file).ok());
  ExpertCache cache(std::move(file), EDGEMOE_EVICT_LRU);
  EXPECT_TRUE(cache.Start(model.SlotsBytes(kLayers * 3 * kExperts / 3), 0).ok());
  std::mt19937 rng(11);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> weights(kLayers);
  std::vector<edgemoe_router> routers;
  for (int l = 0; l < kLayers; ++l) {
    for (int i = 0; i < kExperts * kCols; ++i)
      weights[static_cast<size_t>(l)].push_back(normal(rng) / std::sqrt(64.0f));
    routers.push_back({l, kExperts, kCols, weights[static_cast<size_t>(l)].data(), nullptr, nullptr, 0, 0});
  }
  Prefetch prefetch;
  EXPECT_TRUE(prefetch.Start(cache.file(), routers.data(), kLayers, 1, false).ok());
  edgemoe_reuse reuse = MadeReuse(EDGEMOE_REUSE_CACHE_PRIOR, 0.5, 1, 0.2, 0.1);
  const edgemoe_choosers choosers = {nullptr, &reuse, nullptr};
  Foresight foresight;
  uint64_t n_all = 0, n_named = 0, n_right = 0;
  const auto read_all = [&] {
    for (CacheRead read; cache.NextRead(&read);) {
      n_all += cache.file().Extent(read.slice).length;
      cache.FinishRead(read, Status());
    }
  };
  std::vector<float> state(kCols), x(kCols);
  std::unique_lock<std::mutex> lock(cache.mutex());
  for (int token = 0; token < kTokens; ++token) {
    for (float& v : state) v = 0.8f * v + 0.6f * normal(rng);  // tokens resemble each other
    const double time = cache.AdvanceClock(1);
    std::vector<int32_t> named;
    for (int l = 0; l < kLayers; ++l) {
      for (size_t c = 0; c < kCols; ++c) x[c] = state[c] + 0.4f * normal(rng);
      std::vector<float> scores(kExperts);
      for (size_t e = 0; e < kExperts; ++e) {
        scores[e] = std::inner_product(
            x.begin(), x.end(), weights[static_cast<size_t>(l)].begin() + static_cast<std::ptrdiff_t>(e * kCols), 0.0f);
      }
      std::vector<int32_t> order;
      Predictor::Best(scores.data(), kExperts, kExperts, &order);
      std::vector<uint8_t> resident(kExperts);
      cache.ReadResidents(l, resident.data(), kExperts);
      const edgemoe_selection selection = {
          l, kExperts, kUsed, 0, 1, 0, scores.data(), scores.data(), resident.data(), order.data(), nullptr};
      EXPECT_TRUE(reuse.bias.Select(selection).ok());
      order.resize(kUsed);
      cache.BeginLayer(&lock);
      cache.EnterLayer(l, time, 1);
      std::vector<int32_t> chosen(kExperts, -1), tensors = {model.Gate(l), model.Up(l), model.Down(l)};
      for (int32_t e : order) {
        chosen[static_cast<size_t>(e)] = 0;
        n_right += static_cast<uint64_t>(std::count(named.begin(), named.end(), e));
        for (int32_t t : tensors) {
          const int64_t slice = cache.file().tensors()[static_cast<size_t>(t)].first_slice + e;
          cache.TouchSlice(slice, time, 1);
          EXPECT_NE(cache.Acquire(slice), Acquired::kNoRoom);
        }
      }
      n_named += named.size();
      prefetch.BeginLayer(l, tensors, chosen, kUsed);
      const edgemoe_choosers& who = foresees_bias ? choosers : edgemoe_choosers{};
      prefetch.SeeResidents(&cache, l, 1, who, &foresight);
      prefetch.Foresee(l, 1, reinterpret_cast<const char*>(x.data()), kCols * sizeof(float), 1, {}, who, &foresight);
      prefetch.SetHints(&cache, foresight, true);
      named.clear();
      if (foresight.n_layers > 0) named = foresight.layers[0].experts;
      for (int32_t e : order) {
        for (int32_t t : tensors) {
          const int64_t slice = cache.file().tensors()[static_cast<size_t>(t)].first_slice + e;
          read_all();
          cache.Release(slice);
          cache.Pass(slice);
        }
      }
      cache.EndLayer(l);
      read_all();
    }
  }
  return {cache.counters().hint_wasted_bytes.load(), n_all,
          static_cast<double>(n_right) / static_cast<double>(std::max<uint64_t>(n_named, 1))};
}

// Guards against: predictions that do not know the bias, and so read what it does not choose.
TEST(ForeseenBiasTest, LessIsReadForNothing) {
  const ReadBytes before = DecodedWithBias(false), now = DecodedWithBias(true);
  EXPECT_GT(before.wasted, 0u);
  EXPECT_LT(static_cast<double>(now.wasted), 0.2 * static_cast<double>(before.wasted));
  EXPECT_LT(static_cast<double>(now.all), 0.7 * static_cast<double>(before.all));
  EXPECT_GT(now.recall, before.recall);
}

}  // namespace
}  // namespace edgemoe::test
