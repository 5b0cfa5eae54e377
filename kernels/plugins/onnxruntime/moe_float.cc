// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/moe_float.h"

#include <cstring>

#include "plugins/onnxruntime/half.h"

namespace edgemoe_ort {
namespace {

// Sums side by side, so that compilers use vectors without reordering what the source says.
constexpr int kLanes = 16;

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

}  // namespace

void MultiplyFloat(const Projection& p, const edgemoe_product& product, const float* bias, float* row) {
  const auto* bytes = static_cast<const uint8_t*>(product.weights);
  for (int64_t r = 0; r < product.n_rows; ++r, bytes += product.row_bytes) {
    // A copy of floats as well: tensors begin at any byte of a file.
    if (p.bits == 16) {
      HalvesToFloats(bytes, p.n_cols, row);
    } else {
      std::memcpy(row, bytes, sizeof(float) * static_cast<size_t>(p.n_cols));
    }
    for (int32_t i = 0; i < product.n_x; ++i) {
      const float dot = Dot(row, static_cast<const float*>(product.x[i]), p.n_cols);
      product.y[i][r] = bias != nullptr ? dot + bias[r] : dot;
    }
  }
}

}  // namespace edgemoe_ort
