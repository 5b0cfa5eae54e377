// SPDX-License-Identifier: MIT
#include "core/expert_cache.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <system_error>

namespace edgemoe {

ExpertCache::~ExpertCache() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  queue_cv_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

Status ExpertCache::Start(uint64_t slots_bytes, int n_io_threads, int n_own_readers) {
  if (Status s = pool_.Reserve(file_->tensors()); !s.ok()) return s;
  slices_.resize(static_cast<size_t>(file_->n_slices()));
  classes_.resize(pool_.classes().size());
  promised_.resize(pool_.classes().size());
  queue_.resize(slices_.size());
  hints_.reserve(kMaxHints);
  // Half of the readers: a demand that comes meanwhile finds the others free, and two keep most disks busy
  // (development machine: 859 MiB/s from two, 954 from four).
  max_hint_reads_ = std::max(1, (n_io_threads + n_own_readers) / 2);
  for (size_t i = 0; i < classes_.size(); ++i) {
    const size_t n = static_cast<size_t>(pool_.classes()[i].n_slices);
    classes_[i].slice_of_slot.assign(n, -1);
    classes_[i].free_slots.reserve(n);
  }
  order_.Start(rule_, file_->tensors(), pool_);
  if (rule_ == EDGEMOE_EVICT_AUTO) order_.UseRule(duel_.rule());
  if (Status s = SetSlotsBytes(slots_bytes); !s.ok()) return s;
  uint64_t scratch_bytes = 0;
  for (const ExpertTensor& t : file_->tensors()) {
    if (t.own) scratch_bytes = std::max(scratch_bytes, PackScratchBytes(*kernels_, t));
  }
  pack_scratch_.assign(static_cast<size_t>(n_io_threads), std::vector<char>(scratch_bytes));
  try {
    for (std::vector<char>& scratch : pack_scratch_) readers_.emplace_back([this, &scratch] { ReaderLoop(&scratch); });
  } catch (const std::system_error& e) {
    return Status(EDGEMOE_NO_MEMORY,
                  Format("cannot start reader thread %zu of %d: %s", readers_.size() + 1, n_io_threads, e.what()));
  }
  return Status();
}

void ExpertCache::SlotTotals(int64_t* n_slots, uint64_t* slots_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  *n_slots = pool_.n_slots();
  *slots_bytes = pool_.slots_bytes();
}

void ExpertCache::NoteError(Status error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (last_error_.ok()) last_error_ = std::move(error);
}

Status ExpertCache::TakeError() {
  std::lock_guard<std::mutex> lock(mutex_);
  Status error = last_error_;
  last_error_ = Status();
  return error;
}

Status ExpertCache::SetSlotsBytes(uint64_t slots_bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (resizing_) WaitForEvent(&lock);
  std::vector<SlotClass> classes = pool_.classes();
  SlotPool::Distribute(slots_bytes, &classes);
  for (const SlotClass& c : classes) {
    // Two slots let one slice load while another is computed.
    if (c.n_slots < std::min<int64_t>(2, c.n_slices)) {
      return Status(EDGEMOE_BUDGET,
                    Format("%llu bytes of slots hold %lld experts' tensors of %llu bytes, expected at least 2; "
                           "raise the memory budget",
                           static_cast<unsigned long long>(slots_bytes), static_cast<long long>(c.n_slots),
                           static_cast<unsigned long long>(c.slot_bytes)));
    }
  }
  bool shrinks = false, grows = false;
  for (size_t i = 0; i < classes.size(); ++i) {
    shrinks |= classes[i].n_slots < pool_.classes()[i].n_slots;
    grows |= classes[i].n_slots > pool_.classes()[i].n_slots;
  }
  if (!shrinks && !grows) return Status();
  resizing_ = true;
  DropHints();  // they keep slices out of the order of eviction; what is left to preload goes into slots that are left
  while (shrinks && n_layers_ > 0) WaitForEvent(&lock);
  for (size_t i = 0; i < classes.size(); ++i) {
    const int class_idx = static_cast<int>(i);
    const int64_t before = pool_.classes()[i].n_slots;
    if (classes[i].n_slots < before) {
      while (!TrimClass(class_idx, classes[i].n_slots)) WaitForEvent(&lock);
      pool_.Discard(class_idx, classes[i].n_slots);
    }
    for (int64_t slot = classes[i].n_slots - 1; slot >= before; --slot) {
      classes_[i].free_slots.push_back(static_cast<int32_t>(slot));
    }
  }
  pool_.SetSlots(classes);
  holds_everything_ =
      std::all_of(classes.begin(), classes.end(), [](const SlotClass& c) { return c.n_slots == c.n_slices; });
  resizing_ = false;
  ResizeDuel();
  queue_cv_.notify_all();
  NotifyEvent();
  return Status();
}

// Empty the slots from n_slots on: keep the hottest slices by moving them down. False: some are in use; wait.
bool ExpertCache::TrimClass(int class_idx, int64_t n_slots) {
  ClassState& c = classes_[static_cast<size_t>(class_idx)];
  const int64_t n_now = pool_.classes()[static_cast<size_t>(class_idx)].n_slots;
  auto& free_slots = c.free_slots;
  free_slots.erase(std::remove_if(free_slots.begin(), free_slots.end(), [&](int32_t s) { return s >= n_slots; }),
                   free_slots.end());
  for (int64_t slot = n_slots; slot < n_now; ++slot) {
    const int64_t slice = c.slice_of_slot[static_cast<size_t>(slot)];
    if (slice < 0) continue;
    if (At(slice).n_pins > 0 || At(slice).state != State::kResident) return false;
    for (int64_t coldest; free_slots.empty() && (coldest = order_.Coldest(class_idx)) >= 0;) {
      const int32_t freed = At(coldest).slot;
      DropFromSlot(&c, coldest);
      if (freed < n_slots) free_slots.push_back(freed);
      if (coldest == slice) break;
    }
    if (At(slice).slot < 0) continue;
    if (free_slots.empty()) return false;
    const int32_t to = free_slots.back();
    free_slots.pop_back();
    std::memcpy(pool_.SlotAddress(class_idx, to), pool_.SlotAddress(class_idx, slot),
                pool_.classes()[static_cast<size_t>(class_idx)].slot_bytes);
    c.slice_of_slot[static_cast<size_t>(slot)] = -1;
    c.slice_of_slot[static_cast<size_t>(to)] = slice;
    At(slice).slot = to;
  }
  return true;
}

void ExpertCache::BeginLayer(std::unique_lock<std::mutex>* lock) {
  while (resizing_) WaitForEvent(lock);
  ++n_layers_;
}

void ExpertCache::EndLayer(int layer) {
  order_.LeaveLayer(layer);
  --n_layers_;
  NotifyEvent();
}

double ExpertCache::AdvanceClock(int64_t n_tokens) {
  const bool is_scan = n_tokens > kMostDecodeTokens;
  if (rule_ == EDGEMOE_EVICT_AUTO && !is_scan && duel_.EndToken()) order_.UseRule(duel_.rule());
  return order_.BeginPass(n_tokens, is_scan);
}

void ExpertCache::TouchSlice(int64_t slice, double time, int n_uses) {
  Slice& s = At(slice);
  if (s.read_ahead || s.state == State::kAbsent) needed_bytes_ += file_->Extent(slice).length;
  if (s.read_ahead) {
    s.read_ahead = false;
    (s.state == State::kResident ? counters_.hint_used_bytes : counters_.hint_late_bytes)
        .fetch_add(file_->Extent(slice).length, std::memory_order_relaxed);
  }
  if (order_.heat(slice).time < 0.0 && s.state == State::kResident) {
    counters_.preload_used_bytes.fetch_add(file_->Extent(slice).length, std::memory_order_relaxed);
  }
  s.n_uses += static_cast<uint64_t>(n_uses);
  const Heat& heat = order_.Touch(slice, time, n_uses);
  if (rule_ != EDGEMOE_EVICT_AUTO) return;
  const int tensor_idx = file_->TensorOf(slice);
  const int sample = sample_of_tensor_[static_cast<size_t>(tensor_idx)];
  const int64_t expert = slice - file_->tensors()[static_cast<size_t>(tensor_idx)].first_slice;
  if (sample >= 0) duel_.Use(sample, static_cast<int>(expert), heat, !order_.in_scan());
}

// The first tensors of a few layers, evenly spread, each with its share of the slots.
void ExpertCache::ResizeDuel() {
  if (rule_ != EDGEMOE_EVICT_AUTO) return;
  const auto& tensors = file_->tensors();
  std::vector<size_t> first_of_layer;
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (tensors[t].copy_of >= 0) continue;
    if (t == 0 || tensors[t].layer != tensors[t - 1].layer) first_of_layer.push_back(t);
  }
  const size_t n_samples = std::min<size_t>(first_of_layer.size(), EvictionDuel::kMaxSamples);
  sample_of_tensor_.assign(tensors.size(), -1);
  std::vector<EvictionDuel::Sample> samples;
  for (size_t i = 0; i < n_samples; ++i) {
    const size_t t = first_of_layer[(2 * i + 1) * first_of_layer.size() / (2 * n_samples)];
    const SlotClass& c = pool_.classes()[static_cast<size_t>(pool_.ClassOfTensor(static_cast<int>(t)))];
    const double share = static_cast<double>(c.n_slots) / static_cast<double>(c.n_slices);
    sample_of_tensor_[t] = static_cast<int32_t>(i);
    samples.push_back({tensors[t].n_experts, std::max(tensors[t].n_experts_used,
                                                      static_cast<int>(std::lround(share * tensors[t].n_experts)))});
  }
  duel_.Resize(samples);
}

Acquired ExpertCache::Acquire(int64_t slice) {
  Slice& s = At(slice);
  if (s.state == State::kAbsent) {
    bool pack = false;
    const int32_t slot = TakeSlot(ClassIdx(slice), &pack);
    if (slot < 0) return Acquired::kNoRoom;
    QueueRead(slice, slot, pack);
    ++s.n_pins;
    return Acquired::kStarted;
  }
  if (order_.Contains(slice)) order_.Erase(slice);
  ++s.n_pins;
  return s.state == State::kResident ? Acquired::kResident : Acquired::kJoined;
}

bool ExpertCache::MayReadAhead(int class_idx) const {
  if (!classes_[static_cast<size_t>(class_idx)].free_slots.empty()) return true;
  const int64_t coldest = order_.Coldest(class_idx);
  return coldest >= 0 && !order_.Needed(coldest);
}

bool ExpertCache::ReadAhead(int64_t slice) {
  if (!Absent(slice)) return true;
  if (!MayReadAhead(ClassIdx(slice))) return false;
  bool pack = false;
  const int32_t slot = TakeSlot(ClassIdx(slice), &pack);
  QueueRead(slice, slot, pack);
  return true;
}

void ExpertCache::SetHints(const std::vector<int64_t>& slices) {
  DropHints();
  if (resizing_) return;
  hints_.assign(slices.begin(), slices.begin() + static_cast<std::ptrdiff_t>(std::min(slices.size(), kMaxHints)));
  for (int64_t slice : hints_) {
    Slice& s = At(slice);
    s.hinted = true;
    if (order_.Contains(slice)) order_.Erase(slice);
  }
  if (!hints_.empty()) queue_cv_.notify_all();
}

void ExpertCache::DropHints() {
  for (int64_t slice : hints_) {
    Slice& s = At(slice);
    if (!s.hinted) continue;
    s.hinted = false;
    if (s.state == State::kResident && s.n_pins == 0) order_.Insert(slice);
  }
  hints_.clear();
  next_hint_ = 0;
}

void ExpertCache::Release(int64_t slice) {
  Slice& s = At(slice);
  if (--s.n_pins > 0) return;
  if (s.state == State::kResident && !s.hinted) order_.Insert(slice);
  NotifyEvent();
}

const char* ExpertCache::Data(int64_t slice) const {
  const char* slot = pool_.SlotAddress(ClassIdx(slice), At(slice).slot);
  return Packed(slice) ? slot : slot + file_->Extent(slice).head_bytes;
}

void ExpertCache::WaitForEvent(std::unique_lock<std::mutex>* lock) {
  ++n_event_waiters_;
  const uint64_t seen = events_.load(std::memory_order_relaxed);
  event_cv_.wait(*lock, [&] { return events_.load(std::memory_order_relaxed) != seen; });
  --n_event_waiters_;
}

void ExpertCache::NotifyEvent() {
  events_.fetch_add(1, std::memory_order_release);
  if (n_event_waiters_ > 0) event_cv_.notify_all();
}

int32_t ExpertCache::TakeSlot(int class_idx, bool* was_free) {
  ClassState& c = classes_[static_cast<size_t>(class_idx)];
  *was_free = !c.free_slots.empty();
  if (!*was_free) {
    int64_t victim = order_.Coldest(class_idx);
    if (victim < 0) {
      DropHints();  // what is needed goes before what may be
      victim = order_.Coldest(class_idx);
    }
    if (victim < 0) return -1;
    const int32_t slot = At(victim).slot;
    DropFromSlot(&c, victim);
    return slot;
  }
  const int32_t slot = c.free_slots.back();
  c.free_slots.pop_back();
  return slot;
}

void ExpertCache::DropFromSlot(ClassState* c, int64_t slice) {
  Slice& s = At(slice);
  order_.Erase(slice);
  c->slice_of_slot[static_cast<size_t>(s.slot)] = -1;
  s.slot = -1;
  s.state = State::kAbsent;
  if (s.read_ahead) {
    s.read_ahead = false;
    counters_.hint_wasted_bytes.fetch_add(file_->Extent(slice).length, std::memory_order_relaxed);
  }
  counters_.evictions.fetch_add(1, std::memory_order_relaxed);
}

void ExpertCache::TakeForRead(int64_t slice, int32_t slot, bool pack) {
  Slice& s = At(slice);
  s.state = State::kLoading;
  s.packed = pack && file_->tensors()[static_cast<size_t>(file_->TensorOf(slice))].own;
  s.slot = slot;
  classes_[static_cast<size_t>(ClassIdx(slice))].slice_of_slot[static_cast<size_t>(slot)] = slice;
}

void ExpertCache::QueueRead(int64_t slice, int32_t slot, bool pack) {
  TakeForRead(slice, slot, pack);
  queue_[(queue_head_ + queue_size_++) % queue_.size()] = slice;
  queue_cv_.notify_one();
}

CacheRead ExpertCache::ReadOf(int64_t slice) {
  return {slice, pool_.SlotAddress(ClassIdx(slice), At(slice).slot), At(slice).packed};
}

bool ExpertCache::NextRead(CacheRead* read) {
  if (queue_size_ == 0) return NextHint(read) || NextPreload(read);
  ++n_demand_reads_;
  *read = ReadOf(queue_[queue_head_]);
  queue_head_ = (queue_head_ + 1) % queue_.size();
  --queue_size_;
  return true;
}

bool ExpertCache::NextHint(CacheRead* read) {
  if (n_hint_reads_ >= max_hint_reads_) return false;
  for (; next_hint_ < hints_.size(); ++next_hint_) {
    const int64_t slice = hints_[next_hint_];
    if (!Absent(slice)) continue;
    if (!MayReadAhead(ClassIdx(slice))) continue;
    bool pack = false;
    const int32_t slot = TakeSlot(ClassIdx(slice), &pack);
    TakeForRead(slice, slot, pack);
    At(slice).read_ahead = true;
    ++next_hint_;
    ++n_hint_reads_;
    *read = ReadOf(slice);
    read->is_hint = true;
    return true;
  }
  return false;
}

void ExpertCache::FinishRead(const CacheRead& read, Status status) {
  Slice& s = At(read.slice);
  ClassState& c = classes_[static_cast<size_t>(ClassIdx(read.slice))];
  --(read.is_hint || read.is_preload ? n_hint_reads_ : n_demand_reads_);
  if (read.is_preload) EndPreloadRead(read, status.ok());
  if (n_demand_reads_ == 0 && next_preload_ < preloads_.size()) queue_cv_.notify_all();  // storage may be idle
  counters_.reads.fetch_add(1, std::memory_order_relaxed);
  if (status.ok()) {
    counters_.bytes_read.fetch_add(file_->Extent(read.slice).length, std::memory_order_relaxed);
    s.state = State::kResident;
    if (s.n_pins == 0 && !s.hinted) order_.Insert(read.slice);
  } else {
    c.slice_of_slot[static_cast<size_t>(s.slot)] = -1;
    c.free_slots.push_back(s.slot);
    s.slot = -1;
    s.state = State::kAbsent;
    s.read_ahead = false;
    read_error_ = std::move(status);
  }
  NotifyEvent();
}

// Without the lock. Own slices are interleaved here, on the thread that read them, never on one that computes.
Status ExpertCache::ReadAndPack(const CacheRead& read, char* scratch) {
  Status status = file_->ReadSlice(read.slice, read.to);
  const ExpertTensor& tensor = file_->tensors()[static_cast<size_t>(file_->TensorOf(read.slice))];
  if (!status.ok() || !read.pack) return status;
  const auto begin = std::chrono::steady_clock::now();
  PackSlice(*kernels_, tensor, read.to, file_->Extent(read.slice).head_bytes, scratch);
  const auto taken = std::chrono::steady_clock::now() - begin;
  counters_.pack_ns.fetch_add(
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count()),
      std::memory_order_relaxed);
  return status;
}

void ExpertCache::ReaderLoop(std::vector<char>* scratch) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    CacheRead read;
    queue_cv_.wait(lock, [&] { return stopping_ || NextRead(&read); });
    if (stopping_) return;
    lock.unlock();
    Status status = ReadAndPack(read, scratch->data());
    lock.lock();
    FinishRead(read, std::move(status));
  }
}

int ExpertCache::Residents(int layer, uint8_t* resident, int n_experts) {
  std::lock_guard<std::mutex> lock(mutex_);
  return ReadResidents(layer, resident, n_experts);
}

int ExpertCache::ReadResidents(int layer, uint8_t* resident, int n_experts) const {
  int n_found = 0;
  for (const ExpertTensor& t : file_->tensors()) {
    if (t.layer != layer || t.copy_of >= 0) continue;
    const bool is_first = n_found == 0;
    n_found = t.n_experts;
    if (n_found != n_experts) return n_found;
    for (int e = 0; e < n_experts; ++e) {
      const uint8_t here = Absent(t.first_slice + e) ? 0 : 1;
      resident[e] = is_first ? here : static_cast<uint8_t>(resident[e] & here);
    }
  }
  return n_found;
}

}  // namespace edgemoe
