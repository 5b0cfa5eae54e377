// SPDX-License-Identifier: MIT
// layer_nmse.h: how far a whole MoE layer by each KernelTable, and by ggml's dot products, is from float64.
#ifndef EDGEMOE_BENCHMARKS_LAYER_NMSE_H_
#define EDGEMOE_BENCHMARKS_LAYER_NMSE_H_

#include <cstdint>
#include <vector>

#include "simd/kernel_table.h"

namespace edgemoe::bench {

// hidden 1024, 512 wide experts, 16 of them, 4 per token, SwiGLU, 16 tokens. Weights: Gaussian, quantized by ggml; the
// reference computes with the same quantized weights, so that the error is that of the arithmetic. Activations:
// Gaussian, with 8 channels 20 times as large, as language models have them.
struct LayerNmse {
  std::vector<double> ours;  // of each table
  double ggml;
};
LayerNmse MeasureLayerNmse(const std::vector<const simd::KernelTable*>& tables, simd::Format format, uint32_t seed);

}  // namespace edgemoe::bench
#endif  // EDGEMOE_BENCHMARKS_LAYER_NMSE_H_
