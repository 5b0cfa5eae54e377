// SPDX-License-Identifier: MIT
#include "plugins/ggml/nodes.h"

#include <cstdio>
#include <initializer_list>

#include "plugins/ggml/buffers.h"

namespace edgemoe_ggml {
namespace {

const ggml_tensor* FindRouter(const ggml_tensor* t, int64_t n_experts, int* budget) {
  if (t == nullptr || --*budget < 0) return nullptr;
  if (t->op == GGML_OP_MUL_MAT) return t->src[0]->op == GGML_OP_NONE && t->ne[0] <= n_experts ? t : nullptr;
  for (const ggml_tensor* source : {t->src[0], t->src[1]}) {
    if (const ggml_tensor* router = FindRouter(source, n_experts, budget); router != nullptr) return router;
  }
  return nullptr;
}

}  // namespace

bool IsExpertProduct(const ggml_tensor* node) {
  return node->op == GGML_OP_MUL_MAT_ID && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 &&
         FindExpertWeights(node->src[0]).runtime != nullptr;
}

edgemoe_matmul MatmulOf(const ggml_tensor* product) {
  const ggml_tensor* w = product->src[0];
  const ggml_tensor* x = product->src[1];
  edgemoe_matmul m = {};
  m.tensor_idx = FindExpertWeights(w).tensor_idx;
  m.type = w->type;
  m.n_cols = w->ne[0];
  m.n_rows = w->ne[1];
  m.row_bytes = w->nb[1];
  m.x = static_cast<const float*>(x->data);
  m.x_n_used = x->ne[1];
  m.x_used_bytes = x->nb[1];
  m.x_token_bytes = x->nb[2];
  m.y = static_cast<float*>(product->data);
  m.y_used_bytes = product->nb[1];
  m.y_token_bytes = product->nb[2];
  return m;
}

bool IsView(const ggml_tensor* t) {
  return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
         t->op == GGML_OP_TRANSPOSE;
}

bool Overlap(const ggml_tensor* a, const ggml_tensor* b) {
  const char* a0 = static_cast<const char*>(a->data);
  const char* b0 = static_cast<const char*>(b->data);
  return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

bool Independent(const ggml_tensor* node, const ggml_tensor* other) {
  if (IsView(other)) return true;
  if (Overlap(node, other)) return false;
  for (int i = 0; i < GGML_MAX_SRC; ++i) {
    if (other->src[i] != nullptr && Overlap(node, other->src[i])) return false;
    // Expert weights are never written, and their address says nothing.
    if (i > 0 && node->src[i] != nullptr && Overlap(node->src[i], other)) return false;
  }
  return true;
}

int UseCount(const ggml_cgraph* graph, const ggml_tensor* t) {
  const ggml_hash_set& set = graph->visited_hash_set;
  if (graph->use_counts == nullptr || set.size == 0 || set.keys == nullptr) return -1;
  // ggml's open addressing: tensors are 16-byte aligned, so the address without its last 4 bits is the hash.
  const size_t begin = (reinterpret_cast<uintptr_t>(t) >> 4) % set.size;
  size_t i = begin;
  do {
    if ((set.used[i / 32] >> (i % 32) & 1u) == 0) return -1;
    if (set.keys[i] == t) return graph->use_counts[i];
    i = (i + 1) % set.size;
  } while (i != begin);
  return -1;
}

int32_t LayerOf(const ggml_tensor* weights) {
  int layer = -1;
  return std::sscanf(weights->name, "blk.%d.", &layer) == 1 ? layer : -1;
}

const ggml_tensor* FindRouter(const ggml_tensor* scores, int64_t n_experts) {
  int budget = kScoreNodes;
  return FindRouter(scores, n_experts, &budget);
}

}  // namespace edgemoe_ggml
