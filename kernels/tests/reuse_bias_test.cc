// SPDX-License-Identifier: MIT
// Which experts the choice is told to be resident. The choice itself is compared with numpy's in
// tests/unit/test_reuse.py.
#include <gtest/gtest.h>

#include "core/expert_cache.h"
#include "edgemoe/scheduler.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

// Guards against: an expert that counts as resident with one of its matrices only, one of another layer, one that was
// evicted; and one that is being read that does not count.
TEST(ReuseBiasTest, AnExpertIsResidentWhenNothingOfItHasToBeReadAnyMore) {
  ToyModel model({});
  std::unique_ptr<ExpertFile> file;
  ASSERT_TRUE(ExpertFile::Open(model.Options(0), model.storage().Opener(), &file).ok());
  ExpertCache cache(std::move(file), EDGEMOE_EVICT_LRU);
  ASSERT_TRUE(cache.Start(model.SlotsBytes(6), 0).ok());
  const int n = model.shape().n_experts;
  const auto residents = [&](int layer) {
    std::vector<uint8_t> here(static_cast<size_t>(n), 7);
    EXPECT_EQ(cache.Residents(layer, here.data(), n), n);
    std::vector<int> found;
    for (int e = 0; e < n; ++e) {
      if (here[static_cast<size_t>(e)] != 0) found.push_back(e);
    }
    return found;
  };
  double time = 0.0;
  // Begins the read, which nobody makes: the slice stays in loading, or is made if `finish`.
  const auto use = [&](int tensor_idx, int expert, bool finish) {
    const int64_t slice = static_cast<int64_t>(tensor_idx) * n + expert;
    std::unique_lock<std::mutex> lock(cache.mutex());
    cache.TouchSlice(slice, time += 1.0, 1);
    ASSERT_EQ(cache.Acquire(slice), Acquired::kStarted);
    CacheRead read;
    ASSERT_TRUE(cache.NextRead(&read));
    ASSERT_EQ(read.slice, slice);
    if (!finish) return;
    lock.unlock();
    Status status = cache.file().ReadSlice(read.slice, read.to);
    lock.lock();
    cache.FinishRead(read, std::move(status));
    cache.Release(slice);
  };
  EXPECT_TRUE(residents(0).empty());
  use(model.Gate(0), 3, true);
  use(model.Up(0), 3, true);
  EXPECT_TRUE(residents(0).empty());
  use(model.Down(0), 3, true);
  EXPECT_EQ(residents(0), std::vector<int>{3});
  EXPECT_TRUE(residents(1).empty());
  use(model.Gate(0), 5, true);
  use(model.Up(0), 5, true);
  use(model.Down(0), 5, false);
  EXPECT_EQ(residents(0), (std::vector<int>{3, 5}));
  use(model.Gate(1), 0, true);  // the sixth slot was the last: something of expert 3 goes
  EXPECT_EQ(residents(0), std::vector<int>{5});
  std::vector<uint8_t> here(static_cast<size_t>(n), 7);
  EXPECT_EQ(cache.Residents(9, here.data(), n), 0);
  EXPECT_EQ(cache.Residents(0, here.data(), n - 1), n);
  EXPECT_EQ(here[0], 7) << "written for another number of experts than there are";
}

}  // namespace
}  // namespace edgemoe::test
