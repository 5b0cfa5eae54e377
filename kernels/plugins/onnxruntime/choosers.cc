// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/choosers.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace edgemoe_ort {
namespace {

// Scores that exporters give to experts which may not be chosen: -1e4 (onnxruntime-genai's LFM2), -1e30 (ours).
constexpr float kNoScore = -1e4f;
// The paper's J, as edgemoe/reuse.py has it: 1 where experts are few and large, else 2.
constexpr int64_t kFewExperts = 8;

void Check(int32_t code, const edgemoe_error& error) {
  if (code != EDGEMOE_OK) throw Error(error.message);
}

int DefaultTopJ(const std::vector<QmoeNode>& nodes) {
  int64_t n_experts = 0, n_used = std::numeric_limits<int64_t>::max();
  for (const QmoeNode& n : nodes) {
    n_experts = std::max(n_experts, n.n_experts);
    n_used = std::min(n_used, n.n_used);
  }
  const int64_t wanted = n_experts <= kFewExperts ? 1 : 2;
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, n_used - 1)));
}

// Whether a node may tell the scores of experts that it does not choose.
bool HasScores(const QmoeNode& node, const Router& router) {
  return node.router != node.router_weights && !router.are_of_chosen;
}

// Scores that mixing weights are the softmax of are logits, unless the graph shows something else.
bool AreLogits(const QmoeNode& node, const Router& router) {
  return router.is_known ? router.are_logits : node.router_weights.empty();
}

}  // namespace

Choosers::Choosers(const ChooserOptions& options, const std::vector<QmoeNode>& nodes,
                   const std::vector<Router>& routers) {
  bool has_scores = false;
  for (size_t i = 0; i < nodes.size(); ++i) has_scores |= HasScores(nodes[i], routers[i]);
  if (options.has_reuse && !has_scores) {
    throw Error(
        "cannot bias routing: the QMoE nodes are given scores of the experts that they choose alone; export the "
        "router's own scores as input 1 and mixing weights as input 14, or use reuse_bias 'off'");
  }
  if (options.has_count && options.count_rule == EDGEMOE_COUNT_MAP) {
    for (size_t i = 0; i < nodes.size(); ++i) {
      if (AreLogits(nodes[i], routers[i])) continue;
      throw Error("cannot count experts by their logits: node " + nodes[i].name +
                  " gets scores that are none, as far as the graph shows; use another expert_top_k");
    }
  }
  for (const Router& r : routers) are_probabilities_.push_back(r.are_probabilities ? 1 : 0);
  try {
    Open(options, nodes);
  } catch (...) {
    Close();
    throw;
  }
}

Choosers::~Choosers() { Close(); }

void Choosers::Close() {
  if (count_ != nullptr) edgemoe_count_close(count_);
  if (reuse_ != nullptr) edgemoe_reuse_close(reuse_);
  if (miss_ != nullptr) edgemoe_miss_close(miss_);
}

void Choosers::Open(const ChooserOptions& options, const std::vector<QmoeNode>& nodes) {
  int32_t n_experts = 0, n_used = 0;
  for (const QmoeNode& n : nodes) {
    n_experts = std::max(n_experts, static_cast<int32_t>(n.n_experts));
    n_used = std::max(n_used, static_cast<int32_t>(n.n_used));
  }
  const auto n_layers = static_cast<int32_t>(nodes.size());
  edgemoe_error error = {};
  if (options.has_count) {
    if (options.n_of_layer > n_used) {
      throw Error("expert_top_k " + std::to_string(options.n_of_layer) + ": expected at most the model's " +
                  std::to_string(n_used));
    }
    const std::vector<int32_t> n_of_layer(nodes.size(), options.n_of_layer);
    edgemoe_count_options o = {};
    o.struct_size = sizeof(o);
    o.rule = options.count_rule;
    o.n_layers = n_layers;
    o.n_experts = n_experts;
    o.n_of_layer = options.count_rule == EDGEMOE_COUNT_OF_LAYER ? n_of_layer.data() : nullptr;
    o.top_p = options.top_p;
    o.n_min = options.n_min;
    o.n_max = options.n_max > 0 ? options.n_max : n_used;
    Check(edgemoe_count_open(&o, &count_, &error), error);
  }
  if (options.has_reuse) {
    if (options.top_j > n_used) {
      throw Error("top_j " + std::to_string(options.top_j) + ": expected at most the model's " +
                  std::to_string(n_used) + " experts of a token");
    }
    edgemoe_reuse_options o = {};
    o.struct_size = sizeof(o);
    o.method = options.reuse_method;
    o.n_layers = n_layers;
    o.n_experts = n_experts;
    o.top_j = options.top_j > 0 ? options.top_j : DefaultTopJ(nodes);
    o.strength = options.reuse_bias;
    o.max_mass_moved = options.max_mass_moved;
    o.max_kl = options.max_kl;
    Check(edgemoe_reuse_open(&o, &reuse_, &error), error);
  }
  if (options.skips) {
    edgemoe_miss_options o = {};
    o.struct_size = sizeof(o);
    o.n_layers = n_layers;
    o.n_experts = n_experts;
    o.wait_mass = options.on_miss_mass;
    o.copy_mass = options.on_miss_mass;
    Check(edgemoe_miss_open(&o, &miss_, &error), error);
  }
  resident_.resize(static_cast<size_t>(n_experts));
  order_.resize(static_cast<size_t>(n_experts));
  scores_.resize(static_cast<size_t>(n_experts));
}

void Choosers::Choose(edgemoe_runtime* runtime, int32_t layer, const QmoeNode& node, const float* scores,
                      const float* router_weights, int32_t* experts) {
  const auto n_experts = static_cast<int32_t>(node.n_experts);
  const auto n_used = static_cast<int32_t>(node.n_used);
  edgemoe_runtime_residents(runtime, layer, resident_.data(), n_experts);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int32_t e = 0; e < n_experts; ++e) {
    const auto at = static_cast<size_t>(e);
    const bool has_none =
        !(scores[e] > kNoScore) || std::isinf(scores[e]) || (router_weights != nullptr && router_weights[e] == 0.0f);
    scores_[at] = has_none ? -std::numeric_limits<float>::infinity() : scores[e];
  }
  std::iota(order_.begin(), order_.begin() + n_experts, 0);
  // As the model ranks them, of equal scores the last first; not a number is the lowest, as sorting needs an order.
  const auto rank = [scores](int32_t e) {
    return std::isnan(scores[e]) ? -std::numeric_limits<float>::infinity() : scores[e];
  };
  std::sort(order_.begin(), order_.begin() + n_experts,
            [&](int32_t a, int32_t b) { return rank(a) != rank(b) ? rank(a) > rank(b) : a > b; });
  edgemoe_selection selection = {};
  selection.layer = layer;
  selection.n_experts = n_experts;
  selection.n_used = n_used;
  selection.are_probabilities = are_probabilities_[static_cast<size_t>(layer)];
  selection.are_logits = router_weights == nullptr ? 1 : 0;
  selection.scores = scores_.data();
  selection.masses = router_weights == nullptr ? scores : router_weights;
  selection.resident = resident_.data();
  selection.order = order_.data();
  selection.logits = scores;
  edgemoe_error error = {};
  int32_t n_kept = n_used;
  if (count_ != nullptr) {
    Check(edgemoe_count_select(count_, &selection, &n_kept, &error), error);
    selection.n_used = n_kept;
  }
  if (reuse_ != nullptr) Check(edgemoe_reuse_select(reuse_, &selection, &error), error);
  std::copy_n(order_.begin(), n_kept, experts);
  std::fill(experts + n_kept, experts + n_used, EDGEMOE_NO_EXPERT);
  if (miss_ != nullptr) Check(edgemoe_miss_select(miss_, &selection, experts, &error), error);
}

void Choosers::CountTokens(int64_t n_tokens) {
  const std::lock_guard<std::mutex> lock(mutex_);
  n_tokens_ += static_cast<uint64_t>(n_tokens);
}

void Choosers::Read(edgemoe_ort_counters* counters) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  *counters = {};
  counters->n_tokens = n_tokens_;
  if (count_ != nullptr) edgemoe_count_read_stats(count_, &counters->count);
  if (reuse_ != nullptr) edgemoe_reuse_read_stats(reuse_, &counters->reuse);
  if (miss_ != nullptr) edgemoe_miss_read_stats(miss_, &counters->miss);
}

void Choosers::Reset() {
  const std::lock_guard<std::mutex> lock(mutex_);
  n_tokens_ = 0;
  if (count_ != nullptr) edgemoe_count_reset_stats(count_);
  if (reuse_ != nullptr) edgemoe_reuse_reset_stats(reuse_);
  if (miss_ != nullptr) edgemoe_miss_reset_stats(miss_);
}

}  // namespace edgemoe_ort
