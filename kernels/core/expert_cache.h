// SPDX-License-Identifier: MIT
// expert_cache.h: which slices are resident, and the threads that read the ones that are not.
// A slice is absent, loading or resident. Acquire pins it, so that it is not evicted, and starts the read when
// it is absent; Release unpins it. Reads run without the lock; a failed read leaves the slice absent.
// Which slice is evicted is said in eviction_order.h.
// *Hints* are slices that the next layers may use. While they stand, those that are resident are not evicted as long as
// there is anything else to evict, and those that are absent are read when nothing that a layer waits for is left to
// read. A hint holds no slot before its read begins, so dropping it costs nothing.
// *Preloads* are slices that an earlier run needed most. They are read into free slots only, while storage has nothing
// else to do, and are the first to be evicted until they are used; see warm_start.cc.
// A *scan* is a batch of many tokens, a prompt: it goes through the layers once and uses most slices of each. What it
// has passed is evicted first, in the usual order, for what lies ahead is certain to be used before it; without that a
// prompt would drop the residents of the later layers, which it reads again moments later.
// Invariants: a pinned slice keeps its slot; a slot belongs to at most one slice; a slice is read only while
// loading. Thread-safe: one mutex, never held over I/O.
#ifndef EDGEMOE_CORE_EXPERT_CACHE_H_
#define EDGEMOE_CORE_EXPERT_CACHE_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/arithmetic.h"
#include "core/eviction.h"
#include "core/eviction_duel.h"
#include "core/eviction_order.h"
#include "core/expert_file.h"
#include "core/slot_pool.h"
#include "core/status.h"

namespace edgemoe {

// A batch of more tokens is a scan. Up to here it may be a draft to be verified, which is decoding.
inline constexpr int64_t kMostDecodeTokens = 8;

enum class Acquired {
  kResident,
  kStarted,  // this call started the read
  kJoined,   // someone else's read, perhaps of before a failed disk came back
  kNoRoom
};

struct CacheCounters {
  std::atomic<uint64_t> hits{0}, misses{0}, late_hits{0}, bytes_read{0}, reads{0}, stall_ns{0}, pack_ns{0},
      evictions{0};
  // Bytes read for hints: resident when they were first used, still being read then, or dropped without being used.
  std::atomic<uint64_t> hint_used_bytes{0}, hint_late_bytes{0}, hint_wasted_bytes{0};
  // Bytes read to preload slices, and how many of them were resident when they were first used.
  std::atomic<uint64_t> preload_bytes{0}, preload_used_bytes{0};
};

// A read that a thread is to make, without the lock, and then to report.
struct CacheRead {
  int64_t slice = -1;
  char* to = nullptr;
  bool pack = false;
  bool is_hint = false;
  bool is_preload = false;
};

// Slots of a class left for slices that pass through, when not all that a layer needs can be pinned at once.
inline int64_t StreamingSlots(int64_t n_slots) { return std::min<int64_t>(16, (n_slots + 1) / 2); }

class ExpertCache {
 public:
  // kernels: those that multiply the file's own tensors; null when it has none.
  ExpertCache(std::unique_ptr<ExpertFile> file, edgemoe_eviction rule, const simd::KernelTable* kernels = nullptr)
      : file_(std::move(file)), rule_(rule), kernels_(kernels) {}
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;

  // n_io_threads 0: whoever owns the cache makes the reads, with NextRead and FinishRead, n_own_readers at once.
  Status Start(uint64_t slots_bytes, int n_io_threads, int n_own_readers = 0);
  // More slots, or fewer: the coldest slices leave, the others move. What is left to preload, and what the duel of
  // rules has counted, stays; hints are dropped.
  Status SetSlotsBytes(uint64_t slots_bytes);

  const ExpertFile& file() const { return *file_; }
  const simd::KernelTable* kernels() const { return kernels_; }
  CacheCounters& counters() { return counters_; }
  void SlotTotals(int64_t* n_slots, uint64_t* slots_bytes);
  // Resident slices, the hottest first; without low-bit copies, which the next run reads when it misses.
  std::vector<int64_t> HotSlices();
  // [slice] how many tokens used it since Start.
  std::vector<uint64_t> Uses();
  // As edgemoe_runtime_residents.
  int Residents(int layer, uint8_t* resident, int n_experts);
  // Replace what is left to preload by these slices, the hottest first.
  Status Preload(const int64_t* slices, int64_t n_slices);
  // Slices left to preload, with those being read.
  int64_t n_preloads_left();
  // The first failure since the last TakeError, whoever met it.
  void NoteError(Status error);
  Status TakeError();

  // --- used by MoeLayer, which holds `mutex()` for all of them ---
  // As Residents.
  int ReadResidents(int layer, uint8_t* resident, int n_experts) const;
  std::mutex& mutex() { return mutex_; }
  bool Resident(int64_t slice) const { return At(slice).state == State::kResident; }
  bool Absent(int64_t slice) const { return At(slice).state == State::kAbsent; }
  // A session begins and ends a layer. Shrinking waits for the layers in progress and lets no other begin, so that
  // neither pins nor promises of slots outlive the slots.
  void BeginLayer(std::unique_lock<std::mutex>* lock);
  // Begin a batch of n_tokens; returns the time of its first token.
  double AdvanceClock(int64_t n_tokens);
  // After BeginLayer: the layer, and its batch. With 0 tokens the layer's clock does not run, as whoever sets keys
  // wants it.
  void EnterLayer(int layer, double batch_time, int64_t n_tokens) { order_.EnterLayer(layer, batch_time, n_tokens); }
  void EndLayer(int layer);
  void TouchSlice(int64_t slice, double time, int n_uses);
  // Bytes since Start of slices that were absent when they were touched, or were there only because of a hint.
  uint64_t needed_bytes() const { return needed_bytes_; }
  // Put a slice elsewhere in the order of eviction than the rule would: for whoever knows its next use.
  void SetKey(int64_t slice, double key) { order_.SetKey(slice, key); }
  Acquired Acquire(int64_t slice);
  // Start reading without pinning, but only over slices that no layer in progress has asked for.
  bool ReadAhead(int64_t slice);
  void Release(int64_t slice);
  // The batch in progress will not use the slice again.
  void Pass(int64_t slice) { order_.Pass(slice); }
  // Replace all hints, the likeliest first; reads already under way go on. Slots of slices that a layer in progress has
  // asked for are not given to them. Hints beyond kMaxHints are dropped.
  void SetHints(const std::vector<int64_t>& slices);
  bool Hinted(int64_t slice) const { return At(slice).hinted; }
  // Whether every slice has a slot of its own.
  bool HoldsEverything() const { return holds_everything_; }
  // The next read to make: what a layer waits for, or else a hint, or else a preload. False: nothing, or all that may
  // be under way is.
  bool NextRead(CacheRead* read);
  void FinishRead(const CacheRead& read, Status status);
  const char* Data(int64_t slice) const;
  bool Packed(int64_t slice) const { return At(slice).packed; }
  int n_classes() const { return static_cast<int>(classes_.size()); }
  int64_t n_slots(int class_idx) const { return pool_.classes()[static_cast<size_t>(class_idx)].n_slots; }
  // Slots of a class that layers in progress have been promised; see MoeLayer.
  int64_t& Promised(int class_idx) { return promised_[static_cast<size_t>(class_idx)]; }
  int ClassIdx(int64_t slice) const { return pool_.ClassOfTensor(file_->TensorOf(slice)); }
  // What the last failed read met. A read that fails is nobody's error until a layer that needs it gives up.
  const Status& read_error() const { return read_error_; }
  // Wait until a read ends or a slice is released.
  void WaitForEvent(std::unique_lock<std::mutex>* lock);
  std::atomic<uint64_t>& events() { return events_; }

 private:
  enum class State : uint8_t { kAbsent, kLoading, kResident };
  struct Slice {
    State state = State::kAbsent;
    bool packed = false;
    bool hinted = false;      // kept out of the order of eviction while it is
    bool read_ahead = false;  // read for a hint and not used since
    int32_t slot = -1;
    int32_t n_pins = 0;
    uint64_t n_uses = 0;
  };
  struct ClassState {
    std::vector<int32_t> free_slots;
    std::vector<int64_t> slice_of_slot;
  };

  static constexpr size_t kMaxHints = 1024;

  Slice& At(int64_t slice) { return slices_[static_cast<size_t>(slice)]; }
  const Slice& At(int64_t slice) const { return slices_[static_cast<size_t>(slice)]; }

  void ResizeDuel();
  int32_t TakeSlot(int class_idx, bool* was_free);  // -1: none free or evictable
  void DropFromSlot(ClassState* c, int64_t slice);
  void TakeForRead(int64_t slice, int32_t slot, bool pack);
  void QueueRead(int64_t slice, int32_t slot, bool pack);
  bool MayReadAhead(int class_idx) const;
  bool NextHint(CacheRead* read);
  void DropHints();
  bool NextPreload(CacheRead* read);
  void EndPreloadRead(const CacheRead& read, bool ok);
  void DropPreloads();
  CacheRead ReadOf(int64_t slice);
  Status ReadAndPack(const CacheRead& read, char* scratch);
  void ReaderLoop(std::vector<char>* scratch);
  void NotifyEvent();
  bool TrimClass(int class_idx, int64_t n_slots);

  const std::unique_ptr<ExpertFile> file_;
  const edgemoe_eviction rule_;
  const simd::KernelTable* const kernels_;
  SlotPool pool_;
  std::vector<Slice> slices_;
  std::vector<ClassState> classes_;
  std::vector<int64_t> promised_;
  int n_layers_ = 0;                       // in progress
  bool resizing_ = false;                  // one SetSlotsBytes at a time
  EvictionOrder order_;                    // of resident slices that are neither pinned nor hinted
  EvictionDuel duel_;                      // with EDGEMOE_EVICT_AUTO
  std::vector<int32_t> sample_of_tensor_;  // of the duel, or -1
  Status last_error_;
  Status read_error_;

  std::mutex mutex_;
  std::condition_variable event_cv_;
  int n_event_waiters_ = 0;
  std::atomic<uint64_t> events_{0};

  std::vector<int64_t> queue_;  // ring of slices to read, room for all
  size_t queue_head_ = 0;
  size_t queue_size_ = 0;
  std::vector<int64_t> hints_;
  size_t next_hint_ = 0;    // the first whose read has not begun
  int n_demand_reads_ = 0;  // under way: what a layer waits for
  int n_hint_reads_ = 0;    // under way: hints and preloads
  int max_hint_reads_ = 1;
  std::vector<int64_t> preloads_;
  size_t next_preload_ = 0;  // the first whose read has not begun
  int n_preload_reads_ = 0;  // under way
  bool holds_everything_ = false;
  uint64_t needed_bytes_ = 0;
  std::condition_variable queue_cv_;
  bool stopping_ = false;
  std::vector<std::thread> readers_;
  std::vector<std::vector<char>> pack_scratch_;  // [reader]
  CacheCounters counters_;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_EXPERT_CACHE_H_
