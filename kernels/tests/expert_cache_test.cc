// SPDX-License-Identifier: MIT
#include "core/expert_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "tests/eviction_oracle.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

class ExpertCacheTest : public testing::Test {
 protected:
  void Start(int64_t n_slots, edgemoe_eviction rule = EDGEMOE_EVICT_LRU, int n_io_threads = 2) {
    cache_.reset();
    std::unique_ptr<ExpertFile> file;
    ASSERT_TRUE(ExpertFile::Open(model_.Options(0), model_.storage().Opener(), &file).ok());
    cache_ = std::make_unique<ExpertCache>(std::move(file), rule);
    ASSERT_TRUE(cache_->Start(model_.SlotsBytes(n_slots), n_io_threads).ok());
  }
  Acquired Acquire(int64_t slice) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    return cache_->Acquire(slice);
  }
  void Release(int64_t slice) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    cache_->Release(slice);
  }
  bool Resident(int64_t slice) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    return cache_->Resident(slice);
  }
  // Wait for a read to end; true when the slice is resident then.
  bool Await(int64_t slice) {
    std::unique_lock<std::mutex> lock(cache_->mutex());
    while (!cache_->Resident(slice) && !cache_->Absent(slice)) cache_->WaitForEvent(&lock);
    return cache_->Resident(slice);
  }
  // Touch, acquire, load and release.
  bool Use(int64_t slice, double time, int n_uses = 1) {
    {
      std::lock_guard<std::mutex> lock(cache_->mutex());
      cache_->TouchSlice(slice, time, n_uses);
      if (cache_->Acquire(slice) == Acquired::kNoRoom) return false;
    }
    const bool ok = Await(slice);
    Release(slice);
    return ok;
  }
  bool Intact(int64_t slice) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    const edgemoe_tensor& t = model_.tensors()[static_cast<size_t>(cache_->file().TensorOf(slice))];
    const uint64_t expert = static_cast<uint64_t>(slice % model_.shape().n_experts);
    return std::memcmp(cache_->Data(slice), model_.storage().bytes.data() + t.offset + expert * t.expert_bytes,
                       t.expert_bytes) == 0;
  }
  std::set<int64_t> ResidentSlices() {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    std::set<int64_t> slices;
    for (int64_t s = 0; s < cache_->file().n_slices(); ++s) {
      if (cache_->Resident(s)) slices.insert(s);
    }
    return slices;
  }

  ToyModel model_{ToyShape()};
  std::unique_ptr<ExpertCache> cache_;
};

// Guards against: weights replaced by another expert's in the middle of a product.
TEST_F(ExpertCacheTest, PinnedSliceIsNeverEvicted) {
  Start(4);
  ASSERT_EQ(Acquire(7), Acquired::kStarted);
  ASSERT_EQ(Acquire(8), Acquired::kStarted);
  ASSERT_TRUE(Await(7) && Await(8));
  const char* const data = cache_->Data(7);
  for (int64_t s = 20; s < 140; ++s) ASSERT_TRUE(Use(s, static_cast<double>(s)));
  EXPECT_TRUE(Resident(7) && Resident(8));
  EXPECT_EQ(cache_->Data(7), data);
  EXPECT_TRUE(Intact(7) && Intact(8));
  Release(7);
  for (int64_t s = 20; s < 30; ++s) ASSERT_TRUE(Use(s, static_cast<double>(200 + s)));
  EXPECT_FALSE(Resident(7)) << "released, and colder than all others";
  EXPECT_TRUE(Resident(8));
  Release(8);
}

// Guards against: a pin lost when two users hold one slice and the first lets go.
TEST_F(ExpertCacheTest, SliceStaysPinnedUntilItsLastRelease) {
  Start(2);
  Acquire(0);
  ASSERT_TRUE(Await(0));
  EXPECT_EQ(Acquire(0), Acquired::kResident);
  Release(0);
  ASSERT_TRUE(Use(1, 1.0) && Use(2, 2.0));
  EXPECT_TRUE(Resident(0));
  Release(0);
}

// Guards against: a prompt that drops what its later layers are about to use, and with it half of a later turn's time;
// an order of eviction that stays upside down when the prompt has ended.
TEST_F(ExpertCacheTest, AScanEvictsWhatItHasPassedBeforeWhatLiesAhead) {
  Start(6);
  for (int64_t s = 0; s < 6; ++s) ASSERT_TRUE(Use(s, static_cast<double>(s)));
  const auto use_in_batch = [&](int64_t slice, double time) {
    ASSERT_TRUE(Use(slice, time));
    std::lock_guard<std::mutex> lock(cache_->mutex());
    cache_->Pass(slice);
  };
  double time = cache_->AdvanceClock(64) + 100.0;
  for (int64_t s : {4, 5, 10, 11}) use_in_batch(s, time + 0.01 * static_cast<double>(s));
  // 10 took the oldest's slot, as nothing was passed with it but what is hotter than 4; 11 the coldest passed.
  EXPECT_EQ(ResidentSlices(), (std::set<int64_t>{0, 1, 2, 3, 10, 11}));
  {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    EXPECT_TRUE(cache_->ReadAhead(20)) << "over what was passed, though the batch has used it";
  }
  ASSERT_TRUE(Await(20));
  EXPECT_EQ(ResidentSlices(), (std::set<int64_t>{0, 1, 2, 3, 11, 20}));
  // A token of decode: by age again.
  time = cache_->AdvanceClock(1) + 200.0;
  use_in_batch(30, time);
  use_in_batch(31, time + 0.01);
  EXPECT_TRUE(Resident(11)) << "the newest";
  EXPECT_FALSE(Resident(0)) << "the oldest";
}

// Guards against: a slot taken from a slice in use when all are in use.
TEST_F(ExpertCacheTest, AcquireFindsNoRoomWhenEverySlotIsPinned) {
  Start(2);
  Acquire(0);
  Acquire(1);
  ASSERT_TRUE(Await(0) && Await(1));
  EXPECT_EQ(Acquire(2), Acquired::kNoRoom);
  {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    EXPECT_FALSE(cache_->ReadAhead(2));
  }
  Release(1);
  EXPECT_EQ(Acquire(2), Acquired::kStarted);
  ASSERT_TRUE(Await(2));
  EXPECT_TRUE(Intact(0) && Intact(2));
  Release(0);
  Release(2);
}

// Guards against: a read-ahead that throws out what the layer in progress is about to use.
TEST_F(ExpertCacheTest, ReadAheadTakesNoSlotOfWhatALayerInProgressAskedFor) {
  Start(2);
  ASSERT_TRUE(Use(0, 1.0) && Use(1, 2.0));
  std::unique_lock<std::mutex> lock(cache_->mutex());
  cache_->BeginLayer(&lock);
  const double time = cache_->AdvanceClock(1) + 10.0;
  cache_->EnterLayer(0, time, 1);
  cache_->TouchSlice(1, time, 1);
  EXPECT_TRUE(cache_->ReadAhead(2));
  EXPECT_TRUE(cache_->Absent(0));
  while (!cache_->Resident(2)) cache_->WaitForEvent(&lock);
  cache_->TouchSlice(2, time, 1);
  EXPECT_FALSE(cache_->ReadAhead(3)) << "both are needed now";
  cache_->EndLayer(0);
  EXPECT_TRUE(cache_->ReadAhead(3)) << "the layer has ended";
  while (!cache_->Resident(3)) cache_->WaitForEvent(&lock);
}

// A cache of `n_slots` against an oracle that keeps every use and, when a slot is needed, weighs all of them.
class VictimTest : public ExpertCacheTest, public testing::WithParamInterface<edgemoe_eviction> {};

// Guards against: a heap that loses its order, so that hot slices are evicted and cold ones stay.
TEST_P(VictimTest, IsWhatTheOracleWouldEvict) {
  const size_t n_slots = 8;
  Start(n_slots, GetParam());
  std::mt19937 rng(5);
  std::map<int64_t, History> uses;
  std::set<int64_t> resident;
  double now = 0.0;
  for (int step = 0; step < 1500; ++step) {
    {
      std::lock_guard<std::mutex> lock(cache_->mutex());
      // Odd fractions, so that no two weights are equal.
      now = cache_->AdvanceClock(1 + static_cast<int64_t>(rng() % 3)) + (rng() % 1000) / 1009.0;
    }
    const int64_t slice = static_cast<int64_t>(rng() % 2 ? rng() % 6 : rng() % 40);
    const int n_uses = 1 + static_cast<int>(rng() % 3);
    if (resident.count(slice) == 0 && resident.size() == n_slots) {
      // The cache touches before it makes room, which does not change the order of the others.
      resident.erase(*std::min_element(resident.begin(), resident.end(), [&](int64_t a, int64_t b) {
        return Weight(GetParam(), uses[a], now) < Weight(GetParam(), uses[b], now);
      }));
    }
    resident.insert(slice);
    uses[slice].push_back({now, n_uses});
    ASSERT_TRUE(Use(slice, now, n_uses));
    ASSERT_EQ(ResidentSlices(), resident) << "step " << step;
  }
  EXPECT_GT(cache_->counters().evictions.load(), 300u);
}

INSTANTIATE_TEST_SUITE_P(Rules, VictimTest,
                         testing::Values(EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY, EDGEMOE_EVICT_UTILITY));

// Guards against: a slice that counts as resident although its read failed, or a slot lost with every failure.
TEST_F(ExpertCacheTest, FailedReadLeavesTheSliceAbsentAndItsSlotFree) {
  Start(2);
  model_.storage().on_read = [](int64_t read_no, uint64_t) {
    return read_no < 20 ? Status(EDGEMOE_IO, "injected") : Status();
  };
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(Use(i % 3, i));
  EXPECT_EQ(cache_->read_error().code(), EDGEMOE_IO);
  EXPECT_NE(cache_->read_error().message().find("injected"), std::string::npos);
  EXPECT_TRUE(cache_->TakeError().ok()) << "nobody needed what was not read";
  ASSERT_TRUE(Use(0, 30.0) && Use(1, 31.0));
  EXPECT_TRUE(Resident(0) && Resident(1)) << "both slots still serve";
  EXPECT_TRUE(Intact(0) && Intact(1));
}

// Guards against: slots that hold nothing a product could use, or a Multiply that waits forever for a second slot.
TEST_F(ExpertCacheTest, FewerThanTwoSlotsAreRefusedAndChangeNothing) {
  Start(6);
  ASSERT_TRUE(Use(3, 1.0));
  const Status s = cache_->SetSlotsBytes(model_.SlotsBytes(1));
  EXPECT_EQ(s.code(), EDGEMOE_BUDGET);
  int64_t n_slots = 0;
  uint64_t bytes = 0;
  cache_->SlotTotals(&n_slots, &bytes);
  EXPECT_EQ(n_slots, 6);
  EXPECT_EQ(bytes, model_.SlotsBytes(6));
  EXPECT_TRUE(Resident(3) && Intact(3));
}

// Guards against: a shrink that throws out hot experts, moves them wrongly, or keeps more than it was given.
TEST_F(ExpertCacheTest, ShrinkKeepsTheHottestAndGrowsAgain) {
  std::mt19937 rng(9);
  for (int round = 0; round < 20; ++round) {
    const int64_t before = 10 + static_cast<int64_t>(rng() % 30), after = 2 + static_cast<int64_t>(rng() % 9);
    Start(before);
    std::vector<int64_t> order;  // coldest first
    for (int64_t s = 0; s < before - static_cast<int64_t>(rng() % 3); ++s) order.push_back(s * 3 % 144);
    std::shuffle(order.begin(), order.end(), rng);
    for (size_t i = 0; i < order.size(); ++i) ASSERT_TRUE(Use(order[i], static_cast<double>(i)));
    std::vector<int64_t> uses = order;
    std::shuffle(uses.begin(), uses.end(), rng);
    for (size_t i = 0; i < uses.size(); ++i) ASSERT_TRUE(Use(uses[i], static_cast<double>(100 + i)));
    ASSERT_TRUE(cache_->SetSlotsBytes(model_.SlotsBytes(after)).ok());
    EXPECT_EQ(ResidentSlices(), std::set<int64_t>(uses.end() - after, uses.end()));
    for (int64_t s : ResidentSlices()) EXPECT_TRUE(Intact(s));
    int64_t n_slots = 0;
    uint64_t bytes = 0;
    cache_->SlotTotals(&n_slots, &bytes);
    EXPECT_EQ(bytes, model_.SlotsBytes(after));
    const int64_t reads = model_.storage().n_reads;
    for (size_t i = uses.size() - static_cast<size_t>(after); i < uses.size(); ++i) ASSERT_TRUE(Use(uses[i], 200.0));
    EXPECT_EQ(model_.storage().n_reads, reads) << "kept, and not read again";
    ASSERT_TRUE(cache_->SetSlotsBytes(model_.SlotsBytes(before)).ok());
    for (size_t i = 0; i < order.size(); ++i) ASSERT_TRUE(Use(order[i], static_cast<double>(300 + i)));
    EXPECT_EQ(ResidentSlices().size(), order.size()) << "every slot serves again";
    for (int64_t s : order) EXPECT_TRUE(Intact(s));
  }
}

// Guards against: a shrink that cuts off a slot into which a read is still writing.
TEST_F(ExpertCacheTest, ShrinkWaitsForReadsUnderWay) {
  Watchdog watchdog("ShrinkWaitsForReadsUnderWay");
  Start(12, EDGEMOE_EVICT_LRU, 4);
  ReadGate gate;
  for (int64_t s = 0; s < 8; ++s) ASSERT_TRUE(Use(s, static_cast<double>(s)));
  model_.storage().on_read = [&](int64_t, uint64_t) {
    gate.Wait();
    return Status();
  };
  for (int64_t s = 8; s < 12; ++s) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    cache_->TouchSlice(s, static_cast<double>(s), 1);
    ASSERT_TRUE(cache_->ReadAhead(s));
  }
  gate.AwaitArrivals(4);
  std::atomic<bool> done{false};
  std::thread shrink([&] {
    EXPECT_TRUE(cache_->SetSlotsBytes(model_.SlotsBytes(3)).ok());
    done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  EXPECT_FALSE(done.load());
  gate.Open();
  shrink.join();
  for (int64_t s : ResidentSlices()) EXPECT_TRUE(Intact(s));
  EXPECT_LE(ResidentSlices().size(), 3u);
  for (int64_t s = 20; s < 30; ++s) ASSERT_TRUE(Use(s, static_cast<double>(s)));
  EXPECT_EQ(ResidentSlices(), (std::set<int64_t>{27, 28, 29})) << "three slots serve, no more and no fewer";
}

// Guards against: a destructor that waits for every queued read, or returns while a thread still writes to a slot.
TEST_F(ExpertCacheTest, DestructionAbandonsQueuedReads) {
  Watchdog watchdog("DestructionAbandonsQueuedReads");
  Start(64, EDGEMOE_EVICT_LRU, 1);
  ReadGate gate;
  model_.storage().on_read = [&](int64_t, uint64_t) {
    gate.Wait();
    return Status();
  };
  for (int64_t s = 0; s < 50; ++s) {
    std::lock_guard<std::mutex> lock(cache_->mutex());
    ASSERT_TRUE(cache_->ReadAhead(s));
  }
  gate.AwaitArrivals(1);
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    gate.Open();
  });
  cache_.reset();
  opener.join();
  EXPECT_LT(model_.storage().n_reads, 50);
}

}  // namespace
}  // namespace edgemoe::test
