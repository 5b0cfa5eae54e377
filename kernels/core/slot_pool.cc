// SPDX-License-Identifier: MIT
#include "core/slot_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace edgemoe {
namespace {

constexpr uint64_t kHugePageBytes = 2u << 20;

// The low-bit copies that one token can ask for at once, in the layer that has the most of a class.
int64_t CopiesOfALayer(const std::vector<ExpertTensor>& tensors, const std::vector<int>& class_of_tensor,
                       int class_idx) {
  std::vector<int64_t> n_of_layer;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ExpertTensor& t = tensors[i];
    if (t.copy_of < 0 || class_of_tensor[i] != class_idx) continue;
    n_of_layer.resize(std::max(n_of_layer.size(), static_cast<size_t>(t.layer) + 1));
    n_of_layer[static_cast<size_t>(t.layer)] += t.n_experts_used;
  }
  return *std::max_element(n_of_layer.begin(), n_of_layer.end());
}

}  // namespace

SlotPool::~SlotPool() {
  for (const SlotClass& c : classes_) {
    if (c.base != nullptr) ::munmap(c.base, c.reserved_bytes);
  }
}

std::vector<SlotClass> SlotPool::Classes(const std::vector<ExpertTensor>& tensors, std::vector<int>* class_of_tensor) {
  std::vector<SlotClass> classes;
  class_of_tensor->clear();
  for (const ExpertTensor& t : tensors) {
    const uint64_t bytes = SlotBytes(t);
    auto it = std::find_if(classes.begin(), classes.end(), [&](const SlotClass& c) { return c.slot_bytes == bytes; });
    if (it == classes.end()) {
      classes.emplace_back();
      it = classes.end() - 1;
      it->slot_bytes = bytes;
    }
    it->n_slices += t.n_experts;
    class_of_tensor->push_back(static_cast<int>(it - classes.begin()));
    if (t.copy_of < 0) {
      it->n_cycle_slices += t.n_experts_used;
    } else {
      it->n_copy_slices += t.n_experts;
    }
  }
  for (size_t c = 0; c < classes.size(); ++c) {
    if (classes[c].n_copy_slices > 0) {
      classes[c].n_cycle_slices += CopiesOfALayer(tensors, *class_of_tensor, static_cast<int>(c));
    }
  }
  return classes;
}

uint64_t SlotPool::Distribute(uint64_t slots_bytes, std::vector<SlotClass>* classes) {
  uint64_t floor_bytes = 0;
  for (const SlotClass& c : *classes) floor_bytes += static_cast<uint64_t>(c.n_floor_slots()) * c.slot_bytes;
  const bool has_floor = slots_bytes >= floor_bytes;
  long double rest_bytes = 0;
  for (SlotClass& c : *classes) {
    c.n_slots = has_floor ? c.n_floor_slots() : 0;
    rest_bytes += static_cast<long double>(c.slot_bytes) * c.weight() * (c.n_slices - c.n_slots);
  }
  const long double free_bytes = slots_bytes - (has_floor ? floor_bytes : 0);
  const long double share = rest_bytes > 0 ? std::min<long double>(1.0L, free_bytes / rest_bytes) : 0;
  uint64_t taken = 0;
  for (SlotClass& c : *classes) {
    c.n_slots += static_cast<int64_t>(share * c.weight() * (c.n_slices - c.n_slots));
    taken += static_cast<uint64_t>(c.n_slots) * c.slot_bytes;
  }
  const auto fullness = [](const SlotClass& c) {
    return static_cast<double>(c.n_slots) / (c.weight() * static_cast<double>(c.n_slices));
  };
  for (;;) {
    SlotClass* poorest = nullptr;
    for (SlotClass& c : *classes) {
      if (c.n_slots >= c.n_slices || taken + c.slot_bytes > slots_bytes) continue;
      if (poorest == nullptr || fullness(c) < fullness(*poorest)) poorest = &c;
    }
    if (poorest == nullptr) return taken;
    ++poorest->n_slots;
    taken += poorest->slot_bytes;
  }
}

Status SlotPool::Reserve(const std::vector<ExpertTensor>& tensors) {
  classes_ = Classes(tensors, &class_of_tensor_);
  for (SlotClass& c : classes_) {
    c.reserved_bytes = RoundUp(c.slot_bytes * static_cast<uint64_t>(c.n_slices), kHugePageBytes) + kHugePageBytes;
    void* p =
        ::mmap(nullptr, c.reserved_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      return Status(EDGEMOE_NO_MEMORY, Format("cannot reserve %llu bytes of addresses for expert slots: %s",
                                              static_cast<unsigned long long>(c.reserved_bytes), std::strerror(errno)));
    }
    c.base = static_cast<char*>(p);
  }
  return Status();
}

char* SlotPool::SlotAddress(int class_idx, int64_t slot) const {
  const SlotClass& c = classes_[static_cast<size_t>(class_idx)];
  return c.base + static_cast<uint64_t>(slot) * c.slot_bytes;
}

void SlotPool::SetSlots(const std::vector<SlotClass>& classes) {
  for (size_t i = 0; i < classes_.size(); ++i) {
    SlotClass& c = classes_[i];
    c.n_slots = classes[i].n_slots;
    // Huge pages only where every byte of them belongs to a slot in use, so that none is paid for twice.
    const uint64_t begin = RoundUp(reinterpret_cast<uint64_t>(c.base), kHugePageBytes);
    const uint64_t end =
        RoundDown(reinterpret_cast<uint64_t>(c.base) + static_cast<uint64_t>(c.n_slots) * c.slot_bytes, kHugePageBytes);
    if (end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
}

void SlotPool::Discard(int class_idx, int64_t first_slot) {
  const SlotClass& c = classes_[static_cast<size_t>(class_idx)];
  const uint64_t begin = static_cast<uint64_t>(first_slot) * c.slot_bytes;
  ::madvise(c.base + begin, c.reserved_bytes - begin, MADV_NOHUGEPAGE);
  ::madvise(c.base + begin, c.reserved_bytes - begin, MADV_DONTNEED);
}

int64_t SlotPool::n_slots() const {
  int64_t n = 0;
  for (const SlotClass& c : classes_) n += c.n_slots;
  return n;
}

uint64_t SlotPool::slots_bytes() const {
  uint64_t bytes = 0;
  for (const SlotClass& c : classes_) bytes += static_cast<uint64_t>(c.n_slots) * c.slot_bytes;
  return bytes;
}

}  // namespace edgemoe
