// SPDX-License-Identifier: MIT
// eviction_order.h: which of the slices that may be evicted goes first, over all layers.
// Time runs through the layers, so while layer 3 computes, what layer 4 used a token ago looks almost a token older
// than what layer 3 has just used, though it is needed next. So a slice's age is counted on the clock of its own layer,
// which stands at the last token that the layer has run: layers that the pass in progress has not reached are one pass
// behind. Within a layer all slices share a clock, so their order never changes by itself: a binary heap for each slot
// class and layer, by the rule's keys. Between layers, what the rule's clock has added since is taken off the coldest
// of each heap when a slot is needed: one comparison per layer. Of equals, what the layer that began last holds goes
// first, for that layer comes again last; within a layer they go expert by expert.
// What a layer in progress has asked for goes after all else, whatever its key. What a scan has passed goes first.
// Thread-compatible: ExpertCache locks.
#ifndef EDGEMOE_CORE_EVICTION_ORDER_H_
#define EDGEMOE_CORE_EVICTION_ORDER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/eviction.h"
#include "core/expert_file.h"
#include "core/slot_pool.h"
#include "edgemoe/edgemoe.h"

namespace edgemoe {

class EvictionOrder {
 public:
  void Start(edgemoe_eviction rule, const std::vector<ExpertTensor>& tensors, const SlotPool& pool);

  // A batch of n_tokens begins its way through the layers; returns the time of its first token, 1 for the first of all.
  double BeginPass(int64_t n_tokens, bool is_scan);
  bool in_scan() const { return in_scan_; }
  // A layer begins with n_tokens, the first of the time pass_time, and ends. With 0 tokens its clock does not run.
  void EnterLayer(int layer, double pass_time, int64_t n_tokens);
  void LeaveLayer(int layer);

  // n_uses tokens use the slice, the last one at `time`.
  const Heat& Touch(int64_t slice, double time, int n_uses);
  // An earlier run needed it; the higher the rank, from 0, the colder. What this run has touched stays as it is.
  void Remember(int64_t slice, int64_t rank);
  void SetKey(int64_t slice, double key);
  // With AUTO: LRU or LFU_DECAY, for all slices.
  void UseRule(edgemoe_eviction rule);
  // The scan in progress will not use the slice again.
  void Pass(int64_t slice);

  const Heat& heat(int64_t slice) const { return At(slice).heat; }
  // Orders slices as eviction does, but for those in use: the coldest has the least.
  double Warmth(int64_t slice) const { return At(slice).heat.key - ClockOf(slice).key; }

  // A slice may be evicted from now on, or no longer.
  void Insert(int64_t slice);
  void Erase(int64_t slice);
  bool Contains(int64_t slice) const { return At(slice).heap_idx >= 0; }
  // What to evict first of a slot class; -1: nothing.
  int64_t Coldest(int class_idx) const;
  // A layer in progress has asked for it and may not have used it yet.
  bool Needed(int64_t slice) const;

 private:
  struct Place {
    Heat heat;
    int32_t heap = 0;  // of heaps_
    int32_t heap_idx = -1;
    int32_t expert = 0;
    bool passed = false;  // by the scan in progress
  };
  struct LayerClock {
    PassClock now;
    double key = 0.0;          // what the clock adds to a key; see ClockKey
    uint64_t n_begun = 0;      // layers that had begun when this one did
    double oldest_pass = 0.0;  // first token of the passes in progress here
    int n_in_progress = 0;
  };
  struct Heap {
    int layer = 0;
    std::vector<int64_t> slices;  // the coldest first
  };

  Place& At(int64_t slice) { return places_[static_cast<size_t>(slice)]; }
  const Place& At(int64_t slice) const { return places_[static_cast<size_t>(slice)]; }
  Heap& HeapOf(int64_t slice) { return heaps_[static_cast<size_t>(At(slice).heap)]; }
  const LayerClock& ClockOf(int64_t slice) const {
    return clocks_[static_cast<size_t>(heaps_[static_cast<size_t>(At(slice).heap)].layer)];
  }
  // Of one heap. Equals, which all experts of a token are with some rules, go expert by expert and not in the order in
  // which they came, that is, in which their reads ended.
  bool Colder(int64_t a, int64_t b) const {
    const Place &x = At(a), &y = At(b);
    if (x.passed != y.passed) return x.passed;
    if (x.heat.key != y.heat.key) return x.heat.key < y.heat.key;
    return x.expert != y.expert ? x.expert < y.expert : a < b;
  }
  // Of two heaps.
  bool GoesBefore(int64_t a, int64_t b) const;
  void SetClock(const PassClock& now, LayerClock* clock) const;
  void Moved(int64_t slice);  // its key has changed
  void Reorder();             // all keys have changed
  void SiftUp(Heap* heap, size_t i);
  void SiftDown(Heap* heap, size_t i);

  edgemoe_eviction rule_ = EDGEMOE_EVICT_LRU;
  edgemoe_eviction rule_in_use_ = EDGEMOE_EVICT_LRU;
  std::vector<Place> places_;       // [slice]
  std::vector<Heap> heaps_;         // by class, then by layer
  std::vector<size_t> first_heap_;  // [class], and the end
  std::vector<LayerClock> clocks_;  // [layer]
  PassClock pass_{1.0, 0.0};        // first token of the pass that began last, and its number
  double next_pass_time_ = 1.0;
  uint64_t n_layers_begun_ = 0;
  bool in_scan_ = false;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_EVICTION_ORDER_H_
