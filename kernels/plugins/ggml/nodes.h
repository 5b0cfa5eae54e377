// SPDX-License-Identifier: MIT
// nodes.h: questions about single nodes of a ggml graph, answered from their structure.
#ifndef EDGEMOE_PLUGINS_GGML_NODES_H_
#define EDGEMOE_PLUGINS_GGML_NODES_H_

#include "edgemoe/edgemoe.h"
#include "plugins/ggml/ggml_abi.h"

namespace edgemoe_ggml {

using GraphCompute = ggml_status (*)(ggml_backend_t, ggml_cgraph*);

// Nodes looked at between a router's product and the choice by it: softmax or sigmoid, bias, and what DeepSeek's groups
// take, about 12 with the views.
constexpr int kScoreNodes = 64;

// ggml_mul_mat_id with expert weights that libedgemoe serves.
bool IsExpertProduct(const ggml_tensor* node);
// The same as libedgemoe takes it.
edgemoe_matmul MatmulOf(const ggml_tensor* product);
bool IsView(const ggml_tensor* t);
bool Overlap(const ggml_tensor* a, const ggml_tensor* b);
// May `node` run before `other`, which precedes it in the graph? Not if one writes what the other touches.
bool Independent(const ggml_tensor* node, const ggml_tensor* other);
// How many nodes of the whole graph, not only of this split, take `t` as a source; -1 when the graph does not say.
int UseCount(const ggml_cgraph* graph, const ggml_tensor* t);
// The layer that weights belong to by their name, blk.LAYER.ffn_gate_inp.weight, which is the same for every
// architecture in llama.cpp; -1: none.
int32_t LayerOf(const ggml_tensor* weights);
// The product with a router's weights, of at most n_experts rows, that scores come from; null where they come from
// none.
const ggml_tensor* FindRouter(const ggml_tensor* scores, int64_t n_experts);

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_NODES_H_
