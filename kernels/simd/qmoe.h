// SPDX-License-Identifier: MIT
// qmoe.h: products with the weights of ONNX Runtime's QMoE operator, which lie as in its file: rows of 2, 4 or 8 bit
// codes, the first column in the lowest bits, and apart from them float scales and packed zero points of `block`
// columns each. w = (code - zero point) * scale; without zero points they are 2, 8 and 128.
//
// *Lines.* A line is 64 bytes of a row, 16 words of 32 bits; the last one of a row may be shorter and counts as filled
// up with zeros. A word has 32 / bits columns and lies in one block, so each of 16 lanes has one scale. Activations are
// brought into the order of the codes in a line (QmoePanel), the weights stay as they are.
//
// *Same bits everywhere.* Lane l of a line: p = the sum of its columns' (code - c) * x, then sum_l = fma(p, scale,
// sum_l); at the end lanes l and l + 8, l + 4, l + 2, l + 1 are added.
//   kQmoeFloat: c is the default zero point, p begins with (c - zero point) * (sum of the word's x) where there are
//               zero points and is a chain of fma in the order of the columns.
//   kQmoeInt8:  x = d * q with d = max |x| / 127 of 32 columns (16 with blocks of 16), p is an integer and the scale is
//               scale * d. What ONNX Runtime means by accuracy_level 4.
// So an element's bits depend on its row and its activations alone: not on the table, the number of activation rows
// or the rows multiplied at once. Thread-safe: all of it.
#ifndef EDGEMOE_SIMD_QMOE_H_
#define EDGEMOE_SIMD_QMOE_H_

#include <stdint.h>

#include "simd/kernel_table.h"

namespace edgemoe::simd {

enum QmoeArithmetic : int32_t { kQmoeFloat = 0, kQmoeInt8 = 1, kQmoeArithmeticCount };

inline constexpr int kQmoeLineBytes = 64;
inline constexpr int kQmoeLineWords = 16;

// A matrix, and how it is multiplied. n_cols * bits is a multiple of 8; block is a power of two from 16 on
// that divides n_cols, or n_cols.
struct QmoeShape {
  int32_t bits;
  QmoeArithmetic arithmetic;
  bool has_zero_points;
  int64_t n_cols;
  int64_t block;
};
int64_t QmoePanelBytes(const QmoeShape& shape);
// x: [n_cols] -> panel, for each line
//   kQmoeFloat: float x[32 / bits][16], and with zero points float sums[16]
//   kQmoeInt8:  int8 q[8 / bits][64]; float d[16]; int32 sums[16], negated, times the default zero point if there are
//   no
//               others
// Inf and NaN give NaN results with kQmoeInt8, and with kQmoeFloat what IEEE arithmetic makes of them.
void QmoePanel(const QmoeShape& shape, const float* x, void* panel);

// n_rows rows of weights times n_x activation rows.
struct QmoeProduct {
  QmoeShape shape;
  const uint8_t* weights;  // n_cols * bits / 8 bytes a row
  int64_t n_rows;
  const uint8_t* scales;       // float [n_rows][n_cols / block], of any alignment
  const uint8_t* zero_points;  // if the shape has them
  int64_t zero_points_bit;     // of the first row, counted from zero_points on
  int64_t zero_point_row_bits;
  const float* bias;  // [n_rows], added to the results; null: none
  int32_t n_x;
  const void* const* x;  // [n_x] panels
  float* const* y;       // [n_x], each n_rows results
};

// The scalar table's.
void MultiplyQmoe(const QmoeProduct& product);

// log2 of the words of a block; 31 where a row is one block.
inline constexpr int QmoeBlockShift(int bits, int64_t n_cols, int64_t block) {
  if (block >= n_cols) return 31;
  int shift = 0;
  while ((int64_t{32 / bits} << shift) < block) ++shift;
  return shift;
}

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_QMOE_H_
