// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/qmoe_math.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "edgemoe/selection.h"

namespace edgemoe_ort {
namespace {

// Sums side by side, so that compilers use vectors without reordering what the source says.
constexpr int kLanes = 16;

float Sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float ZeroPoint(const Projection& p, const uint8_t* zero_points, int64_t row, int64_t block) {
  if (zero_points == nullptr) return p.bits == 4 ? 8.0f : 128.0f;
  const int64_t at = p.has_packed_row_zero_points ? row : block;
  const uint8_t* const packed =
      p.has_packed_row_zero_points ? zero_points : zero_points + static_cast<uint64_t>(row) * p.zero_point_row_bytes();
  if (p.bits == 8) return packed[at];
  return static_cast<float>((packed[at / 2] >> (4 * (at % 2))) & 15);
}

}  // namespace

void OrderColumns(int bits, int64_t n_cols, const float* x, float* y) {
  if (bits == 8) {
    std::memcpy(y, x, sizeof(float) * static_cast<size_t>(n_cols));
    return;
  }
  const int64_t half = n_cols / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[2 * i];
    y[half + i] = x[2 * i + 1];
  }
}

void DequantizeRow(const Projection& p, const uint8_t* packed, const ExpertSides& sides, int64_t row, float* w) {
  const uint8_t* const scales = sides.scales + static_cast<uint64_t>(row) * p.scale_row_bytes();
  for (int64_t b = 0; b < p.n_blocks; ++b) {
    float scale;
    std::memcpy(&scale, scales + static_cast<size_t>(b) * sizeof(float), sizeof(float));
    const float zero = ZeroPoint(p, sides.zero_points, row, b);
    if (p.bits == 8) {
      const int64_t end = (b + 1) * p.block;
      for (int64_t i = b * p.block; i < end; ++i) w[i] = (static_cast<float>(packed[i]) - zero) * scale;
    } else {
      const int64_t end = (b + 1) * p.block / 2;
      float* const odd = w + p.n_cols / 2;
      for (int64_t i = b * p.block / 2; i < end; ++i) w[i] = (static_cast<float>(packed[i] & 15) - zero) * scale;
      for (int64_t i = b * p.block / 2; i < end; ++i) odd[i] = (static_cast<float>(packed[i] >> 4) - zero) * scale;
    }
  }
}

float Dot(const float* a, const float* b, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) sums[l] += a[i] * b[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
  }
  return sums[0];
}

void Activate(const QmoeNode& node, float* rows) {
  const int64_t n = node.inter;
  switch (node.activation) {
    case Activation::kRelu:
      for (int64_t i = 0; i < n; ++i) rows[i] = std::max(0.0f, rows[i]);
      return;
    case Activation::kGelu:
      // The tanh form, with the constants of arXiv 1606.08415 (section 2), as ONNX Runtime's kernel has it.
      for (int64_t i = 0; i < n; ++i) {
        const float x = rows[i];
        rows[i] = 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
      }
      return;
    case Activation::kSilu:
      for (int64_t i = 0; i < n; ++i) rows[i] *= Sigmoid(rows[i]);
      return;
    case Activation::kIdentity:
      return;
    case Activation::kSwiglu:
      // Gate and up alternate, gate first. What is written lies never ahead of what is still to be read.
      for (int64_t i = 0; i < n; ++i) {
        const float gate = std::min(rows[2 * i], node.limit);
        const float up = std::clamp(rows[2 * i + 1], -node.limit, node.limit);
        rows[i] = gate * Sigmoid(node.alpha * gate) * (up + node.beta);
      }
      return;
  }
}

void Route(const QmoeNode& node, const float* scores, const float* router_weights,
           std::vector<std::pair<float, int32_t>>* order, int32_t* experts, float* weights) {
  order->resize(static_cast<size_t>(node.n_experts));
  for (int32_t e = 0; e < node.n_experts; ++e) (*order)[static_cast<size_t>(e)] = {scores[e], e};
  std::partial_sort(order->begin(), order->begin() + node.n_used, order->end(), std::greater<>());
  for (int64_t u = 0; u < node.n_used; ++u) experts[u] = (*order)[static_cast<size_t>(u)].second;
  Mix(node, scores, router_weights, experts, weights);
}

void Mix(const QmoeNode& node, const float* scores, const float* router_weights, const int32_t* experts,
         float* weights) {
  float highest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for (int64_t u = 0; u < node.n_used; ++u) {
    if (experts[u] != EDGEMOE_NO_EXPERT) highest = std::max(highest, scores[experts[u]]);
  }
  for (int64_t u = 0; u < node.n_used; ++u) {
    const int32_t expert = experts[u];
    weights[u] = expert == EDGEMOE_NO_EXPERT ? 0.0f
                 : router_weights != nullptr ? router_weights[expert]
                                             : std::exp(scores[expert] - highest);
    sum += weights[u];
  }
  if (router_weights != nullptr && !node.normalizes) return;
  for (int64_t u = 0; u < node.n_used; ++u) weights[u] = sum == 0.0f ? 0.0f : weights[u] / sum;
}

}  // namespace edgemoe_ort
