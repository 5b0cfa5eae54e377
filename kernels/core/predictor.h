// SPDX-License-Identifier: MIT
// predictor.h: which experts the next layers will choose, from the present layer's hidden state. The residual stream
// changes little from one layer to the next, so the next router applied to the present state names most of its experts:
// 88.6 % of Qwen3-30B-A3B's, 80.7 % of Qwen3.6-35B's, 78.8 % of DeepSeek-V2-Lite's (peers' measurements; arXiv
// 2312.17238, 2502.12224). A layer sees its state after the norm, x = h / rms(h) * norm; so the next router's matrix is
// stored with its columns scaled by norm_next / norm, and no norm is computed here. The first layers have no layer
// before them: kToken stands for the token's embedding, normalized. Matrices are Q8_0 and multiplied by simd/.
// Immutable after Set, so thread-safe; scratch belongs to the caller.
#ifndef EDGEMOE_CORE_PREDICTOR_H_
#define EDGEMOE_CORE_PREDICTOR_H_

#include <cstdint>
#include <vector>

#include "core/status.h"
#include "edgemoe/scheduler.h"
#include "simd/kernel_table.h"

namespace edgemoe {

class Predictor {
 public:
  static constexpr int kMaxDepth = 2;
  static constexpr int kToken = -1;  // in the place of a layer: the token's embedding

  Status Set(const edgemoe_router* routers, int n_routers, int max_depth);
  static uint64_t Bytes(const edgemoe_router* routers, int n_routers, int max_depth);

  // The layer that is `distance` layers with experts after `layer` (or kToken), or -1 when nothing is known about it.
  int TargetOf(int layer, int distance) const;
  int64_t n_cols() const { return n_cols_; }
  int max_experts() const { return max_experts_; }

  struct Scratch {
    std::vector<char> panel;
    std::vector<float> scores;   // of the rows of a matrix
    std::vector<int32_t> order;  // experts, best first
  };
  void Reserve(Scratch* scratch) const;
  // x: [n_cols] -> scratch->order: the n_best experts of TargetOf(layer, distance), the likeliest first. The target
  // exists.
  void Rank(int layer, int distance, int n_best, const float* x, Scratch* scratch) const;
  // scores [n_experts] of TargetOf(layer, distance), as Rank leaves them -> masses as edgemoe_selection has them: a
  // sigmoid's without the bias of the selection. Returns whether they are logits.
  bool Masses(int layer, int distance, const float* scores, float* masses) const;
  // order: the n_best of n scores, the highest first; a NaN is the lowest.
  static void Best(const float* scores, int n, int n_best, std::vector<int32_t>* order);

 private:
  struct Matrix {
    int target = -1;
    int n_experts = 0;
    bool sigmoid = false;
    std::vector<uint8_t> rows;  // Q8_0, padded to whole groups of rows
    std::vector<float> bias;    // empty: zeros
  };
  const Matrix* Find(int layer, int distance) const;

  const simd::KernelTable* table_ = nullptr;
  int64_t n_cols_ = 0;
  int max_experts_ = 0;
  std::vector<Matrix> matrices_;  // [layer + 1][distance - 1]
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_PREDICTOR_H_
