// SPDX-License-Identifier: MIT
#include "plugins/ggml/selection.h"

#include <cmath>
#include <vector>

#include "plugins/ggml/edgemoe_ggml.h"

namespace edgemoe_ggml {
namespace {

struct Choosers {
  edgemoe_runtime* runtime = nullptr;
  edgemoe_choosers who = {};
  bool need_logits = false;
  uint64_t n_selections = 0;
  std::vector<uint8_t> resident;  // [expert], as many as the largest layer has
};
thread_local Choosers t_choosers;

// A router's logits, copied before a softmax or sigmoid makes masses of them: their memory may become the masses'.
struct Logits {
  const ggml_tensor* masses = nullptr;
  std::vector<float> values;  // [n_tokens][n_experts]
};
thread_local Logits t_logits;

// The last choice, until the layer's products have taken it.
struct Chosen {
  int32_t layer = -1;
  int64_t n_tokens = 0;
  int64_t n_used = 0;
  std::vector<int32_t> ids;  // [n_tokens][n_used]
};
thread_local Chosen t_chosen;

// A sorted list of experts for each token, and where the mixing weights are gathered by it.
struct Choice {
  int32_t layer = 0;
  int32_t n_used = 0;
  const ggml_tensor* order = nullptr;   // [n_experts, n_tokens] i32
  const ggml_tensor* masses = nullptr;  // [1, n_experts, n_tokens] f32
  bool are_masses_free = false;         // read by nobody but for the mixing weights
  bool are_probabilities = false;
  bool are_logits = false;
};

const ggml_tensor* SkipViews(const ggml_tensor* t) {
  while (t != nullptr && (t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE)) t = t->src[0];
  return t;
}

// Whether scores are a softmax as it came, or one from which DeepSeek's groups were masked out, and no bias was added.
bool AreProbabilities(const ggml_tensor* t) {
  for (int i = 0; t != nullptr && i < kScoreNodes; ++i, t = t->src[0]) {
    if (t->op == GGML_OP_SOFT_MAX) return true;
    const bool is_same =
        t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_SET_ROWS || t->op == GGML_OP_GET_ROWS;
    if (!is_same) return false;
  }
  return false;
}

bool IsRows(const ggml_tensor* t, ggml_type type) {
  return t->type == type && ggml_is_contiguous(t) && t->ne[2] == 1 && t->ne[3] == 1;
}

// Whether from `begin` on nothing but `reader` reads the memory of `t`.
bool IsReadOnlyBy(const ggml_cgraph* graph, int begin, const ggml_tensor* t, const ggml_tensor* reader) {
  const ggml_tensor* const memory = SkipViews(t);
  for (int i = begin; i < graph->n_nodes; ++i) {
    const ggml_tensor* node = graph->nodes[i];
    if (node == reader || IsView(node)) continue;
    for (int k = 0; k < GGML_MAX_SRC && node->src[k] != nullptr; ++k) {
      if (SkipViews(node->src[k]) == memory) return false;
    }
  }
  return true;
}

// Scores of groups are sorted as well: no mixing weights are gathered by those.
bool FindWeights(const ggml_cgraph* graph, int begin, Choice* choice) {
  const int64_t n_experts = choice->order->ne[0], n_tokens = choice->order->ne[1];
  for (int i = begin; i < graph->n_nodes; ++i) {
    const ggml_tensor* node = graph->nodes[i];
    if (node->op == GGML_OP_ARGSORT) return false;
    if (node->op != GGML_OP_GET_ROWS) continue;
    const ggml_tensor* masses = node->src[0];
    const ggml_tensor* ids = node->src[1];
    if (ids->op != GGML_OP_VIEW || ids->view_src != choice->order || ids->view_offs != 0) continue;
    if (masses->type != GGML_TYPE_F32 || !ggml_is_contiguous(masses) || masses->ne[0] != 1 ||
        masses->ne[1] != n_experts || masses->ne[2] != n_tokens || ids->ne[1] != n_tokens) {
      return false;
    }
    choice->masses = masses;
    choice->are_masses_free = IsReadOnlyBy(graph, begin, masses, node);
    choice->n_used = static_cast<int32_t>(ids->ne[0]);
    for (int k = i + 1; k < graph->n_nodes && !choice->are_logits; ++k) {
      choice->are_logits = graph->nodes[k]->op == GGML_OP_SOFT_MAX && SkipViews(graph->nodes[k]->src[0]) == node;
    }
    return true;
  }
  return false;
}

bool FindChoice(const ggml_cgraph* graph, int i, Choice* choice) {
  const ggml_tensor* node = graph->nodes[i];
  if (node->op != GGML_OP_ARGSORT || node->op_params[0] != GGML_SORT_ORDER_DESC) return false;
  if (!IsRows(node, GGML_TYPE_I32) || !IsRows(node->src[0], GGML_TYPE_F32)) return false;
  const ggml_tensor* router = FindRouter(node->src[0], static_cast<int64_t>(t_choosers.resident.size()));
  if (router == nullptr || router->ne[0] != node->ne[0]) return false;
  choice->layer = LayerOf(router->src[0]);
  if (choice->layer < 0) return false;
  choice->order = node;
  choice->are_probabilities = AreProbabilities(node->src[0]);
  return FindWeights(graph, i + 1, choice);
}

// Whether masses are made of a router's logits here.
bool MakesMasses(const ggml_tensor* node) {
  const bool is_softmax = node->op == GGML_OP_SOFT_MAX && node->src[1] == nullptr;
  const bool is_sigmoid = node->op == GGML_OP_UNARY && node->op_params[0] == GGML_UNARY_OP_SIGMOID;
  if (!(is_softmax || is_sigmoid) || !IsRows(node->src[0], GGML_TYPE_F32)) return false;
  const ggml_tensor* router = FindRouter(node->src[0], static_cast<int64_t>(t_choosers.resident.size()));
  return router != nullptr && router->ne[0] == node->ne[0] && LayerOf(router->src[0]) >= 0;
}

void KeepLogits(const ggml_tensor* masses) {
  const ggml_tensor* logits = masses->src[0];
  const float* const values = static_cast<const float*>(logits->data);
  t_logits.masses = masses;
  t_logits.values.assign(values, values + ggml_nelements(logits));
}

// [n_tokens][n_experts]; null where they are not known.
const float* LogitsOf(const Choice& choice) {
  if (choice.are_logits) return static_cast<const float*>(choice.masses->data);
  return t_logits.masses == SkipViews(choice.masses) ? t_logits.values.data() : nullptr;
}

// Give the places that stay empty no mixing weight.
void Empty(const Choice& choice, const edgemoe_selection& selection, const int32_t* ids) {
  float* const masses = const_cast<float*>(selection.masses);
  for (int32_t i = 0; i < choice.n_used; ++i) {
    if (ids[i] == EDGEMOE_NO_EXPERT) masses[selection.order[i]] = choice.are_logits ? -INFINITY : 0.0f;
  }
}

bool SelectFor(const Choice& choice, int64_t token, int32_t* ids) {
  const int32_t n_experts = static_cast<int32_t>(choice.order->ne[0]);
  edgemoe_selection selection = {};
  selection.layer = choice.layer;
  selection.n_experts = n_experts;
  selection.n_used = choice.n_used;
  selection.are_probabilities = choice.are_probabilities ? 1 : 0;
  selection.are_logits = choice.are_logits ? 1 : 0;
  selection.scores = static_cast<const float*>(choice.order->src[0]->data) + token * n_experts;
  selection.masses = static_cast<const float*>(choice.masses->data) + token * n_experts;
  selection.resident = t_choosers.resident.data();
  selection.order = static_cast<int32_t*>(choice.order->data) + token * n_experts;
  if (t_choosers.need_logits) selection.logits = LogitsOf(choice) + token * n_experts;
  int32_t n_kept = choice.n_used;
  if (t_choosers.who.count != nullptr) {
    if (edgemoe_count_select(t_choosers.who.count, &selection, &n_kept, nullptr) != EDGEMOE_OK) return false;
    selection.n_used = n_kept;
  }
  if (t_choosers.who.reuse != nullptr) {
    if (edgemoe_reuse_select(t_choosers.who.reuse, &selection, nullptr) != EDGEMOE_OK) return false;
  }
  for (int32_t i = 0; i < choice.n_used; ++i) ids[i] = i < n_kept ? selection.order[i] : EDGEMOE_NO_EXPERT;
  if (t_choosers.who.miss != nullptr) {
    if (edgemoe_miss_select(t_choosers.who.miss, &selection, ids, nullptr) != EDGEMOE_OK) return false;
    // What is waited for is there for the tokens that come after in the batch.
    for (int32_t i = 0; i < n_kept; ++i) {
      if (ids[i] == selection.order[i]) t_choosers.resident[static_cast<size_t>(ids[i])] = 1;
    }
  }
  Empty(choice, selection, ids);
  ++t_choosers.n_selections;
  return true;
}

bool Apply(const Choice& choice) {
  const int32_t n_experts = static_cast<int32_t>(choice.order->ne[0]);
  uint8_t* const resident = t_choosers.resident.data();
  if (edgemoe_runtime_residents(t_choosers.runtime, choice.layer, resident, n_experts) != n_experts) return true;
  const bool may_empty = t_choosers.who.count != nullptr || t_choosers.who.miss != nullptr;
  if (may_empty && !choice.are_masses_free) return true;
  if (t_choosers.need_logits && LogitsOf(choice) == nullptr) return true;
  t_chosen.layer = choice.layer;
  t_chosen.n_tokens = choice.order->ne[1];
  t_chosen.n_used = choice.n_used;
  t_chosen.ids.resize(static_cast<size_t>(t_chosen.n_tokens * t_chosen.n_used));
  for (int64_t token = 0; token < t_chosen.n_tokens; ++token) {
    if (!SelectFor(choice, token, t_chosen.ids.data() + token * t_chosen.n_used)) return false;
  }
  return true;
}

}  // namespace

bool HasChoosers() { return t_choosers.runtime != nullptr; }

ggml_status ComputeChosen(GraphCompute compute, ggml_backend_t cpu, ggml_cgraph* graph) {
  if (!HasChoosers()) return compute(cpu, graph);
  int begin = 0;
  const auto compute_until = [&](int end) {
    if (begin == end) return GGML_STATUS_SUCCESS;
    if (begin == 0 && end == graph->n_nodes) return compute(cpu, graph);
    ggml_cgraph view = ggml_graph_view(graph, begin, end);
    begin = end;
    return compute(cpu, &view);
  };
  for (int i = 0; i < graph->n_nodes; ++i) {
    if (t_choosers.need_logits && MakesMasses(graph->nodes[i])) {
      if (const ggml_status status = compute_until(i); status != GGML_STATUS_SUCCESS) return status;
      KeepLogits(graph->nodes[i]);
    }
    Choice choice;
    if (!FindChoice(graph, i, &choice)) continue;
    if (const ggml_status status = compute_until(i + 1); status != GGML_STATUS_SUCCESS) return status;
    if (!Apply(choice)) return GGML_STATUS_FAILED;
  }
  return compute_until(graph->n_nodes);
}

const edgemoe_choosers* ThoseWhoChoose() { return &t_choosers.who; }

const int32_t* TakeChosen(const edgemoe_runtime* runtime, int32_t layer, int64_t n_tokens, int64_t n_used) {
  const bool is_it = runtime == t_choosers.runtime && layer == t_chosen.layer && n_tokens == t_chosen.n_tokens &&
                     n_used == t_chosen.n_used;
  t_chosen.layer = -1;
  return is_it ? t_chosen.ids.data() : nullptr;
}

}  // namespace edgemoe_ggml

uint64_t edgemoe_ggml_set_choosers(edgemoe_runtime* runtime, const edgemoe_choosers* choosers, int32_t n_experts) {
  edgemoe_ggml::Choosers& mine = edgemoe_ggml::t_choosers;
  const uint64_t n_selections = mine.n_selections;
  mine.runtime = runtime;
  mine.who = runtime != nullptr ? *choosers : edgemoe_choosers{};
  mine.need_logits = mine.who.count != nullptr && edgemoe_count_needs_logits(mine.who.count) != 0;
  mine.n_selections = 0;
  mine.resident.resize(static_cast<size_t>(n_experts));
  edgemoe_ggml::t_chosen.layer = -1;
  edgemoe_ggml::t_logits.masses = nullptr;
  return n_selections;
}
