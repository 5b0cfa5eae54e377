// SPDX-License-Identifier: MIT
// kernel_table.h: arithmetic on quantized expert weights, one table of functions per instruction set. This folder is
// arithmetic only: it owns no memory, starts no thread, reads no file, and knows neither cache nor engine.
//
// *Rows.* A table multiplies groups of `rows_per_group` consecutive matrix rows, one row per 32-bit lane, interleaved
// as pack.h says; the bytes are a permutation of the file's and no more than they.
//
// *Activations.* A format multiplies with one kind of activation row (Activation). A panel is T activation rows
// interleaved, so that a kernel finds what it multiplies next to each other; one row is a panel of T = 1.
//
// *Same bits everywhere.* Each result is a sum over the blocks of its row, in order, of an integer dot product times
// scales, with every rounding step fixed (kernel files say which). So results are bit-identical for every table,
// every T and every split of the rows among threads; the scalar table is the oracle, and tests compare bits.
// Thread-safe: all of it.
#ifndef EDGEMOE_SIMD_KERNEL_TABLE_H_
#define EDGEMOE_SIMD_KERNEL_TABLE_H_

#include <stddef.h>
#include <stdint.h>

namespace edgemoe::simd {

// Values of edgemoe_format in edgemoe.h.
enum Format : int32_t {
  kNoFormat = 0,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS,
  kMXFP4,
  kFormatCount
};

// Layout of a panel of T rows of n columns; see also PanelBytes.
//   kFloat:          float x[n][T]
//   kInt8x32, x256:  int8 q[n / 4][T][4]; float d[n / B][T]; int32 sums[n / 16][T], with x = d * q and B = 32 or 256,
//                    d = max |x| of a block / 127, sums of 16 consecutive q.
enum Activation : int32_t { kFloat = 0, kInt8x32 = 1, kInt8x256 = 2, kActivationCount };

inline constexpr int64_t PanelBytes(Activation a, int64_t n_cols, int64_t n_rows) {
  return n_rows * (a == kFloat ? n_cols * 4 : n_cols + n_cols / (a == kInt8x32 ? 32 : 256) * 4 + n_cols / 16 * 4);
}

// Panels have 1, 2, 4 or 8 rows.
inline constexpr int kTileCount = 4;
inline constexpr int kMaxTile = 1 << (kTileCount - 1);
// log2 of the rows of the next panel where n_left > 0 rows are left: the largest panel that they fill.
inline constexpr int NextTile(int64_t n_left) {
  int log2_rows = kTileCount - 1;
  while ((1 << log2_rows) > n_left) --log2_rows;
  return log2_rows;
}

// n_groups groups of weights times one panel.
struct GroupProduct {
  const uint8_t* weights;  // n_groups packed groups, of any alignment
  int64_t n_groups;
  int64_t n_cols;
  const void* panel;
  float* const* y;  // [T], each n_groups * rows_per_group results
  // Weights that later calls multiply, for panels of several rows to fetch into the caches on the way.
  const uint8_t* next = nullptr;
  int64_t n_next_bytes = 0;
};
using MultiplyFunction = void (*)(const GroupProduct&);
// rows: n_groups * rows_per_group rows as in a file, of any alignment -> out: as many packed groups, as many bytes.
// They must not overlap.
using InterleaveFunction = void (*)(const uint8_t* rows, int64_t n_groups, int64_t n_cols, uint8_t* out);

struct QmoeProduct;  // qmoe.h

enum GluKind : int32_t {
  kSwiGlu = 0,     // silu(gate) * up
  kSwiGluOai = 1,  // gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit): g / (1 + exp(-alpha g)) * (u + beta)
  kSwiGluClamp = 2,  // as ggml's GGML_GLU_OP_SWIGLU_CLAMP with its limit
  kGeGlu = 3,        // gelu(gate) * up, gelu's tanh form
  kReGlu = 4,        // max(gate, 0) * up
  kSilu = 5,         // of gate alone, as are the two below
  kGelu = 6,
  kReluSquared = 7,
  kGluKindCount
};
struct GluParams {
  GluKind kind;
  float alpha;
  float limit;
  float beta = 1.0f;
};

struct KernelTable {
  const char* isa;         // as EDGEMOE_ISA names it
  int32_t rows_per_group;  // 1: rows as they lie in the file
  // x: [n_cols] -> a panel of one row. n_cols is a multiple of the kind's block. Inf and NaN give NaN results (kFloat:
  // what IEEE arithmetic makes of them).
  void (*quantize[kActivationCount])(const float* x, void* panel, int64_t n_cols);
  InterleaveFunction interleave[kFormatCount];  // null for kNoFormat, as are the functions below
  // Groups that are not packed, times a panel of one row: the results of multiply.
  MultiplyFunction multiply_rows[kFormatCount];
  // [format][log2(T)]
  MultiplyFunction multiply[kFormatCount][kTileCount];
  // out[i] = act(gate[i] (+ gate_bias[i])) * (up[i] (+ up_bias[i])). Biases may be null; up is null for the kinds of
  // gate alone. out may be gate or up.
  void (*glu)(const GluParams& params, const float* gate, const float* gate_bias, const float* up, const float* up_bias,
              float* out, int64_t n);
  // out[i] = sum over u, in order, of weights[u] * (rows[u][i] (+ biases[u][i])); biases may be null. The first product
  // is rounded, the others are fused into the sum. out may be one of the rows. Biases: null, or none of them is.
  void (*combine)(const float* const* rows, const float* const* biases, const float* weights, int n_rows, float* out,
                  int64_t n);
  // Weights of ONNX Runtime's QMoE, as they lie in its file.
  void (*qmoe)(const QmoeProduct& product);
};

// What is compiled into this build, best first; the last is scalar. Null-terminated.
const KernelTable* const* Compiled();
// The last of them: it takes rows as they lie in a file, and every CPU runs it.
const KernelTable& Portable();
// Whether this CPU (and its operating system) can run it.
bool Supported(const KernelTable& table);
// The table to use: that named by EDGEMOE_ISA, or the first supported one. On failure null, and `error` (n_error bytes)
// says what was asked for and which names there are.
const KernelTable* Choose(const char* isa, char* error, size_t n_error);

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_KERNEL_TABLE_H_
