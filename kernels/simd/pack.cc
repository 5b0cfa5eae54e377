// SPDX-License-Identifier: MIT
// Runs on the threads that read from disk, so it must keep well ahead of one: see Interleave.
#include "simd/pack.h"

#include <string.h>

#include "simd/quant_blocks.h"

namespace edgemoe::simd {
namespace {

// Fields in file order. A unit is what one load of a kernel takes of each row: 4 bytes of codes, one scale. The units
// of a block fill it, which the table cannot check itself; simd_pack_test.cc does.
constexpr FormatInfo kInfos[kFormatCount] = {
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

// Unit u of row r, at rows + r * stride + u * U, goes to out + (u * R + r) * U. In this order of the loops a core of
// 2025 packs 10 to 14 GB/s of quantized rows at R = 16; with the row outside, half of that.
template <int R, int U>
void Interleave(const uint8_t* rows, int64_t stride, int64_t n_units, uint8_t* out) {
  for (int64_t u = 0; u < n_units; ++u) {
    for (int r = 0; r < R; ++r) memcpy(out + (u * R + r) * U, rows + r * stride + u * U, U);
  }
}

// Rows of 2-byte values are often whole pages, so that equal columns of all rows fall into one set of the first-level
// cache. 64 of them are therefore gathered first: 11 to 19 GB/s at R = 16 and 2048 columns instead of 5.
template <int R>
void InterleaveHalves(const uint8_t* rows, int64_t stride, int64_t n_units, uint8_t* out) {
  constexpr int kChunk = 64;
  alignas(64) uint8_t chunk[R][kChunk * 2 + 64];
  int64_t u = 0;
  for (; u + kChunk <= n_units; u += kChunk) {
    for (int r = 0; r < R; ++r) memcpy(chunk[r], rows + r * stride + u * 2, kChunk * 2);
    Interleave<R, 2>(chunk[0], sizeof(chunk[0]), kChunk, out + u * R * 2);
  }
  Interleave<R, 2>(rows + u * 2, stride, n_units - u, out + u * R * 2);
}

template <int R>
void PackRows(const FormatInfo& info, int64_t n_cols, const uint8_t* rows, uint8_t* out) {
  const int64_t n_blocks = n_cols / info.block_cols;
  const int64_t stride = n_blocks * info.block_bytes;
  if (info.block_cols == 1) return InterleaveHalves<R>(rows, stride, n_cols, out);
  for (int64_t b = 0; b < n_blocks; ++b) {
    for (int f = 0; f < info.n_fields; ++f) {
      const int n_units = info.fields[f].n_units;
      const int unit_bytes = info.fields[f].unit_bytes;
      if (unit_bytes == 4) {
        Interleave<R, 4>(rows, stride, n_units, out);
      } else if (unit_bytes == 2) {
        Interleave<R, 2>(rows, stride, n_units, out);
      } else {
        Interleave<R, 1>(rows, stride, n_units, out);
      }
      rows += n_units * unit_bytes;
      out += R * n_units * unit_bytes;
    }
  }
}

// A panel's parts, codes by four, scales and sums, are all of 4-byte units, and each part of a panel of T is T times as
// long: so the whole of it is one interleaving.
template <int T>
void InterleaveWords(const void* const* rows, size_t n_words, uint8_t* out) {
  const uint8_t* from[T];
  for (int t = 0; t < T; ++t) from[t] = static_cast<const uint8_t*>(rows[t]);
  for (size_t w = 0; w < n_words; ++w) {
    for (int t = 0; t < T; ++t) memcpy(out + (w * T + t) * 4, from[t] + w * 4, 4);
  }
}

}  // namespace

const FormatInfo& Info(Format format) { return kInfos[format]; }

void PackGroup(Format format, int rows_per_group, int64_t n_cols, const uint8_t* rows, uint8_t* out) {
  const FormatInfo& info = kInfos[format];
  switch (rows_per_group) {
    case 1:
      memcpy(out, rows, static_cast<size_t>(RowBytes(format, n_cols)));
      break;
    case 4:
      PackRows<4>(info, n_cols, rows, out);
      break;
    case 8:
      PackRows<8>(info, n_cols, rows, out);
      break;
    case 16:
      PackRows<16>(info, n_cols, rows, out);
      break;
    default:  // no table has another width
      __builtin_unreachable();
  }
}

void PackPanel(Activation activation, int64_t n_cols, int T, const void* const* rows, void* out) {
  const size_t row_bytes = static_cast<size_t>(PanelBytes(activation, n_cols, 1));
  uint8_t* to = static_cast<uint8_t*>(out);
  switch (T) {
    case 1:
      memcpy(to, rows[0], row_bytes);
      break;
    case 2:
      InterleaveWords<2>(rows, row_bytes / 4, to);
      break;
    case 4:
      InterleaveWords<4>(rows, row_bytes / 4, to);
      break;
    case 8:
      InterleaveWords<8>(rows, row_bytes / 4, to);
      break;
    default:  // see kMaxTile
      __builtin_unreachable();
  }
}

}  // namespace edgemoe::simd
