// SPDX-License-Identifier: MIT
// tables.h: the tables by name, for kernel_table.cc and the tests. A build has those of its processor family, each the
// one symbol of the file compiled for that instruction set.
#ifndef EDGEMOE_SIMD_TABLES_H_
#define EDGEMOE_SIMD_TABLES_H_

#include "simd/cpu_features.h"
#include "simd/kernel_table.h"
#include "simd/pack.h"

namespace edgemoe::simd {

extern const KernelTable kScalarTable;
extern const KernelTable kAvx2Table;
extern const KernelTable kAvxVnniTable;
extern const KernelTable kAvx512VnniTable;
extern const KernelTable kNeonTable;
extern const KernelTable kNeonDotprodTable;
extern const KernelTable kNeonI8mmTable;

// Supported and Choose of kernel_table.h for a given CPU.
bool SupportedOn(const CpuFeatures& cpu, const KernelTable& table);
const KernelTable* ChooseOn(const CpuFeatures& cpu, const char* isa, char* error, size_t n_error);

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_TABLES_H_
