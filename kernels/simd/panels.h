// SPDX-License-Identifier: MIT
// panels.h: a matrix times many activation rows: panels of them, blocks of matrix rows, and what to fetch meanwhile.
#ifndef EDGEMOE_SIMD_PANELS_H_
#define EDGEMOE_SIMD_PANELS_H_

#include "simd/kernel_table.h"

namespace edgemoe::simd {

// x[0..n_x) panels of one row -> out: the panels of up to kMaxTile rows that MultiplyPanels takes, the largest first.
// They need PanelBytes of n_x.
void PackPanels(Activation activation, int64_t n_cols, int32_t n_x, const void* const* x, void* out);

// n_rows matrix rows, a multiple of the table's rows_per_group, times n_x activation rows.
struct PanelsProduct {
  const uint8_t* weights;
  int64_t n_rows;
  int64_t n_cols;
  const void* panels;  // of PackPanels, or one of one row
  int32_t n_x;
  float* const* y;  // [n_x]
  int64_t first_y;  // the results go to y[.][first_y] and up
};
void MultiplyPanels(const KernelTable& table, Format format, const PanelsProduct& product);

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_PANELS_H_
