// SPDX-License-Identifier: MIT
#include "benchmarks/workload.h"

#include <strings.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace edgemoe::bench {

ggml_type GgmlTypeOf(simd::Format format) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const auto type = static_cast<ggml_type>(i);
    const char* name = ggml_type_name(type);
    if (name != nullptr && std::strcmp(name, simd::Info(format).name) == 0) return type;
  }
  std::fprintf(stderr, "kernel_benchmark: ggml has no type named '%s'\n", simd::Info(format).name);
  std::exit(2);
}

simd::Format FindFormat(const std::string& name) {
  for (int i = simd::kNoFormat + 1; i < simd::kFormatCount; ++i) {
    const auto format = static_cast<simd::Format>(i);
    if (strcasecmp(name.c_str(), simd::Info(format).name) == 0) return format;
  }
  return simd::kNoFormat;
}

std::vector<float> RandomFloats(int64_t n, float std, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0F, std);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<uint8_t> RandomRows(simd::Format format, int64_t n_rows, int64_t n_cols, std::mt19937& random) {
  const ggml_type type = GgmlTypeOf(format);
  const std::vector<float> floats = RandomFloats(n_rows * n_cols, 1.0F / 32, random);
  std::vector<uint8_t> rows(static_cast<size_t>(simd::RowBytes(format, n_cols) * n_rows));
  const size_t written = ggml_quantize_chunk(type, floats.data(), rows.data(), 0, n_rows, n_cols, nullptr);
  if (written != rows.size()) {
    std::fprintf(stderr, "kernel_benchmark: %s: ggml wrote %zu bytes, expected %zu\n", ggml_type_name(type), written,
                 rows.size());
    std::exit(2);
  }
  return rows;
}

double Nmse(const float* found, const float* expected, size_t n) {
  double error = 0, size = 0;
  for (size_t i = 0; i < n; ++i) {
    const double difference = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
    error += difference * difference;
    size += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return error / size;
}

Bank MakeBank(simd::Format format, size_t n_bytes, std::mt19937& random) {
  const auto row_bytes = static_cast<size_t>(simd::RowBytes(format, kCols));
  const size_t matrix_bytes = row_bytes * kRows;
  const auto n_matrices = std::max<int64_t>(8, static_cast<int64_t>(n_bytes / matrix_bytes) / 8 * 8);
  Bank bank{format, n_matrices, matrix_bytes, AllocateHuge(static_cast<size_t>(n_matrices) * matrix_bytes)};
  const std::vector<uint8_t> rows = RandomRows(format, kRows, kCols, random);
#pragma omp parallel for
  for (int64_t i = 0; i < n_matrices; ++i) {
    uint8_t* out = bank.bytes.get() + static_cast<size_t>(i) * matrix_bytes;
    const size_t first = static_cast<size_t>(i * 37 % kRows) * row_bytes;
    std::memcpy(out, rows.data() + first, matrix_bytes - first);
    std::memcpy(out + matrix_bytes - first, rows.data(), first);
  }
  return bank;
}

}  // namespace edgemoe::bench
