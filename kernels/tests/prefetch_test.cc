// SPDX-License-Identifier: MIT
// Hints in the cache, and predictions from routers. The cache has no reader threads here: the test makes the reads
// itself, one at a time, so that every order is the same in every run.
#include "core/prefetch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

class HintsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::unique_ptr<ExpertFile> file;
    ASSERT_TRUE(ExpertFile::Open(model_.Options(0), model_.storage().Opener(), &file).ok());
    cache_ = std::make_unique<ExpertCache>(std::move(file), EDGEMOE_EVICT_LRU);
    ASSERT_TRUE(cache_->Start(model_.SlotsBytes(6), 0).ok());
  }
  // The next read, finished at once; -1 when there is none to make.
  int64_t ReadOne(Status status = Status()) {
    CacheRead read;
    if (!cache_->NextRead(&read)) return -1;
    cache_->FinishRead(read, std::move(status));
    return read.slice;
  }
  std::vector<int64_t> ReadAll() {
    std::vector<int64_t> slices;
    for (int64_t s; (s = ReadOne()) >= 0;) slices.push_back(s);
    return slices;
  }
  void Use(int64_t slice, double time) {
    cache_->TouchSlice(slice, time, 1);
    ASSERT_NE(cache_->Acquire(slice), Acquired::kNoRoom);
    ReadAll();
    cache_->Release(slice);
  }
  uint64_t LengthOf(int64_t slice) const { return cache_->file().Extent(slice).length; }

  ToyModel model_{ToyShape()};
  std::unique_ptr<ExpertCache> cache_;
};

// Guards against: a layer that waits behind a read that may be for nothing.
TEST_F(HintsTest, WhatALayerWaitsForIsReadFirst) {
  cache_->SetHints({10, 11, 12});
  EXPECT_EQ(ReadOne(), 10) << "nothing else to do: the likeliest";
  ASSERT_EQ(cache_->Acquire(20), Acquired::kStarted);
  ASSERT_EQ(cache_->Acquire(21), Acquired::kStarted);
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{20, 21, 11, 12}));
}

// Guards against: all readers busy with guesses when a layer asks.
TEST_F(HintsTest, OnlyAFewHintsAreReadAtOnce) {
  cache_->SetHints({10, 11, 12});
  CacheRead first, second;
  ASSERT_TRUE(cache_->NextRead(&first));
  EXPECT_FALSE(cache_->NextRead(&second)) << "one under way is all that a cache without reader threads allows";
  cache_->Acquire(20);
  ASSERT_TRUE(cache_->NextRead(&second));
  EXPECT_EQ(second.slice, 20);
  cache_->FinishRead(first, Status());
  cache_->FinishRead(second, Status());
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{11, 12}));
}

// Guards against: a guess that throws out what the layer in progress needs, or an endless search when it needs all.
TEST_F(HintsTest, HintsTakeNoSlotOfWhatALayerInProgressAskedFor) {
  for (int64_t s = 0; s < 6; ++s) Use(s, 1.0);
  std::unique_lock<std::mutex> lock(cache_->mutex());
  cache_->BeginLayer(&lock);
  const double time = cache_->AdvanceClock(1) + 10.0;
  cache_->EnterLayer(0, time, 1);
  for (int64_t s = 2; s < 6; ++s) cache_->TouchSlice(s, time, 1);
  cache_->SetHints({50, 51, 52, 53});
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{50, 51}));
  for (int64_t s = 2; s < 6; ++s) EXPECT_TRUE(cache_->Resident(s)) << s;
  cache_->EndLayer(0);
  cache_->SetHints({50, 51, 52, 53});
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{52, 53})) << "the layer before, which comes again a token later";
}

// Guards against: reading what the next layer needs, and evicting it before that layer begins.
TEST_F(HintsTest, HintedSlicesAreEvictedLast) {
  for (int64_t s = 0; s < 6; ++s) Use(s, static_cast<double>(s));
  cache_->SetHints({0, 1});
  Use(20, 7.0);
  Use(21, 7.0);
  EXPECT_TRUE(cache_->Resident(0) && cache_->Resident(1)) << "the oldest, but hinted";
  EXPECT_TRUE(cache_->Absent(2) && cache_->Absent(3));
  cache_->SetHints({});
  Use(22, 9.0);
  EXPECT_TRUE(cache_->Absent(0)) << "no longer hinted, and the oldest again";
}

// Guards against: a deadlock at the floor, where hints protect all that could make room.
TEST_F(HintsTest, ADemandDropsHintsWhenNothingElseIsLeft) {
  for (int64_t s = 0; s < 6; ++s) Use(s, static_cast<double>(s));
  cache_->SetHints({0, 1, 2, 3, 4, 5});
  EXPECT_EQ(cache_->Acquire(20), Acquired::kStarted);
  EXPECT_TRUE(cache_->Absent(0));
  EXPECT_FALSE(cache_->Hinted(1));
}

// Guards against: hints whose slots are lost, or which are read again, when they are replaced while being read.
TEST_F(HintsTest, AReplacedHintUnderWayBecomesAnOrdinarySlice) {
  cache_->SetHints({10});
  CacheRead read;
  ASSERT_TRUE(cache_->NextRead(&read));
  cache_->SetHints({});
  cache_->FinishRead(read, Status());
  EXPECT_TRUE(cache_->Resident(10));
  for (int64_t s = 0; s < 6; ++s) Use(s, 2.0 + static_cast<double>(s));
  EXPECT_TRUE(cache_->Absent(10)) << "never used, so evicted first";
  EXPECT_EQ(cache_->counters().hint_wasted_bytes.load(), LengthOf(10));
}

// Guards against: statistics that call a late or useless guess a good one.
TEST_F(HintsTest, CountsUsedLateAndWastedBytes) {
  cache_->SetHints({10, 11});
  EXPECT_EQ(ReadOne(), 10);
  CacheRead read;
  ASSERT_TRUE(cache_->NextRead(&read));
  cache_->TouchSlice(10, 2.0, 1);
  cache_->TouchSlice(11, 2.0, 1);
  cache_->TouchSlice(11, 2.5, 1);
  cache_->FinishRead(read, Status());
  const CacheCounters& c = cache_->counters();
  EXPECT_EQ(c.hint_used_bytes.load(), LengthOf(10));
  EXPECT_EQ(c.hint_late_bytes.load(), LengthOf(11));
  EXPECT_EQ(c.hint_wasted_bytes.load(), 0u);
}

// Guards against: a controller that is told other needs of the same tokens, depending on what was foreseen of them.
TEST_F(HintsTest, NeededBytesAreTheSameWithAndWithoutHints) {
  cache_->SetHints({10, 11, 12});
  EXPECT_EQ(ReadOne(), 10);
  CacheRead read;
  ASSERT_TRUE(cache_->NextRead(&read));
  ASSERT_EQ(read.slice, 11);
  EXPECT_EQ(cache_->needed_bytes(), 0u) << "nobody has asked yet";
  cache_->TouchSlice(10, 1.0, 1);  // read in time
  cache_->TouchSlice(11, 1.0, 1);  // late
  cache_->TouchSlice(13, 1.0, 1);  // not foreseen
  EXPECT_EQ(cache_->needed_bytes(), LengthOf(10) + LengthOf(11) + LengthOf(13));
  cache_->FinishRead(read, Status());
  cache_->TouchSlice(10, 2.0, 1);
  cache_->TouchSlice(11, 2.0, 1);
  EXPECT_EQ(cache_->needed_bytes(), LengthOf(10) + LengthOf(11) + LengthOf(13)) << "resident from the token before";
}

// Guards against: a guess whose read fails and takes a slot, or an error, with it.
TEST_F(HintsTest, AFailedHintLeavesTheSliceAbsentAndItsSlotFree) {
  cache_->SetHints({10});
  EXPECT_EQ(ReadOne(Status(EDGEMOE_IO, "no such luck")), 10);
  EXPECT_TRUE(cache_->Absent(10));
  EXPECT_TRUE(cache_->TakeError().ok());
  for (int64_t s = 0; s < 6; ++s) Use(s, static_cast<double>(s));
  for (int64_t s = 0; s < 6; ++s) EXPECT_TRUE(cache_->Resident(s)) << s;
}

// Guards against: a smaller pool that waits forever for slots that hints keep.
TEST_F(HintsTest, ShrinkingDropsHints) {
  for (int64_t s = 0; s < 6; ++s) Use(s, static_cast<double>(s));
  cache_->SetHints({0, 1, 2, 3, 4, 5});
  ASSERT_TRUE(cache_->SetSlotsBytes(model_.SlotsBytes(3)).ok());
  EXPECT_TRUE(cache_->Resident(3) && cache_->Resident(4) && cache_->Resident(5));
  EXPECT_EQ(ReadOne(), -1);
}

// Guards against: slices kept, and read, for predictions that nobody makes any more: in a prompt, or switched off.
TEST_F(HintsTest, ABatchThatDoesNotLookAheadDropsThem) {
  Prefetch prefetch;
  prefetch.controller.Start(1, false);
  cache_->SetHints({10, 11});
  EXPECT_EQ(prefetch.BeginBatch(cache_.get(), 1), 1);
  EXPECT_TRUE(cache_->Hinted(10)) << "the layers of this token will replace them";
  EXPECT_EQ(prefetch.BeginBatch(cache_.get(), 64), 0);
  EXPECT_FALSE(cache_->Hinted(10));
  cache_->SetHints({10, 11});
  prefetch.controller.Start(0, false);
  EXPECT_EQ(prefetch.BeginBatch(cache_.get(), 1), 0);
  EXPECT_FALSE(cache_->Hinted(10));
  EXPECT_EQ(ReadOne(), -1);
}

// Guards against: a trial of depths that begins with the rest of a prompt, whose last layer is for its last token
// alone, and takes that for a token.
TEST_F(HintsTest, TheRestOfAPromptIsNoTokenOfDecode) {
  Prefetch prefetch;
  prefetch.controller.Start(2, true);
  prefetch.BeginBatch(cache_.get(), 64);
  EXPECT_EQ(prefetch.BeginBatch(cache_.get(), 1, true), 2);
  for (int t = 0; t < PrefetchController::kWindowTokens; ++t) {
    EXPECT_EQ(prefetch.BeginBatch(cache_.get(), 1), 2) << "token " << t << " of the first window";
  }
  EXPECT_EQ(prefetch.BeginBatch(cache_.get(), 1), 0) << "the challenger's first";
}

// Guards against: storage that idles between a prompt's layers; layers outside the graph that are read for nothing.
TEST_F(HintsTest, APromptLooksAheadToTheNextLayer) {
  Prefetch prefetch;
  ASSERT_TRUE(prefetch.Start(cache_->file(), nullptr, 0, 2, true).ok());
  const ToyShape shape;
  const int n_layers = cache_->file().tensors().back().layer + 1;
  ASSERT_GE(n_layers, 3);
  ASSERT_EQ(prefetch.BeginBatch(cache_.get(), 64), 1);
  const size_t n_experts = static_cast<size_t>(shape.n_experts);
  Foresight f;
  prefetch.ForeseePrompt(0, n_experts * 3 / 4, n_experts, nullptr, 0, 64, &f);
  ASSERT_EQ(f.n_layers, 1);
  EXPECT_EQ(f.layers[0].layer, 1);
  EXPECT_EQ(f.layers[0].experts.size(), n_experts);
  prefetch.SetHints(cache_.get(), f, false);
  const int64_t first = ReadOne();
  EXPECT_EQ(cache_->file().tensors()[static_cast<size_t>(cache_->file().TensorOf(first))].layer, 1);
  prefetch.ForeseePrompt(0, n_experts / 2, n_experts, nullptr, 0, 64, &f);
  EXPECT_EQ(f.n_layers, 0) << "half of the experts, and nothing to predict from";
  prefetch.ForeseePrompt(n_layers - 1, n_experts, n_experts, nullptr, 0, 64, &f);
  EXPECT_EQ(f.n_layers, 0) << "the last layer";
  // Layer 1 never begins: from the second batch on, layer 2 follows layer 0.
  for (int l = 0; l < n_layers; ++l) {
    std::vector<int32_t> tensors;
    for (size_t t = 0; t < cache_->file().tensors().size(); ++t) {
      if (cache_->file().tensors()[t].layer == l) tensors.push_back(static_cast<int32_t>(t));
    }
    if (l != 1) prefetch.BeginLayer(l, tensors, {}, 0);
  }
  prefetch.BeginBatch(cache_.get(), 64);
  prefetch.ForeseePrompt(0, n_experts, n_experts, nullptr, 0, 64, &f);
  ASSERT_EQ(f.n_layers, 1);
  EXPECT_EQ(f.layers[0].layer, 2);
}

struct Routers {
  explicit Routers(int n_experts, int n_layers = 3, int64_t n_cols = 96) : n_cols(n_cols), rng(7) {
    std::normal_distribution<float> normal;
    for (int l = 0; l < n_layers; ++l) {
      weights.emplace_back();
      for (int64_t i = 0; i < n_experts * n_cols; ++i) weights.back().push_back(normal(rng));
      norms.emplace_back();
      for (int64_t i = 0; i < n_cols; ++i) norms.back().push_back(0.5f + std::fabs(normal(rng)));
      biases.emplace_back();
      for (int e = 0; e < n_experts; ++e) biases.back().push_back(0.1f * normal(rng));
      list.push_back({2 * l, n_experts, n_cols, weights.back().data(), norms.back().data(), nullptr, 0, 0});
    }
  }
  // What router `to` gives to the normalized state whose product with the norm of router `from` (-1: none) is x.
  std::vector<double> Scores(int from, int to, const std::vector<float>& x) const {
    const edgemoe_router& r = list[static_cast<size_t>(to)];
    std::vector<double> scores;
    for (int e = 0; e < r.n_experts; ++e) {
      double sum = 0.0;
      for (size_t c = 0; c < x.size(); ++c) {
        const double state = from < 0 ? x[c] : x[c] / static_cast<double>(norms[static_cast<size_t>(from)][c]);
        sum += static_cast<double>(weights[static_cast<size_t>(to)][static_cast<size_t>(e) * x.size() + c]) * state *
               static_cast<double>(norms[static_cast<size_t>(to)][c]);
      }
      if (r.sigmoid) sum = 1.0 / (1.0 + std::exp(-sum));
      scores.push_back(sum + (r.bias != nullptr ? r.bias[e] : 0.0f));
    }
    return scores;
  }
  std::vector<float> State() {
    std::normal_distribution<float> normal;
    std::vector<float> x;
    for (int64_t c = 0; c < n_cols; ++c) x.push_back(normal(rng));
    return x;
  }

  const int64_t n_cols;
  std::mt19937 rng;
  std::vector<std::vector<float>> weights, norms, biases;
  std::vector<edgemoe_router> list;
};

class PredictorTest : public testing::TestWithParam<std::tuple<int, bool>> {};

// Guards against: columns scaled by the wrong norm, rows padded into the ranking, a bias before the sigmoid.
TEST_P(PredictorTest, RanksAsTheNextRouterDoes) {
  const auto [n_experts, sigmoid] = GetParam();
  Routers routers(n_experts);
  for (size_t l = 0; l < routers.list.size() && sigmoid; ++l) {
    routers.list[l].sigmoid = 1;
    routers.list[l].bias = routers.biases[l].data();
  }
  Predictor predictor;
  ASSERT_TRUE(predictor.Set(routers.list.data(), 3, 2).ok());
  Predictor::Scratch scratch;
  predictor.Reserve(&scratch);
  for (int from = -1; from < 2; ++from) {
    for (int distance = 1; distance <= 2 && from + distance < 3; ++distance) {
      const int layer = from < 0 ? Predictor::kToken : 2 * from;
      ASSERT_EQ(predictor.TargetOf(layer, distance), 2 * (from + distance));
      const std::vector<float> x = routers.State();
      const std::vector<double> scores = routers.Scores(from, from + distance, x);
      predictor.Rank(layer, distance, 4, x.data(), &scratch);
      ASSERT_EQ(scratch.order.size(), 4u);
      std::vector<double> sorted = scores;
      std::sort(sorted.rbegin(), sorted.rend());
      // 8-bit weights and activations: each within 1/254 of the largest of its block; measured: at most 0.02 of the
      // scores' spread. What is ranked r-th is no worse than the true r-th by more than that.
      const double spread = sorted.front() - sorted.back();
      for (size_t r = 0; r < 4; ++r) {
        EXPECT_GE(scores[static_cast<size_t>(scratch.order[r])], sorted[r] - 0.05 * spread) << "rank " << r;
      }
    }
  }
  EXPECT_EQ(predictor.TargetOf(2, 2), -1) << "past the last layer";
  EXPECT_EQ(predictor.TargetOf(1, 1), -1) << "no layer with a router";
}

INSTANTIATE_TEST_SUITE_P(Shapes, PredictorTest, testing::Combine(testing::Values(4, 16, 20, 64), testing::Bool()));

// Guards against: a NaN in the state that breaks the sorting.
TEST(Predictor, RanksSomethingForAStateOfNaN) {
  Routers routers(20);
  Predictor predictor;
  ASSERT_TRUE(predictor.Set(routers.list.data(), 3, 1).ok());
  Predictor::Scratch scratch;
  predictor.Reserve(&scratch);
  const std::vector<float> x(96, std::nanf(""));
  predictor.Rank(0, 1, 4, x.data(), &scratch);
  EXPECT_EQ(scratch.order, (std::vector<int32_t>{0, 1, 2, 3}));
}

// Guards against: shapes that the kernels cannot multiply, found only when they are.
TEST(Predictor, RefusesShapesThatItCannotMultiply) {
  Routers routers(8);
  const auto error_of = [&](auto change) {
    std::vector<edgemoe_router> list = routers.list;
    change(&list);
    Predictor predictor;
    return predictor.Set(list.data(), 3, 2).message();
  };
  EXPECT_NE(error_of([](auto* l) { (*l)[1].n_cols = 64; }).find("router 1 of layer 2"), std::string::npos);
  EXPECT_NE(error_of([](auto* l) { (*l)[2].layer = 2; }).find("growing layers"), std::string::npos);
  EXPECT_NE(error_of([](auto* l) { (*l)[0].n_cols = 48; }).find("multiple of 32"), std::string::npos);
  Predictor predictor;
  EXPECT_NE(predictor.Set(routers.list.data(), 3, 3).message().find("depth 3, expected 0 to 2"), std::string::npos);
}

// Guards against: a plan that reserves less than predictions take.
TEST(Predictor, BytesCoverBothDistances) {
  Routers routers(20);
  const uint64_t row = 96 / 32 * 34;
  EXPECT_EQ(Predictor::Bytes(routers.list.data(), 3, 0), 0u);
  EXPECT_EQ(Predictor::Bytes(routers.list.data(), 3, 1), 3 * 32 * row);
  EXPECT_EQ(Predictor::Bytes(routers.list.data(), 3, 2), 5 * 32 * row);
}

// Guards against: a plan that reserves less than corrections take; with 20 experts, 2 tables from layers, 2 from
// tokens.
TEST(Corrections, BytesCoverAllTables) {
  Routers routers(20);
  const uint64_t of_layer = 21 * 20 * 4, of_token = (Corrections::kTokenRows + 1) * 20 * 4;
  EXPECT_EQ(Corrections::Bytes(routers.list.data(), 3, 0), 0u);
  EXPECT_EQ(Corrections::Bytes(routers.list.data(), 3, 1), 2 * of_layer + of_token);
  EXPECT_EQ(Corrections::Bytes(routers.list.data(), 3, 2), 3 * of_layer + 2 * of_token);
}

// A layer of 16 experts, 4 chosen, whose next layer's true scores are those of its router plus `told`, for each
// expert chosen, plus noise. Returns the recall of the last `n_judged` tokens without corrections, and with those that
// were said to be the better ones.
std::pair<double, double> RecallOf(Corrections* corrections, float told, float noise, int n_tokens, int n_judged) {
  constexpr int kExperts = 16, kUsed = 4;
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> effects(kExperts, std::vector<float>(kExperts));
  for (auto& row : effects) {
    for (float& x : row) x = told * normal(rng);
  }
  double plain_right = 0.0, used_right = 0.0;
  for (int t = 0; t < n_tokens; ++t) {
    std::vector<int32_t> ids = RandomIds(&rng, 1, kUsed, kExperts);
    std::vector<float> scores(kExperts), truth(kExperts);
    for (size_t e = 0; e < kExperts; ++e) {
      scores[e] = normal(rng);
      truth[e] = scores[e] + noise * normal(rng);
      for (int32_t id : ids) truth[e] += effects[static_cast<size_t>(id)][e];
    }
    Guess guess;
    guess.layer = 0;
    guess.distance = 1;
    guess.target = 2;
    guess.chosen = ids;
    Predictor::Best(scores.data(), kExperts, kUsed, &guess.plain);
    const bool is_better = corrections->Apply(0, 1, ids.data(), kUsed, scores.data());
    Predictor::Best(scores.data(), kExperts, kUsed, &guess.corrected);
    std::vector<int32_t> best, chosen(kExperts, -1);
    Predictor::Best(truth.data(), kExperts, kUsed, &best);
    for (int32_t e : best) chosen[static_cast<size_t>(e)] = 0;
    corrections->Learn(guess, chosen);
    if (t < n_tokens - n_judged) continue;
    for (int32_t e : guess.plain) plain_right += chosen[static_cast<size_t>(e)] >= 0 ? 1.0 : 0.0;
    for (int32_t e : is_better ? guess.corrected : guess.plain) used_right += chosen[static_cast<size_t>(e)] >= 0;
  }
  return {plain_right / (kUsed * n_judged), used_right / (kUsed * n_judged)};
}

// Guards against: corrections that learn nothing, or of the wrong experts.
TEST(Corrections, LearnWhatFollowsFromAChoice) {
  Routers routers(16);
  Corrections corrections;
  corrections.Start(routers.list.data(), 3, 1);
  const auto [plain, used] = RecallOf(&corrections, 1.0f, 0.0f, 4000, 1000);
  EXPECT_LT(plain, 0.6);
  EXPECT_GT(used, plain + 0.2);
}

// Guards against: predictions that are spoilt where nothing is to be learnt.
TEST(Corrections, AreNotUsedWhereTheyDoNotHelp) {
  Routers routers(16);
  for (const float noise : {0.0f, 0.5f, 2.0f}) {
    Corrections corrections;
    corrections.Start(routers.list.data(), 3, 1);
    const auto [plain, used] = RecallOf(&corrections, 0.0f, noise, 4000, 4000);
    EXPECT_GT(used, plain - 0.01) << noise;
  }
}

// Guards against: a read or write beside a table: no expert, one of another model, a layer that nothing is known of.
TEST(Corrections, IgnoreWhatTheyDoNotKnow) {
  Routers routers(16);
  Corrections corrections;
  corrections.Start(routers.list.data(), 3, 1);
  std::vector<float> scores(16, 0.5f);
  const std::vector<float> before = scores;
  const std::vector<int32_t> ids = {-1, 99, 3};
  for (const auto& [layer, distance] : {std::pair(0, 2), {1, 1}, {4, 1}, {90, 1}, {-1, 2}}) {
    EXPECT_FALSE(corrections.Apply(layer, distance, ids.data(), 3, scores.data())) << layer << " " << distance;
    EXPECT_EQ(scores, before);
  }
  Guess guess;
  guess.layer = 0;
  guess.distance = 1;
  guess.target = 2;
  guess.chosen = ids;
  guess.corrected = {0, 1, 2, 3};
  corrections.Learn(guess, std::vector<int32_t>(4, 0));  // another number of experts
  EXPECT_FALSE(corrections.Apply(0, 1, ids.data(), 3, scores.data()));
  EXPECT_EQ(scores, before);
  corrections.Learn(guess, std::vector<int32_t>(16, -1));
  std::vector<float> spread = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  corrections.Apply(0, 1, ids.data(), 3, spread.data());
  EXPECT_LT(spread[3], 3.0f) << "named in vain";
  EXPECT_EQ(spread[4], 4.0f);
}

// Guards against: tokens that share a row more often than chance has it.
TEST(Corrections, TokensSpreadOverRows) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::vector<char> is_used(Corrections::kTokenRows);
  for (int t = 0; t < Corrections::kTokenRows; ++t) {
    std::vector<float> embedding(64);
    // As dequantized ones: few distinct numbers.
    for (float& x : embedding) x = 0.01f * std::round(3.0f * normal(rng));
    const int32_t row = Corrections::TokenRow(embedding.data(), 64);
    ASSERT_GE(row, 0);
    ASSERT_LT(row, Corrections::kTokenRows);
    is_used[static_cast<size_t>(row)] = 1;
  }
  // 1 - 1/e of all, with a spread of about 16 rows.
  EXPECT_NEAR(std::count(is_used.begin(), is_used.end(), 1), 647, 64);
}

}  // namespace
}  // namespace edgemoe::test
