// SPDX-License-Identifier: MIT
#include "benchmarks/layer_nmse.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "benchmarks/workload.h"
#include "ggml-cpu.h"

namespace edgemoe::bench {
namespace {

constexpr int64_t kHidden = 1024;
constexpr int64_t kFf = 512;
constexpr int kExperts = 16;
constexpr size_t kUsed = 4;
constexpr int kTokens = 16;
constexpr size_t kOutliers = 8;
constexpr float kOutlierSize = 20.0F;

// n_cols values times n_rows rows.
struct Matrix {
  simd::Format format;
  int64_t n_rows;
  int64_t n_cols;
  std::vector<uint8_t> rows;  // as in a file

  Matrix(simd::Format f, int64_t r, int64_t c, std::mt19937& random)
      : format(f), n_rows(r), n_cols(c), rows(RandomRows(f, r, c, random)) {}
};
struct Expert {
  Matrix gate, up, down;
};

std::vector<double> MultiplyExactly(const Matrix& m, const std::vector<double>& x) {
  const ggml_type type = GgmlTypeOf(m.format);
  const auto row_bytes = static_cast<size_t>(simd::RowBytes(m.format, m.n_cols));
  std::vector<float> row(static_cast<size_t>(m.n_cols));
  std::vector<double> y;
  for (int64_t r = 0; r < m.n_rows; ++r) {
    ggml_get_type_traits(type)->to_float(m.rows.data() + static_cast<size_t>(r) * row_bytes, row.data(), m.n_cols);
    y.push_back(std::inner_product(x.begin(), x.end(), row.begin(), 0.0));
  }
  return y;
}

std::vector<float> MultiplyByGgml(const Matrix& m, const std::vector<float>& x) {
  const ggml_type_traits_cpu* traits = ggml_get_type_traits_cpu(GgmlTypeOf(m.format));
  std::vector<uint8_t> quantized(ggml_row_size(traits->vec_dot_type, m.n_cols));
  ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(x.data(), quantized.data(), m.n_cols);
  const auto row_bytes = static_cast<size_t>(simd::RowBytes(m.format, m.n_cols));
  std::vector<float> y(static_cast<size_t>(m.n_rows));
  for (size_t r = 0; r < y.size(); ++r)
    traits->vec_dot(static_cast<int>(m.n_cols), &y[r], 0, m.rows.data() + r * row_bytes, 0, quantized.data(), 0, 1);
  return y;
}

// The rows of a matrix as one table wants them.
class PackedMatrix {
 public:
  PackedMatrix(const simd::KernelTable& table, const Matrix& m)
      : table_(table), matrix_(m), packed_(AllocateHuge(m.rows.size())) {
    table.interleave[m.format](m.rows.data(), m.n_rows / table.rows_per_group, m.n_cols, packed_.get());
  }

  std::vector<float> Multiply(const std::vector<float>& x) const {
    const simd::Activation activation = simd::Info(matrix_.format).activation;
    Buffer panel = AllocateHuge(static_cast<size_t>(simd::PanelBytes(activation, matrix_.n_cols, 1)));
    table_.quantize[activation](x.data(), panel.get(), matrix_.n_cols);
    std::vector<float> y(static_cast<size_t>(matrix_.n_rows));
    float* const rows[1] = {y.data()};
    table_.multiply[matrix_.format][0](
        {packed_.get(), matrix_.n_rows / table_.rows_per_group, matrix_.n_cols, panel.get(), rows});
    return y;
  }

 private:
  const simd::KernelTable& table_;
  const Matrix& matrix_;
  Buffer packed_;
};
struct PackedExpert {
  PackedMatrix gate, up, down;
};

std::vector<float> SwiGlu(const std::vector<float>& gate, const std::vector<float>& up) {
  std::vector<float> out(gate.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = gate[i] / (1.0F + std::exp(-gate[i])) * up[i];
  return out;
}

struct Token {
  std::vector<float> x;
  std::vector<size_t> experts;
  std::vector<float> weights;
  std::vector<double> expected;
};

std::vector<double> ComputeExactly(const std::vector<Expert>& experts, const Token& token) {
  std::vector<double> out(kHidden);
  const std::vector<double> x(token.x.begin(), token.x.end());
  for (size_t u = 0; u < kUsed; ++u) {
    const Expert& expert = experts[token.experts[u]];
    std::vector<double> gate = MultiplyExactly(expert.gate, x);
    const std::vector<double> up = MultiplyExactly(expert.up, x);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1.0 + std::exp(-gate[i])) * up[i];
    const std::vector<double> down = MultiplyExactly(expert.down, gate);
    for (size_t i = 0; i < down.size(); ++i) out[i] += static_cast<double>(token.weights[u]) * down[i];
  }
  return out;
}

std::vector<float> ComputeByGgml(const std::vector<Expert>& experts, const Token& token) {
  std::vector<float> out(kHidden);
  for (size_t u = 0; u < kUsed; ++u) {
    const Expert& expert = experts[token.experts[u]];
    const std::vector<float> gate = MultiplyByGgml(expert.gate, token.x);
    const std::vector<float> down = MultiplyByGgml(expert.down, SwiGlu(gate, MultiplyByGgml(expert.up, token.x)));
    for (size_t i = 0; i < down.size(); ++i) out[i] += token.weights[u] * down[i];
  }
  return out;
}

std::vector<float> ComputeByTable(const simd::KernelTable& table, const std::vector<PackedExpert>& experts,
                                  const Token& token) {
  std::vector<std::vector<float>> downs;
  for (size_t u = 0; u < kUsed; ++u) {
    const PackedExpert& expert = experts[token.experts[u]];
    const std::vector<float> gate = expert.gate.Multiply(token.x), up = expert.up.Multiply(token.x);
    std::vector<float> inner(kFf);
    table.glu({simd::kSwiGlu, 0, 0}, gate.data(), nullptr, up.data(), nullptr, inner.data(), kFf);
    downs.push_back(expert.down.Multiply(inner));
  }
  const float* rows[kUsed];
  for (size_t u = 0; u < kUsed; ++u) rows[u] = downs[u].data();
  std::vector<float> out(kHidden);
  table.combine(rows, nullptr, token.weights.data(), kUsed, out.data(), kHidden);
  return out;
}

double NmseOf(const std::vector<Token>& tokens, const std::function<std::vector<float>(const Token&)>& compute) {
  double error = 0, size = 0;
  for (const Token& token : tokens) {
    const std::vector<float> found = compute(token);
    for (size_t i = 0; i < found.size(); ++i) {
      error += std::pow(static_cast<double>(found[i]) - token.expected[i], 2);
      size += std::pow(token.expected[i], 2);
    }
  }
  return error / size;
}

}  // namespace

LayerNmse MeasureLayerNmse(const std::vector<const simd::KernelTable*>& tables, simd::Format format, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Expert> experts;
  for (int i = 0; i < kExperts; ++i)
    experts.push_back({Matrix(format, kFf, kHidden, random), Matrix(format, kFf, kHidden, random),
                       Matrix(format, kHidden, kFf, random)});
  std::vector<size_t> channels(kHidden);
  std::iota(channels.begin(), channels.end(), size_t{0});
  std::shuffle(channels.begin(), channels.end(), random);

  std::vector<Token> tokens(kTokens);
  for (Token& token : tokens) {
    token.x = RandomFloats(kHidden, 1.0F, random);
    for (size_t i = 0; i < kOutliers; ++i) token.x[channels[i]] *= kOutlierSize;
    token.experts.resize(kExperts);
    std::iota(token.experts.begin(), token.experts.end(), size_t{0});
    std::shuffle(token.experts.begin(), token.experts.end(), random);
    token.weights.resize(kUsed);
    for (float& weight : token.weights) weight = std::uniform_real_distribution<float>(0.05F, 0.5F)(random);
    token.expected = ComputeExactly(experts, token);
  }
  LayerNmse result{{}, NmseOf(tokens, [&](const Token& token) { return ComputeByGgml(experts, token); })};
  for (const simd::KernelTable* table : tables) {
    std::vector<PackedExpert> packed;
    for (const Expert& e : experts)
      packed.push_back({PackedMatrix(*table, e.gate), PackedMatrix(*table, e.up), PackedMatrix(*table, e.down)});
    result.ours.push_back(NmseOf(tokens, [&](const Token& token) { return ComputeByTable(*table, packed, token); }));
  }
  return result;
}

}  // namespace edgemoe::bench
