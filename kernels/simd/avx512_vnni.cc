// SPDX-License-Identifier: MIT
// The kernels for AVX-512 with VNNI. See formats.inl.
// GCC 12 takes the undefined vectors of its own immintrin.h for mistakes (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
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
#include "simd/vector_avx512.inl"
#include "simd/pointwise.inl"
#include "simd/driver.inl"
// clang-format on
}  // namespace

constexpr KernelTable kTable = MakeTable<Avx512Vnni>("avx512_vnni");
const KernelTable kAvx512VnniTable = kTable;

}  // namespace edgemoe::simd
