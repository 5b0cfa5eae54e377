// SPDX-License-Identifier: MIT
// workload.h: random matrices of one format, as they lie in a file, for ours and ggml's kernels to multiply.
#ifndef EDGEMOE_BENCHMARKS_WORKLOAD_H_
#define EDGEMOE_BENCHMARKS_WORKLOAD_H_

#include <random>
#include <string>
#include <vector>

#include "benchmarks/machine.h"
#include "ggml.h"
#include "simd/pack.h"

namespace edgemoe::bench {

// An expert's gate or up matrix of OLMoE. A thread takes a whole one in decode and 256 rows in prefill, as the
// scheduler of the runtime does for a few experts; of many it takes whole ones in prefill too.
inline constexpr int64_t kCols = 2048;
inline constexpr int64_t kRows = 1024;
inline constexpr int64_t kChunkRows = 256;

ggml_type GgmlTypeOf(simd::Format format);
// Ignores case; kNoFormat when there is none of that name.
simd::Format FindFormat(const std::string& name);

std::vector<float> RandomFloats(int64_t n, float std, std::mt19937& random);
// Quantized by ggml; n_rows rows one after the other.
std::vector<uint8_t> RandomRows(simd::Format format, int64_t n_rows, int64_t n_cols, std::mt19937& random);

// sum (found - expected)^2 / sum expected^2
double Nmse(const float* found, const float* expected, size_t n);

struct Bank {
  simd::Format format;
  int64_t n_matrices;
  size_t matrix_bytes;
  Buffer bytes;

  const uint8_t* Matrix(int64_t i) const { return bytes.get() + static_cast<size_t>(i) * matrix_bytes; }
  size_t TotalBytes() const { return static_cast<size_t>(n_matrices) * matrix_bytes; }
};
// Matrices of kRows x kCols, a multiple of 8 of them; each is the same 1024 random rows, rotated, as quantizing half a
// gigabyte takes minutes in some formats.
Bank MakeBank(simd::Format format, size_t n_bytes, std::mt19937& random);

}  // namespace edgemoe::bench
#endif  // EDGEMOE_BENCHMARKS_WORKLOAD_H_
