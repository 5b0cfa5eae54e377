// SPDX-License-Identifier: MIT
// prefetch.h: what the layers of one runtime share for reading ahead: who predicts, how deep, and what was predicted.
// Guarded by the cache's mutex, but for the predictor, which is immutable, and the corrections, which have their own.
#ifndef EDGEMOE_CORE_PREFETCH_H_
#define EDGEMOE_CORE_PREFETCH_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "core/corrections.h"
#include "core/expert_cache.h"
#include "core/foreseen_choice.h"
#include "core/predictor.h"
#include "core/prefetch_controller.h"

namespace edgemoe {

// A prompt's layer that uses this share of its experts is followed by one that needs nearly all.
inline constexpr double kNearlyAll = 0.75;

// What one thread foresees, kept so that decoding allocates nothing.
struct Foresight {
  struct Layer {
    int layer = -1;
    // The likeliest first; ids of low-bit copies as edgemoe_session_begin_layer takes them.
    std::vector<int32_t> experts;
    std::vector<uint8_t> resident;  // [expert], for choosers
  };
  Layer layers[Predictor::kMaxDepth];
  int n_layers = 0;
  std::vector<char> is_listed;  // [id]
  Predictor::Scratch scratch;
  std::vector<int32_t> corrected;  // one token's experts, the likeliest first
  ForeseenChoice choice;
  // Of the last layers, until the layers that they are of have chosen.
  Guess guesses[Predictor::kMaxDepth * Predictor::kMaxDepth];
  size_t next_guess = 0;
};
// What a layer chose, or the row of corrections that stands for a token: [n_tokens][n_used]; null: neither.
struct Choice {
  const int32_t* ids = nullptr;
  int64_t n_used = 0;
};

class Prefetch {
 public:
  Predictor predictor;
  Corrections corrections;
  PrefetchController controller;
  std::atomic<uint64_t> predicted{0}, predicted_right{0}, chosen{0};

  // Before the first layer.
  Status Start(const ExpertFile& file, const edgemoe_router* routers, int n_routers, int max_depth, bool adaptive);
  // The present states x of n_tokens tokens in `layer`, or Predictor::kToken, and what it chose for them -> the experts
  // of the next `depth` layers. choosers: who has a say there, with the residents that SeeResidents has seen.
  void Foresee(int layer, int depth, const char* x, uint64_t x_token_bytes, int64_t n_tokens, const Choice& choice,
               const edgemoe_choosers& choosers, Foresight* f);
  // A layer has chosen the ids with chosen_of_id >= 0, copies among them: learn from what was foreseen of it.
  void Learn(int layer, const std::vector<int32_t>& chosen_of_id, Foresight* f);
  // A prompt's layer has chosen n_chosen of its n_experts: the experts of the next one. It needs nearly all where this
  // one did; otherwise those that some of the tokens, evenly spread, are predicted to choose.
  void ForeseePrompt(int layer, size_t n_chosen, size_t n_experts, const char* x, uint64_t x_token_bytes,
                     int64_t n_tokens, Foresight* f);
  // The tokens that come next, at most kMostDecodeTokens, by their embeddings [n_tokens][n_cols]: hints for the first
  // layers.
  void ForeseeTokens(ExpertCache* cache, const float* embeddings, int64_t n_tokens, const edgemoe_choosers& choosers);

  // --- with the cache's lock ---
  // A batch begins, or the rest of one, as when only a prompt's last token goes through its last layer; returns the
  // depth to look ahead from its layers. The controller, which knows decoding only, has no say in a prompt.
  int BeginBatch(ExpertCache* cache, int64_t n_tokens, bool is_rest = false);
  // A layer begins with these tensors, in the order of use, and has chosen the experts with chosen_of_expert >= 0.
  void BeginLayer(int layer, const std::vector<int32_t>& tensor_idxs, const std::vector<int32_t>& chosen_of_expert,
                  size_t n_chosen);
  // For the layers that Foresee is going to name experts of, if somebody has a say in them.
  void SeeResidents(ExpertCache* cache, int layer, int depth, const edgemoe_choosers& choosers, Foresight* f) const;
  // counts: whether to compare with what is chosen then.
  void SetHints(ExpertCache* cache, const Foresight& foresight, bool counts);
  // [Predictor::kMaxDepth] the experts that decoding has foreseen of a layer since it last began, from one layer ahead
  // of it and from two, the likeliest first; empty: nobody looked. Null: nobody ever does.
  const std::vector<int32_t>* Foreseen(int layer) const {
    const size_t first = static_cast<size_t>(layer) * Predictor::kMaxDepth;
    return first < foreseen_.size() ? &foreseen_[first] : nullptr;
  }

 private:
  // scratch.scores of the layer `distance` layers on, and `order`, all its experts by falling score -> who is chosen.
  void Choose(int layer, int distance, const edgemoe_choosers& choosers, Foresight* f,
              std::vector<int32_t>* order) const;
  void KeepGuess(int layer, int distance, int target, const int32_t* ids, int64_t n_used, Foresight* f) const;

  std::vector<int> n_used_of_layer_;  // immutable after Start
  // In the order of use, as layers have been seen to begin; until the first batch has ended, as their names suggest.
  std::vector<std::vector<int32_t>> tensors_of_layer_;
  std::vector<char> has_begun_;          // [layer]
  std::vector<int> n_experts_of_layer_;  // immutable after Start
  int max_depth_ = 0;
  int n_batches_ = 0;
  std::vector<int64_t> hints_;
  std::vector<int32_t> predicted_experts_;  // of predicted_layer_, which has not begun yet
  int predicted_layer_ = -1;
  std::vector<std::vector<int32_t>> foreseen_;  // [layer][distance - 1], as Foreseen says

  int last_token_target_ = -1;  // the last layer that is foreseen from tokens; immutable after Start
  std::mutex token_mutex_;      // of what is below
  Foresight token_foresight_;
  std::vector<float> token_state_;
  std::vector<int32_t> token_rows_;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_PREFETCH_H_
