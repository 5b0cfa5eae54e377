// SPDX-License-Identifier: MIT
// What an earlier run leaves, read ahead: into free slots, behind everything else, and harmless when it fails.
#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <set>

#include "core/expert_cache.h"
#include "edgemoe/scheduler.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

// Without reader threads the test makes the reads, one at a time: as with one reader, one preload may be under way.
class WarmStartTest : public testing::TestWithParam<edgemoe_eviction> {
 protected:
  void Start(int64_t n_slots, int n_io_threads = 0) {
    cache_.reset();
    std::unique_ptr<ExpertFile> file;
    ASSERT_TRUE(ExpertFile::Open(model_.Options(0), model_.storage().Opener(), &file).ok());
    cache_ = std::make_unique<ExpertCache>(std::move(file), GetParam());
    ASSERT_TRUE(cache_->Start(model_.SlotsBytes(n_slots), n_io_threads).ok());
  }
  void Preload(const std::vector<int64_t>& slices) {
    ASSERT_TRUE(cache_->Preload(slices.data(), static_cast<int64_t>(slices.size())).ok());
  }
  std::optional<CacheRead> Next() {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    CacheRead read;
    return cache_->NextRead(&read) ? std::optional<CacheRead>(read) : std::nullopt;
  }
  void Finish(const CacheRead& read) {
    Status status = cache_->file().ReadSlice(read.slice, read.to);
    std::lock_guard<std::mutex> lock(cache_->mutex());
    cache_->FinishRead(read, std::move(status));
  }
  // Make all reads there are; the slices in the order in which they were read.
  std::vector<int64_t> ReadAll() {
    std::vector<int64_t> slices;
    while (const std::optional<CacheRead> read = Next()) {
      slices.push_back(read->slice);
      Finish(*read);
    }
    return slices;
  }
  void Use(int64_t slice, double time) {
    {
      std::lock_guard<std::mutex> lock(cache_->mutex());
      cache_->TouchSlice(slice, time, 1);
      ASSERT_NE(cache_->Acquire(slice), Acquired::kNoRoom);
    }
    ReadAll();
    std::lock_guard<std::mutex> lock(cache_->mutex());
    cache_->Release(slice);
  }
  Acquired Acquire(int64_t slice) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    return cache_->Acquire(slice);
  }
  bool Resident(int64_t slice) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    return cache_->Resident(slice);
  }
  bool Intact(int64_t slice) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    const edgemoe_tensor& t = model_.tensors()[static_cast<size_t>(cache_->file().TensorOf(slice))];
    const uint64_t expert = static_cast<uint64_t>(slice % model_.shape().n_experts);
    return std::memcmp(cache_->Data(slice), model_.storage().bytes.data() + t.offset + expert * t.expert_bytes,
                       t.expert_bytes) == 0;
  }

  ToyModel model_{ToyShape()};
  std::unique_ptr<ExpertCache> cache_;
};

INSTANTIATE_TEST_SUITE_P(All, WarmStartTest, testing::Values(EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY));

// Guards against: the hottest left out because colder ones took the slots, a slice read twice, a resident one evicted.
TEST_P(WarmStartTest, ReadsTheHottestFirstAndOnlyIntoFreeSlots) {
  Start(5);
  Use(9, 1.0);
  Use(10, 2.0);
  Preload({40, 9, 20, 90, 21, 22});
  EXPECT_EQ(cache_->n_preloads_left(), 6);
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{40, 20, 90}));
  EXPECT_EQ(cache_->n_preloads_left(), 0);
  for (int64_t s : {9, 10, 40, 20, 90}) EXPECT_TRUE(Resident(s) && Intact(s)) << s;
  EXPECT_EQ(cache_->counters().evictions.load(), 0u);
  Preload({50, 51});
  EXPECT_EQ(ReadAll(), std::vector<int64_t>()) << "no slot is free";
  EXPECT_EQ(cache_->n_preloads_left(), 0);
}

// Guards against: preloads of one slot size given up because another size has no free slots.
TEST_P(WarmStartTest, FullClassesDoNotEndThePreloadsOfOthers) {
  ToyShape shape;
  shape.mixed = true;  // down of layer 0 (slices 32..47) has slots of its own
  ToyModel mixed(shape);
  RuntimePtr runtime(mixed.Open(mixed.SlotsBytes(2), 1, GetParam()));
  const int64_t n_first = runtime->cache.n_slots(0);
  std::vector<int64_t> slices;
  for (int64_t s = 0; s < 32; ++s) slices.push_back(s);
  ASSERT_LT(n_first, 32);
  slices.push_back(40);
  ASSERT_TRUE(runtime->cache.Preload(slices.data(), static_cast<int64_t>(slices.size())).ok());
  Watchdog watchdog("FullClassesDoNotEndThePreloadsOfOthers");
  std::unique_lock<std::mutex> lock(runtime->cache.mutex());
  while (!runtime->cache.Resident(40)) runtime->cache.WaitForEvent(&lock);
  for (int64_t s = 0; s < 32; ++s) EXPECT_EQ(runtime->cache.Resident(s), s < n_first) << s;
}

// Guards against: a layer that waits for a queue of preloads, and preloads that share the disk with what it waits for.
TEST_P(WarmStartTest, DemandsAndHintsGoFirst) {
  Start(20);
  Preload({40, 41, 42, 43});
  const std::optional<CacheRead> first = Next();
  ASSERT_TRUE(first && first->is_preload);
  EXPECT_FALSE(Next()) << "one preload at a time for one reader";
  ASSERT_EQ(Acquire(7), Acquired::kStarted);
  ASSERT_EQ(Acquire(8), Acquired::kStarted);
  const std::optional<CacheRead> a = Next(), b = Next();
  ASSERT_TRUE(a && b);
  EXPECT_EQ(a->slice, 7);
  EXPECT_EQ(b->slice, 8);
  Finish(*first);
  EXPECT_FALSE(Next()) << "41 must wait for the demands under way";
  Finish(*a);
  EXPECT_FALSE(Next());
  {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    cache_->SetHints({60});
  }
  Finish(*b);
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{60, 41, 42, 43}));
}

// Guards against: readers that sleep while there are preloads and the disk is idle, since nothing woke them when the
// last demand was read.
TEST_P(WarmStartTest, ReadersWakeWhenTheLastDemandIsRead) {
  Watchdog watchdog("ReadersWakeWhenTheLastDemandIsRead");
  Start(100, 4);
  ReadGate demand, preloads;
  model_.storage().on_read = [&](int64_t read_no, uint64_t) {
    (read_no == 0 ? demand : preloads).Wait();
    return Status();
  };
  ASSERT_EQ(Acquire(0), Acquired::kStarted);
  demand.AwaitArrivals(1);
  Preload({60, 61, 62, 63});
  EXPECT_EQ(model_.storage().n_reads, 1);
  demand.Open();
  preloads.AwaitArrivals(2);  // half of four
  preloads.Open();
  cache_.reset();  // its readers pass the gates, which end with this test
}

// Guards against: demands that find every reader busy with preloads.
TEST_P(WarmStartTest, ReadersStayFreeForDemands) {
  Watchdog watchdog("ReadersStayFreeForDemands");
  Start(100, 2);
  ReadGate gate;
  model_.storage().on_read = [&](int64_t read_no, uint64_t) {
    if (read_no == 0) gate.Wait();
    return Status();
  };
  std::vector<int64_t> slices;
  for (int64_t s = 60; s < 100; ++s) slices.push_back(s);
  Preload(slices);
  gate.AwaitArrivals(1);  // a preload that does not end
  std::unique_lock<std::mutex> lock(cache_->mutex());
  for (int64_t s = 0; s < 10; ++s) {
    ASSERT_EQ(cache_->Acquire(s), Acquired::kStarted);
    while (!cache_->Resident(s)) cache_->WaitForEvent(&lock);
    cache_->Release(s);
  }
  lock.unlock();
  gate.Open();
  lock.lock();
  for (int64_t s : slices) {
    while (!cache_->Resident(s)) cache_->WaitForEvent(&lock);
  }
}

// Guards against: a preload that was a mistake and outlives what is used, and the hottest evicted before the coldest.
TEST_P(WarmStartTest, UnusedPreloadsAreEvictedFirstTheColdestBeforeTheHotter) {
  Start(6);
  Use(1, 0.001);  // once, at the very beginning
  Preload({70, 71, 72, 73, 74});
  ReadAll();
  Use(72, 0.002);
  const std::vector<int64_t> victims = {74, 73, 71, 70, 1, 72};
  for (size_t i = 0; i < victims.size(); ++i) {
    for (size_t j = i; j < victims.size(); ++j) EXPECT_TRUE(Resident(victims[j])) << victims[j];
    Use(100 + static_cast<int64_t>(i), 50.0 + static_cast<double>(i));
    EXPECT_FALSE(Resident(victims[i])) << victims[i];
  }
  uint64_t read_bytes = 0;
  for (int64_t s = 70; s < 75; ++s) read_bytes += cache_->file().Extent(s).length;
  EXPECT_EQ(cache_->counters().preload_bytes.load(), read_bytes);
  EXPECT_EQ(cache_->counters().preload_used_bytes.load(), cache_->file().Extent(72).length);
}

// Guards against: a hot set in the wrong order, with what is not resident in it, or counts that miss or repeat uses.
TEST_P(WarmStartTest, TellsWhatIsHotAndWhatWasUsed) {
  Start(5);
  EXPECT_EQ(cache_->HotSlices(), std::vector<int64_t>());
  for (int64_t s : {3, 4, 5}) Use(s, 1.0 + static_cast<double>(s));
  Use(4, 9.0);
  Preload({80, 81, 82});
  ReadAll();
  EXPECT_EQ(cache_->HotSlices(), (std::vector<int64_t>{4, 5, 3, 80, 81}));
  Use(6, 10.0);
  EXPECT_EQ(cache_->HotSlices().back(), 80) << "81 had to go";
  std::vector<uint64_t> expected(static_cast<size_t>(cache_->file().n_slices()));
  expected[3] = expected[5] = expected[6] = 1;
  expected[4] = 2;
  EXPECT_EQ(cache_->Uses(), expected);
}

// Guards against: a later call's hotter slices behind what an earlier one left, and heat lost by what was used before.
TEST_P(WarmStartTest, ALaterPreloadReplacesWhatIsLeft) {
  Start(30);
  Preload({10, 11, 12, 13});
  const std::optional<CacheRead> first = Next();
  ASSERT_TRUE(first);
  Preload({20, 10, 21});
  EXPECT_EQ(cache_->n_preloads_left(), 4) << "with the one being read";
  Finish(*first);
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{20, 21}));
  EXPECT_FALSE(Resident(11));
}

// Guards against: a bad block under a preload that stops the user's next call, loses the slot, or is met again and
// again.
TEST_P(WarmStartTest, AFailedPreloadIsNobodysErrorAndEndsPreloading) {
  Start(4);
  model_.storage().on_read = [&](int64_t read_no, uint64_t) {
    return read_no == 1 ? Status(EDGEMOE_IO, "bad block") : Status();
  };
  Preload({10, 11, 12});
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{10, 11}));
  EXPECT_EQ(cache_->n_preloads_left(), 0);
  EXPECT_TRUE(cache_->TakeError().ok());
  EXPECT_FALSE(Resident(11));
  for (int64_t s : {11, 30, 31}) Use(s, static_cast<double>(s));
  for (int64_t s : {10, 11, 30, 31}) EXPECT_TRUE(Resident(s) && Intact(s)) << "four slots serve: " << s;
}

// Guards against: indices of another model, which would be read out of bounds.
TEST_P(WarmStartTest, SlicesThatDoNotExistAreRefused) {
  Start(4);
  for (int64_t bad : {int64_t{-1}, int64_t{144}, INT64_MAX}) {
    const std::vector<int64_t> slices = {1, bad};
    EXPECT_EQ(cache_->Preload(slices.data(), 2).code(), EDGEMOE_INVALID_ARGUMENT);
  }
  EXPECT_EQ(ReadAll(), std::vector<int64_t>());
}

// Guards against: preloads given up because a few slots were, read over what is in use, or not resumed with more slots.
TEST_P(WarmStartTest, PreloadsThatFitSurviveResizing) {
  Start(6);
  Use(40, 1.0);
  std::vector<int64_t> slices;
  for (int64_t s = 0; s < 12; ++s) slices.push_back(s);
  Preload(slices);
  const std::optional<CacheRead> first = Next();
  ASSERT_TRUE(first.has_value());
  Finish(*first);
  ASSERT_TRUE(cache_->SetSlotsBytes(model_.SlotsBytes(5)).ok());
  EXPECT_EQ(cache_->n_preloads_left(), 11);
  EXPECT_EQ(ReadAll(), (std::vector<int64_t>{1, 2, 3})) << "slots for three more are left";
  EXPECT_TRUE(Resident(40) && Intact(40)) << "what is in use stays";
  for (int64_t s = 0; s < 4; ++s) EXPECT_TRUE(Resident(s) && Intact(s)) << s;
  EXPECT_EQ(cache_->n_preloads_left(), 0);
}

// Guards against: a preload that writes to a slot that was taken away, or that takes slots beyond a smaller budget.
TEST_P(WarmStartTest, ResizingWhilePreloading) {
  Watchdog watchdog("ResizingWhilePreloading");
  Start(40, 2);
  ReadGate gate;
  model_.storage().on_read = [&](int64_t read_no, uint64_t) {
    if (read_no == 5) gate.Wait();
    return Status();
  };
  std::vector<int64_t> slices;
  for (int64_t s = 0; s < 40; ++s) slices.push_back(s);
  Preload(slices);
  gate.AwaitArrivals(1);
  std::thread shrink([&] { EXPECT_TRUE(cache_->SetSlotsBytes(model_.SlotsBytes(3)).ok()); });
  gate.Open();
  shrink.join();
  while (cache_->n_preloads_left() > 0) std::this_thread::yield();  // none of them finds a slot
  const std::vector<int64_t> hot = cache_->HotSlices();
  EXPECT_LE(hot.size(), 3u);
  for (int64_t s : hot) EXPECT_TRUE(Intact(s)) << s;
}

// Guards against: closing a model that waits until everything is preloaded, or a thread that writes to freed memory.
TEST_P(WarmStartTest, DestructionAbandonsPreloads) {
  Watchdog watchdog("DestructionAbandonsPreloads");
  Start(64, 2);
  ReadGate gate;
  model_.storage().on_read = [&](int64_t read_no, uint64_t) {
    gate.Wait();
    // The others take 600 ms in all: time for the destructor to begin.
    if (read_no >= 2) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    return Status();
  };
  std::vector<int64_t> slices;
  for (int64_t s = 0; s < 60; ++s) slices.push_back(s);
  Preload(slices);
  gate.AwaitArrivals(1);
  std::thread opener([&] { gate.Open(); });
  cache_.reset();
  opener.join();
  EXPECT_LT(model_.storage().n_reads, 60);
}

// Guards against: bits that depend on what was preloaded, and layers that wait for slots which preloads hold.
TEST_P(WarmStartTest, LayersBesidePreloadsGiveTheSameBits) {
  Watchdog watchdog("LayersBesidePreloadsGiveTheSameBits");
  for (int64_t n_slots : {2, 5, 20, 144}) {
    RuntimePtr runtime(model_.Open(model_.SlotsBytes(n_slots), 3, GetParam()));
    ToySession session(runtime.get(), &model_, 2);
    std::mt19937 rng(static_cast<uint32_t>(n_slots));
    for (int batch = 0; batch < 12; ++batch) {
      std::vector<int64_t> slices;
      for (int i = 0; i < 30; ++i) slices.push_back(static_cast<int64_t>(rng() % 144));
      ASSERT_TRUE(runtime->cache.Preload(slices.data(), 30).ok());
      const int n_tokens = batch == 0 ? 9 : 1;
      for (int layer = 0; layer < 3; ++layer) {
        const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, 4, 16);
        const std::vector<float> x = RandomRows(&rng, n_tokens, 16);
        ASSERT_EQ(session.RunLayer(layer, ids, n_tokens, x), EDGEMOE_OK) << session.error().message;
        const std::vector<float> expected = model_.Reference(layer, ids, n_tokens, x);
        ASSERT_EQ(std::memcmp(session.y().data(), expected.data(), expected.size() * sizeof(float)), 0);
      }
    }
  }
}

// Guards against: a C caller's array overrun, and counts by another numbering than that of the tensors.
TEST_P(WarmStartTest, CApiTellsAndTakesSlicesByTheOrderOfTensors) {
  RuntimePtr runtime(model_.Open(model_.SlotsBytes(144), 2, GetParam()));
  edgemoe_error error = {};
  {
    ToySession session(runtime.get(), &model_);
    std::mt19937 rng(1);
    ASSERT_EQ(session.RunLayer(1, {5, 6, 5, 7}, 2, RandomRows(&rng, 2, 16)), EDGEMOE_OK);
  }
  std::vector<uint64_t> n_uses(144, 99);
  EXPECT_EQ(edgemoe_runtime_slice_uses(runtime.get(), n_uses.data(), 60, &error), 60);
  EXPECT_EQ(n_uses[60], 99u);
  EXPECT_EQ(edgemoe_runtime_slice_uses(runtime.get(), n_uses.data(), 144, &error), 144);
  for (int32_t tensor = 0; tensor < 9; ++tensor) {
    const uint64_t in_layer = tensor / 3 == 1 ? 1 : 0;
    EXPECT_EQ(n_uses[static_cast<size_t>(tensor * 16 + 5)], 2 * in_layer);
    EXPECT_EQ(n_uses[static_cast<size_t>(tensor * 16 + 7)], in_layer);
    EXPECT_EQ(n_uses[static_cast<size_t>(tensor * 16 + 8)], 0u);
  }
  std::vector<int64_t> hot(144, -5);
  EXPECT_EQ(edgemoe_runtime_hot_slices(runtime.get(), hot.data(), 4, &error), 4);
  EXPECT_EQ(hot[4], -5);
  EXPECT_EQ(edgemoe_runtime_hot_slices(runtime.get(), hot.data(), 144, &error), 9);
  const std::set<int64_t> expected = {53, 54, 55, 69, 70, 71, 85, 86, 87};
  EXPECT_EQ(std::set<int64_t>(hot.begin(), hot.begin() + 9), expected);
  const int64_t slices[] = {3, 144};
  EXPECT_EQ(edgemoe_runtime_preload(runtime.get(), slices, 2, &error), EDGEMOE_INVALID_ARGUMENT);
  EXPECT_EQ(edgemoe_runtime_preload(runtime.get(), slices, 1, &error), EDGEMOE_OK) << error.message;
  edgemoe_preload_stats stats;
  do {
    edgemoe_runtime_preload_stats(runtime.get(), &stats);
  } while (stats.n_left > 0);
  EXPECT_EQ(stats.n_slices, 144);
  EXPECT_EQ(stats.read_bytes, runtime->cache.file().Extent(3).length);
}

}  // namespace
}  // namespace edgemoe::test
