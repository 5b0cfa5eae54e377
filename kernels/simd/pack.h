// SPDX-License-Identifier: MIT
// pack.h: what the formats look like in a file and in packed groups, and how activation rows are interleaved into
// panels. Portable code, the same for every instruction set; rows are packed by a KernelTable (interleave).
#ifndef EDGEMOE_SIMD_PACK_H_
#define EDGEMOE_SIMD_PACK_H_

#include "simd/kernel_table.h"
#include "simd/quant_blocks.h"

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
// Fields in file order. A unit is what one load of a kernel takes of each row: 4 bytes of codes, one scale. The units
// of a block fill it, which the table cannot check itself; simd_pack_test.cc does.
inline constexpr FormatInfo kInfos[kFormatCount] = {
    {"", 0, 0, kFloat, 0, {}},
    {"f16", 1, 2, kFloat, 1, {{2, 1}}},
    {"bf16", 1, 2, kFloat, 1, {{2, 1}}},
    {"q4_0", 32, sizeof(BlockQ4_0), kInt8x32, 2, {{2, 1}, {4, 4}}},
    {"q4_1", 32, sizeof(BlockQ4_1), kInt8x32, 3, {{2, 1}, {2, 1}, {4, 4}}},
    {"q8_0", 32, sizeof(BlockQ8_0), kInt8x32, 2, {{2, 1}, {4, 8}}},
    {"q2_K", 256, sizeof(BlockQ2_K), kInt8x256, 4, {{1, 16}, {4, 16}, {2, 1}, {2, 1}}},
    {"q3_K", 256, sizeof(BlockQ3_K), kInt8x256, 4, {{4, 8}, {4, 16}, {1, 12}, {2, 1}}},
    {"q4_K", 256, sizeof(BlockQ4_K), kInt8x256, 4, {{2, 1}, {2, 1}, {1, 12}, {4, 32}}},
    {"q5_K", 256, sizeof(BlockQ5_K), kInt8x256, 5, {{2, 1}, {2, 1}, {1, 12}, {4, 8}, {4, 32}}},
    {"q6_K", 256, sizeof(BlockQ6_K), kInt8x256, 4, {{4, 32}, {4, 16}, {1, 16}, {2, 1}}},
    {"iq4_nl", 32, sizeof(BlockIQ4_NL), kInt8x32, 2, {{2, 1}, {4, 4}}},
    {"iq4_xs", 256, sizeof(BlockIQ4_XS), kInt8x256, 4, {{2, 1}, {2, 1}, {1, 4}, {4, 32}}},
    {"mxfp4", 32, sizeof(BlockMXFP4), kInt8x32, 2, {{1, 1}, {4, 4}}},
};

const FormatInfo& Info(Format format);  // kNoFormat: name "", block_cols 0

inline int64_t RowBytes(Format f, int64_t n_cols) { return n_cols / Info(f).block_cols * Info(f).block_bytes; }

// rows[0..T) panels of one row -> out: a panel of T (1, 2, 4 or 8).
void PackPanel(Activation activation, int64_t n_cols, int T, const void* const* rows, void* out);

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_PACK_H_
