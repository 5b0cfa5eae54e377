// SPDX-License-Identifier: MIT
// The kernels for Advanced SIMD with dot products of bytes. See formats.inl.
// GCC's scheduling before register allocation moves so many loads ahead of the products that sums spill.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")
#endif
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simd/quant_blocks.h"
#include "simd/tables.h"

namespace edgemoe::simd {
namespace {
// clang-format off: their order matters
#include "simd/formats.inl"
#include "simd/vector_neon.inl"
#include "simd/vector_neon_dotprod.inl"
#include "simd/pointwise.inl"
#include "simd/driver.inl"
// clang-format on
}  // namespace

constexpr KernelTable kTable = MakeTable<NeonDotprod>("neon_dotprod");
const KernelTable kNeonDotprodTable = kTable;

}  // namespace edgemoe::simd
