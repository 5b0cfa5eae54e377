// SPDX-License-Identifier: MIT
// The CMake file of this folder defines EDGEMOE_SIMD_<ISA> for each table it compiles.
#include "simd/kernel_table.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "simd/tables.h"

namespace edgemoe::simd {
namespace {

const KernelTable* const kCompiled[] = {
#ifdef EDGEMOE_SIMD_AVX512_VNNI
    &kAvx512VnniTable,
#endif
#ifdef EDGEMOE_SIMD_AVX_VNNI
    &kAvxVnniTable,
#endif
#ifdef EDGEMOE_SIMD_AVX2
    &kAvx2Table,
#endif
#ifdef EDGEMOE_SIMD_NEON_I8MM
    &kNeonI8mmTable,
#endif
#ifdef EDGEMOE_SIMD_NEON_DOTPROD
    &kNeonDotprodTable,
#endif
#ifdef EDGEMOE_SIMD_NEON
    &kNeonTable,
#endif
    &kScalarTable,      nullptr,
};

struct Requirement {
  const char* isa;
  bool (*met_by)(const CpuFeatures& cpu);
};

bool HasAvx2(const CpuFeatures& cpu) { return cpu.avx2 && cpu.fma && cpu.f16c; }
const Requirement kRequirements[] = {
    {"avx512_vnni", [](const CpuFeatures& cpu) { return HasAvx2(cpu) && cpu.avx512 && cpu.avx512_vnni; }},
    {"avx_vnni", [](const CpuFeatures& cpu) { return HasAvx2(cpu) && cpu.avx_vnni; }},
    {"avx2", HasAvx2},
    {"neon_i8mm", [](const CpuFeatures& cpu) { return cpu.neon && cpu.dotprod && cpu.i8mm; }},
    {"neon_dotprod", [](const CpuFeatures& cpu) { return cpu.neon && cpu.dotprod; }},
    {"neon", [](const CpuFeatures& cpu) { return cpu.neon; }},
    {"scalar", [](const CpuFeatures&) { return true; }},
};

// Appends to a string of n bytes, and cuts what does not fit.
__attribute__((format(printf, 3, 4))) void Append(char* text, size_t n, const char* format, ...) {
  const size_t length = n > 0 ? strlen(text) : 0;
  va_list arguments;
  va_start(arguments, format);
  if (length + 1 < n) vsnprintf(text + length, n - length, format, arguments);
  va_end(arguments);
}

void WriteError(const CpuFeatures& cpu, const char* isa, bool is_compiled, char* error, size_t n_error) {
  if (n_error > 0) error[0] = '\0';
  Append(error, n_error, "EDGEMOE_ISA=%s: %s; compiled here: ", isa,
         is_compiled ? "this CPU lacks it" : "no such instruction set");
  for (const KernelTable* const* t = kCompiled; *t != nullptr; ++t) {
    Append(error, n_error, "%s%s%s", t == kCompiled ? "" : ", ", (*t)->isa,
           SupportedOn(cpu, **t) ? "" : " (this CPU lacks it)");
  }
}

}  // namespace

const KernelTable* const* Compiled() { return kCompiled; }

const KernelTable& Portable() { return kScalarTable; }

bool SupportedOn(const CpuFeatures& cpu, const KernelTable& table) {
  for (const Requirement& r : kRequirements) {
    if (strcmp(r.isa, table.isa) == 0) return r.met_by(cpu);
  }
  return false;
}

bool Supported(const KernelTable& table) { return SupportedOn(DetectCpu(), table); }

const KernelTable* ChooseOn(const CpuFeatures& cpu, const char* isa, char* error, size_t n_error) {
  const bool any = isa == nullptr || isa[0] == '\0';
  bool is_compiled = false;
  for (const KernelTable* const* t = kCompiled; *t != nullptr; ++t) {
    const bool named = any || strcmp((*t)->isa, isa) == 0;
    if (named && SupportedOn(cpu, **t)) return *t;
    is_compiled |= named;
  }
  WriteError(cpu, isa, is_compiled, error, n_error);  // not reached without a name: scalar is always there
  return nullptr;
}

const KernelTable* Choose(const char* isa, char* error, size_t n_error) {
  return ChooseOn(DetectCpu(), isa, error, n_error);
}

}  // namespace edgemoe::simd
