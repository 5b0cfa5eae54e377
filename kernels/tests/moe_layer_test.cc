// SPDX-License-Identifier: MIT
// One session over a cache: what is read, counted, kept, and that none of it changes a bit of the results.
#include "core/moe_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "edgemoe/selection.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

edgemoe_stats StatsOf(edgemoe_runtime* runtime) {
  edgemoe_stats stats;
  edgemoe_runtime_stats(runtime, &stats);
  return stats;
}

std::set<int64_t> ResidentSlices(edgemoe_runtime* runtime) {
  std::lock_guard<std::mutex> lock(runtime->cache.mutex());
  std::set<int64_t> slices;
  for (int64_t s = 0; s < runtime->cache.file().n_slices(); ++s) {
    if (runtime->cache.Resident(s)) slices.insert(s);
  }
  return slices;
}

// Reads that take up to a millisecond, each its own time, in an order that the seed decides.
std::function<Status(int64_t, uint64_t)> UnevenReads(uint32_t seed) {
  return [seed](int64_t read_no, uint64_t offset) {
    std::mt19937 rng(seed + static_cast<uint32_t>(read_no) * 7919u + static_cast<uint32_t>(offset));
    std::this_thread::sleep_for(std::chrono::microseconds(rng() % 3 == 0 ? rng() % 1000 : 0));
    return Status();
  };
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Guards against: a hit rate in the stats that is not what happened.
TEST(MoeLayerTest, ResidentAndAbsentExpertsAreCounted) {
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(144)));
  ToySession session(runtime.get(), &model);
  std::mt19937 rng(1);
  const std::vector<float> x = RandomRows(&rng, 2, 16);
  ASSERT_EQ(session.RunLayer(0, {0, 1, 2, 3}, 1, x), EDGEMOE_OK);
  ASSERT_EQ(session.RunLayer(0, {0, 1, 2, 9}, 1, x), EDGEMOE_OK);
  ASSERT_EQ(session.RunLayer(0, {0, 1, 2, 9, 9, 8, 0, 1}, 2, x), EDGEMOE_OK);
  const edgemoe_stats stats = StatsOf(runtime.get());
  EXPECT_EQ(stats.misses, 4u + 1u + 1u);
  EXPECT_EQ(stats.hits, 3u + 4u) << "an expert counts once per layer, however many tokens chose it";
  EXPECT_EQ(stats.late_hits, 0u);
  EXPECT_EQ(stats.reads, 6u * 3u);
  EXPECT_EQ(stats.reads, static_cast<uint64_t>(model.storage().n_reads.load()));
  EXPECT_EQ(stats.evictions, 0u);
  EXPECT_EQ(stats.n_slots, 144);
  EXPECT_GE(stats.bytes_read, stats.reads * model.tensors()[0].expert_bytes);
  edgemoe_runtime_reset_stats(runtime.get());
  EXPECT_EQ(StatsOf(runtime.get()).misses + StatsOf(runtime.get()).reads, 0u);
}

// Guards against: an empty place of a choice that is read, counted, multiplied with some expert, or left as it was,
// with experts before and behind it, in tokens without any, and in a layer without any.
TEST(MoeLayerTest, EmptyPlacesAreZerosAndCostNothing) {
  Watchdog watchdog("EmptyPlacesAreZerosAndCostNothing");
  constexpr int32_t kNone = EDGEMOE_NO_EXPERT;
  ToyModel model({});
  for (int64_t n_slots : {4, 144}) {
    for (int n_threads : {1, 3}) {
      RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots)));
      ToySession session(runtime.get(), &model, n_threads);
      std::mt19937 rng(1);
      const std::vector<float> x = RandomRows(&rng, 4, 16);
      const std::vector<int32_t> ids = {5, 9, kNone, kNone, kNone, 9, kNone, 2, kNone, kNone, kNone, kNone, 0, 1, 2, 3};
      ASSERT_EQ(session.RunLayer(0, ids, 4, x), EDGEMOE_OK) << session.error().message;
      EXPECT_TRUE(SameBits(session.y(), model.Reference(0, ids, 4, x))) << n_slots << " slots";
      edgemoe_stats stats = StatsOf(runtime.get());
      EXPECT_EQ(stats.hits + stats.misses + stats.late_hits, 6u);
      EXPECT_EQ(stats.misses, 6u);
      EXPECT_EQ(stats.reads, 6u * 3u);
      // One token, as in decoding, and then one without any.
      const std::vector<float> row(x.begin(), x.begin() + 16);
      for (const std::vector<int32_t>& one :
           {std::vector<int32_t>{7, kNone, kNone, kNone}, std::vector<int32_t>{kNone, kNone, kNone, kNone}}) {
        ASSERT_EQ(session.RunLayer(1, one, 1, row), EDGEMOE_OK) << session.error().message;
        EXPECT_TRUE(SameBits(session.y(), model.Reference(1, one, 1, row)));
      }
      stats = StatsOf(runtime.get());
      EXPECT_EQ(stats.misses, 7u);
      EXPECT_EQ(stats.reads, 7u * 3u);
    }
  }
}

// Guards against: two sessions that read one expert twice, or count what is under way as absent.
TEST(MoeLayerTest, ExpertStillLoadingIsALateHitAndIsNotReadAgain) {
  Watchdog watchdog("ExpertStillLoadingIsALateHitAndIsNotReadAgain");
  ToyModel model({});
  ReadGate gate;
  model.storage().on_read = [&](int64_t, uint64_t) {
    gate.Wait();
    return Status();
  };
  RuntimePtr runtime(model.Open(model.SlotsBytes(144), 12));
  std::mt19937 rng(1);
  const std::vector<float> x = RandomRows(&rng, 1, 16);
  std::thread first([&] {
    ToySession session(runtime.get(), &model);
    EXPECT_EQ(session.RunLayer(0, {0, 1, 2, 3}, 1, x), EDGEMOE_OK);
  });
  gate.AwaitArrivals(12);
  ToySession session(runtime.get(), &model);
  ASSERT_EQ(session.Begin(0, {3, 2}, 1), EDGEMOE_OK);
  EXPECT_EQ(StatsOf(runtime.get()).late_hits, 2u);
  EXPECT_EQ(StatsOf(runtime.get()).misses, 4u);
  gate.Open();
  ASSERT_EQ(session.MultiplyGateUp(x), EDGEMOE_OK);
  ASSERT_EQ(session.MultiplyDown(), EDGEMOE_OK);
  session.End();
  first.join();
  EXPECT_TRUE(SameBits(session.y(), model.Reference(0, {3, 2}, 1, x)));
  EXPECT_EQ(model.storage().n_reads, 12);
}

// Guards against: a cache of one token's experts that still reads experts which the token before used.
TEST(MoeLayerTest, FetchesPerTokenAreAtMostTheExpertsThatChanged) {
  for (uint32_t seed = 0; seed < 6; ++seed) {
    ToyShape shape;
    shape.n_layers = 4;
    shape.n_ff = 72;  // of any size: only reads are counted
    ToyModel model(shape);
    model.storage().on_read = UnevenReads(seed);
    const int64_t cycle = 4 * 3 * shape.n_used;
    RuntimePtr runtime(model.Open(model.SlotsBytes(cycle + seed % 3 * 5), 3));
    ToySession session(runtime.get(), &model, 1 + static_cast<int>(seed % 2));
    std::mt19937 rng(seed);
    std::vector<std::vector<int32_t>> before(4);
    for (int token = 0; token < 40; ++token) {
      const int64_t reads = model.storage().n_reads;
      int64_t changed = 0;
      for (int layer = 0; layer < 4; ++layer) {
        std::vector<int32_t> ids = RandomIds(&rng, 1, 4, 16);
        // Keep a random part of the last token's choice.
        for (size_t i = 0; i < before[static_cast<size_t>(layer)].size(); ++i) {
          const int32_t kept = before[static_cast<size_t>(layer)][i];
          if (rng() % 3 != 0 && std::find(ids.begin(), ids.end(), kept) == ids.end()) ids[i] = kept;
        }
        for (int32_t id : ids) {
          const auto& old = before[static_cast<size_t>(layer)];
          changed += std::find(old.begin(), old.end(), id) == old.end();
        }
        ASSERT_EQ(session.RunLayer(layer, ids, 1, RandomRows(&rng, 1, 16)), EDGEMOE_OK);
        before[static_cast<size_t>(layer)] = ids;
      }
      EXPECT_LE(model.storage().n_reads - reads, 3 * changed) << "token " << token << ", seed " << seed;
    }
  }
}

using WavesParam = std::tuple<edgemoe_eviction, int, int, bool>;  // rule, slots per class, threads, mixed classes
class WavesTest : public testing::TestWithParam<WavesParam> {};

// Guards against: a prompt whose experts do not fit reading them again for every wave, and wrong or hung waves.
TEST_P(WavesTest, EachSliceIsReadAtMostOncePerLayerAndBatch) {
  const auto [rule, n_slots, n_threads, mixed] = GetParam();
  Watchdog watchdog("EachSliceIsReadAtMostOncePerLayerAndBatch");
  ToyShape shape;
  shape.mixed = mixed;
  ToyModel model(shape);
  model.storage().on_read = UnevenReads(static_cast<uint32_t>(n_slots));
  RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots), 3, rule));
  ToySession session(runtime.get(), &model, n_threads);
  std::mt19937 rng(static_cast<uint32_t>(n_slots * 10 + n_threads));
  for (int batch = 0; batch < 12; ++batch) {
    const int n_tokens = batch % 3 == 2 ? 1 : 1 + static_cast<int>(rng() % 9);
    for (int layer = 0; layer < shape.n_layers; ++layer) {
      std::vector<int32_t> reads;
      for (int32_t t = 0; t < 9; ++t) {
        for (int e = 0; e < 16; ++e) reads.push_back(model.ReadsOf(t, e));
      }
      const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, 4, 16);
      const std::vector<float> x = RandomRows(&rng, n_tokens, 16);
      ASSERT_EQ(session.RunLayer(layer, ids, n_tokens, x), EDGEMOE_OK) << session.error().message;
      ASSERT_TRUE(SameBits(session.y(), model.Reference(layer, ids, n_tokens, x)));
      for (int32_t t = 0; t < 9; ++t) {
        for (int e = 0; e < 16; ++e) {
          ASSERT_LE(model.ReadsOf(t, e) - reads[static_cast<size_t>(t * 16 + e)], 1)
              << "tensor " << t << ", expert " << e << ", batch " << batch << ", layer " << layer;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, WavesTest,
                         testing::Combine(testing::Values(EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY,
                                                          EDGEMOE_EVICT_LEAST_STALE, EDGEMOE_EVICT_UTILITY,
                                                          EDGEMOE_EVICT_AUTO),
                                          testing::Values(2, 3, 5, 9, 20, 40), testing::Values(1, 3), testing::Bool()));

// The products of a layer whose weights stay, and their bytes then.
struct StayingWeights {
  edgemoe_kernels kernels = ToyKernels();
  int n_products = 0;
  std::vector<std::pair<const char*, std::vector<char>>> staying;

  static void Multiply(void* self, int32_t thread_idx, const edgemoe_product* p) {
    StayingWeights& s = *static_cast<StayingWeights*>(self);
    ++s.n_products;
    if (p->stays != 0) {
      const char* const w = static_cast<const char*>(p->weights);
      s.staying.emplace_back(w, std::vector<char>(w, w + static_cast<uint64_t>(p->n_rows) * p->row_bytes));
    }
    s.kernels.multiply(s.kernels.context, thread_idx, p);
  }
};

// Guards against: weights said to stay whose slot is given away before the layer ends; those of resident experts not
// said to stay, which the ONNX Runtime plug-in then copies.
TEST(MoeLayerTest, WeightsThatStayDo) {
  for (const int64_t n_slots : {5, 9, 144}) {
    ToyModel model({});
    RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots)));
    StayingWeights seen;
    edgemoe_kernels kernels = SerialToyKernels();
    kernels.context = &seen;
    kernels.multiply = StayingWeights::Multiply;
    ToySession session(runtime.get(), &model, 1, kernels);
    std::mt19937 rng(1);
    const std::vector<float> x = RandomRows(&rng, 1, 16);
    for (int run = 0; run < 3; ++run) {
      seen.n_products = 0;
      seen.staying.clear();
      ASSERT_EQ(session.Begin(0, {0, 1, 2, 3}, 1), EDGEMOE_OK);
      ASSERT_EQ(session.MultiplyGateUp(x), EDGEMOE_OK);
      ASSERT_EQ(session.MultiplyDown(), EDGEMOE_OK);
      for (const auto& [weights, bytes] : seen.staying) {
        EXPECT_EQ(std::memcmp(weights, bytes.data(), bytes.size()), 0) << n_slots << " slots, run " << run;
      }
      session.End();
      const size_t n_staying = seen.staying.size();
      if (run == 0) {
        EXPECT_EQ(n_staying, 0u) << "all were absent";
      } else if (n_slots == 144) {
        EXPECT_EQ(n_staying, static_cast<size_t>(seen.n_products));
      } else {
        EXPECT_LT(n_staying, static_cast<size_t>(seen.n_products));
      }
    }
  }
}

// Guards against: a slice that was used and evicted in this layer read ahead once more, when another session lets a
// slot go.
TEST(MoeLayerTest, ProductsAtHandAreNotReadAhead) {
  Watchdog watchdog("ProductsAtHandAreNotReadAhead");
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(4), 3));
  ToySession session(runtime.get(), &model);
  std::mt19937 rng(1);
  const std::vector<float> x = RandomRows(&rng, 1, 16);
  const int64_t other = model.Down(2) * 16;  // an old slice that somebody else holds at first
  {
    std::unique_lock<std::mutex> lock(runtime->cache.mutex());
    runtime->cache.AdvanceClock(10);
    ASSERT_EQ(runtime->cache.Acquire(other), Acquired::kStarted);
    while (!runtime->cache.Resident(other)) runtime->cache.WaitForEvent(&lock);
  }
  ReadGate gate;
  model.storage().on_read = [&](int64_t read_no, uint64_t) {
    if (read_no >= 6) gate.Wait();  // 1 to 8: gate and up of four experts
    return Status();
  };
  ASSERT_EQ(session.Begin(0, {0, 1, 2, 3}, 1), EDGEMOE_OK);
  std::thread release([&] {
    gate.AwaitArrivals(3);
    {
      std::lock_guard<std::mutex> lock(runtime->cache.mutex());
      runtime->cache.Release(other);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    gate.Open();
  });
  ASSERT_EQ(session.MultiplyGateUp(x), EDGEMOE_OK);
  release.join();
  ASSERT_EQ(session.MultiplyDown(), EDGEMOE_OK);
  session.End();
  for (int32_t t = 0; t < 3; ++t) {
    for (int e = 0; e < 4; ++e) EXPECT_EQ(model.ReadsOf(t, e), 1) << "tensor " << t << ", expert " << e;
  }
}

// Guards against: residency that differs from LRU over experts by passes of their layers, whatever the machinery behind
// it.
TEST(MoeLayerTest, DecodeLeavesWhatAnLruOfExpertsWouldLeave) {
  ToyShape shape;
  shape.n_ff = 72;
  shape.n_used = 1;
  ToyModel model(shape);
  for (size_t n_experts_held : {1, 4, 7, 20}) {
    RuntimePtr runtime(model.Open(model.SlotsBytes(static_cast<int64_t>(3 * n_experts_held))));
    ToySession session(runtime.get(), &model);
    std::mt19937 rng(static_cast<uint32_t>(n_experts_held));
    std::map<std::pair<int, int32_t>, int> last_use;  // of (layer, expert), in steps
    for (int step = 0; step < 300; ++step) {
      const int layer = step % 3;
      const int32_t expert = static_cast<int32_t>(rng() % (rng() % 2 ? 4 : 16));
      ASSERT_EQ(session.RunLayer(layer, {expert}, 1, RandomRows(&rng, 1, 16)), EDGEMOE_OK);
      // Goes first: unused for most passes of its layer, and of equals what the layer that ran last holds.
      const auto order = [&](const auto& held) {
        const int layer_step = step - (layer - held.first.first + 3) % 3;
        return std::make_pair(layer_step - held.second, layer_step);
      };
      if (last_use.count({layer, expert}) == 0 && last_use.size() == n_experts_held) {
        last_use.erase(std::max_element(last_use.begin(), last_use.end(),
                                        [&](const auto& a, const auto& b) { return order(a) < order(b); }));
      }
      last_use[{layer, expert}] = step;
      std::set<int64_t> expected;
      for (const auto& [held, _] : last_use) {
        for (int64_t t = 0; t < 3; ++t) expected.insert((held.first * 3 + t) * 16 + held.second);
      }
      ASSERT_EQ(ResidentSlices(runtime.get()), expected) << "step " << step;
    }
  }
}

// Guards against: victims hotter than slices that stay, when several experts of a layer are replaced at once.
TEST(MoeLayerTest, EverySliceEvictedIsColderThanEverySliceThatStays) {
  ToyShape shape;
  shape.n_ff = 72;
  ToyModel model(shape);
  RuntimePtr runtime(model.Open(model.SlotsBytes(50)));
  ToySession session(runtime.get(), &model);
  std::mt19937 rng(3);
  std::vector<int> last_use(144, -1);
  for (int step = 0; step < 200; ++step) {
    const int layer = step % 3;
    const std::vector<int32_t> ids = RandomIds(&rng, 1, 4, 16);
    const std::set<int64_t> before = ResidentSlices(runtime.get());
    ASSERT_EQ(session.RunLayer(layer, ids, 1, RandomRows(&rng, 1, 16)), EDGEMOE_OK);
    const std::set<int64_t> after = ResidentSlices(runtime.get());
    std::set<int64_t> used;
    for (int32_t id : ids) {
      for (int64_t t = 0; t < 3; ++t) used.insert((layer * 3 + t) * 16 + id);
    }
    for (int64_t s : used) EXPECT_EQ(after.count(s), 1u) << "used just now";
    // Hotter: unused for fewer passes of its layer; of equals, what the layer holds that ran longest ago.
    const auto warmth = [&](int64_t s) {
      const int layer_step = step - (layer - static_cast<int>(s / 48) + 3) % 3;
      return std::make_pair(last_use[static_cast<size_t>(s)] - layer_step, -layer_step);
    };
    std::pair<int, int> hottest_victim = {-step - 3, 0}, coldest_survivor = {1, 0};
    size_t n_new = 0;
    for (int64_t s : before) {
      if (after.count(s) == 0) hottest_victim = std::max(hottest_victim, warmth(s));
    }
    for (int64_t s : after) {
      n_new += before.count(s) == 0;
      EXPECT_TRUE(before.count(s) == 1 || used.count(s) == 1) << "read, but not used";
      if (used.count(s) == 0) coldest_survivor = std::min(coldest_survivor, warmth(s));
    }
    EXPECT_LE(hottest_victim, coldest_survivor) << "step " << step;
    EXPECT_EQ(after.size(), std::min<size_t>(50, before.size() + n_new)) << "a slot lies idle";
    for (int64_t s : used) last_use[static_cast<size_t>(s)] = step;
  }
}

// Guards against: an answer that depends on memory, threads or the disk's timing. The first promise of all.
TEST(MoeLayerTest, ResultsDependOnNothingButTheInputs) {
  Watchdog watchdog("ResultsDependOnNothingButTheInputs", 120);
  ToyShape shape;
  shape.mixed = true;
  ToyModel model(shape);
  for (int64_t n_slots : {2, 7, 30, 144}) {
    for (int n_threads = 1; n_threads <= 4; ++n_threads) {
      model.storage().on_read = n_threads % 2 ? UnevenReads(static_cast<uint32_t>(n_slots)) : nullptr;
      RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots), n_threads));
      ToySession session(runtime.get(), &model, n_threads);
      std::mt19937 rng(7);
      for (int batch = 0; batch < 4; ++batch) {
        const int n_tokens = batch == 1 ? 40 : batch + 1;  // 40: the inputs are quantized in parallel
        for (int layer = 0; layer < 3; ++layer) {
          const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, 4, 16);
          const std::vector<float> x = RandomRows(&rng, n_tokens, 16);
          ASSERT_EQ(session.RunLayer(layer, ids, n_tokens, x), EDGEMOE_OK);
          ASSERT_TRUE(SameBits(session.y(), model.Reference(layer, ids, n_tokens, x)))
              << n_slots << " slots, " << n_threads << " threads, batch " << batch << ", layer " << layer;
        }
      }
    }
  }
}

// Guards against: results that depend on where in the list an expert stands, or on who stands beside it.
TEST(MoeLayerTest, ResultsDoNotDependOnTheOrderOfTokensOrExperts) {
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(6)));
  ToySession session(runtime.get(), &model, 2);
  std::mt19937 rng(4);
  const int n_tokens = 6;
  const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, 4, 16);
  const std::vector<float> x = RandomRows(&rng, n_tokens, 16);
  const std::vector<float> expected = model.Reference(1, ids, n_tokens, x);
  for (int round = 0; round < 10; ++round) {
    std::vector<int> token_at = {0, 1, 2, 3, 4, 5}, used_at = {0, 1, 2, 3};
    std::shuffle(token_at.begin(), token_at.end(), rng);
    std::shuffle(used_at.begin(), used_at.end(), rng);
    std::vector<int32_t> new_ids;
    std::vector<float> new_x;
    for (int t : token_at) {
      for (int u : used_at) new_ids.push_back(ids[static_cast<size_t>(t * 4 + u)]);
      new_x.insert(new_x.end(), x.begin() + t * 16, x.begin() + (t + 1) * 16);
    }
    ASSERT_EQ(session.RunLayer(1, new_ids, n_tokens, new_x), EDGEMOE_OK);
    for (int t = 0; t < n_tokens; ++t) {
      for (int u = 0; u < 4; ++u) {
        const int from = (token_at[static_cast<size_t>(t)] * 4 + used_at[static_cast<size_t>(u)]) * 16;
        ASSERT_EQ(
            std::memcmp(&session.y()[static_cast<size_t>((t * 4 + u) * 16)], &expected[static_cast<size_t>(from)], 64),
            0);
      }
    }
  }
}

// Guards against: one expert chosen twice by a token (a broken router) reading or releasing its slices twice.
TEST(MoeLayerTest, ExpertChosenTwiceByOneTokenIsComputedTwiceAndReadOnce) {
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(20)));
  ToySession session(runtime.get(), &model);
  std::mt19937 rng(5);
  const std::vector<float> x = RandomRows(&rng, 2, 16);
  const std::vector<int32_t> ids = {5, 5, 1, 5, 1, 1, 5, 1};
  ASSERT_EQ(session.RunLayer(2, ids, 2, x), EDGEMOE_OK);
  EXPECT_TRUE(SameBits(session.y(), model.Reference(2, ids, 2, x)));
  EXPECT_EQ(model.storage().n_reads, 6);
}

// Guards against: a selection out of range that reads another tensor's bytes, and a session unusable after it.
TEST(MoeLayerTest, ExpertOutOfRangeIsRefused) {
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(20)));
  ToySession session(runtime.get(), &model);
  std::mt19937 rng(5);
  const std::vector<float> x = RandomRows(&rng, 1, 16);
  for (int32_t bad : {-2, 16, INT32_MIN, INT32_MAX}) {
    EXPECT_EQ(session.RunLayer(0, {0, bad}, 1, x), EDGEMOE_INVALID_ARGUMENT);
    EXPECT_NE(std::string(session.error().message).find(std::to_string(bad)), std::string::npos)
        << session.error().message;
    EXPECT_EQ(session.MultiplyDown(), EDGEMOE_INVALID_ARGUMENT) << "no layer is in progress";
  }
  ASSERT_EQ(session.RunLayer(0, {0, 15}, 1, x), EDGEMOE_OK);
  EXPECT_TRUE(SameBits(session.y(), model.Reference(0, {0, 15}, 1, x)));
}

class FailedReadTest : public testing::TestWithParam<std::tuple<int, int>> {};  // slots, threads

// Guards against: one bad sector that poisons the session, leaks pins until nothing can load, or goes unnoticed.
TEST_P(FailedReadTest, FailsItsMultiplyAndNothingAfterIt) {
  const auto [n_slots, n_threads] = GetParam();
  Watchdog watchdog("FailsItsMultiplyAndNothingAfterIt");
  ToyModel model({});
  std::mt19937 rng(static_cast<uint32_t>(n_slots));
  std::atomic<int64_t> fail_at{-1};
  model.storage().on_read = [&](int64_t read_no, uint64_t) {
    return read_no == fail_at ? Status(EDGEMOE_IO, "injected") : Status();
  };
  RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots), 2));
  ToySession session(runtime.get(), &model, n_threads);
  int n_failed = 0;
  for (int round = 0; round < 60; ++round) {
    fail_at = model.storage().n_reads + static_cast<int64_t>(round == 0 ? 0 : rng() % 30);
    const int n_tokens = 1 + static_cast<int>(rng() % 4);
    const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, 4, 16);
    const std::vector<float> x = RandomRows(&rng, n_tokens, 16);
    const int32_t code = session.RunLayer(round % 3, ids, n_tokens, x);
    if (code != EDGEMOE_OK) {
      ++n_failed;
      EXPECT_EQ(code, EDGEMOE_IO);
      EXPECT_NE(session.error().message[0], '\0');
      edgemoe_error error = {};
      edgemoe_runtime_take_error(runtime.get(), &error);
      EXPECT_NE(std::string(error.message).find("injected"), std::string::npos) << error.message;
      EXPECT_NE(std::string(error.message).find("blk."), std::string::npos) << error.message;
      fail_at = -1;
      ASSERT_EQ(session.RunLayer(round % 3, ids, n_tokens, x), EDGEMOE_OK) << session.error().message;
    }
    ASSERT_TRUE(SameBits(session.y(), model.Reference(round % 3, ids, n_tokens, x)));
  }
  EXPECT_GT(n_failed, 0);
  // No pin and no slot was lost on the way: every slot can still be filled, and emptied.
  ASSERT_EQ(edgemoe_runtime_set_slots_bytes(runtime.get(), model.SlotsBytes(144), nullptr), EDGEMOE_OK);
  std::vector<int32_t> all(16);
  for (int e = 0; e < 16; ++e) all[static_cast<size_t>(e)] = e;
  fail_at = -1;
  for (int layer = 0; layer < 3; ++layer)
    ASSERT_EQ(session.RunLayer(layer, all, 4, RandomRows(&rng, 4, 16)), EDGEMOE_OK);
  EXPECT_EQ(ResidentSlices(runtime.get()).size(), 144u);
  ASSERT_EQ(edgemoe_runtime_set_slots_bytes(runtime.get(), model.SlotsBytes(2), nullptr), EDGEMOE_OK);
  EXPECT_EQ(ResidentSlices(runtime.get()).size(), 2u);
}

INSTANTIATE_TEST_SUITE_P(All, FailedReadTest, testing::Combine(testing::Values(2, 5, 24, 144), testing::Values(1, 3)));

// Guards against: a read that a failed call left under way, and that fails after the disk has come back, failing the
// next call too.
TEST(MoeLayerTest, ALateFailureOfAnEarlierCallIsReadAgain) {
  Watchdog watchdog("ALateFailureOfAnEarlierCallIsReadAgain");
  for (int n_threads : {1, 2}) {
    ToyModel model({});
    std::atomic<bool> open{false};
    model.storage().on_read = [&](int64_t read_no, uint64_t) {
      while (read_no == 1 && !open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return read_no <= 1 ? Status(EDGEMOE_IO, "injected") : Status();
    };
    RuntimePtr runtime(model.Open(model.SlotsBytes(24), 2));
    ToySession session(runtime.get(), &model, n_threads);
    std::mt19937 rng(7);
    const std::vector<int32_t> ids = {3, 5, 8, 11};
    const std::vector<float> x = RandomRows(&rng, 1, 16);
    ASSERT_EQ(session.RunLayer(0, ids, 1, x), EDGEMOE_IO);
    std::thread disk([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      open = true;
    });
    EXPECT_EQ(session.RunLayer(0, ids, 1, x), EDGEMOE_OK) << session.error().message;
    disk.join();
    EXPECT_TRUE(SameBits(session.y(), model.Reference(0, ids, 1, x)));
  }
}

// Guards against: a disk that fails for good hanging the process instead of failing the call.
TEST(MoeLayerTest, DeadDiskFailsEveryMultiplyAndHangsNone) {
  Watchdog watchdog("DeadDiskFailsEveryMultiplyAndHangsNone");
  ToyModel model({});
  model.storage().on_read = [](int64_t, uint64_t) { return Status(EDGEMOE_IO, "dead"); };
  RuntimePtr runtime(model.Open(model.SlotsBytes(8)));
  ToySession session(runtime.get(), &model, 3);
  std::mt19937 rng(5);
  for (int round = 0; round < 10; ++round) {
    EXPECT_EQ(session.RunLayer(round % 3, RandomIds(&rng, 3, 4, 16), 3, RandomRows(&rng, 3, 16)), EDGEMOE_IO);
  }
}

}  // namespace
}  // namespace edgemoe::test
