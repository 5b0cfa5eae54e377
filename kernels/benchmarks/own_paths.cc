// SPDX-License-Identifier: MIT
#include "benchmarks/own_paths.h"

#include <algorithm>
#include <atomic>

#include "simd/panels.h"

namespace edgemoe::bench {
namespace {
constexpr int64_t kChunks = kRows / kChunkRows;
constexpr int64_t kTimedPacks = 48;  // matrices: 50 MiB of 4-bit weights, more than L3
}  // namespace

OwnMatrices::OwnMatrices(const simd::KernelTable& table, const Bank& bank)
    : table_(table),
      bank_(bank),
      activation_(simd::Info(bank.format).activation),
      group_bytes_(static_cast<size_t>(simd::RowBytes(bank.format, kCols) * table.rows_per_group)),
      packed_(AllocateHuge(bank.TotalBytes())) {
  std::fill_n(packed_.get(), bank.TotalBytes(), uint8_t{0});  // page faults are not packing
  const auto pack = [&](int64_t i) {
    table.interleave[bank.format](bank.Matrix(i), kRows / table.rows_per_group, kCols,
                                  packed_.get() + static_cast<size_t>(i) * bank.matrix_bytes);
  };
  const int64_t n_timed = std::min(kTimedPacks, bank.n_matrices);
  const double begin = NowSeconds();
  for (int64_t i = 0; i < n_timed; ++i) pack(i);
  pack_bytes_per_second_ =
      static_cast<double>(bank.matrix_bytes) * static_cast<double>(n_timed) / (NowSeconds() - begin);
#pragma omp parallel for
  for (int64_t i = n_timed; i < bank.n_matrices; ++i) pack(i);
}

void OwnMatrices::MultiplyRows(int64_t matrix, int64_t first_row, int64_t n_rows, const void* panels, int32_t n_x,
                               float* const* y) const {
  const size_t first_group = static_cast<size_t>(first_row / table_.rows_per_group);
  const uint8_t* weights =
      packed_.get() + static_cast<size_t>(matrix) * bank_.matrix_bytes + first_group * group_bytes_;
  simd::MultiplyPanels(table_, bank_.format, {weights, n_rows, kCols, panels, n_x, y, first_row});
}

double OwnMatrices::Decode(const std::vector<int32_t>& order, bool is_packed, const float* x, float* y, int n_threads) {
  Buffer panel = AllocateHuge(static_cast<size_t>(simd::PanelBytes(activation_, kCols, 1)));
  std::fill_n(panel.get(), simd::PanelBytes(activation_, kCols, 1), uint8_t{0});
  std::atomic<int64_t> next{0};
  const int64_t n = static_cast<int64_t>(order.size());
  double begin = 0, end = 0;
#pragma omp parallel num_threads(n_threads)
  {
#pragma omp barrier
#pragma omp master
    {
      begin = NowSeconds();
      table_.quantize[activation_](x, panel.get(), kCols);
    }
#pragma omp barrier
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      float* matrix_y = y + i * kRows;
      const int32_t matrix = order[static_cast<size_t>(i)];
      if (is_packed) {
        MultiplyRows(matrix, 0, kRows, panel.get(), 1, &matrix_y);
      } else {
        table_.multiply_rows[bank_.format](
            {bank_.Matrix(matrix), kRows / table_.rows_per_group, kCols, panel.get(), &matrix_y});
      }
    }
#pragma omp barrier
#pragma omp master
    end = NowSeconds();
  }
  return end - begin;
}

OwnMatrices::PrefillSeconds OwnMatrices::Prefill(int64_t n_experts, int64_t n_tokens, int n_repeats, const float* x,
                                                 float* y, int n_threads) {
  const int64_t n_rows = n_experts * n_tokens;
  const auto row_bytes = static_cast<size_t>(simd::PanelBytes(activation_, kCols, 1));
  Buffer rows = AllocateHuge(row_bytes * static_cast<size_t>(n_rows));
  Buffer panels = AllocateHuge(row_bytes * static_cast<size_t>(n_rows));
  std::fill_n(rows.get(), row_bytes * static_cast<size_t>(n_rows), uint8_t{0});
  std::fill_n(panels.get(), row_bytes * static_cast<size_t>(n_rows), uint8_t{0});
  std::vector<const void*> panel_rows;
  std::vector<float*> rows_y;
  for (int64_t i = 0; i < n_rows; ++i) {
    panel_rows.push_back(rows.get() + static_cast<size_t>(i) * row_bytes);
    rows_y.push_back(y + i * kRows);
  }
  std::atomic<int64_t> next{0};
  PrefillSeconds seconds{};
#pragma omp parallel num_threads(n_threads)
  {
    for (int repeat = 0; repeat < n_repeats; ++repeat) {
      double begin = 0, quantized = 0, packed = 0;
#pragma omp barrier
#pragma omp master
      {
        next = 0;
        begin = NowSeconds();
      }
#pragma omp for  // ends with a barrier, as does the next
      for (int64_t i = 0; i < n_rows; ++i)
        table_.quantize[activation_](x + i * kCols, rows.get() + static_cast<size_t>(i) * row_bytes, kCols);
      quantized = NowSeconds();
#pragma omp for
      for (int64_t first = 0; first < n_rows; first += n_tokens)
        simd::PackPanels(activation_, kCols, static_cast<int32_t>(n_tokens), panel_rows.data() + first,
                         panels.get() + row_bytes * static_cast<size_t>(first));
      packed = NowSeconds();
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_experts * kChunks;) {
        const int64_t expert = i / kChunks;
        const int64_t first = expert * n_tokens;
        MultiplyRows(expert, i % kChunks * kChunkRows, kChunkRows,
                     panels.get() + row_bytes * static_cast<size_t>(first), static_cast<int32_t>(n_tokens),
                     rows_y.data() + first);
      }
#pragma omp barrier
#pragma omp master
      {
        seconds.quantize += quantized - begin;
        seconds.pack += packed - quantized;
        seconds.multiply += NowSeconds() - packed;
      }
    }
  }
  return seconds;
}

}  // namespace edgemoe::bench
