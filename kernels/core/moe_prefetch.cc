// SPDX-License-Identifier: MIT
// moe_prefetch.cc: what a layer foresees for the layers after it, while its own reads are under way.
#include <algorithm>

#include "core/moe_layer.h"

namespace edgemoe {

// With the cache's lock.
void MoeLayer::BeginBatch(int64_t n_tokens) {
  batch_time_ = cache_->AdvanceClock(n_tokens);
  Prefetch& p = *prefetch_;
  const auto now = std::chrono::steady_clock::now();
  if (n_tokens == 1 && p.in_decode) {
    p.controller.OnToken(std::chrono::duration<double, std::micro>(now - p.last_token).count());
  } else {
    p.controller.OnInterruption();
  }
  p.last_token = now;
  p.in_decode = n_tokens == 1;
  const bool is_decode = n_tokens <= kMostDecodeTokens;
  prefetch_depth_ = is_decode && !cache_->HoldsEverything() ? p.controller.depth() : 0;
  predicted_layer_ = -1;
  if (!cache_->HoldsEverything()) cache_->SetHints({}, batch_time_);
}

// With the cache's lock: how right was what the layer before foresaw?
void MoeLayer::CheckPrediction(int layer) {
  Prefetch& p = *prefetch_;
  if (p.tensors_of_layer.size() <= static_cast<size_t>(layer))
    p.tensors_of_layer.resize(static_cast<size_t>(layer) + 1);
  auto& tensors = p.tensors_of_layer[static_cast<size_t>(layer)];
  if (tensors != tensor_idxs_) tensors = tensor_idxs_;
  is_predicted_ = prefetch_depth_ == 0;
  if (predicted_layer_ != layer) return;
  uint64_t n_right = 0;
  for (int32_t e : predicted_) n_right += chosen_of_expert_[static_cast<size_t>(e)] >= 0 ? 1 : 0;
  p.predicted.fetch_add(predicted_.size(), std::memory_order_relaxed);
  p.predicted_right.fetch_add(n_right, std::memory_order_relaxed);
  p.chosen.fetch_add(chosen_.size(), std::memory_order_relaxed);
}

void MoeLayer::Predict() {
  if (is_predicted_) return;
  is_predicted_ = true;
  const edgemoe_matmul* const end = matmuls_ + n_matmuls_;
  const edgemoe_matmul* const m = std::find_if(matmuls_, end, [](const edgemoe_matmul& p) { return p.x_n_used == 1; });
  const Predictor& predictor = prefetch_->predictor;
  hints_.clear();
  predicted_layer_ = -1;
  if (m != end && m->n_cols == predictor.n_cols()) {
    predictor.Reserve(&scratch_);
    for (int distance = 1; distance <= prefetch_depth_; ++distance) {
      const int target = predictor.TargetOf(layer_, distance);
      if (target < 0) break;
      is_ranked_.assign(static_cast<size_t>(predictor.max_experts()), 0);
      predicted_ahead_.clear();
      for (int64_t t = 0; t < last_n_tokens_; ++t) {
        const auto* const x = reinterpret_cast<const float*>(reinterpret_cast<const char*>(m->x) +
                                                             static_cast<uint64_t>(t) * m->x_token_bytes);
        predictor.Rank(layer_, distance, static_cast<int>(n_used_), x, &scratch_);
        for (int32_t e : scratch_.order) {
          if (!is_ranked_[static_cast<size_t>(e)]) predicted_ahead_.push_back(e);
          is_ranked_[static_cast<size_t>(e)] = 1;
        }
      }
      AddHints(target);
      if (distance == 1) {
        predicted_layer_ = target;
        predicted_.assign(predicted_ahead_.begin(), predicted_ahead_.end());
      }
    }
  }
  std::lock_guard<std::mutex> lock(cache_->mutex());
  cache_->SetHints(hints_, batch_time_);
}

// The slices of predicted_ahead_ in the order in which the layer will ask for them: what is multiplied with its input
// expert by expert, and the last product's behind.
void MoeLayer::AddHints(int target) {
  const auto& all = prefetch_->tensors_of_layer;
  if (static_cast<size_t>(target) >= all.size() || all[static_cast<size_t>(target)].empty()) return;
  const auto& tensors = all[static_cast<size_t>(target)];
  for (int32_t e : predicted_ahead_) {
    for (size_t i = 0; i + 1 < tensors.size(); ++i) hints_.push_back(Slice(tensors[i], e));
  }
  for (int32_t e : predicted_ahead_) hints_.push_back(Slice(tensors.back(), e));
}

}  // namespace edgemoe
