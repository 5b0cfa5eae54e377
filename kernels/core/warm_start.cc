// SPDX-License-Identifier: MIT
// warm_start.cc: what the cache tells a later run, and how it reads what an earlier run has told. A preload's read
// begins only when no layer waits for storage and no hint is left, so a demand finds at most the reads of
// max_hint_reads_ slices before it.
#include <algorithm>
#include <utility>

#include "core/expert_cache.h"

namespace edgemoe {

std::vector<int64_t> ExpertCache::HotSlices() {
  std::vector<std::pair<double, int64_t>> found;
  found.reserve(static_cast<size_t>(file_->n_slices()));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t slice = 0; slice < file_->n_slices(); ++slice) {
      const bool is_copy = file_->tensors()[static_cast<size_t>(file_->TensorOf(slice))].copy_of >= 0;
      if (Resident(slice) && !is_copy) found.emplace_back(-order_.Warmth(slice), slice);
    }
  }
  std::sort(found.begin(), found.end());
  std::vector<int64_t> slices;
  slices.reserve(found.size());
  for (const auto& [_, slice] : found) slices.push_back(slice);
  return slices;
}

std::vector<uint64_t> ExpertCache::Uses() {
  std::vector<uint64_t> n_uses(static_cast<size_t>(file_->n_slices()));
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < n_uses.size(); ++i) n_uses[i] = slices_[i].n_uses;
  return n_uses;
}

Status ExpertCache::Preload(const int64_t* slices, int64_t n_slices) {
  std::vector<int64_t> preloads(slices, slices + n_slices);
  for (int64_t slice : preloads) {
    if (slice < 0 || slice >= file_->n_slices()) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    Format("slice %lld to preload, expected 0..%lld", static_cast<long long>(slice),
                           static_cast<long long>(file_->n_slices() - 1)));
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  DropPreloads();
  preloads_ = std::move(preloads);
  queue_cv_.notify_all();
  return Status();
}

int64_t ExpertCache::n_preloads_left() {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(preloads_.size() - next_preload_) + n_preload_reads_;
}

// With the lock, as all below. Reads under way go on.
void ExpertCache::DropPreloads() {
  preloads_.clear();
  next_preload_ = 0;
}

bool ExpertCache::NextPreload(CacheRead* read) {
  if (n_demand_reads_ > 0 || n_hint_reads_ >= max_hint_reads_ || resizing_) return false;
  for (; next_preload_ < preloads_.size(); ++next_preload_) {
    const int64_t slice = preloads_[next_preload_];
    ClassState& c = classes_[static_cast<size_t>(ClassIdx(slice))];
    if (!Absent(slice) || c.free_slots.empty()) continue;
    const int32_t slot = c.free_slots.back();
    c.free_slots.pop_back();
    TakeForRead(slice, slot, true);
    order_.Remember(slice, static_cast<int64_t>(next_preload_));
    ++next_preload_;
    ++n_hint_reads_;
    ++n_preload_reads_;
    *read = ReadOf(slice);
    read->is_preload = true;
    return true;
  }
  return false;
}

void ExpertCache::EndPreloadRead(const CacheRead& read, bool ok) {
  --n_preload_reads_;
  if (ok) {
    counters_.preload_bytes.fetch_add(file_->Extent(read.slice).length, std::memory_order_relaxed);
  } else {
    DropPreloads();  // what is needed will be asked for, and then the failure is an error
  }
}

}  // namespace edgemoe
