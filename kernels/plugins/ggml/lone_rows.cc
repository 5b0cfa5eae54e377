// SPDX-License-Identifier: MIT
#include "plugins/ggml/lone_rows.h"

#include <atomic>
#include <vector>

#include "ggml-cpu.h"
#include "plugins/ggml/cpu_phases.h"
#include "plugins/ggml/edgemoe_ggml.h"
#include "plugins/ggml/selection.h"

namespace edgemoe_ggml {
namespace {

struct LoneRows {
  int64_t n_tokens = 0;  // of the batch; below 2 there is nothing to do
  std::vector<ggml_tensor> shadows;
  std::vector<ggml_tensor*> nodes;
};
thread_local LoneRows t_rows;

// One function for all CPU backends of a process: their interfaces are copies of one table.
std::atomic<GraphCompute>& Original() {
  static std::atomic<GraphCompute> original{nullptr};
  return original;
}

bool IsFlashAttention(const ggml_tensor* t, int64_t n_tokens) {
  return t->op == GGML_OP_FLASH_ATTN_EXT && t->src[0]->ne[1] == n_tokens;
}

// Products whose columns are the batch's tokens. Those with several columns for each token are the same alone.
// op_params[1] marks a product with a Hadamard matrix, which has code of its own for any number of columns.
bool IsProduct(const ggml_tensor* t, int64_t n_tokens) {
  return t->op == GGML_OP_MUL_MAT && t->ne[1] == n_tokens && t->op_params[1] == 0;
}

// Of four tensors at most (a node and its sources) one node is made.
constexpr size_t kShadowsPerNode = 4;

class Rewriter {
 public:
  explicit Rewriter(LoneRows* rows) : rows_(rows) {}

  void Add(ggml_tensor* node) {
    if (IsFlashAttention(node, rows_->n_tokens)) {
      for (int64_t i = 0; i < rows_->n_tokens; ++i) AddAttentionRow(node, i);
    } else if (IsProduct(node, rows_->n_tokens)) {
      if (node->ne[3] == 1 && node->src[0]->ne[3] == 1) {
        AddProduct(node);
      } else {
        for (int64_t i = 0; i < rows_->n_tokens; ++i) AddColumn(node, i);
      }
    } else {
      rows_->nodes.push_back(node);
    }
  }

 private:
  ggml_tensor* Shadow(const ggml_tensor* t) {
    rows_->shadows.push_back(*t);
    return &rows_->shadows.back();
  }

  ggml_tensor* Row(const ggml_tensor* t, int dim, int64_t i) {
    ggml_tensor* row = Shadow(t);
    row->ne[dim] = 1;
    row->data = static_cast<char*>(t->data) + static_cast<size_t>(i) * t->nb[dim];
    return row;
  }

  // Matrices of (columns, rows, n) as matrices of (columns, 1 row, rows, n): dimensions 1 and 2 become 2 and 3.
  ggml_tensor* RowsApart(const ggml_tensor* t) {
    ggml_tensor* apart = Shadow(t);
    apart->ne[1] = 1;
    apart->ne[2] = t->ne[1];
    apart->ne[3] = t->ne[2];
    apart->nb[2] = t->nb[1];
    apart->nb[3] = t->nb[2];
    return apart;
  }

  // One node for all tokens, so that each row of weights is read from memory once: the tokens are a dimension along
  // which the weights are the same.
  void AddProduct(const ggml_tensor* node) {
    ggml_tensor* y = RowsApart(node);
    ggml_tensor* w = Shadow(node->src[0]);
    w->ne[2] = 1;
    w->ne[3] = node->src[0]->ne[2];
    w->nb[3] = node->src[0]->nb[2];
    y->src[0] = w;
    y->src[1] = RowsApart(node->src[1]);
    rows_->nodes.push_back(y);
  }

  void AddColumn(const ggml_tensor* node, int64_t i) {
    ggml_tensor* y = Row(node, 1, i);
    y->src[1] = Row(node->src[1], 1, i);
    rows_->nodes.push_back(y);
  }

  void AddAttentionRow(const ggml_tensor* node, int64_t i) {
    ggml_tensor* y = Row(node, 2, i);
    y->src[0] = Row(node->src[0], 1, i);
    if (node->src[3] != nullptr) y->src[3] = Row(node->src[3], 1, i);
    rows_->nodes.push_back(y);
  }

  LoneRows* rows_;
};

ggml_status ComputeLoneRows(ggml_backend_t cpu, ggml_cgraph* graph) {
  const GraphCompute compute = Original().load();
  LoneRows& rows = t_rows;
  if (rows.n_tokens < 2) return ComputeInPhases(compute, cpu, graph);
  size_t n_shadows = 0;
  for (int i = 0; i < graph->n_nodes; ++i) {
    if (IsFlashAttention(graph->nodes[i], rows.n_tokens) || IsProduct(graph->nodes[i], rows.n_tokens))
      n_shadows += kShadowsPerNode * static_cast<size_t>(rows.n_tokens);
  }
  if (n_shadows == 0) return ComputeInPhases(compute, cpu, graph);
  rows.shadows.clear();
  rows.shadows.reserve(n_shadows);  // nodes point to shadows: they must not move
  rows.nodes.clear();
  Rewriter rewriter(&rows);
  for (int i = 0; i < graph->n_nodes; ++i) rewriter.Add(graph->nodes[i]);
  ggml_cgraph lone = ggml_graph_view(graph, 0, graph->n_nodes);
  lone.nodes = rows.nodes.data();
  lone.n_nodes = static_cast<int>(rows.nodes.size());
  return ComputeInPhases(compute, cpu, &lone);
}

}  // namespace

void SetCpuThreads(ggml_backend_t cpu, int n_threads) {
  ggml_backend_cpu_set_n_threads(cpu, n_threads);
  if ((t_rows.n_tokens < 2 && !IsProfiled() && !HasChoosers()) || cpu->iface.graph_compute == ComputeLoneRows) return;
  Original().store(cpu->iface.graph_compute);
  cpu->iface.graph_compute = ComputeLoneRows;
}

}  // namespace edgemoe_ggml

void edgemoe_ggml_set_lone_rows(int64_t n_tokens) { edgemoe_ggml::t_rows.n_tokens = n_tokens; }
