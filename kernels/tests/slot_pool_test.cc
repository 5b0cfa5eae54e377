// SPDX-License-Identifier: MIT
#include "core/slot_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

SlotClass Class(uint64_t slot_bytes, int64_t n_slices, int64_t n_cycle_slices = 0) {
  SlotClass c;
  c.slot_bytes = slot_bytes;
  c.n_slices = n_slices;
  c.n_cycle_slices = n_cycle_slices;
  return c;
}

uint64_t BankBytes(const std::vector<SlotClass>& classes) {
  uint64_t bytes = 0;
  for (const SlotClass& c : classes) bytes += c.slot_bytes * static_cast<uint64_t>(c.n_slices);
  return bytes;
}

uint64_t TakenBytes(const std::vector<SlotClass>& classes) {
  uint64_t bytes = 0;
  for (const SlotClass& c : classes) bytes += c.slot_bytes * static_cast<uint64_t>(c.n_slots);
  return bytes;
}

uint64_t FloorBytes(const std::vector<SlotClass>& classes) {
  uint64_t bytes = 0;
  for (const SlotClass& c : classes) bytes += c.slot_bytes * static_cast<uint64_t>(c.n_floor_slots());
  return bytes;
}

std::vector<SlotClass> RandomClasses(std::mt19937* rng) {
  std::vector<SlotClass> classes;
  const uint32_t n_classes = 1 + (*rng)() % 4;
  for (uint32_t i = 0; i < n_classes; ++i) {
    const int64_t n_slices = 1 + (*rng)() % 5000;
    classes.push_back(
        Class(4096u * (1 + (*rng)() % ((*rng)() % 2 ? 8u : 3000u)), n_slices, (*rng)() % (n_slices / 4 + 1)));
  }
  return classes;
}

// Guards against: rounding that takes a slot more than the budget pays for.
TEST(DistributeTest, NeverExceedsTheBudget) {
  std::mt19937 rng(1);
  for (int round = 0; round < 3000; ++round) {
    std::vector<SlotClass> classes = RandomClasses(&rng);
    const uint64_t bank = BankBytes(classes);
    const uint64_t budget = round % 5 == 0 ? bank - rng() % 2 : (uint64_t{rng()} << 32 | rng()) % (bank + bank / 8);
    const uint64_t taken = SlotPool::Distribute(budget, &classes);
    EXPECT_LE(taken, budget);
    EXPECT_EQ(taken, TakenBytes(classes));
    for (const SlotClass& c : classes) {
      EXPECT_GE(c.n_slots, 0);
      EXPECT_LE(c.n_slots, c.n_slices);
    }
  }
}

// Guards against: one projection starved while another keeps every expert, which makes each of its products a miss.
TEST(DistributeTest, EveryClassGetsTheSameShareOfWhatIsBeyondItsFloor) {
  std::mt19937 rng(2);
  for (int round = 0; round < 1000; ++round) {
    std::vector<SlotClass> classes = RandomClasses(&rng);
    const uint64_t floor = FloorBytes(classes), bank = BankBytes(classes);
    const uint64_t budget = (uint64_t{rng()} << 32 | rng()) % bank;
    const uint64_t paid = budget < floor ? 0 : floor;
    const double share = static_cast<double>(budget - paid) / static_cast<double>(std::max<uint64_t>(bank - paid, 1));
    SlotPool::Distribute(budget, &classes);
    for (const SlotClass& c : classes) {
      const int64_t n_floor = budget < floor ? 0 : c.n_floor_slots();
      EXPECT_GE(c.n_slots, n_floor + static_cast<int64_t>(share * static_cast<double>(c.n_slices - n_floor) - 1e-6));
    }
  }
  std::vector<SlotClass> classes = {Class(8192, 1000, 200), Class(12288, 3000, 600)};
  SlotPool::Distribute(BankBytes(classes) / 4, &classes);
  EXPECT_EQ(classes[0].n_slots, 250);
  EXPECT_EQ(classes[1].n_slots, 750);
}

// Guards against: a size that occurs in one layer only given one slot, too few to run, by a budget that is enough.
TEST(DistributeTest, BudgetOfTheFloorsGivesEveryClassItsFloor) {
  std::mt19937 rng(4);
  for (int round = 0; round < 1000; ++round) {
    std::vector<SlotClass> classes = RandomClasses(&rng);
    SlotPool::Distribute(FloorBytes(classes) + (round % 2 == 0 ? 0 : rng()), &classes);
    for (const SlotClass& c : classes) {
      EXPECT_GE(c.n_slots, c.n_cycle_slices);
      EXPECT_GE(c.n_slots, std::min<int64_t>(2, c.n_slices));
    }
  }
}

// Guards against: memory of the budget left idle while slices are absent.
TEST(DistributeTest, RemainderIsUsed) {
  std::mt19937 rng(3);
  for (int round = 0; round < 1000; ++round) {
    std::vector<SlotClass> classes = RandomClasses(&rng);
    const uint64_t budget = (uint64_t{rng()} << 32 | rng()) % (2 * BankBytes(classes));
    const uint64_t taken = SlotPool::Distribute(budget, &classes);
    for (const SlotClass& c : classes) {
      EXPECT_TRUE(c.n_slots == c.n_slices || taken + c.slot_bytes > budget) << "one more slot would have fitted";
    }
  }
}

// Guards against: a budget larger than the model taken whole.
TEST(DistributeTest, NothingIsTakenBeyondTheModel) {
  std::vector<SlotClass> classes = {Class(4096, 10), Class(8192, 3)};
  EXPECT_EQ(SlotPool::Distribute(UINT64_MAX, &classes), BankBytes(classes));
  EXPECT_EQ(SlotPool::Distribute(0, &classes), 0u);
}

// Guards against: a slot too small for the one expert of a tensor that straddles a page more than the others.
TEST(SlotBytesTest, SlotHoldsTheLongestOfATensorsExtents) {
  ExpertTensor t;
  t.n_experts = 8;
  t.expert_bytes = 4096;
  EXPECT_EQ(SlotBytes(t), 4096u);
  t.offset = 32;
  EXPECT_EQ(SlotBytes(t), 8192u);
  t.offset = 0;
  t.expert_bytes = 4097;  // the last expert begins 7 bytes into a page and ends 8 bytes into the next but one
  EXPECT_EQ(SlotBytes(t), 8192u);
  t.n_experts = 1;
  t.offset = 4095;
  t.expert_bytes = 2;
  EXPECT_EQ(SlotBytes(t), 8192u) << "two bytes on two pages";
}

// Guards against: tensors of one size in two classes, between which slots could not be lent.
TEST(SlotPoolTest, TensorsOfOneSizeShareAClass) {
  ToyModel uniform({});
  ToyShape mixed_shape;
  mixed_shape.mixed = true;
  ToyModel mixed(mixed_shape);
  std::vector<ExpertTensor> tensors;
  std::vector<int> class_of_tensor;
  ASSERT_TRUE(ExpertFile::Describe(uniform.Options(0), &tensors).ok());
  std::vector<SlotClass> classes = SlotPool::Classes(tensors, &class_of_tensor);
  ASSERT_EQ(classes.size(), 1u);
  EXPECT_EQ(classes[0].n_slices, 3 * 3 * 16);
  EXPECT_EQ(classes[0].n_cycle_slices, 3 * 3 * 4);
  ASSERT_TRUE(ExpertFile::Describe(mixed.Options(0), &tensors).ok());
  classes = SlotPool::Classes(tensors, &class_of_tensor);
  ASSERT_EQ(classes.size(), 2u);
  EXPECT_EQ(class_of_tensor, (std::vector<int>{0, 0, 1, 0, 0, 0, 0, 0, 1}));
  EXPECT_EQ(classes[1].n_slices, 2 * 16);
}

// Guards against: slots that overlap, or that lose their contents when the pool is cut to what lies before them.
TEST(SlotPoolTest, DiscardLeavesTheSlotsBeforeItAlone) {
  ToyModel model({});
  std::vector<ExpertTensor> tensors;
  ASSERT_TRUE(ExpertFile::Describe(model.Options(0), &tensors).ok());
  SlotPool pool;
  ASSERT_TRUE(pool.Reserve(tensors).ok());
  std::vector<SlotClass> classes = pool.classes();
  classes[0].n_slots = classes[0].n_slices;
  pool.SetSlots(classes);
  const uint64_t slot_bytes = classes[0].slot_bytes;
  EXPECT_EQ(pool.n_slots(), classes[0].n_slices);
  EXPECT_EQ(pool.slots_bytes(), static_cast<uint64_t>(classes[0].n_slices) * slot_bytes);
  for (int64_t slot = 0; slot < classes[0].n_slots; ++slot)
    std::memset(pool.SlotAddress(0, slot), static_cast<int>(slot + 1), slot_bytes);
  pool.Discard(0, 10);
  for (int64_t slot = 0; slot < 20; ++slot) {
    const char expected = slot < 10 ? static_cast<char>(slot + 1) : '\0';
    EXPECT_EQ(pool.SlotAddress(0, slot)[0], expected);
    EXPECT_EQ(pool.SlotAddress(0, slot)[slot_bytes - 1], expected) << "memory of slot " << slot;
  }
}

}  // namespace
}  // namespace edgemoe::test
