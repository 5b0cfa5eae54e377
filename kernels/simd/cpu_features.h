// SPDX-License-Identifier: MIT
// cpu_features.h: what the CPU, with its operating system, lets a program use. Thread-safe.
#ifndef EDGEMOE_SIMD_CPU_FEATURES_H_
#define EDGEMOE_SIMD_CPU_FEATURES_H_

#include <stdint.h>

namespace edgemoe::simd {

// All false for another processor family.
struct CpuFeatures {
  // x86-64. False also if the operating system does not keep the registers across a switch of threads.
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx_vnni = false;  // the VEX form, of CPUs without AVX-512 as well
  bool avx512 = false;    // F, BW, DQ and VL
  bool avx512_vnni = false;
  // aarch64
  bool neon = false;
  bool dotprod = false;
  bool i8mm = false;
};

// Of the CPU it runs on.
CpuFeatures DetectCpu();

// What decides on x86-64: registers of CPUID by leaf, and XCR0 (0 if the system does not offer XGETBV).
struct X86Registers {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_ecx = 0;
  uint32_t leaf7_1_eax = 0;
  uint64_t xcr0 = 0;
};
CpuFeatures FeaturesOf(const X86Registers& registers);

}  // namespace edgemoe::simd
#endif  // EDGEMOE_SIMD_CPU_FEATURES_H_
