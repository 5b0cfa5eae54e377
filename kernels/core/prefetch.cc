// SPDX-License-Identifier: MIT
#include "core/prefetch.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <numeric>

namespace edgemoe {
namespace {

// Of a prompt, to predict from: 25 us each on the thread that computes (OLMoE's routers, AVX-512).
constexpr int64_t kSampledTokens = 32;

bool HaveASay(const edgemoe_choosers& choosers) {
  return choosers.count != nullptr || choosers.reuse != nullptr || choosers.miss != nullptr;
}

}  // namespace

int Prefetch::BeginBatch(ExpertCache* cache, int64_t n_tokens, bool is_rest) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  const double now_us = std::chrono::duration<double, std::micro>(now).count();
  controller.OnBatch(now_us, cache->needed_bytes(), n_tokens == 1 && !is_rest);
  const bool in_prompt = n_tokens > kMostDecodeTokens;
  if (++n_batches_ == 2) {
    // Layers that the first batch did not use are no part of the graph: heads for drafts, say.
    for (size_t i = 0; i < tensors_of_layer_.size(); ++i) {
      if (!has_begun_[i]) tensors_of_layer_[i].clear();
    }
  }
  const int wanted = in_prompt ? std::min(max_depth_, 1) : controller.depth();
  const int depth = cache->HoldsEverything() ? 0 : wanted;
  if (depth == 0) {
    // Nobody will replace what the batch before has left.
    cache->SetHints({});
    predicted_layer_ = -1;
  }
  return depth;
}

void Prefetch::BeginLayer(int layer, const std::vector<int32_t>& tensor_idxs,
                          const std::vector<int32_t>& chosen_of_expert, size_t n_chosen) {
  if (tensors_of_layer_.size() <= static_cast<size_t>(layer)) {  // not started: nobody looks ahead
    tensors_of_layer_.resize(static_cast<size_t>(layer) + 1);
    has_begun_.resize(tensors_of_layer_.size());
  }
  has_begun_[static_cast<size_t>(layer)] = 1;
  for (size_t i = 0; i < Predictor::kMaxDepth; ++i) {
    const size_t idx = static_cast<size_t>(layer) * Predictor::kMaxDepth + i;
    if (idx < foreseen_.size()) foreseen_[idx].clear();
  }
  auto& tensors = tensors_of_layer_[static_cast<size_t>(layer)];
  if (tensors != tensor_idxs) tensors = tensor_idxs;
  if (predicted_layer_ != layer) return;
  uint64_t n_right = 0;
  for (int32_t e : predicted_experts_) {
    const size_t i = static_cast<size_t>(e);
    n_right += i < chosen_of_expert.size() && chosen_of_expert[i] >= 0 ? 1 : 0;
  }
  predicted.fetch_add(predicted_experts_.size(), std::memory_order_relaxed);
  predicted_right.fetch_add(n_right, std::memory_order_relaxed);
  chosen.fetch_add(n_chosen, std::memory_order_relaxed);
  predicted_layer_ = -1;
}

void Prefetch::SetHints(ExpertCache* cache, const Foresight& f, bool counts) {
  hints_.clear();
  predicted_layer_ = -1;
  for (int i = 0; i < f.n_layers; ++i) {
    const Foresight::Layer& next = f.layers[i];
    if (static_cast<size_t>(next.layer) >= tensors_of_layer_.size()) break;
    const auto& tensors = tensors_of_layer_[static_cast<size_t>(next.layer)];
    if (tensors.empty()) break;
    // In the order in which the layer will ask: what is multiplied with its input expert by expert, and the last
    // product's slices behind.
    const auto add = [&](int32_t tensor_idx, int32_t id) {
      const ExpertTensor& t = cache->file().tensors()[static_cast<size_t>(tensor_idx)];
      if (id < t.n_experts) {
        hints_.push_back(t.first_slice + id);
      } else if (t.copy >= 0 && id < 2 * t.n_experts) {
        hints_.push_back(cache->file().tensors()[static_cast<size_t>(t.copy)].first_slice + id - t.n_experts);
      }
    };
    for (int32_t e : next.experts) {
      for (size_t t = 0; t + 1 < tensors.size(); ++t) add(tensors[t], e);
    }
    for (int32_t e : next.experts) add(tensors.back(), e);
    if (counts) {
      const size_t idx = static_cast<size_t>(next.layer) * Predictor::kMaxDepth + static_cast<size_t>(i);
      std::vector<int32_t>& foreseen = foreseen_[idx];
      const int32_t n_experts = n_experts_of_layer_[static_cast<size_t>(next.layer)];
      foreseen.clear();
      for (int32_t id : next.experts) {
        const int32_t e = id < n_experts ? id : id - n_experts;  // a low-bit copy stands for its expert
        if (std::find(foreseen.begin(), foreseen.end(), e) == foreseen.end()) foreseen.push_back(e);
      }
    }
    if (i == 0 && counts) {
      predicted_layer_ = next.layer;
      predicted_experts_.assign(next.experts.begin(), next.experts.end());
    }
  }
  cache->SetHints(hints_);
}

Status Prefetch::Start(const ExpertFile& file, const edgemoe_router* routers, int n_routers, int max_depth,
                       bool adaptive) {
  if (Status s = predictor.Set(routers, n_routers, max_depth); !s.ok()) return s;
  int n_layers = 0;
  for (const ExpertTensor& t : file.tensors()) n_layers = std::max(n_layers, t.layer + 1);
  n_used_of_layer_.assign(static_cast<size_t>(n_layers), 0);
  n_experts_of_layer_.assign(static_cast<size_t>(n_layers), 0);
  tensors_of_layer_.assign(static_cast<size_t>(n_layers), {});
  has_begun_.assign(static_cast<size_t>(n_layers), 0);
  for (size_t i = 0; i < file.tensors().size(); ++i) {
    const ExpertTensor& t = file.tensors()[i];
    if (t.copy_of >= 0) continue;
    const size_t layer = static_cast<size_t>(t.layer);
    n_used_of_layer_[layer] = t.n_experts_used;
    n_experts_of_layer_[layer] = t.n_experts;
    tensors_of_layer_[layer].push_back(static_cast<int32_t>(i));
  }
  for (auto& tensors : tensors_of_layer_) {
    std::stable_partition(tensors.begin(), tensors.end(), [&](int32_t t) {
      return file.tensors()[static_cast<size_t>(t)].name.find("down") == std::string::npos;
    });
  }
  corrections.Start(routers, n_routers, max_depth);
  last_token_target_ = predictor.TargetOf(Predictor::kToken, std::min(std::max(max_depth, 1), n_routers));
  max_depth_ = max_depth;
  // Decoding allocates nothing.
  size_t n_slices = 0;
  for (const ExpertTensor& t : file.tensors()) n_slices += static_cast<size_t>(t.n_experts);
  hints_.reserve(n_slices);
  predicted_experts_.reserve(2 * static_cast<size_t>(predictor.max_experts()));
  foreseen_.assign(max_depth > 0 ? static_cast<size_t>(n_layers) * Predictor::kMaxDepth : 0, {});
  for (auto& experts : foreseen_) experts.reserve(static_cast<size_t>(predictor.max_experts()));
  controller.Start(n_routers > 0 ? max_depth : 0, adaptive);
  return Status();
}

void Prefetch::SeeResidents(ExpertCache* cache, int layer, int depth, const edgemoe_choosers& choosers,
                            Foresight* f) const {
  if (!HaveASay(choosers)) return;
  for (int distance = 1; distance <= depth; ++distance) {
    const int target = predictor.TargetOf(layer, distance);
    if (target < 0 || static_cast<size_t>(target) >= n_experts_of_layer_.size()) return;
    std::vector<uint8_t>& resident = f->layers[distance - 1].resident;
    resident.assign(static_cast<size_t>(predictor.max_experts()), 0);
    cache->ReadResidents(target, resident.data(), n_experts_of_layer_[static_cast<size_t>(target)]);
  }
}

void Prefetch::Choose(int layer, int distance, const edgemoe_choosers& choosers, Foresight* f,
                      std::vector<int32_t>* order) const {
  const size_t target = static_cast<size_t>(predictor.TargetOf(layer, distance));
  const float* const scores = f->scratch.scores.data();
  edgemoe_selection s = {};
  s.layer = static_cast<int32_t>(target);
  s.n_experts = n_experts_of_layer_[target];
  s.n_used = n_used_of_layer_[target];
  s.are_logits = predictor.Masses(layer, distance, scores, f->choice.masses()) ? 1 : 0;
  s.scores = scores;
  s.masses = f->choice.masses();
  s.resident = f->layers[distance - 1].resident.data();
  f->choice.Choose(choosers, s, order);
}

void Prefetch::Foresee(int layer, int depth, const char* x, uint64_t x_token_bytes, int64_t n_tokens,
                       const Choice& choice, const edgemoe_choosers& choosers, Foresight* f) {
  f->n_layers = 0;
  const bool is_left_to_model = !HaveASay(choosers);
  predictor.Reserve(&f->scratch);
  if (!is_left_to_model) f->choice.Reserve(predictor.max_experts());
  const size_t n_most = static_cast<size_t>(std::max<int64_t>(predictor.max_experts(), choice.n_used));
  f->corrected.reserve(n_most);
  for (Guess& guess : f->guesses) {
    for (std::vector<int32_t>* experts : {&guess.chosen, &guess.plain, &guess.corrected}) experts->reserve(n_most);
  }
  for (int distance = 1; distance <= depth; ++distance) {
    Foresight::Layer& next = f->layers[distance - 1];
    next.layer = predictor.TargetOf(layer, distance);
    if (next.layer < 0 || static_cast<size_t>(next.layer) >= n_used_of_layer_.size()) return;
    const int n_experts = n_experts_of_layer_[static_cast<size_t>(next.layer)];
    // Choosers see all of them.
    const int n_ranked = is_left_to_model ? n_used_of_layer_[static_cast<size_t>(next.layer)] : n_experts;
    f->is_listed.assign(2 * static_cast<size_t>(predictor.max_experts()), 0);
    next.experts.clear();
    next.experts.reserve(2 * static_cast<size_t>(predictor.max_experts()));
    for (int64_t t = 0; t < n_tokens; ++t) {
      const char* const row = x + static_cast<uint64_t>(t) * x_token_bytes;
      predictor.Rank(layer, distance, n_ranked, reinterpret_cast<const float*>(row), &f->scratch);
      if (!is_left_to_model) Choose(layer, distance, choosers, f, &f->scratch.order);
      const std::vector<int32_t>* experts = &f->scratch.order;
      if (choice.ids != nullptr) {
        const int32_t* const ids = choice.ids + t * choice.n_used;
        const bool is_better = corrections.Apply(layer, distance, ids, choice.n_used, f->scratch.scores.data());
        Predictor::Best(f->scratch.scores.data(), n_experts, n_ranked, &f->corrected);
        if (!is_left_to_model) Choose(layer, distance, choosers, f, &f->corrected);
        if (n_tokens == 1) KeepGuess(layer, distance, next.layer, ids, choice.n_used, f);
        if (is_better) experts = &f->corrected;
      }
      for (int32_t e : *experts) {
        if (f->is_listed[static_cast<size_t>(e)]) continue;
        f->is_listed[static_cast<size_t>(e)] = 1;
        next.experts.push_back(e);
        // What is waited for is there for the tokens that come after in the batch.
        if (choosers.miss != nullptr && e < n_experts) next.resident[static_cast<size_t>(e)] = 1;
      }
    }
    ++f->n_layers;
  }
}

void Prefetch::KeepGuess(int layer, int distance, int target, const int32_t* ids, int64_t n_used, Foresight* f) const {
  const int n_experts = n_experts_of_layer_[static_cast<size_t>(target)];
  const auto keep = [n_experts](const std::vector<int32_t>& named, std::vector<int32_t>* experts) {
    experts->assign(named.begin(), named.end());
    for (int32_t& e : *experts) e = e < n_experts ? e : e - n_experts;
  };
  Guess& guess = f->guesses[f->next_guess++ % std::size(f->guesses)];
  guess.layer = layer;
  guess.distance = distance;
  guess.target = target;
  guess.chosen.assign(ids, ids + n_used);
  keep(f->scratch.order, &guess.plain);
  keep(f->corrected, &guess.corrected);
}

void Prefetch::Learn(int layer, const std::vector<int32_t>& chosen_of_id, Foresight* f) {
  const auto learn = [&](Foresight* from) {
    for (Guess& guess : from->guesses) {
      if (guess.target < 0) continue;
      if (guess.target == layer) corrections.Learn(guess, chosen_of_id);
      // Those of a layer at or behind this one are of a batch that has ended.
      if (guess.target <= layer || guess.layer >= layer) guess.target = -1;
    }
  };
  learn(f);
  if (layer > last_token_target_) return;
  std::lock_guard<std::mutex> lock(token_mutex_);
  learn(&token_foresight_);
}

void Prefetch::ForeseePrompt(int layer, size_t n_chosen, size_t n_experts, const char* x, uint64_t x_token_bytes,
                             int64_t n_tokens, Foresight* f) {
  f->n_layers = 0;
  if (static_cast<double>(n_chosen) < kNearlyAll * static_cast<double>(n_experts)) {
    const int64_t n_sampled = std::min(n_tokens, kSampledTokens);
    const uint64_t stride = static_cast<uint64_t>(n_tokens / n_sampled);
    if (x != nullptr) Foresee(layer, 1, x, stride * x_token_bytes, n_sampled, {}, {}, f);
    return;
  }
  size_t next = static_cast<size_t>(layer) + 1;
  while (next < tensors_of_layer_.size() && tensors_of_layer_[next].empty()) ++next;
  if (next == tensors_of_layer_.size()) return;
  f->layers[0].layer = static_cast<int>(next);
  f->layers[0].experts.resize(static_cast<size_t>(n_experts_of_layer_[next]));
  std::iota(f->layers[0].experts.begin(), f->layers[0].experts.end(), 0);
  f->n_layers = 1;
}

void Prefetch::ForeseeTokens(ExpertCache* cache, const float* embeddings, int64_t n_tokens,
                             const edgemoe_choosers& choosers) {
  std::lock_guard<std::mutex> token_lock(token_mutex_);
  int depth = 0;
  {
    std::lock_guard<std::mutex> lock(cache->mutex());
    // The first layer of the batch before went by the depth of its own token; so does the one that comes.
    depth = cache->HoldsEverything() ? 0 : controller.depth();
    SeeResidents(cache, Predictor::kToken, depth, choosers, &token_foresight_);
  }
  if (depth == 0) return;
  const size_t n_cols = static_cast<size_t>(predictor.n_cols());
  token_rows_.reserve(static_cast<size_t>(kMostDecodeTokens));
  token_state_.reserve(n_cols * static_cast<size_t>(kMostDecodeTokens));
  token_state_.resize(n_cols * static_cast<size_t>(n_tokens));
  for (size_t begin = 0; begin < token_state_.size(); begin += n_cols) {
    double sum = 0.0;
    for (size_t i = begin; i < begin + n_cols; ++i) sum += static_cast<double>(embeddings[i]) * embeddings[i];
    const float scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(n_cols) + 1e-12));
    for (size_t i = begin; i < begin + n_cols; ++i) token_state_[i] = embeddings[i] * scale;
  }
  token_rows_.clear();
  for (int64_t t = 0; t < n_tokens; ++t) {
    token_rows_.push_back(Corrections::TokenRow(embeddings + static_cast<size_t>(t) * n_cols, predictor.n_cols()));
  }
  for (Guess& guess : token_foresight_.guesses) guess.target = -1;
  Foresee(Predictor::kToken, depth, reinterpret_cast<const char*>(token_state_.data()), n_cols * sizeof(float),
          n_tokens, {token_rows_.data(), 1}, choosers, &token_foresight_);
  std::lock_guard<std::mutex> lock(cache->mutex());
  SetHints(cache, token_foresight_, true);
}

}  // namespace edgemoe
