// SPDX-License-Identifier: MIT
#include "plugins/ggml/cpu_phases.h"

#include <algorithm>
#include <iterator>

#include "plugins/ggml/edgemoe_ggml.h"
#include "plugins/ggml/nodes.h"
#include "plugins/ggml/selection.h"

namespace edgemoe_ggml {
namespace {

struct Profiled {
  edgemoe_runtime* runtime = nullptr;
  int32_t n_experts = 0;
};
thread_local Profiled t_profiled;

bool IsChoice(const ggml_tensor* t) { return t->op == GGML_OP_ARGSORT || t->op == GGML_OP_TOP_K; }

bool FollowsFrom(const ggml_tensor* t, const ggml_tensor* from, int* budget) {
  if (t == nullptr || --*budget < 0) return false;
  if (t == from) return true;
  // The last source first: mixing weights are gathered from scores, whose ancestry is the whole network, by the choice.
  return std::any_of(std::make_reverse_iterator(t->src + GGML_MAX_SRC), std::make_reverse_iterator(t->src),
                     [&](const ggml_tensor* source) { return FollowsFrom(source, from, budget); });
}

// Nodes [router, choice) are scores, [choice, end) the choice and the mixing weights.
struct RouterNodes {
  int router = 0;
  int choice = 0;
  int end = 0;
};

// The first router at or behind `begin`; all fields n_nodes where there is none.
RouterNodes NextRouter(const ggml_cgraph* graph, int begin) {
  const int n = graph->n_nodes;
  for (int last = begin; last < n; ++last) {
    const ggml_tensor* node = graph->nodes[last];
    if (!IsChoice(node) || node->src[0]->ne[0] > t_profiled.n_experts) continue;
    const ggml_tensor* router = FindRouter(node->src[0], t_profiled.n_experts);
    int first = begin;
    while (first < last && graph->nodes[first] != router) ++first;
    if (first == last) continue;
    // Scores of groups are sorted before those of experts.
    RouterNodes found = {first, first, last + 1};
    while (!IsChoice(graph->nodes[found.choice])) ++found.choice;
    for (; found.end < n; ++found.end) {
      int budget = kScoreNodes;
      const ggml_tensor* next = graph->nodes[found.end];
      if (!IsView(next) && !IsChoice(next) && !FollowsFrom(next, graph->nodes[found.choice], &budget)) break;
    }
    return found;
  }
  return {n, n, n};
}

}  // namespace

bool IsProfiled() { return t_profiled.runtime != nullptr; }

ggml_status ComputeInPhases(GraphCompute compute, ggml_backend_t cpu, ggml_cgraph* graph) {
  if (!IsProfiled()) return ComputeChosen(compute, cpu, graph);
  const auto compute_nodes = [&](edgemoe_phase phase, int begin, int end) {
    if (begin == end) return GGML_STATUS_SUCCESS;
    const ProfiledPhase scope(phase);
    if (begin == 0 && end == graph->n_nodes) return ComputeChosen(compute, cpu, graph);
    ggml_cgraph view = ggml_graph_view(graph, begin, end);
    return ComputeChosen(compute, cpu, &view);
  };
  ggml_status status = GGML_STATUS_SUCCESS;
  for (int done = 0; done < graph->n_nodes && status == GGML_STATUS_SUCCESS;) {
    const RouterNodes next = NextRouter(graph, done);
    status = compute_nodes(EDGEMOE_PHASE_DENSE, done, next.router);
    if (status == GGML_STATUS_SUCCESS) status = compute_nodes(EDGEMOE_PHASE_ROUTER, next.router, next.choice);
    if (status == GGML_STATUS_SUCCESS) status = compute_nodes(EDGEMOE_PHASE_SELECT, next.choice, next.end);
    done = next.end;
  }
  return status;
}

ProfiledPhase::ProfiledPhase(edgemoe_phase phase)
    : runtime_(t_profiled.runtime), before_(runtime_ == nullptr ? -1 : edgemoe_runtime_enter_phase(runtime_, phase)) {}

ProfiledPhase::~ProfiledPhase() {
  if (before_ >= 0) (void)edgemoe_runtime_enter_phase(runtime_, before_);
}

}  // namespace edgemoe_ggml

void edgemoe_ggml_set_profiled(edgemoe_runtime* runtime, int32_t n_experts) {
  edgemoe_ggml::t_profiled = {runtime, n_experts};
}
