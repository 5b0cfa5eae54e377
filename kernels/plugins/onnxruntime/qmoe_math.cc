// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/qmoe_math.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "edgemoe/selection.h"

namespace edgemoe_ort {
namespace {

namespace simd = edgemoe::simd;

// Gates that are told apart from ups at a time: 4 KiB on the stack.
constexpr int64_t kGluCols = 512;

// Gate and up alternate, gate first. What is written lies never ahead of what is still to be read.
void Swiglu(const simd::KernelTable& table, const QmoeNode& node, float* row) {
  const simd::GluParams params = {simd::kSwiGluOai, node.alpha, node.limit, node.beta};
  float gate[kGluCols], up[kGluCols];
  for (int64_t first = 0; first < node.inter; first += kGluCols) {
    const int64_t n = std::min(kGluCols, node.inter - first);
    for (int64_t i = 0; i < n; ++i) {
      gate[i] = row[2 * (first + i)];
      up[i] = row[2 * (first + i) + 1];
    }
    table.glu(params, gate, nullptr, up, nullptr, row + first, n);
  }
}

}  // namespace

void Activate(const simd::KernelTable& table, const QmoeNode& node, float* row) {
  switch (node.activation) {
    case Activation::kRelu:
      for (int64_t i = 0; i < node.inter; ++i) row[i] = row[i] < 0.0f ? 0.0f : row[i];
      return;
    case Activation::kGelu:
      return table.glu({simd::kGelu, 0.0f, 0.0f}, row, nullptr, nullptr, nullptr, row, node.inter);
    case Activation::kSilu:
      return table.glu({simd::kSilu, 0.0f, 0.0f}, row, nullptr, nullptr, nullptr, row, node.inter);
    case Activation::kIdentity:
      return;
    case Activation::kSwiglu:
      return Swiglu(table, node, row);
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
  if (!node.is_quantized && !node.normalizes) {
    sum = 0.0f;
    for (int64_t e = 0; e < node.n_experts; ++e) sum += std::exp(scores[e] - highest);
  }
  for (int64_t u = 0; u < node.n_used; ++u) weights[u] = sum == 0.0f ? 0.0f : weights[u] / sum;
}

}  // namespace edgemoe_ort
