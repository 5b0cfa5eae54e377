// SPDX-License-Identifier: MIT
// Several threads on one cache: sessions beside each other, sizes changed under them, reads that end in any order.
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>

#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

void ExpectSameBits(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0);
}

void RunBatches(edgemoe_runtime* runtime, ToyModel* model, uint32_t seed, int n_batches, int n_threads) {
  ToySession session(runtime, model, n_threads);
  std::mt19937 rng(seed);
  for (int batch = 0; batch < n_batches; ++batch) {
    const int n_tokens = 1 + static_cast<int>(rng() % 5);
    for (int layer = 0; layer < model->shape().n_layers; ++layer) {
      const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, 4, 16);
      const std::vector<float> x = RandomRows(&rng, n_tokens, 16);
      ASSERT_EQ(session.RunLayer(layer, ids, n_tokens, x), EDGEMOE_OK) << session.error().message;
      ExpectSameBits(session.y(), model->Reference(layer, ids, n_tokens, x));
    }
  }
}

class TwoSessionsTest : public testing::TestWithParam<std::tuple<int, bool>> {};  // slots per class, mixed classes

// Guards against: two contexts of one model that hold each other's slots and wait forever.
TEST_P(TwoSessionsTest, ShareATinyCacheWithoutDeadlock) {
  const auto [n_slots, mixed] = GetParam();
  Watchdog watchdog("ShareATinyCacheWithoutDeadlock");
  ToyShape shape;
  shape.mixed = mixed;
  shape.n_ff = 140;
  ToyModel model(shape);
  RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots), 2));
  std::thread other([&, edgemoe = runtime.get()] { RunBatches(edgemoe, &model, 1, 25, 2); });
  RunBatches(runtime.get(), &model, 2, 25, 1);
  other.join();
}

INSTANTIATE_TEST_SUITE_P(All, TwoSessionsTest, testing::Combine(testing::Values(2, 3, 12, 20), testing::Bool()));

// Guards against: a session that holds all slots of one size and waits for another size, all of which a second session
// holds while it waits for the first.
TEST(SessionsTest, EachFittingInOneClassOnlyDoNotWaitForEachOther) {
  Watchdog watchdog("EachFittingInOneClassOnlyDoNotWaitForEachOther");
  ToyShape shape;
  shape.n_layers = 2;
  shape.n_used = 2;
  shape.mixed = true;  // layer 0: gate and up of class F, down of class I; layer 1: all of class F
  ToyModel model(shape);
  std::vector<ExpertTensor> tensors;
  ASSERT_TRUE(ExpertFile::Describe(model.Options(0), &tensors).ok());
  RuntimePtr runtime(model.Open(20 * SlotBytes(tensors[0]) + 4 * SlotBytes(tensors[2])));
  ASSERT_EQ(runtime->cache.n_slots(0), 20);
  ASSERT_EQ(runtime->cache.n_slots(1), 4);
  ToySession a(runtime.get(), &model), b(runtime.get(), &model);
  std::mt19937 rng(1);
  const std::vector<float> x = RandomRows(&rng, 5, 16);
  const std::vector<int32_t> ids_a = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, ids_b = {14, 15};
  ASSERT_EQ(a.RunLayer(0, ids_a, 5, x), EDGEMOE_OK);  // fills class F with the 20 slices that a uses
  for (int32_t expert : {0, 1, 14, 15}) {             // class I: two of a's, two of b's
    std::unique_lock<std::mutex> lock(runtime->cache.mutex());
    const int64_t slice = model.Down(0) * 16 + expert;
    runtime->cache.TouchSlice(slice, 1000.0, 1);
    ASSERT_NE(runtime->cache.Acquire(slice), Acquired::kNoRoom);
    while (!runtime->cache.Resident(slice)) runtime->cache.WaitForEvent(&lock);
    runtime->cache.Release(slice);
  }
  // a fits in class F and not in I; b fits in what a leaves of I, and not in F.
  ASSERT_EQ(a.Begin(0, ids_a, 5), EDGEMOE_OK);
  ASSERT_EQ(b.Begin(0, ids_b, 1), EDGEMOE_OK);
  const auto run = [&](ToySession* session) {
    EXPECT_EQ(session->MultiplyGateUp(x), EDGEMOE_OK);
    EXPECT_EQ(session->MultiplyDown(), EDGEMOE_OK);
    session->End();
  };
  std::thread other(run, &b);
  run(&a);
  other.join();
  ExpectSameBits(a.y(), model.Reference(0, ids_a, 5, x));
  ExpectSameBits(b.y(), model.Reference(0, ids_b, 1, x));
}

// Guards against: a cache or a counter that two models in one process share by accident.
TEST(RuntimesTest, TwoRuntimesInOneProcessDoNotKnowEachOther) {
  Watchdog watchdog("TwoRuntimesInOneProcessDoNotKnowEachOther");
  ToyShape shape;
  ToyModel first(shape);
  shape.seed = 2;
  shape.mixed = true;
  ToyModel second(shape);
  RuntimePtr a(first.Open(first.SlotsBytes(5))), b(second.Open(second.SlotsBytes(9)));
  std::thread other([&] { RunBatches(b.get(), &second, 1, 10, 2); });
  RunBatches(a.get(), &first, 1, 10, 2);
  other.join();
  edgemoe_stats stats;
  edgemoe_runtime_stats(a.get(), &stats);
  EXPECT_EQ(stats.reads, static_cast<uint64_t>(first.storage().n_reads.load()));
  EXPECT_EQ(stats.n_slots, 5);
}

// Guards against: a budget cut during a layer that takes the free slots which the layer needs to end.
TEST(ResizeTest, ShrinkDuringALayerWaitsForItAndDoesNotStarveIt) {
  Watchdog watchdog("ShrinkDuringALayerWaitsForItAndDoesNotStarveIt");
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(40)));
  ToySession session(runtime.get(), &model, 2);
  std::mt19937 rng(1);
  const std::vector<float> x = RandomRows(&rng, 1, 16);
  ASSERT_EQ(session.RunLayer(0, {0, 1, 2, 3}, 1, x), EDGEMOE_OK);
  const std::vector<int32_t> ids = {0, 1, 2, 3, 4};  // twelve slices resident and pinned, three to read
  ASSERT_EQ(session.Begin(0, ids, 1), EDGEMOE_OK);
  std::atomic<bool> shrunk{false};
  std::thread shrink([&] {
    EXPECT_EQ(edgemoe_runtime_set_slots_bytes(runtime.get(), model.SlotsBytes(4), nullptr), EDGEMOE_OK);
    shrunk = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(shrunk.load()) << "twelve slices are in use";
  EXPECT_EQ(session.MultiplyGateUp(x), EDGEMOE_OK);
  EXPECT_EQ(session.MultiplyDown(), EDGEMOE_OK);
  session.End();
  shrink.join();
  ExpectSameBits(session.y(), model.Reference(0, ids, 1, x));
  edgemoe_stats stats;
  edgemoe_runtime_stats(runtime.get(), &stats);
  EXPECT_EQ(stats.n_slots, 4);
  ASSERT_EQ(session.RunLayer(0, ids, 1, x), EDGEMOE_OK);
  ExpectSameBits(session.y(), model.Reference(0, ids, 1, x));
}

// Guards against: slots lost, doubled or cut off under a layer when two threads change the size while others compute.
TEST(ResizeTest, SizesChangedWhileSessionsRunCostNeitherSlotsNorBits) {
  Watchdog watchdog("SizesChangedWhileSessionsRunCostNeitherSlotsNorBits", 120);
  ToyShape shape;
  shape.mixed = true;
  shape.n_ff = 140;
  ToyModel model(shape);
  RuntimePtr runtime(model.Open(model.SlotsBytes(12), 2));
  std::atomic<bool> stop{false};
  std::vector<std::thread> resizers;
  for (uint32_t seed : {1u, 2u}) {
    resizers.emplace_back([&, seed] {
      std::mt19937 rng(seed);
      while (!stop) {
        EXPECT_EQ(edgemoe_runtime_set_slots_bytes(runtime.get(), model.SlotsBytes(2 + rng() % 40), nullptr),
                  EDGEMOE_OK);
        std::this_thread::sleep_for(std::chrono::microseconds(rng() % 500));
      }
    });
  }
  std::thread other([&] { RunBatches(runtime.get(), &model, 1, 25, 1); });
  RunBatches(runtime.get(), &model, 2, 25, 2);
  other.join();
  stop = true;
  for (std::thread& t : resizers) t.join();
  ASSERT_EQ(edgemoe_runtime_set_slots_bytes(runtime.get(), UINT64_MAX, nullptr), EDGEMOE_OK);
  ToySession session(runtime.get(), &model);
  std::vector<int32_t> all(16);
  for (int e = 0; e < 16; ++e) all[static_cast<size_t>(e)] = e;
  std::mt19937 rng(3);
  for (int layer = 0; layer < 3; ++layer)
    ASSERT_EQ(session.RunLayer(layer, all, 4, RandomRows(&rng, 4, 16)), EDGEMOE_OK);
  edgemoe_runtime_reset_stats(runtime.get());
  for (int layer = 0; layer < 3; ++layer)
    ASSERT_EQ(session.RunLayer(layer, all, 4, RandomRows(&rng, 4, 16)), EDGEMOE_OK);
  edgemoe_stats stats;
  edgemoe_runtime_stats(runtime.get(), &stats);
  EXPECT_EQ(stats.hits, 48u) << "with a slot for every slice everything is resident";
  EXPECT_EQ(stats.n_slots, 144);
}

// Guards against: stats read by another thread (a progress display) racing with computing.
TEST(StatsTest, MayBeReadWhileComputing) {
  Watchdog watchdog("StatsMayBeReadWhileComputing");
  ToyShape shape;
  shape.n_ff = 72;
  ToyModel model(shape);
  RuntimePtr runtime(model.Open(model.SlotsBytes(9)));
  std::atomic<bool> stop{false};
  std::thread reader([&] {
    uint64_t last = 0;
    while (!stop) {
      edgemoe_stats stats;
      edgemoe_runtime_stats(runtime.get(), &stats);
      EXPECT_GE(stats.reads, last);
      last = stats.reads;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  });
  RunBatches(runtime.get(), &model, 1, 10, 2);
  stop = true;
  reader.join();
}

}  // namespace
}  // namespace edgemoe::test
