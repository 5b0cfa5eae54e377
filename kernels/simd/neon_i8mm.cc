// SPDX-License-Identifier: MIT
// The kernels for Advanced SIMD with the products of bytes of ARMv8.6. See formats.inl.
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
#include "simd/vector_neon_i8mm.inl"
#include "simd/pointwise.inl"
#include "simd/driver.inl"
// clang-format on
}  // namespace

constexpr KernelTable kTable = MakeTable<NeonI8mm>("neon_i8mm");
const KernelTable kNeonI8mmTable = kTable;

}  // namespace edgemoe::simd
