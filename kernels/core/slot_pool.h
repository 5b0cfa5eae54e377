// SPDX-License-Identifier: MIT
// slot_pool.h: the memory that holds resident experts. Slots of one size form a class; each class is one range
// of addresses reserved for every slice there is, of which the first n_slots are in use, so a pool can shrink
// and grow without moving its neighbours. Memory is taken from the system when a slot is first written.
// Invariant: slots_bytes() never exceeds what Resize was given. Thread-compatible: ExpertCache locks.
#ifndef EDGEMOE_CORE_SLOT_POOL_H_
#define EDGEMOE_CORE_SLOT_POOL_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/expert_file.h"
#include "core/status.h"
#include "edgemoe/edgemoe.h"

namespace edgemoe {

// Of the memory that a slice of the model gets, what a low-bit copy gets for each of its bytes.
inline constexpr double kCopyShare = 0.2;

struct SlotClass {
  uint64_t slot_bytes = 0;
  int64_t n_slices = 0;        // slices of this size in the model
  int64_t n_cycle_slices = 0;  // of which one token uses so many; of low-bit copies, one layer of it
  int64_t n_copy_slices = 0;   // of which so many are low-bit copies
  int64_t n_slots = 0;
  char* base = nullptr;
  uint64_t reserved_bytes = 0;

  // What a slice counts when memory is divided: 1, and less where some are low-bit copies.
  double weight() const {
    const double n_full = static_cast<double>(n_slices - n_copy_slices);
    return (n_full + kCopyShare * static_cast<double>(n_copy_slices)) / static_cast<double>(n_slices);
  }
  // Slots without which a token's experts do not fit; two at least, so that one slice loads while another is used.
  int64_t n_floor_slots() const { return std::max(n_cycle_slices, std::min<int64_t>(2, n_slices)); }
};

class SlotPool {
 public:
  SlotPool() = default;
  ~SlotPool();
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  // One class per distinct slot size; class_of_tensor[i] is the class of tensor i.
  static std::vector<SlotClass> Classes(const std::vector<ExpertTensor>& tensors, std::vector<int>* class_of_tensor);
  // Give each class its floor if all of them can have it, then the same share of its other slices, where a low-bit
  // copy counts kCopyShare of a slice, then the remainder to the class that is shortest of slots.
  // Fills n_slots; returns the bytes taken, at most slots_bytes.
  static uint64_t Distribute(uint64_t slots_bytes, std::vector<SlotClass>* classes);

  Status Reserve(const std::vector<ExpertTensor>& tensors);
  const std::vector<SlotClass>& classes() const { return classes_; }
  int ClassOfTensor(int tensor_idx) const { return class_of_tensor_[static_cast<size_t>(tensor_idx)]; }
  char* SlotAddress(int class_idx, int64_t slot) const;
  void SetSlots(const std::vector<SlotClass>& classes);  // takes n_slots of each
  // Return the memory of slots [first, n_slots reserved) of a class to the system.
  void Discard(int class_idx, int64_t first_slot);
  int64_t n_slots() const;
  uint64_t slots_bytes() const;

 private:
  std::vector<SlotClass> classes_;
  std::vector<int> class_of_tensor_;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_SLOT_POOL_H_
