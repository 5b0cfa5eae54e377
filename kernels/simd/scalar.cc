// SPDX-License-Identifier: MIT
// The oracle: every step as the formats define it, in the order and with the roundings that all tables share. Written
// to be read, not to be fast.
//
// The contract, to the bit. Numbers are IEEE single precision, rounded to nearest even, denormals kept; what is not
// written as fma is rounded by itself.
//
// - quantize, per block: m = max |x|, taken on the bit patterns, so that Inf and NaN are the largest. m is Inf or NaN:
//   d = NaN, all q = 0. m < 2^-100: d = 0, q = 0. Else d = m / 127, id = 127 / m, q = x * id to the nearest even.
// - One row times one activation row: acc = 0; then for each block, with S the exact integer sum over its sub-blocks of
//   scale * (w . q), where formats of 32 columns have one sub-block of scale 1:
//       acc = fma(float(S), wd * xd, acc)
//   then Q4_1:              acc = fma(wm, xd * float(sum of q), acc)
//   then Q2_K, Q4_K, Q5_K:  acc = fma(float(M), -(wdmin * xd), acc), with M the sum of min * (sum of q of a sub-block)
//   (|S| and |M| stay below 2^27: 256 columns of at most 128 * 32 * 127, those of Q6_K.)
// - F16, BF16: a[k % 4] = fma(w, x, a[k % 4]), and (a0 + a1) + (a2 + a3).
// - E(x), for e^x: x to -87..88, n = rint(x * log2(e)), r = fma(n, -ln2_low, fma(n, -ln2_high, x)), the polynomial by
//   Horner's rule with fma, times 2^n. Relative error below 3.5e-7 (simd_glu_test.cc).
// - Comparisons are written so that NaN stays NaN.
#include <stdint.h>
#include <string.h>

#include "simd/qmoe.h"
#include "simd/quant_blocks.h"
#include "simd/tables.h"

namespace edgemoe::simd {
namespace {

float Fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

float FloatOf(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t BitsOf(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

uint32_t Load16(const uint8_t* p) { return static_cast<uint32_t>(p[0] | p[1] << 8); }

float LoadF16(const uint8_t* p) {
  const uint32_t h = Load16(p);
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 0) {  // denormal: a multiple of 2^-24, exactly representable
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) return FloatOf(sign | 0x7f800000u | mantissa << 13);
  return FloatOf(sign | (exponent + 112) << 23 | mantissa << 13);
}

float LoadBF16(const uint8_t* p) { return FloatOf(Load16(p) << 16); }

// A block as its definition has it: column i of sub-block j = i / sub_cols is d * scale[j] * w[i] + offset, with offset
// -dmin * min[j], or m of Q4_1.
struct Block {
  float d = 0.0f;
  float dmin = 0.0f;
  float m = 0.0f;
  int16_t w[256];
  int32_t scale[16] = {1};
  int32_t min[16] = {0};
};

int Nibble(const uint8_t* qs, int i) { return i < 16 ? qs[i] & 15 : qs[i - 16] >> 4; }

// What a format's offset is.
enum Offset { kNone, kConstant, kMins };

// One struct per format, with its block's size and how to read it.
struct Q4_0 {
  static constexpr int kBytes = sizeof(BlockQ4_0), kCols = 32, kSubCols = 32;
  static constexpr Offset kOffset = kNone;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ4_0 b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    for (int i = 0; i < 32; ++i) out->w[i] = static_cast<int16_t>(Nibble(b.qs, i) - 8);
  }
};

struct Q4_1 {
  static constexpr int kBytes = sizeof(BlockQ4_1), kCols = 32, kSubCols = 32;
  static constexpr Offset kOffset = kConstant;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ4_1 b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    out->m = LoadF16(b.m);
    for (int i = 0; i < 32; ++i) out->w[i] = static_cast<int16_t>(Nibble(b.qs, i));
  }
};

struct Q8_0 {
  static constexpr int kBytes = sizeof(BlockQ8_0), kCols = 32, kSubCols = 32;
  static constexpr Offset kOffset = kNone;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ8_0 b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    for (int i = 0; i < 32; ++i) out->w[i] = static_cast<int8_t>(b.qs[i]);
  }
};

struct IQ4_NL {
  static constexpr int kBytes = sizeof(BlockIQ4_NL), kCols = 32, kSubCols = 32;
  static constexpr Offset kOffset = kNone;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockIQ4_NL b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    for (int i = 0; i < 32; ++i) out->w[i] = kValuesIQ4NL[Nibble(b.qs, i)];
  }
};

struct MXFP4 {
  static constexpr int kBytes = sizeof(BlockMXFP4), kCols = 32, kSubCols = 32;
  static constexpr Offset kOffset = kNone;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockMXFP4 b;
    memcpy(&b, bytes, sizeof(b));
    out->d = FloatOf(MXFP4ScaleBits(b.e));
    for (int i = 0; i < 32; ++i) out->w[i] = kValuesMXFP4[Nibble(b.qs, i)];
  }
};

// The two bits of column i in Q2_K and Q3_K.
int TwoBits(const uint8_t* qs, int i) {
  const int half = i / 128, s = i % 128 / 32, l = i % 32;
  return qs[32 * half + l] >> (2 * s) & 3;
}

struct Q2_K {
  static constexpr int kBytes = sizeof(BlockQ2_K), kCols = 256, kSubCols = 16;
  static constexpr Offset kOffset = kMins;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ2_K b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    out->dmin = LoadF16(b.dmin);
    for (int j = 0; j < 16; ++j) {
      out->scale[j] = b.scales[j] & 15;
      out->min[j] = b.scales[j] >> 4;
    }
    for (int i = 0; i < 256; ++i) out->w[i] = static_cast<int16_t>(TwoBits(b.qs, i));
  }
};

struct Q3_K {
  static constexpr int kBytes = sizeof(BlockQ3_K), kCols = 256, kSubCols = 16;
  static constexpr Offset kOffset = kNone;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ3_K b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    for (int j = 0; j < 16; ++j) {
      const int low = j < 8 ? b.scales[j] & 15 : b.scales[j - 8] >> 4;
      const int high = b.scales[8 + j % 4] >> (2 * (j / 4)) & 3;
      out->scale[j] = (low | high << 4) - 32;
    }
    for (int i = 0; i < 256; ++i) {
      const bool high = (b.hmask[i % 32] >> (i / 32) & 1) != 0;
      out->w[i] = static_cast<int16_t>(TwoBits(b.qs, i) - (high ? 0 : 4));
    }
  }
};

// The 6-bit scales and mins of Q4_K and Q5_K.
void ReadScalesAndMins(const uint8_t* scales, Block* out) {
  for (int j = 0; j < 4; ++j) {
    out->scale[j] = scales[j] & 63;
    out->min[j] = scales[j + 4] & 63;
    out->scale[j + 4] = (scales[j + 8] & 15) | scales[j] >> 6 << 4;
    out->min[j + 4] = scales[j + 8] >> 4 | scales[j + 4] >> 6 << 4;
  }
}

// Their low four bits at column l of sub-block j.
int LowBits(const uint8_t* qs, int j, int l) { return qs[32 * (j / 2) + l] >> (4 * (j % 2)) & 15; }

struct Q4_K {
  static constexpr int kBytes = sizeof(BlockQ4_K), kCols = 256, kSubCols = 32;
  static constexpr Offset kOffset = kMins;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ4_K b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    out->dmin = LoadF16(b.dmin);
    ReadScalesAndMins(b.scales, out);
    for (int i = 0; i < 256; ++i) out->w[i] = static_cast<int16_t>(LowBits(b.qs, i / 32, i % 32));
  }
};

struct Q5_K {
  static constexpr int kBytes = sizeof(BlockQ5_K), kCols = 256, kSubCols = 32;
  static constexpr Offset kOffset = kMins;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ5_K b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    out->dmin = LoadF16(b.dmin);
    ReadScalesAndMins(b.scales, out);
    for (int i = 0; i < 256; ++i) {
      const int high = b.qh[i % 32] >> (i / 32) & 1;
      out->w[i] = static_cast<int16_t>(LowBits(b.qs, i / 32, i % 32) | high << 4);
    }
  }
};

struct Q6_K {
  static constexpr int kBytes = sizeof(BlockQ6_K), kCols = 256, kSubCols = 16;
  static constexpr Offset kOffset = kNone;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockQ6_K b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    for (int j = 0; j < 16; ++j) out->scale[j] = static_cast<int8_t>(b.scales[j]);
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, s = i % 128 / 32, l = i % 32;
      const int low = b.ql[64 * half + 32 * (s % 2) + l] >> (4 * (s / 2)) & 15;
      const int high = b.qh[32 * half + l] >> (2 * s) & 3;
      out->w[i] = static_cast<int16_t>((low | high << 4) - 32);
    }
  }
};

struct IQ4_XS {
  static constexpr int kBytes = sizeof(BlockIQ4_XS), kCols = 256, kSubCols = 32;
  static constexpr Offset kOffset = kNone;
  static void Read(const uint8_t* bytes, Block* out) {
    BlockIQ4_XS b;
    memcpy(&b, bytes, sizeof(b));
    out->d = LoadF16(b.d);
    for (int j = 0; j < 8; ++j) {
      const int low = b.scales_l[j / 2] >> (4 * (j % 2)) & 15;
      const int high = static_cast<int>(Load16(b.scales_h) >> (2 * j) & 3);
      out->scale[j] = (low | high << 4) - 32;
    }
    for (int i = 0; i < 256; ++i) out->w[i] = kValuesIQ4NL[Nibble(b.qs + 16 * (i / 32), i % 32)];
  }
};

// acc after one more block, of one row of weights and row t of a panel of T. q, d and sums are where the block begins.
template <class F, int T>
float AddBlock(const Block& w, const int8_t* q, const float* d, const int32_t* sums, int t, float acc) {
  int32_t s = 0, m = 0, sum = 0;
  for (int j = 0; j < F::kCols / F::kSubCols; ++j) {
    int32_t dot = 0;
    for (int i = j * F::kSubCols; i < (j + 1) * F::kSubCols; ++i) dot += w.w[i] * q[i / 4 * (T * 4) + t * 4 + i % 4];
    int32_t sum_of_sub = 0;
    for (int k = j * F::kSubCols / 16; k < (j + 1) * F::kSubCols / 16; ++k) sum_of_sub += sums[k * T + t];
    s += w.scale[j] * dot;
    m += w.min[j] * sum_of_sub;
    sum += sum_of_sub;
  }
  const float xd = d[t];
  acc = Fma(static_cast<float>(s), w.d * xd, acc);
  if (F::kOffset == kConstant) acc = Fma(w.m, xd * static_cast<float>(sum), acc);
  if (F::kOffset == kMins) acc = Fma(static_cast<float>(m), -(w.dmin * xd), acc);
  return acc;
}

template <class F, int T>
void Multiply(const GroupProduct& p) {
  const int64_t n_blocks = p.n_cols / F::kCols;
  const int8_t* q = static_cast<const int8_t*>(p.panel);
  const float* d = reinterpret_cast<const float*>(q + p.n_cols * T);
  const int32_t* sums = reinterpret_cast<const int32_t*>(d + p.n_cols / (F::kCols == 32 ? 32 : 256) * T);
  for (int64_t row = 0; row < p.n_groups; ++row) {
    float acc[T] = {0.0f};
    for (int64_t b = 0; b < n_blocks; ++b) {
      Block w;
      F::Read(p.weights + (row * n_blocks + b) * F::kBytes, &w);
      for (int t = 0; t < T; ++t) {
        acc[t] = AddBlock<F, T>(w, q + b * F::kCols * T, d + b * T, sums + b * (F::kCols / 16) * T, t, acc[t]);
      }
    }
    for (int t = 0; t < T; ++t) p.y[t][row] = acc[t];
  }
}

template <float (*Load)(const uint8_t*), int T>
void MultiplyFloat(const GroupProduct& p) {
  const float* x = static_cast<const float*>(p.panel);
  for (int64_t row = 0; row < p.n_groups; ++row) {
    const uint8_t* w = p.weights + row * p.n_cols * 2;
    for (int t = 0; t < T; ++t) {
      float a[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int64_t k = 0; k < p.n_cols; ++k) a[k % 4] = Fma(Load(w + k * 2), x[k * T + t], a[k % 4]);
      p.y[t][row] = (a[0] + a[1]) + (a[2] + a[3]);
    }
  }
}

template <int B>
void QuantizeInt8(const float* x, void* panel, int64_t n_cols) {
  int8_t* q = static_cast<int8_t*>(panel);
  float* d = reinterpret_cast<float*>(q + n_cols);
  int32_t* sums = reinterpret_cast<int32_t*>(d + n_cols / B);
  for (int64_t b = 0; b < n_cols / B; ++b) {
    uint32_t max_bits = 0;
    for (int64_t i = b * B; i < (b + 1) * B; ++i) {
      const uint32_t magnitude = BitsOf(x[i]) & 0x7fffffffu;
      max_bits = magnitude > max_bits ? magnitude : max_bits;
    }
    const float m = FloatOf(max_bits);
    const bool finite = max_bits < 0x7f800000u;
    const bool zero = !finite || m < 0x1p-100f;  // 127 / m might overflow
    d[b] = !finite ? FloatOf(0x7fc00000u) : zero ? 0.0f : m / 127.0f;
    const float id = zero ? 0.0f : 127.0f / m;
    for (int64_t i = b * B; i < (b + 1) * B; ++i) {
      q[i] = zero ? int8_t{0} : static_cast<int8_t>(__builtin_rintf(x[i] * id));
    }
  }
  for (int64_t k = 0; k < n_cols / 16; ++k) {
    sums[k] = 0;
    for (int64_t i = k * 16; i < (k + 1) * 16; ++i) sums[k] += q[i];
  }
}

void QuantizeFloat(const float* x, void* panel, int64_t n_cols) {
  memcpy(panel, x, static_cast<size_t>(n_cols) * sizeof(float));
}

bool IsNan(float x) { return x != x; }

float E(float x) {
  if (IsNan(x)) return x;
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 0x1.715476p+0f);
  float r = Fma(n, -0x1.62e400p-1f, x);
  r = Fma(n, -0x1.7f7d1cp-20f, r);
  float p = 1.0f / 720.0f;
  p = Fma(p, r, 1.0f / 120.0f);
  p = Fma(p, r, 1.0f / 24.0f);
  p = Fma(p, r, 1.0f / 6.0f);
  p = Fma(p, r, 0.5f);
  p = Fma(p, r, 1.0f);
  p = Fma(p, r, 1.0f);
  return p * FloatOf(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

float Silu(float g) { return g / (1.0f + E(-g)); }

float Gelu(float g) {
  float t = 0.044715f * g;
  t = Fma(t, g, 1.0f);
  t = t * g;
  t = t * 1.5957691216057308f;  // 2 sqrt(2 / pi): (1 + tanh(t / 2)) / 2 is 1 / (1 + e^-t)
  return g / (1.0f + E(-t));
}

float Relu(float g) { return g > 0.0f || IsNan(g) ? g : 0.0f; }

float AtMost(float x, float limit) { return limit < x ? limit : x; }
float AtLeast(float x, float limit) { return x < limit ? limit : x; }

float Glu(const GluParams& p, float g, float u) {
  switch (p.kind) {
    case kSwiGlu:
      return Silu(g) * u;
    case kSwiGluOai: {
      g = AtMost(g, p.limit);
      u = AtLeast(AtMost(u, p.limit), -p.limit);
      return (g / (1.0f + E(p.alpha * -g))) * (u + p.beta);
    }
    case kSwiGluClamp: {
      g = AtMost(g, p.limit);
      u = AtLeast(AtMost(u, p.limit), -p.limit);
      return Silu(g) * u;
    }
    case kGeGlu:
      return Gelu(g) * u;
    case kReGlu:
      return Relu(g) * u;
    case kSilu:
      return Silu(g);
    case kGelu:
      return Gelu(g);
    case kReluSquared:
      return Relu(g) * Relu(g);
    case kGluKindCount:
      break;
  }
  __builtin_unreachable();
}

void GluRow(const GluParams& params, const float* gate, const float* gate_bias, const float* up, const float* up_bias,
            float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate_bias != nullptr ? gate[i] + gate_bias[i] : gate[i];
    const float u = up == nullptr ? 0.0f : up_bias != nullptr ? up[i] + up_bias[i] : up[i];
    out[i] = Glu(params, g, u);
  }
}

void Combine(const float* const* rows, const float* const* biases, const float* weights, int n_rows, float* out,
             int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int u = 0; u < n_rows; ++u) {
      const float x = biases != nullptr ? rows[u][i] + biases[u][i] : rows[u][i];
      sum = u == 0 ? weights[0] * x : Fma(weights[u], x, sum);
    }
    out[i] = sum;
  }
}

template <Format format>
void CopyRows(const uint8_t* rows, int64_t n_groups, int64_t n_cols, uint8_t* out) {
  memcpy(out, rows, static_cast<size_t>(n_groups * RowBytes(format, n_cols)));
}

}  // namespace

#define EDGEMOE_TILES(F) {Multiply<F, 1>, Multiply<F, 2>, Multiply<F, 4>, Multiply<F, 8>}
#define EDGEMOE_FLOAT_TILES(F) {MultiplyFloat<F, 1>, MultiplyFloat<F, 2>, MultiplyFloat<F, 4>, MultiplyFloat<F, 8>}
const KernelTable kScalarTable = {
    "scalar",
    1,
    {QuantizeFloat, QuantizeInt8<32>, QuantizeInt8<256>},
    {nullptr, CopyRows<kF16>, CopyRows<kBF16>, CopyRows<kQ4_0>, CopyRows<kQ4_1>, CopyRows<kQ8_0>, CopyRows<kQ2_K>,
     CopyRows<kQ3_K>, CopyRows<kQ4_K>, CopyRows<kQ5_K>, CopyRows<kQ6_K>, CopyRows<kIQ4_NL>, CopyRows<kIQ4_XS>,
     CopyRows<kMXFP4>},
    {nullptr, MultiplyFloat<LoadF16, 1>, MultiplyFloat<LoadBF16, 1>, Multiply<Q4_0, 1>, Multiply<Q4_1, 1>,
     Multiply<Q8_0, 1>, Multiply<Q2_K, 1>, Multiply<Q3_K, 1>, Multiply<Q4_K, 1>, Multiply<Q5_K, 1>, Multiply<Q6_K, 1>,
     Multiply<IQ4_NL, 1>, Multiply<IQ4_XS, 1>, Multiply<MXFP4, 1>},
    {{nullptr, nullptr, nullptr, nullptr},
     EDGEMOE_FLOAT_TILES(LoadF16),
     EDGEMOE_FLOAT_TILES(LoadBF16),
     EDGEMOE_TILES(Q4_0),
     EDGEMOE_TILES(Q4_1),
     EDGEMOE_TILES(Q8_0),
     EDGEMOE_TILES(Q2_K),
     EDGEMOE_TILES(Q3_K),
     EDGEMOE_TILES(Q4_K),
     EDGEMOE_TILES(Q5_K),
     EDGEMOE_TILES(Q6_K),
     EDGEMOE_TILES(IQ4_NL),
     EDGEMOE_TILES(IQ4_XS),
     EDGEMOE_TILES(MXFP4)},
    GluRow,
    Combine,
    MultiplyQmoe,
};

}  // namespace edgemoe::simd
