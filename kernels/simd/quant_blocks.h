// SPDX-License-Identifier: MIT
// quant_blocks.h: the bytes of one block of each format, as they lie in a GGUF file, and the tables of values that
// codes stand for. Only plain data and functions of internal linkage: every instruction set's file may include it, and
// nothing of it, compiled for a newer CPU, can be linked into code for all CPUs.
//
// Sources. Q*_0, Q*_1, Q*_K and IQ4_*: ggml's ggml-common.h, which is the definition of GGUF's types. MXFP4: the block
// is ggml's too, its numbers (E2M1 codes, one E8M0 exponent for 32 of them) those of the OCP Microscaling Formats (MX)
// Specification v1.0. Numbers are little-endian. Members are bytes, so a block may begin at any address; d, dmin and m
// are IEEE binary16. In the packed form of R rows (pack.h) a field begins at R * offsetof(block, field).
#ifndef EDGEMOE_SIMD_QUANT_BLOCKS_H_
#define EDGEMOE_SIMD_QUANT_BLOCKS_H_

#include <stddef.h>
#include <stdint.h>

namespace edgemoe::simd {

// 32 columns. Nibbles: column i < 16 is the low nibble of qs[i], column 16 + i the high one. In all five formats.
struct BlockQ4_0 {
  uint8_t d[2];
  uint8_t qs[16];  // d * (nibble - 8)
};
static_assert(sizeof(BlockQ4_0) == 18, "Q4_0");

struct BlockQ4_1 {
  uint8_t d[2];
  uint8_t m[2];
  uint8_t qs[16];  // d * nibble + m
};
static_assert(sizeof(BlockQ4_1) == 20, "Q4_1");

struct BlockIQ4_NL {
  uint8_t d[2];
  uint8_t qs[16];  // d * kValuesIQ4NL[nibble]
};
static_assert(sizeof(BlockIQ4_NL) == 18, "IQ4_NL");

struct BlockMXFP4 {
  uint8_t e;
  uint8_t qs[16];  // 2^(e - 128) * kValuesMXFP4[nibble]
};
static_assert(sizeof(BlockMXFP4) == 17, "MXFP4");

struct BlockQ8_0 {
  uint8_t d[2];
  uint8_t qs[32];  // d * int8
};
static_assert(sizeof(BlockQ8_0) == 34, "Q8_0");

// 256 columns in sub-blocks, each with a scale (and a min) of few bits.

// 16 sub-blocks j of 16: d * (scales[j] & 15) * code - dmin * (scales[j] >> 4). Half h of 128 columns takes qs[32 h
// ..]: column 128 h + 32 s + l is bits 2 s and 2 s + 1 of qs[32 h + l].
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t qs[64];
  uint8_t d[2];
  uint8_t dmin[2];
};
static_assert(sizeof(BlockQ2_K) == 84, "Q2_K");

// 16 sub-blocks j of 16: d * (scale - 32) * (code - 4), with the low two bits of the code as in Q2_K and the third one
// bit 4 h + s of hmask[l]. scale, 6 bits: low nibbles of scales[0..8) are the low bits of j < 8, the high nibbles those
// of j >= 8; bits 2 (j / 4) and up of scales[8 + j % 4] are the high two.
struct BlockQ3_K {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint8_t d[2];
};
static_assert(sizeof(BlockQ3_K) == 110, "Q3_K");

// 8 sub-blocks j of 32: d * scale * code - dmin * min. Sub-blocks 2 c and 2 c + 1 are the low and high nibbles of
// qs[32 c ..]. scale and min, 6 bits: for j < 4 scales[j] & 63 and scales[j + 4] & 63; for the others the low and high
// nibbles of scales[j + 4], under the two high bits of scales[j - 4] and scales[j].
struct BlockQ4_K {
  uint8_t d[2];
  uint8_t dmin[2];
  uint8_t scales[12];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144, "Q4_K");

// As Q4_K; bit j of qh[l] is bit 4 of the code at column l of sub-block j.
struct BlockQ5_K {
  uint8_t d[2];
  uint8_t dmin[2];
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176, "Q5_K");

// 16 sub-blocks j of 16: d * int8 scales[j] * (code - 32). Half h of 128 columns takes ql[64 h ..], qh[32 h ..]: with
// l < 32, columns l, 32 + l, 64 + l, 96 + l have the low nibbles of ql[l], ql[32 + l] and the high nibbles of ql[l],
// ql[32 + l], below bits 0-1, 2-3, 4-5, 6-7 of qh[l].
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  uint8_t scales[16];
  uint8_t d[2];
};
static_assert(sizeof(BlockQ6_K) == 210, "Q6_K");

// 8 sub-blocks j of 32, nibbles as in the formats of 32 columns at qs[16 j ..]: d * (scale - 32) *
// kValuesIQ4NL[nibble]. scale, 6 bits: nibble j % 2 of scales_l[j / 2] below bits 2 j and 2 j + 1 of scales_h.
struct BlockIQ4_XS {
  uint8_t d[2];
  uint8_t scales_h[2];
  uint8_t scales_l[4];
  uint8_t qs[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136, "IQ4_XS");

constexpr int8_t kValuesIQ4NL[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Twice the values of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), so that they are integers; MXFP4Scale is half the E8M0 scale.
constexpr int8_t kValuesMXFP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The bits of the float 2^(e - 128): below e = 2 it is denormal. As ggml does, e = 255 (NaN in the specification) is
// taken for the number it would be.
static inline uint32_t MXFP4ScaleBits(uint8_t e) {
  return e >= 2 ? static_cast<uint32_t>(e - 1) << 23 : 0x00200000u << e;
}

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_QUANT_BLOCKS_H_
