// SPDX-License-Identifier: MIT
// qmoe_node.h: a com.microsoft::QMoE or MoE node, read from its source and checked: which of its attributes and inputs
// we implement, and where the bytes of its experts lie. Whatever we do not implement is named, never ignored.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_NODE_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_NODE_H_

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "plugins/onnxruntime/node_source.h"

namespace edgemoe_ort {

enum class Activation { kRelu, kGelu, kSilu, kIdentity, kSwiglu };

// One stacked tensor [n_experts][...] of experts: streamed from a file, or small and kept in memory.
struct ExpertBytes {
  bool exists = false;
  bool is_streamed = false;
  std::string name;
  uint64_t expert_bytes = 0;   // in the file
  uint64_t memory_bytes = 0;   // of one expert, kept or copied for its products: scales of 16 bits become 32
  FileExtent extent;           // streamed
  std::vector<uint8_t> bytes;  // kept: [n_experts][memory_bytes]
};

// A matrix [n_rows][n_cols] of each expert. Quantized: w = (q - zero point) * scale, one scale for `block` columns;
// else (MoE) floats of 32 or 16 bits, and no blocks.
struct Projection {
  int bits = 0;
  int64_t n_rows = 0;
  int64_t n_cols = 0;
  int64_t block = 0;                        // columns of a scale; n_cols: one scale for a row
  int64_t n_blocks = 0;                     // of a row
  bool has_packed_row_zero_points = false;  // [n_experts][packed n_rows], not packed for each row
  bool has_half_scales = false;             // in the file; in memory scales are floats
  ExpertBytes weights, scales, zero_points;
  std::vector<float> bias;  // [n_experts][n_rows]; empty: none

  uint64_t row_bytes() const { return static_cast<uint64_t>(n_cols * bits / 8); }
  uint64_t scale_row_bytes() const { return static_cast<uint64_t>(n_blocks) * sizeof(float); }
  uint64_t file_scale_row_bytes() const { return scale_row_bytes() / (has_half_scales ? 2 : 1); }
  uint64_t zero_point_row_bytes() const { return static_cast<uint64_t>((n_blocks * bits + 7) / 8); }
};

struct QmoeNode {
  std::string name;
  bool is_quantized = true;
  int64_t n_experts = 0;
  int64_t n_used = 0;
  int64_t hidden = 0;
  int64_t inter = 0;
  Activation activation = Activation::kRelu;
  float alpha = 1.0f, beta = 0.0f, limit = std::numeric_limits<float>::infinity();
  bool has_8_bit_activations = false;  // accuracy_level 4: asked for, as speed is
  bool normalizes = false;  // weights over the chosen experts: router_weights, or the softmax of all scores (MoE)
  // Names of the inputs that are computed, float32 or float16. Without router_weights, the weights are the softmax of
  // the chosen scores if quantized, else that of all scores.
  std::string x, router, router_weights;
  Projection fc1, fc2;
};

// Why we do not compute this node, or "" with `node` filled. with_data: copy what is kept in memory.
std::string ReadMoe(const NodeSource& source, bool with_data, QmoeNode* node);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_NODE_H_
