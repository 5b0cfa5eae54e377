// SPDX-License-Identifier: MIT
// The kernels for Advanced SIMD, which every AArch64 CPU has. See formats.inl.
#include <arm_neon.h>
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
#include "simd/vector_neon.inl"
#include "simd/pointwise.inl"
#include "simd/driver.inl"
// clang-format on
}  // namespace

constexpr KernelTable kTable = MakeTable<Neon>("neon");
const KernelTable kNeonTable = kTable;

}  // namespace edgemoe::simd
