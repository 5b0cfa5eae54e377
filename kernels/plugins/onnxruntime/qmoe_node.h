// SPDX-License-Identifier: MIT
// qmoe_node.h: a com.microsoft::QMoE node, read from the graph and checked: which of its attributes and inputs we
// implement, and where the bytes of its experts lie. Whatever we do not implement is named, never ignored.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_NODE_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_NODE_H_

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "plugins/onnxruntime/ort_api.h"

namespace edgemoe_ort {

enum class Activation { kRelu, kGelu, kSilu, kIdentity, kSwiglu };

// One stacked tensor [n_experts][...] of experts: streamed from a file, or small and kept in memory.
struct ExpertBytes {
  bool exists = false;
  bool is_streamed = false;
  std::string name;
  uint64_t expert_bytes = 0;
  FileExtent extent;           // streamed
  std::vector<uint8_t> bytes;  // kept: [n_experts][expert_bytes]
};

// A quantized matrix [n_rows][n_cols] of each expert: w = (q - zero point) * scale, one scale for `block` columns.
struct Projection {
  int bits = 0;
  int64_t n_rows = 0;
  int64_t n_cols = 0;
  int64_t block = 0;                        // columns of a scale; n_cols: one scale for a row
  int64_t n_blocks = 0;                     // of a row
  bool has_packed_row_zero_points = false;  // [n_experts][packed n_rows], not packed for each row
  ExpertBytes weights, scales, zero_points;
  std::vector<float> bias;  // [n_experts][n_rows]; empty: none

  uint64_t row_bytes() const { return static_cast<uint64_t>(n_cols * bits / 8); }
  uint64_t scale_row_bytes() const { return static_cast<uint64_t>(n_blocks) * sizeof(float); }
  uint64_t zero_point_row_bytes() const { return static_cast<uint64_t>((n_blocks * bits + 7) / 8); }
};

struct QmoeNode {
  std::string name;
  int64_t n_experts = 0;
  int64_t n_used = 0;
  int64_t hidden = 0;
  int64_t inter = 0;
  Activation activation = Activation::kRelu;
  float alpha = 1.0f, beta = 0.0f, limit = std::numeric_limits<float>::infinity();
  bool has_8_bit_activations = false;  // accuracy_level 4: asked for, as speed is
  bool normalizes = false;             // router_weights over the chosen experts
  // Names of the inputs that are computed; without router_weights, the weights are the softmax of the chosen scores.
  std::string x, router, router_weights;
  Projection fc1, fc2;
};

// Why we do not compute this node, or "" with `node` filled. with_data: copy what is kept in memory.
std::string ReadQmoe(const Ort& ort, const OrtGraph* graph, const OrtNode* ort_node, bool with_data, QmoeNode* node);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_NODE_H_
