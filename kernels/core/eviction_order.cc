// SPDX-License-Identifier: MIT
#include "core/eviction_order.h"

#include <algorithm>
#include <utility>

namespace edgemoe {

void EvictionOrder::Start(edgemoe_eviction rule, const std::vector<ExpertTensor>& tensors, const SlotPool& pool) {
  rule_ = rule_in_use_ = rule;
  int n_layers = 0;
  size_t n_slices = 0;
  for (const ExpertTensor& t : tensors) {
    n_layers = std::max(n_layers, t.layer + 1);
    n_slices = std::max(n_slices, static_cast<size_t>(t.first_slice + t.n_experts));
  }
  places_.assign(n_slices, Place());
  clocks_.assign(static_cast<size_t>(n_layers), LayerClock());
  heaps_.clear();
  first_heap_.assign(1, 0);
  std::vector<int32_t> heap_of_layer(clocks_.size());
  std::vector<size_t> n_slices_of_heap;
  for (size_t class_idx = 0; class_idx < pool.classes().size(); ++class_idx) {
    std::fill(heap_of_layer.begin(), heap_of_layer.end(), -1);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const ExpertTensor& t = tensors[i];
      if (pool.ClassOfTensor(static_cast<int>(i)) != static_cast<int>(class_idx)) continue;
      int32_t& heap = heap_of_layer[static_cast<size_t>(t.layer)];
      if (heap < 0) {
        heap = static_cast<int32_t>(heaps_.size());
        heaps_.push_back({t.layer, {}});
        n_slices_of_heap.push_back(0);
      }
      n_slices_of_heap[static_cast<size_t>(heap)] += static_cast<size_t>(t.n_experts);
      for (int e = 0; e < t.n_experts; ++e) {
        At(t.first_slice + e).heap = heap;
        At(t.first_slice + e).expert = e;
      }
    }
    first_heap_.push_back(heaps_.size());
  }
  for (size_t i = 0; i < heaps_.size(); ++i) heaps_[i].slices.reserve(n_slices_of_heap[i]);
}

double EvictionOrder::BeginPass(int64_t n_tokens, bool is_scan) {
  if (in_scan_) {
    for (Place& p : places_) p.passed = false;
    Reorder();
  }
  in_scan_ = is_scan;
  pass_ = {next_pass_time_, pass_.number + 1.0};
  next_pass_time_ += static_cast<double>(n_tokens);
  // No layer is further behind, so that what a layer holds that runs no more ages as well.
  for (LayerClock& clock : clocks_) {
    SetClock({std::max(clock.now.time, pass_.time - 1.0), std::max(clock.now.number, pass_.number - 1.0)}, &clock);
  }
  return pass_.time;
}

void EvictionOrder::EnterLayer(int layer, double pass_time, int64_t n_tokens) {
  LayerClock& clock = clocks_[static_cast<size_t>(layer)];
  const double last_time = pass_time + static_cast<double>(n_tokens) - 1.0;
  SetClock({std::max(clock.now.time, last_time), n_tokens > 0 ? pass_.number : clock.now.number}, &clock);
  clock.n_begun = ++n_layers_begun_;
  clock.oldest_pass = clock.n_in_progress == 0 ? pass_time : std::min(clock.oldest_pass, pass_time);
  ++clock.n_in_progress;
}

void EvictionOrder::LeaveLayer(int layer) { --clocks_[static_cast<size_t>(layer)].n_in_progress; }

void EvictionOrder::SetClock(const PassClock& now, LayerClock* clock) const {
  clock->now = now;
  clock->key = ClockKey(rule_in_use_, now);
}

const Heat& EvictionOrder::Touch(int64_t slice, double time, int n_uses) {
  Heat& heat = At(slice).heat;
  edgemoe::Touch(rule_, pass_, time, n_uses, &heat);
  SetKey(slice, rule_ == EDGEMOE_EVICT_AUTO ? KeyBy(rule_in_use_, heat) : heat.key);
  return heat;
}

void EvictionOrder::Remember(int64_t slice, int64_t rank) {
  Heat& heat = At(slice).heat;
  if (heat.time <= 0.0) edgemoe::Remember(rank, &heat);
}

void EvictionOrder::SetKey(int64_t slice, double key) {
  At(slice).heat.key = key;
  Moved(slice);
}

void EvictionOrder::UseRule(edgemoe_eviction rule) {
  rule_in_use_ = rule;
  for (Place& p : places_) p.heat.key = KeyBy(rule, p.heat);
  for (LayerClock& clock : clocks_) SetClock(clock.now, &clock);
  Reorder();
}

void EvictionOrder::Pass(int64_t slice) {
  if (!in_scan_) return;
  At(slice).passed = true;
  Moved(slice);
}

bool EvictionOrder::Needed(int64_t slice) const {
  const Place& p = At(slice);
  const LayerClock& clock = ClockOf(slice);
  return clock.n_in_progress > 0 && !p.passed && p.heat.time >= clock.oldest_pass;
}

bool EvictionOrder::GoesBefore(int64_t a, int64_t b) const {
  const bool a_needed = Needed(a), b_needed = Needed(b);
  if (a_needed != b_needed) return b_needed;
  if (At(a).passed != At(b).passed) return At(a).passed;
  const double a_warmth = Warmth(a), b_warmth = Warmth(b);
  return a_warmth != b_warmth ? a_warmth < b_warmth : ClockOf(a).n_begun > ClockOf(b).n_begun;
}

int64_t EvictionOrder::Coldest(int class_idx) const {
  int64_t coldest = -1;
  const size_t end = first_heap_[static_cast<size_t>(class_idx) + 1];
  for (size_t i = first_heap_[static_cast<size_t>(class_idx)]; i < end; ++i) {
    const Heap& heap = heaps_[i];
    if (heap.slices.empty()) continue;
    if (coldest < 0 || GoesBefore(heap.slices.front(), coldest)) coldest = heap.slices.front();
  }
  return coldest;
}

void EvictionOrder::Moved(int64_t slice) {
  if (!Contains(slice)) return;
  Heap& heap = HeapOf(slice);
  SiftUp(&heap, static_cast<size_t>(At(slice).heap_idx));
  SiftDown(&heap, static_cast<size_t>(At(slice).heap_idx));
}

void EvictionOrder::Reorder() {
  for (Heap& heap : heaps_) {
    for (size_t i = heap.slices.size() / 2; i-- > 0;) SiftDown(&heap, i);
  }
}

void EvictionOrder::Insert(int64_t slice) {
  Heap& heap = HeapOf(slice);
  heap.slices.push_back(slice);
  At(slice).heap_idx = static_cast<int32_t>(heap.slices.size() - 1);
  SiftUp(&heap, heap.slices.size() - 1);
}

void EvictionOrder::Erase(int64_t slice) {
  Heap& heap = HeapOf(slice);
  const size_t i = static_cast<size_t>(At(slice).heap_idx);
  At(slice).heap_idx = -1;
  const int64_t last = heap.slices.back();
  heap.slices.pop_back();
  if (last == slice) return;
  heap.slices[i] = last;
  At(last).heap_idx = static_cast<int32_t>(i);
  SiftUp(&heap, i);
  SiftDown(&heap, static_cast<size_t>(At(last).heap_idx));
}

void EvictionOrder::SiftUp(Heap* heap, size_t i) {
  auto& slices = heap->slices;
  while (i > 0) {
    const size_t parent = (i - 1) / 2;
    if (!Colder(slices[i], slices[parent])) return;
    std::swap(slices[parent], slices[i]);
    At(slices[parent]).heap_idx = static_cast<int32_t>(parent);
    At(slices[i]).heap_idx = static_cast<int32_t>(i);
    i = parent;
  }
}

void EvictionOrder::SiftDown(Heap* heap, size_t i) {
  auto& slices = heap->slices;
  for (;;) {
    size_t least = i;
    for (size_t child = 2 * i + 1; child <= 2 * i + 2 && child < slices.size(); ++child) {
      if (Colder(slices[child], slices[least])) least = child;
    }
    if (least == i) return;
    std::swap(slices[least], slices[i]);
    At(slices[least]).heap_idx = static_cast<int32_t>(least);
    At(slices[i]).heap_idx = static_cast<int32_t>(i);
    i = least;
  }
}

}  // namespace edgemoe
