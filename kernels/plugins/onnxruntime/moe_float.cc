// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/moe_float.h"

#include <algorithm>
#include <cstring>

#include "plugins/onnxruntime/half.h"

namespace edgemoe_ort {
namespace {

// Sums side by side, so that compilers use vectors without reordering what the source says.
constexpr int kLanes = 16;
// Columns that become floats at a time, on the stack, for so many activation rows: tensors begin at any byte of a file.
constexpr int64_t kChunkCols = 512;
constexpr int32_t kTile = 8;

void Accumulate(const float* w, const float* x, int64_t n, float* sums) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += w[i + l] * x[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) sums[l] += w[i] * x[i];
}

float Total(float* sums) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
  }
  return sums[0];
}

// One row times kTile activation rows at most.
void MultiplyRow(const Projection& p, const uint8_t* row, const edgemoe_product& product, int32_t first_x, int32_t n_x,
                 float* results) {
  float w[kChunkCols], sums[kTile][kLanes] = {};
  const int64_t element_bytes = p.bits / 8;
  for (int64_t col = 0; col < p.n_cols; col += kChunkCols) {
    const int64_t n = std::min(kChunkCols, p.n_cols - col);
    if (p.bits == 16) {
      HalvesToFloats(row + col * element_bytes, n, w);
    } else {
      std::memcpy(w, row + col * element_bytes, static_cast<size_t>(n * element_bytes));
    }
    for (int32_t i = 0; i < n_x; ++i) {
      Accumulate(w, static_cast<const float*>(product.x[first_x + i]) + col, n, sums[i]);
    }
  }
  for (int32_t i = 0; i < n_x; ++i) results[i] = Total(sums[i]);
}

}  // namespace

void MultiplyFloat(const Projection& p, const edgemoe_product& product, const float* bias) {
  const auto* bytes = static_cast<const uint8_t*>(product.weights);
  for (int64_t r = 0; r < product.n_rows; ++r, bytes += product.row_bytes) {
    for (int32_t first = 0; first < product.n_x; first += kTile) {
      const int32_t n = std::min(kTile, product.n_x - first);
      float results[kTile];
      MultiplyRow(p, bytes, product, first, n, results);
      for (int32_t i = 0; i < n; ++i) product.y[first + i][r] = bias != nullptr ? results[i] + bias[r] : results[i];
    }
  }
}

}  // namespace edgemoe_ort
