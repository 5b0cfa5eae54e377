// SPDX-License-Identifier: MIT
#include "core/moe_layer.h"

#include <algorithm>
#include <utility>

#include "edgemoe/selection.h"

namespace edgemoe {

Status MoeLayer::Begin(const int32_t* ids, int64_t n_tokens, int64_t n_used, uint64_t ids_token_bytes,
                       const int32_t* tensor_idxs, int n_tensors) {
  const PhaseScope phase(clock_, EDGEMOE_PHASE_SELECT);
  End();
  choosers_ = std::exchange(next_choosers_, {});
  const auto& tensors = cache_->file().tensors();
  tensor_idxs_.assign(tensor_idxs, tensor_idxs + n_tensors);
  const bool known = std::all_of(tensor_idxs_.begin(), tensor_idxs_.end(),
                                 [&](int32_t t) { return t >= 0 && static_cast<size_t>(t) < tensors.size(); });
  if (tensor_idxs_.empty() || !known) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("layer of %d tensors: expected at least one, each of index 0..%zu",
                                                   n_tensors, tensors.size() - 1));
  }
  const ExpertTensor& first = tensors[static_cast<size_t>(tensor_idxs_[0])];
  for (int32_t t : tensor_idxs_) {
    if (tensors[static_cast<size_t>(t)].n_experts != first.n_experts) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    Format("layer %d: tensors of %d and %d experts share one selection", first.layer, first.n_experts,
                           tensors[static_cast<size_t>(t)].n_experts));
    }
  }
  n_experts_ = first.n_experts;
  if (Status s = Choose(ids, n_tokens, n_used, ids_token_bytes); !s.ok()) return s;
  if (n_tokens == 1) prefetch_->Learn(first.layer, chosen_of_id_, &foresight_);
  // Room for the most pins and reads that this many experts can take, so that decoding never allocates.
  pinned_.reserve(tensor_idxs_.size() * chosen_.size());
  is_pinned_.reserve(tensor_idxs_.size() * chosen_.size());
  ahead_.reserve(tensor_idxs_.size() * chosen_.size());
  pending_.reserve(tensor_idxs_.size() * chosen_.size());
  loading_.reserve(tensor_idxs_.size() * chosen_.size());
  std::unique_lock<std::mutex> lock(cache_->mutex());
  cache_->BeginLayer(&lock);
  if (first.layer <= last_layer_ || n_tokens != last_n_tokens_ || last_layer_ < 0) {
    batch_time_ = cache_->AdvanceClock(n_tokens);
    prefetch_depth_ = prefetch_->BeginBatch(cache_, n_tokens, first.layer > last_layer_ && last_layer_ >= 0);
  }
  cache_->EnterLayer(first.layer, batch_time_, n_tokens);
  last_layer_ = layer_ = first.layer;
  last_n_tokens_ = n_tokens;
  active_ = true;
  trace_.Begin(*cache_, tensor_idxs_, expert_of_.data(), n_tokens, n_used, prefetch_->Foreseen(first.layer));
  prefetch_->BeginLayer(first.layer, tensor_idxs_, chosen_of_id_, chosen_.size());
  CountAndPin();
  // A prompt's layer that does not fit needs every slot for itself.
  const bool fits = std::all_of(shares_.begin(), shares_.end(), [](const ClassShare& s) { return s.fits; });
  foreseen_ = prefetch_depth_ == 0 || (n_tokens > kMostDecodeTokens && !fits);
  return Status();
}

Status MoeLayer::Choose(const int32_t* ids, int64_t n_tokens, int64_t n_used, uint64_t ids_token_bytes) {
  const bool has_copies =
      std::all_of(tensor_idxs_.begin(), tensor_idxs_.end(), [&](int32_t t) { return Tensor(t).copy >= 0; });
  const int32_t n_ids = has_copies ? 2 * n_experts_ : n_experts_;
  has_chosen_copies_ = false;
  chosen_of_id_.assign(static_cast<size_t>(n_ids), -1);
  chosen_.clear();
  n_used_ = n_used;
  const size_t n_pairs = static_cast<size_t>(n_tokens * n_used);
  if (pairs_.size() < n_pairs) pairs_.resize(n_pairs);
  if (expert_of_.size() < n_pairs) expert_of_.resize(n_pairs);
  const auto id_at = [&](int64_t token, int64_t used) {
    return reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(ids) +
                                            static_cast<uint64_t>(token) * ids_token_bytes)[used];
  };
  for (int64_t token = 0; token < n_tokens; ++token) {
    for (int64_t used = 0; used < n_used; ++used) {
      const int32_t id = id_at(token, used);
      expert_of_[static_cast<size_t>(token * n_used + used)] = ExpertOf(id);
      if (id == EDGEMOE_NO_EXPERT) continue;
      if (id < 0 || id >= n_ids) {
        return Status(
            EDGEMOE_INVALID_ARGUMENT,
            Format("token %lld selects expert %d, expected 0..%d (%d experts%s)", static_cast<long long>(token), id,
                   n_ids - 1, n_experts_, has_copies ? " and their low-bit copies" : ", no low-bit copies"));
      }
      has_chosen_copies_ |= IsCopy(id);
      int32_t& idx = chosen_of_id_[static_cast<size_t>(id)];
      if (idx < 0) {
        idx = static_cast<int32_t>(chosen_.size());
        chosen_.emplace_back();
        chosen_.back().id = id;
      }
      ++chosen_[static_cast<size_t>(idx)].n_pairs;
      chosen_[static_cast<size_t>(idx)].last_time = static_cast<double>(token);
    }
  }
  if (n_tokens > kMostDecodeTokens) {
    // What has most rows first: computing it hides most reading.
    std::stable_sort(chosen_.begin(), chosen_.end(),
                     [](const ChosenExpert& a, const ChosenExpert& b) { return a.n_pairs > b.n_pairs; });
    for (size_t c = 0; c < chosen_.size(); ++c)
      chosen_of_id_[static_cast<size_t>(chosen_[c].id)] = static_cast<int32_t>(c);
  }
  int64_t first_pair = 0;
  max_pairs_ = 0;
  for (ChosenExpert& c : chosen_) {
    c.first_pair = first_pair;
    first_pair += c.n_pairs;
    max_pairs_ = std::max<int64_t>(max_pairs_, c.n_pairs);
    c.n_pairs = 0;
  }
  n_pairs_ = first_pair;
  makes_room_for_copies_ = has_chosen_copies_ || (has_copies && n_tokens <= kMostDecodeTokens);
  for (int64_t token = 0; token < n_tokens; ++token) {
    for (int64_t used = 0; used < n_used; ++used) {
      const int32_t id = id_at(token, used);
      if (id == EDGEMOE_NO_EXPERT) continue;
      ChosenExpert& c = chosen_[static_cast<size_t>(chosen_of_id_[static_cast<size_t>(id)])];
      pairs_[static_cast<size_t>(c.first_pair + c.n_pairs++)] = {static_cast<int32_t>(token),
                                                                 static_cast<int32_t>(used)};
    }
  }
  return Status();
}

// Touch what the layer will use, count it, and pin what is resident: the first products' slices are pinned when
// they are acquired, the later ones' here as far as the class has slots to promise.
void MoeLayer::CountAndPin() {
  CacheCounters& counters = cache_->counters();
  for (ChosenExpert& c : chosen_) {
    bool absent = false, loading = false;
    const double time = batch_time_ + c.last_time;
    for (int32_t t : tensor_idxs_) {
      const int64_t slice = Slice(t, c.id);
      absent |= cache_->Absent(slice);
      loading |= !cache_->Resident(slice);
      cache_->TouchSlice(slice, time, c.n_pairs);
    }
    (absent ? counters.misses : loading ? counters.late_hits : counters.hits).fetch_add(1, std::memory_order_relaxed);
  }
  Promise();
  ahead_.clear();
  next_ahead_ = 0;
  is_pinned_.clear();
  for (int32_t t : tensor_idxs_) {
    for (const ChosenExpert& c : chosen_) {
      is_pinned_.push_back(0);
      const int64_t slice = Slice(t, c.id);
      ClassShare& share = shares_[static_cast<size_t>(cache_->ClassIdx(slice))];
      if (cache_->Absent(slice) || (!share.fits && share.n_promised == 0)) {
        ahead_.push_back(slice);
        continue;
      }
      if (!share.fits) --share.n_promised;
      (void)cache_->Acquire(slice);
      pinned_.push_back(slice);
      is_pinned_.back() = 1;
    }
  }
}

// Set slots aside so that several sessions never wait for each other's pins: a layer that fits beside what
// others were promised gets all it needs; one that does not pins a part and streams through the rest. A layer fits in
// all classes or in none: two that each fit in another class could wait for each other's pins forever.
void MoeLayer::Promise() {
  shares_.assign(static_cast<size_t>(cache_->n_classes()), ClassShare());
  for (int32_t t : tensor_idxs_) {
    for (const ChosenExpert& c : chosen_) ++shares_[static_cast<size_t>(cache_->ClassIdx(Slice(t, c.id)))].n_needed;
  }
  bool fits = true;
  for (size_t i = 0; i < shares_.size(); ++i) {
    fits &= shares_[i].n_needed <= cache_->n_slots(static_cast<int>(i)) - cache_->Promised(static_cast<int>(i));
  }
  for (size_t i = 0; i < shares_.size(); ++i) {
    ClassShare& share = shares_[i];
    const int64_t n_slots = cache_->n_slots(static_cast<int>(i));
    int64_t& promised = cache_->Promised(static_cast<int>(i));
    share.fits = fits;
    share.n_promised =
        fits ? share.n_needed : std::clamp<int64_t>(n_slots - promised - StreamingSlots(n_slots), 0, share.n_needed);
    promised += share.n_promised;
    share.n_held = share.n_promised;
  }
}

void MoeLayer::End() {
  if (!active_) return;
  const PhaseScope phase(clock_, EDGEMOE_PHASE_SELECT);
  trace_.End(cache_->counters());
  std::lock_guard<std::mutex> lock(cache_->mutex());
  for (int64_t slice : pinned_) cache_->Release(slice);
  for (size_t i = 0; i < shares_.size(); ++i) cache_->Promised(static_cast<int>(i)) -= shares_[i].n_held;
  pinned_.clear();
  active_ = false;
  cache_->EndLayer(layer_);
}

}  // namespace edgemoe
