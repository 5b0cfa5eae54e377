// SPDX-License-Identifier: MIT
// pack.h: what the formats look like in a file, how rows of a matrix are interleaved into groups, and activation rows
// into panels. Portable code, the same for every instruction set.
#ifndef EDGEMOE_SIMD_PACK_H_
#define EDGEMOE_SIMD_PACK_H_

#include "simd/kernel_table.h"

namespace edgemoe::simd {

// A block is a sequence of fields, each a sequence of units of 1, 2 or 4 bytes; see quant_blocks.h. A packed group of R
// rows has, for each block, for each field, for each unit, that unit of row 0, 1, .. R - 1.
struct Field {
  int16_t unit_bytes;
  int16_t n_units;
};
struct FormatInfo {
  const char* name;  // as ggml_type_name gives it
  int32_t block_cols;
  int32_t block_bytes;
  Activation activation;
  int32_t n_fields;
  Field fields[5];
};
const FormatInfo& Info(Format format);  // kNoFormat: name "", block_cols 0

inline int64_t RowBytes(Format f, int64_t n_cols) { return n_cols / Info(f).block_cols * Info(f).block_bytes; }

// rows: rows_per_group rows of RowBytes each, one after the other -> out: as many bytes. They must not overlap.
void PackGroup(Format format, int rows_per_group, int64_t n_cols, const uint8_t* rows, uint8_t* out);
// rows[0..T) panels of one row -> out: a panel of T (1, 2, 4 or 8).
void PackPanel(Activation activation, int64_t n_cols, int T, const void* const* rows, void* out);

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_PACK_H_
