// SPDX-License-Identifier: MIT
// own_paths.h: matrices packed for one KernelTable, multiplied as the runtime does it: OpenMP's pool (ggml's too),
// whose threads take chunks of rows of one matrix after the other.
#ifndef EDGEMOE_BENCHMARKS_OWN_PATHS_H_
#define EDGEMOE_BENCHMARKS_OWN_PATHS_H_

#include <vector>

#include "benchmarks/workload.h"

namespace edgemoe::bench {

class OwnMatrices {
 public:
  OwnMatrices(const simd::KernelTable& table, const Bank& bank);

  // One core, from the bank's bytes to packed ones, over more than the caches hold.
  double pack_bytes_per_second() const { return pack_bytes_per_second_; }

  // One activation row times the matrices of `order`, packed or with their rows as in a file. Returns seconds,
  // quantizing x included. y: [order.size()][kRows].
  double Decode(const std::vector<int32_t>& order, bool is_packed, const float* x, float* y, int n_threads);

  struct PrefillSeconds {
    double quantize;
    double pack;  // into panels
    double multiply;
  };
  // n_tokens rows of x for each of the first n_experts matrices (x is [n_experts * n_tokens][kCols]), n_repeats times.
  // y: [n_experts * n_tokens][kRows].
  PrefillSeconds Prefill(int64_t n_experts, int64_t n_tokens, int n_repeats, const float* x, float* y, int n_threads);

 private:
  void MultiplyRows(int64_t matrix, int64_t first_row, int64_t n_rows, const void* panels, int32_t n_x,
                    float* const* y) const;

  const simd::KernelTable& table_;
  const Bank& bank_;
  simd::Activation activation_;
  size_t group_bytes_;
  Buffer packed_;
  double pack_bytes_per_second_ = 0;
};

}  // namespace edgemoe::bench
#endif  // EDGEMOE_BENCHMARKS_OWN_PATHS_H_
