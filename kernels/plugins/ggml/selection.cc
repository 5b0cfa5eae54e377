// SPDX-License-Identifier: MIT
#include "plugins/ggml/selection.h"

#include <cstdio>
#include <vector>

#include "plugins/ggml/edgemoe_ggml.h"

namespace edgemoe_ggml {
namespace {

struct Biased {
  edgemoe_runtime* runtime = nullptr;
  edgemoe_reuse* reuse = nullptr;
  std::vector<uint8_t> resident;  // [expert], as many as the largest layer has
};
thread_local Biased t_biased;

// A sorted list of experts for each token, and where the mixing weights are gathered by it.
struct Choice {
  int32_t layer = 0;
  int32_t n_used = 0;
  const ggml_tensor* order = nullptr;   // [n_experts, n_tokens] i32
  const ggml_tensor* masses = nullptr;  // [1, n_experts, n_tokens] f32
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
  const ggml_tensor* router = FindRouter(node->src[0], static_cast<int64_t>(t_biased.resident.size()));
  // The same name for every architecture in llama.cpp: blk.LAYER.ffn_gate_inp.weight.
  if (router == nullptr || router->ne[0] != node->ne[0]) return false;
  if (std::sscanf(router->src[0]->name, "blk.%d.", &choice->layer) != 1) return false;
  choice->order = node;
  choice->are_probabilities = AreProbabilities(node->src[0]);
  return FindWeights(graph, i + 1, choice);
}

bool Apply(const Choice& choice) {
  const int32_t n_experts = static_cast<int32_t>(choice.order->ne[0]);
  uint8_t* const resident = t_biased.resident.data();
  if (edgemoe_runtime_residents(t_biased.runtime, choice.layer, resident, n_experts) != n_experts) return true;
  for (int64_t token = 0; token < choice.order->ne[1]; ++token) {
    edgemoe_selection selection = {};
    selection.layer = choice.layer;
    selection.n_experts = n_experts;
    selection.n_used = choice.n_used;
    selection.are_probabilities = choice.are_probabilities ? 1 : 0;
    selection.are_logits = choice.are_logits ? 1 : 0;
    selection.scores = static_cast<const float*>(choice.order->src[0]->data) + token * n_experts;
    selection.masses = static_cast<const float*>(choice.masses->data) + token * n_experts;
    selection.resident = resident;
    selection.order = static_cast<int32_t*>(choice.order->data) + token * n_experts;
    if (edgemoe_reuse_select(t_biased.reuse, &selection, nullptr) != EDGEMOE_OK) return false;
  }
  return true;
}

}  // namespace

bool IsBiased() { return t_biased.reuse != nullptr; }

ggml_status ComputeBiased(GraphCompute compute, ggml_backend_t cpu, ggml_cgraph* graph) {
  if (!IsBiased()) return compute(cpu, graph);
  int begin = 0;
  for (int i = 0; i < graph->n_nodes; ++i) {
    Choice choice;
    if (!FindChoice(graph, i, &choice)) continue;
    ggml_cgraph view = ggml_graph_view(graph, begin, i + 1);
    if (const ggml_status status = compute(cpu, &view); status != GGML_STATUS_SUCCESS) return status;
    if (!Apply(choice)) return GGML_STATUS_FAILED;
    begin = i + 1;
  }
  if (begin == graph->n_nodes) return GGML_STATUS_SUCCESS;
  if (begin == 0) return compute(cpu, graph);
  ggml_cgraph view = ggml_graph_view(graph, begin, graph->n_nodes);
  return compute(cpu, &view);
}

}  // namespace edgemoe_ggml

void edgemoe_ggml_set_reuse(edgemoe_runtime* runtime, edgemoe_reuse* reuse, int32_t n_experts) {
  edgemoe_ggml::t_biased.runtime = runtime;
  edgemoe_ggml::t_biased.reuse = reuse;
  edgemoe_ggml::t_biased.resident.resize(static_cast<size_t>(n_experts));
}
