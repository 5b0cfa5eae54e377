// SPDX-License-Identifier: MIT
#include "simd/qmoe.h"

#include <string.h>

namespace edgemoe::simd {
namespace {

constexpr int kWords = kQmoeLineWords;
constexpr int kMostLineCols = 256;  // of 2 bits

int64_t LineCount(const QmoeShape& s) {
  const int64_t line_cols = kQmoeLineBytes * 8 / s.bits;
  return (s.n_cols + line_cols - 1) / line_cols;
}

int64_t LineBytes(const QmoeShape& s) {
  const int codes_in_byte = 8 / s.bits;
  if (s.arithmetic == kQmoeInt8) return (codes_in_byte + 2) * kQmoeLineBytes;
  return (4 * codes_in_byte + (s.has_zero_points ? 1 : 0)) * kQmoeLineBytes;
}

// Widths are template arguments so that compilers make vectors of the loops.
template <int kBits>
void FloatLine(const QmoeShape& s, const float* x, uint8_t* to) {
  constexpr int kWordCols = 32 / kBits;
  auto* const line = reinterpret_cast<float*>(to);
  for (int j = 0; j < kWordCols; ++j) {
    for (int l = 0; l < kWords; ++l) line[j * kWords + l] = x[l * kWordCols + j];
  }
  if (!s.has_zero_points) return;
  float* const sums = line + kWordCols * kWords;
  for (int l = 0; l < kWords; ++l) sums[l] = line[l];
  for (int j = 1; j < kWordCols; ++j) {
    for (int l = 0; l < kWords; ++l) sums[l] += line[j * kWords + l];
  }
}

// n of them -> q, and d. As pointwise.inl: m is the largest |x| as bits, so that NaN and Inf are seen.
template <int n>
float QuantizeBlock(const float* x, int32_t* q) {
  int32_t bits = 0;
  for (int i = 0; i < n; ++i) {
    int32_t b;
    memcpy(&b, x + i, sizeof(b));
    b &= 0x7fffffff;
    bits = b > bits ? b : bits;
  }
  float m;
  memcpy(&m, &bits, sizeof(m));
  const bool is_finite = bits < 0x7f800000, is_zero = !(m >= 0x1p-100f);
  if (!is_finite || is_zero) {
    for (int i = 0; i < n; ++i) q[i] = 0;
    return is_finite ? 0.0f : __builtin_nanf("");
  }
  const float inverse = 127.0f / m;
  for (int i = 0; i < n; ++i) {
    // The sum's low bits are the product, rounded to the nearest integer, even if there are two.
    const float shifted = x[i] * inverse + 0x1.8p23f;
    int32_t b;
    memcpy(&b, &shifted, sizeof(b));
    q[i] = b - 0x4b400000;
  }
  return m / 127.0f;
}

template <int kBits, int kBlock>
void QuantizeLine(const QmoeShape& s, const float* x, uint8_t* line) {
  constexpr int kCodesInByte = 8 / kBits, kWordCols = 32 / kBits, kLineCols = kWords * kWordCols;
  int32_t q[kLineCols];
  float d[kLineCols / kBlock];
  for (int i = 0; i < kLineCols / kBlock; ++i) d[i] = QuantizeBlock<kBlock>(x + i * kBlock, q + i * kBlock);
  for (int j = 0; j < kCodesInByte; ++j) {
    auto* const codes = reinterpret_cast<int8_t*>(line + j * kQmoeLineBytes);
    for (int i = 0; i < kQmoeLineBytes; ++i) codes[i] = static_cast<int8_t>(q[kCodesInByte * i + j]);
  }
  auto* const scales = reinterpret_cast<float*>(line + kCodesInByte * kQmoeLineBytes);
  auto* const sums = reinterpret_cast<int32_t*>(line + (kCodesInByte + 1) * kQmoeLineBytes);
  const int32_t factor = s.has_zero_points ? -1 : -(1 << (kBits - 1));
  for (int l = 0; l < kWords; ++l) {
    int32_t sum = 0;
    for (int i = 0; i < kWordCols; ++i) sum += q[l * kWordCols + i];
    scales[l] = d[l * kWordCols / kBlock];
    sums[l] = factor * sum;
  }
}

template <int kBits>
void Int8Line(const QmoeShape& s, const float* x, uint8_t* line) {
  if (s.block == 16) return QuantizeLine<kBits, 16>(s, x, line);
  QuantizeLine<kBits, 32>(s, x, line);
}

float Fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <typename T>
T Read(const void* p) {
  T value;
  memcpy(&value, p, sizeof(value));
  return value;
}

int Bits(const uint8_t* p, int64_t bit, int n) { return p[bit >> 3] >> (bit & 7) & ((1 << n) - 1); }

template <QmoeArithmetic kArithmetic, int kBits>
float Element(const QmoeProduct& p, int64_t row, const void* panel) {
  constexpr int kWordCols = 32 / kBits, kCenter = 1 << (kBits - 1), kCodesInByte = 8 / kBits;
  const QmoeShape& shape = p.shape;
  const int64_t n_cols = shape.n_cols, n_blocks = n_cols / shape.block;
  const uint8_t* const codes = p.weights + row * (n_cols * kBits / 8);
  const auto* line = static_cast<const uint8_t*>(panel);
  float sums[kWords] = {};
  for (int64_t col = 0; col < n_cols; line += LineBytes(shape)) {
    for (int l = 0; l < kWords && col < n_cols; ++l, col += kWordCols) {
      const int64_t block = col / shape.block;
      const float scale = Read<float>(p.scales + (row * n_blocks + block) * 4);
      int zero = kCenter;
      if (shape.has_zero_points) {
        zero = Bits(p.zero_points, p.zero_points_bit + row * p.zero_point_row_bits + block * kBits, kBits);
      }
      const auto x_at = [&](int at) { return line + at * kQmoeLineBytes + l * 4; };
      const auto code_at = [&](int j) { return col + j < n_cols ? Bits(codes, (col + j) * kBits, kBits) : 0; };
      if (kArithmetic == kQmoeInt8) {
        int32_t sum = Read<int32_t>(x_at(kCodesInByte + 1));
        if (shape.has_zero_points) sum *= zero;
        for (int j = 0; j < kWordCols; ++j) {
          sum += code_at(j) * static_cast<int8_t>(x_at(j % kCodesInByte)[j / kCodesInByte]);
        }
        sums[l] = Fma(static_cast<float>(sum), scale * Read<float>(x_at(kCodesInByte)), sums[l]);
      } else {
        float sum = 0.0f;
        if (shape.has_zero_points) sum = static_cast<float>(kCenter - zero) * Read<float>(x_at(kWordCols));
        for (int j = 0; j < kWordCols; ++j) {
          const float w = static_cast<float>(code_at(j) - kCenter), x = Read<float>(x_at(j));
          sum = j == 0 && !shape.has_zero_points ? w * x : Fma(w, x, sum);
        }
        sums[l] = Fma(sum, scale, sums[l]);
      }
    }
  }
  for (int n = kWords / 2; n > 0; n /= 2) {
    for (int l = 0; l < n; ++l) sums[l] += sums[l + n];
  }
  return p.bias != nullptr ? sums[0] + p.bias[row] : sums[0];
}

template <QmoeArithmetic kArithmetic, int kBits>
void MultiplyAll(const QmoeProduct& p) {
  for (int32_t i = 0; i < p.n_x; ++i) {
    for (int64_t row = 0; row < p.n_rows; ++row) p.y[i][row] = Element<kArithmetic, kBits>(p, row, p.x[i]);
  }
}

}  // namespace

int64_t QmoePanelBytes(const QmoeShape& shape) { return LineCount(shape) * LineBytes(shape); }

void QmoePanel(const QmoeShape& shape, const float* x, void* panel) {
  using LineFunction = void (*)(const QmoeShape&, const float*, uint8_t*);
  const bool is_int8 = shape.arithmetic == kQmoeInt8;
  const LineFunction fill = shape.bits == 2   ? is_int8 ? Int8Line<2> : FloatLine<2>
                              : shape.bits == 4 ? is_int8 ? Int8Line<4> : FloatLine<4>
                              : is_int8 ? Int8Line<8>
                                              : FloatLine<8>;
  auto* line = static_cast<uint8_t*>(panel);
  const int64_t line_cols = kQmoeLineBytes * 8 / shape.bits, line_bytes = LineBytes(shape);
  for (int64_t col = 0; col < shape.n_cols; col += line_cols, line += line_bytes) {
    if (shape.n_cols - col >= line_cols) {
      fill(shape, x + col, line);
    } else {
      float last[kMostLineCols] = {};
      memcpy(last, x + col, static_cast<size_t>(shape.n_cols - col) * sizeof(float));
      fill(shape, last, line);
    }
  }
}

void MultiplyQmoe(const QmoeProduct& p) {
  const bool is_int8 = p.shape.arithmetic == kQmoeInt8;
  if (p.shape.bits == 2) return is_int8 ? MultiplyAll<kQmoeInt8, 2>(p) : MultiplyAll<kQmoeFloat, 2>(p);
  if (p.shape.bits == 4) return is_int8 ? MultiplyAll<kQmoeInt8, 4>(p) : MultiplyAll<kQmoeFloat, 4>(p);
  return is_int8 ? MultiplyAll<kQmoeInt8, 8>(p) : MultiplyAll<kQmoeFloat, 8>(p);
}

}  // namespace edgemoe::simd
