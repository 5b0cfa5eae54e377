// SPDX-License-Identifier: MIT
// The kernels for AVX2, FMA and F16C. See formats.inl.
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
#include "simd/pointwise.inl"
#include "simd/driver.inl"
// clang-format on
}  // namespace

constexpr KernelTable kTable = MakeTable<Avx2>("avx2");
const KernelTable kAvx2Table = kTable;

}  // namespace edgemoe::simd
