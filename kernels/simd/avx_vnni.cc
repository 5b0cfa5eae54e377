// SPDX-License-Identifier: MIT
// The kernels for AVX2 with AVX-VNNI: CPUs that have VNNI, but not AVX-512. See formats.inl.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simd/qmoe.h"
#include "simd/quant_blocks.h"
#include "simd/tables.h"

namespace edgemoe::simd {
namespace {
// clang-format off: their order matters
#include "simd/formats.inl"
#include "simd/vector_avx2.inl"
// clang-format on

// AVX2 with a Dot into int32 lanes that takes all unsigned codes.
struct AvxVnni : Avx2 {
  static constexpr int kMaxCode = 255;
  static constexpr bool kLooksUpAgain = true;  // MXFP4, T = 8: 1.05 times as fast; AVX2, AVX-512: 0.97, 0.96
  template <int kMax>
  static constexpr int kSteps = 8;
  template <int kMax>
  static constexpr bool kIsWide = true;

  template <int kMax>
  static I Dot(I partial, I codes, I acts) {
    return _mm256_dpbusd_avx_epi32(partial, codes, acts);
  }
  template <int kMax>
  static I Scale(I scale) {
    return scale;
  }
  template <int kMax>
  static I FoldScaled(I sum, I partial, I scale) {
    return Fixed(Add(sum, _mm256_mullo_epi32(partial, scale)));
  }
  template <int kMax>
  static I Fold(I sum, I partial) {
    return Add(sum, partial);
  }
  static I DotPairs(I sum, I pairs, I acts) { return _mm256_dpwssd_avx_epi32(sum, pairs, acts); }

  static constexpr bool kDotsSigned = false;
  template <int kBits>
  static I DotWords(I sum, I codes, I x) {
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
  }
};

// clang-format off
#include "simd/pointwise.inl"
#include "simd/driver.inl"
// clang-format on
}  // namespace

constexpr KernelTable kTable = MakeTable<AvxVnni>("avx_vnni");
const KernelTable kAvxVnniTable = kTable;

}  // namespace edgemoe::simd
