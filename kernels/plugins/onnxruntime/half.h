// SPDX-License-Identifier: MIT
// half.h: 16-bit floats (IEEE 754 binary16) to and from 32 bits, on every CPU. Loops without branches, so that
// compilers use vectors where the CPU has no conversion of its own. Pure functions, thread-safe.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_HALF_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_HALF_H_

#include <cstdint>
#include <cstring>

namespace edgemoe_ort {

inline float FloatOfBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t BitsOfFloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float HalfToFloat(uint16_t half) {
  // Exponents are 112 apart; a multiplication sets subnormals right too. Infinities and NaNs have all exponent bits.
  const float scaled = FloatOfBits(static_cast<uint32_t>(half & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return FloatOfBits(BitsOfFloat(scaled) | special | static_cast<uint32_t>(half & 0x8000) << 16);
}

// To the nearest, of two as near the even one; beyond 65504 infinity.
inline uint16_t FloatToHalf(float x) {
  const uint32_t bits = BitsOfFloat(x);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves whole multiples of 2^-24, a subnormal's unit, in the lowest bits, rounded.
    half = BitsOfFloat(FloatOfBits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    if (half > 0x7c00) half = 0x7c00;
  }
  return static_cast<uint16_t>(sign | half);
}

// from: n halves of any alignment.
inline void HalvesToFloats(const void* from, int64_t n, float* to) {
  const auto* const bytes = static_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * i, sizeof(half));
    to[i] = HalfToFloat(half);
  }
}

inline void FloatsToHalves(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = FloatToHalf(from[i]);
}

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_HALF_H_
