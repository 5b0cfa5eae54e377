// SPDX-License-Identifier: MIT
#include "tests/simd_fakes.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "simd/quant_blocks.h"

namespace edgemoe::simd::test {
namespace {

// Where a block has its binary16 numbers.
std::vector<size_t> HalvesOf(Format format) {
  switch (format) {
    case kQ4_1:
    case kQ4_K:
    case kQ5_K:
      return {0, 2};
    case kQ2_K:
      return {offsetof(BlockQ2_K, d), offsetof(BlockQ2_K, dmin)};
    case kQ3_K:
      return {offsetof(BlockQ3_K, d)};
    case kQ6_K:
      return {offsetof(BlockQ6_K, d)};
    case kMXFP4:
      return {};
    default:
      return {0};
  }
}

uint16_t MakeHalf(Weights kind, std::mt19937* rng) {
  const uint16_t bits = static_cast<uint16_t>((*rng)());
  const uint16_t sign = bits & 0x8000;
  switch (kind) {
    case Weights::kOrdinary:
    case Weights::kAllOnes:
    case Weights::kExtremes:
    case Weights::kAllZeros:  // 2^-10 to 2^-3
      return static_cast<uint16_t>(sign | (5 + (bits >> 10 & 7)) << 10 | (bits & 1023));
    case Weights::kAnyFinite:
      return (bits & 0x7c00) == 0x7c00 ? static_cast<uint16_t>(bits & ~0x4000) : bits;
    case Weights::kZeroScales:
      return sign;
    case Weights::kDenormalScales:
      return static_cast<uint16_t>(sign | (bits & 1023));
    case Weights::kHugeScales:
      return static_cast<uint16_t>(sign | 0x7bff);
    case Weights::kNanScales:
      return static_cast<uint16_t>(sign | 0x7c00 | (bits & 512));  // Inf and NaN
  }
  return 0;
}

uint8_t MakeExponent(Weights kind, std::mt19937* rng) {
  const uint8_t bits = static_cast<uint8_t>((*rng)());
  switch (kind) {
    case Weights::kOrdinary:
    case Weights::kAllOnes:
    case Weights::kExtremes:
    case Weights::kAllZeros:
      return static_cast<uint8_t>(116 + bits % 16);
    case Weights::kZeroScales:
      return 0;
    case Weights::kDenormalScales:
      return bits % 3;
    case Weights::kHugeScales:
      return 254;
    case Weights::kNanScales:
      return 255;
    case Weights::kAnyFinite:
      return bits;
  }
  return 0;
}

// Rows of F16 or BF16 are nothing but scales.
uint16_t MakeValue16(Format format, Weights kind, std::mt19937* rng) {
  const uint16_t half = MakeHalf(kind, rng);
  if (format == kF16) return half;
  const uint16_t exponent = half >> 10 & 31, rest = static_cast<uint16_t>((half & 0x8000) | (half & 127));
  if (kind == Weights::kAnyFinite) {
    const uint16_t bits = static_cast<uint16_t>((*rng)());
    return (bits & 0x7f80) == 0x7f80 ? static_cast<uint16_t>(bits & ~0x4000) : bits;
  }
  const int widened = kind == Weights::kNanScales    ? 255
                      : kind == Weights::kHugeScales ? 254
                      : exponent == 0                ? 0
                                                     : exponent + 112;
  return static_cast<uint16_t>(rest | widened << 7);
}

void FillFields(const FormatInfo& info, std::vector<uint8_t>* rows, std::mt19937* rng) {
  const uint8_t bytes[] = {0, 255, 127, 128};
  for (size_t at = 0; at < rows->size();) {
    for (int f = 0; f < info.n_fields; ++f) {
      const size_t n = static_cast<size_t>(info.fields[f].unit_bytes * info.fields[f].n_units);
      std::memset(&(*rows)[at], bytes[(*rng)() % 4], n);
      at += n;
    }
  }
}

double HalfToDouble(const uint8_t* p) {
  const int bits = p[0] + 256 * p[1];
  const int exponent = bits / 1024 % 32, mantissa = bits % 1024;
  double x = std::ldexp(exponent == 0 ? mantissa : 1024 + mantissa, std::max(exponent, 1) - 25);
  if (exponent == 31) x = mantissa == 0 ? INFINITY : NAN;
  return bits >= 32768 ? -x : x;
}

double BrainToDouble(const uint8_t* p) {
  const int bits = p[0] + 256 * p[1];
  const int exponent = bits / 128 % 256, mantissa = bits % 128;
  double x = std::ldexp(exponent == 0 ? mantissa : 128 + mantissa, std::max(exponent, 1) - 134);
  if (exponent == 255) x = mantissa == 0 ? INFINITY : NAN;
  return bits >= 32768 ? -x : x;
}

struct Writer {
  double* main;
  double* offset;
  void Put(double m, double o) { *main++ = m, *offset++ = o; }
};

// Blocks of 32 with nibbles: all low ones, then all high ones.
template <class Value>
void Nibbles(const uint8_t* qs, double scale, double offset, Value value, Writer* out) {
  for (int i = 0; i < 16; ++i) out->Put(scale * value(qs[i] % 16), offset);
  for (int i = 0; i < 16; ++i) out->Put(scale * value(qs[i] / 16), offset);
}

double E2M1(int code) {
  const double magnitudes[] = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
  return code < 8 ? magnitudes[code] : -magnitudes[code - 8];
}

double IQ4(int code) {
  const double values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return values[code];
}

void Q2KOrQ3K(Format format, const uint8_t* block, Writer* out) {
  const bool is_q2 = format == kQ2_K;
  const uint8_t* qs = block + (is_q2 ? 16 : 32);
  const uint8_t* scales = block + (is_q2 ? 0 : 96);
  const double d = HalfToDouble(block + (is_q2 ? 80 : 108));
  int sub = 0;
  for (int half = 0; half < 2; ++half) {
    for (int plane = 0; plane < 4; ++plane) {
      for (int side = 0; side < 2; ++side, ++sub) {
        double scale = 0.0, offset = 0.0;
        if (is_q2) {
          scale = scales[sub] % 16;
          offset = -HalfToDouble(block + 82) * (scales[sub] / 16);
        } else {
          const int nibble = sub < 8 ? scales[sub] % 16 : scales[sub - 8] / 16;
          const int pair = scales[8 + sub % 4] >> (sub / 4 * 2) & 3;
          scale = nibble + 16 * pair - 32;
        }
        for (int l = 16 * side; l < 16 * side + 16; ++l) {
          const int low = qs[32 * half + l] >> (2 * plane) & 3;
          const bool high = is_q2 || (block[l] & (1 << (4 * half + plane))) != 0;
          out->Put(d * scale * (high ? low : low - 4), offset);
        }
      }
    }
  }
}

void Q4KOrQ5K(Format format, const uint8_t* block, Writer* out) {
  const uint8_t* qh = format == kQ5_K ? block + 16 : nullptr;
  const uint8_t* qs = block + (format == kQ5_K ? 48 : 16);
  const uint8_t* s = block + 4;
  for (int sub = 0; sub < 8; ++sub) {
    const int scale = sub < 4 ? s[sub] % 64 : s[sub + 4] % 16 + s[sub - 4] / 64 * 16;
    const int min = sub < 4 ? s[sub + 4] % 64 : s[sub + 4] / 16 + s[sub] / 64 * 16;
    for (int l = 0; l < 32; ++l) {
      const int byte = qs[sub / 2 * 32 + l];
      int code = sub % 2 == 0 ? byte % 16 : byte / 16;
      if (qh != nullptr && (qh[l] & (1 << sub)) != 0) code += 16;
      out->Put(HalfToDouble(block) * scale * code, -HalfToDouble(block + 2) * min);
    }
  }
}

void Q6K(const uint8_t* block, Writer* out) {
  const double d = HalfToDouble(block + 208);
  const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
  for (int i = 0; i < 256; ++i) {
    const uint8_t* ql = block + i / 128 * 64;
    const uint8_t* qh = block + 128 + i / 128 * 32;
    const int in_half = i % 128;
    const int low = in_half < 64 ? ql[in_half] % 16 : ql[in_half - 64] / 16;
    const int high = qh[in_half % 32] >> (in_half / 32 * 2) & 3;
    out->Put(d * scales[i / 16] * (low + 16 * high - 32), 0.0);
  }
}

void IQ4XS(const uint8_t* block, Writer* out) {
  const int high_bits = block[2] + 256 * block[3];
  for (int sub = 0; sub < 8; ++sub) {
    const int byte = block[4 + sub / 2];
    const int scale = (sub % 2 == 0 ? byte % 16 : byte / 16) + 16 * (high_bits >> (2 * sub) & 3) - 32;
    Nibbles(block + 8 + 16 * sub, HalfToDouble(block) * scale, 0.0, IQ4, out);
  }
}

void DequantizeBlock(Format format, const uint8_t* block, Writer* out) {
  switch (format) {
    case kF16:
      return out->Put(HalfToDouble(block), 0.0);
    case kBF16:
      return out->Put(BrainToDouble(block), 0.0);
    case kQ4_0:
      return Nibbles(block + 2, HalfToDouble(block), 0.0, [](int code) { return code - 8.0; }, out);
    case kQ4_1:
      return Nibbles(
          block + 4, HalfToDouble(block), HalfToDouble(block + 2), [](int code) { return static_cast<double>(code); },
          out);
    case kIQ4_NL:
      return Nibbles(block + 2, HalfToDouble(block), 0.0, IQ4, out);
    case kMXFP4:
      return Nibbles(block + 1, std::ldexp(1.0, block[0] - 127), 0.0, E2M1, out);
    case kQ8_0:
      for (int i = 0; i < 32; ++i) out->Put(HalfToDouble(block) * static_cast<int8_t>(block[2 + i]), 0.0);
      return;
    case kQ2_K:
    case kQ3_K:
      return Q2KOrQ3K(format, block, out);
    case kQ4_K:
    case kQ5_K:
      return Q4KOrQ5K(format, block, out);
    case kQ6_K:
      return Q6K(block, out);
    case kIQ4_XS:
      return IQ4XS(block, out);
    case kNoFormat:
    case kFormatCount:
      break;
  }
}

}  // namespace

DoubleRow Dequantize(Format format, const uint8_t* row, int64_t n_cols) {
  DoubleRow result = {std::vector<double>(static_cast<size_t>(n_cols)),
                      std::vector<double>(static_cast<size_t>(n_cols))};
  Writer out = {result.main.data(), result.offset.data()};
  for (int64_t b = 0; b < n_cols / Info(format).block_cols; ++b) {
    DequantizeBlock(format, row + b * Info(format).block_bytes, &out);
  }
  return result;
}

std::vector<uint8_t> MakeRows(Format format, int64_t n_rows, int64_t n_cols, Weights kind, std::mt19937* rng) {
  const FormatInfo& info = Info(format);
  std::vector<uint8_t> rows(static_cast<size_t>(n_rows * RowBytes(format, n_cols)));
  if (info.block_cols == 1) {
    for (size_t i = 0; i < rows.size(); i += 2) {
      const uint16_t value = MakeValue16(format, kind, rng);
      std::memcpy(&rows[i], &value, 2);
    }
    return rows;
  }
  for (uint8_t& byte : rows) {
    byte = kind == Weights::kAllOnes ? 0xff : kind == Weights::kAllZeros ? 0 : static_cast<uint8_t>((*rng)());
  }
  if (kind == Weights::kExtremes) FillFields(info, &rows, rng);
  for (size_t block = 0; block < rows.size(); block += static_cast<size_t>(info.block_bytes)) {
    if (format == kMXFP4) rows[block] = MakeExponent(kind, rng);
    for (const size_t at : HalvesOf(format)) {
      const uint16_t half = MakeHalf(kind, rng);
      std::memcpy(&rows[block + at], &half, 2);
    }
  }
  return rows;
}

std::vector<float> MakeValues(int64_t n, Values kind, std::mt19937* rng) {
  std::vector<float> x(static_cast<size_t>(n));
  // One draw per number, of all its parts: compilers differ in the order in which they call the operands of a product.
  const auto draw = [rng](int low, int high) {
    const uint32_t bits = (*rng)();
    const float magnitude = 1.0f + static_cast<float>(bits & 0x7fffff) * 0x1p-23f;
    const int exponent = low + static_cast<int>((bits >> 8) % static_cast<uint32_t>(high - low + 1));
    return std::ldexp(bits >> 31 != 0 ? -magnitude : magnitude, exponent);
  };
  const float common = draw(0, 0);
  for (float& v : x) {
    switch (kind) {
      case Values::kZeros:
      case Values::kSpike:
        v = std::copysign(0.0f, draw(0, 0));
        break;
      case Values::kDenormals:
        v = draw(-149, -127);
        break;
      case Values::kHuge:
        v = draw(0, 0) * 1e30f;
        break;
      case Values::kAllEqual:
        v = common;
        break;
      case Values::kPlusMinusOne:
        v = std::copysign(1.0f, draw(0, 0));
        break;
      case Values::kWide:
        v = draw(-120, 120);
        break;
      case Values::kOrdinary:
      case Values::kInf:
      case Values::kNan:
        v = draw(-8, -1);
        break;
    }
  }
  float* const one = &x[(*rng)() % x.size()];
  if (kind == Values::kSpike) *one = common;
  if (kind == Values::kInf) *one = std::copysign(INFINITY, common);
  if (kind == Values::kNan) *one = NAN;
  return x;
}

AlignedBytes Quantize(const KernelTable& table, Activation activation, const std::vector<float>& x) {
  const int64_t n_cols = static_cast<int64_t>(x.size());
  AlignedBytes panel(static_cast<size_t>(PanelBytes(activation, n_cols, 1)));
  std::vector<float> shifted(x.size() + 1);  // x needs no alignment
  std::copy(x.begin(), x.end(), shifted.begin() + 1);
  table.quantize[activation](shifted.data() + 1, panel.data(), n_cols);
  return panel;
}

std::vector<std::vector<float>> Multiply(const KernelTable& table, Format format, int64_t n_cols, int64_t n_rows,
                                         const std::vector<uint8_t>& rows, const std::vector<AlignedBytes>& panels) {
  const Activation activation = Info(format).activation;
  const int T = static_cast<int>(panels.size());
  const int R = table.rows_per_group;
  AlignedBytes weights(rows.size());
  table.interleave[format](rows.data(), n_rows / R, n_cols, weights.data());
  std::vector<const void*> panel_data;
  for (const AlignedBytes& p : panels) panel_data.push_back(p.data());
  AlignedBytes panel(static_cast<size_t>(PanelBytes(activation, n_cols, T)));
  PackPanel(activation, n_cols, T, panel_data.data(), panel.data());
  std::vector<std::vector<float>> y(panels.size(), std::vector<float>(static_cast<size_t>(n_rows), -12345.0f));
  std::vector<float*> y_data;
  for (std::vector<float>& row : y) y_data.push_back(row.data());
  int log2_of_T = 0;
  while (1 << log2_of_T < T) ++log2_of_T;
  table.multiply[format][log2_of_T]({weights.data(), n_rows / R, n_cols, panel.data(), y_data.data()});
  return y;
}

std::vector<float> MultiplyRows(const KernelTable& table, Format format, int64_t n_cols, int64_t n_rows,
                                const std::vector<uint8_t>& rows, const AlignedBytes& panel) {
  AlignedBytes weights(rows.size() + 1);
  std::copy(rows.begin(), rows.end(), weights.data() + 1);
  std::vector<float> y(static_cast<size_t>(n_rows), -12345.0f);
  float* const y_data[1] = {y.data()};
  table.multiply_rows[format]({weights.data() + 1, n_rows / table.rows_per_group, n_cols, panel.data(), y_data});
  return y;
}

::testing::AssertionResult SameBits(const std::vector<float>& got, const std::vector<float>& want) {
  size_t n_different = 0, first = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const bool same = std::memcmp(&got[i], &want[i], sizeof(float)) == 0;
    if (same || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
    if (n_different++ == 0) first = i;
  }
  if (n_different == 0) return ::testing::AssertionSuccess();
  char text[160];
  snprintf(text, sizeof(text), "%zu of %zu differ, first at %zu: got %a (%g), want %a (%g)", n_different, want.size(),
           first, static_cast<double>(got[first]), static_cast<double>(got[first]), static_cast<double>(want[first]),
           static_cast<double>(want[first]));
  return ::testing::AssertionFailure() << text;
}

int64_t ColumnUnit(Format format) { return std::max(Info(format).block_cols, 32); }

std::vector<Format> AllFormats() {
  std::vector<Format> formats;
  for (int f = kNoFormat + 1; f < kFormatCount; ++f) formats.push_back(static_cast<Format>(f));
  return formats;
}

std::vector<const KernelTable*> AllTables() {
  std::vector<const KernelTable*> tables;
  for (const KernelTable* const* t = Compiled(); *t != nullptr; ++t) tables.push_back(*t);
  return tables;
}

}  // namespace edgemoe::simd::test
