// SPDX-License-Identifier: MIT
#include "simd/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edgemoe::simd {
namespace {

bool Bit(uint64_t word, int bit) { return (word >> bit & 1) != 0; }

#if defined(__x86_64__)
X86Registers ReadRegisters() {
  X86Registers r;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) != 0) r.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) {
    r.leaf7_ebx = b;
    r.leaf7_ecx = c;
    const uint32_t last_subleaf = a;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) r.leaf7_1_eax = a;
  }
  const int osxsave = 27;
  if (Bit(r.leaf1_ecx, osxsave)) {
    // _xgetbv() would need -mxsave.
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    r.xcr0 = static_cast<uint64_t>(high) << 32 | low;
  }
  return r;
}
#endif

}  // namespace

// Bits as in Intel's Software Developer's Manual, volume 2, CPUID, and volume 1, 13.3 (XCR0) and 15.2 (AVX-512).
CpuFeatures FeaturesOf(const X86Registers& r) {
  const uint64_t ymm_state = 0x06;  // XMM and the upper halves of YMM
  const uint64_t zmm_state = 0xe6;  // and mask registers, the upper halves of ZMM0-15, ZMM16-31
  CpuFeatures f;
  const bool ymm = Bit(r.leaf1_ecx, 28) && (r.xcr0 & ymm_state) == ymm_state;
  const bool zmm = ymm && (r.xcr0 & zmm_state) == zmm_state;
  f.fma = ymm && Bit(r.leaf1_ecx, 12);
  f.f16c = ymm && Bit(r.leaf1_ecx, 29);
  f.avx2 = ymm && Bit(r.leaf7_ebx, 5);
  f.avx_vnni = f.avx2 && Bit(r.leaf7_1_eax, 4);
  const bool foundation = Bit(r.leaf7_ebx, 16), dq = Bit(r.leaf7_ebx, 17);
  const bool bw = Bit(r.leaf7_ebx, 30), vl = Bit(r.leaf7_ebx, 31);
  f.avx512 = zmm && foundation && dq && bw && vl;
  f.avx512_vnni = f.avx512 && Bit(r.leaf7_ecx, 11);
  return f;
}

#if defined(__x86_64__)
CpuFeatures DetectCpu() { return FeaturesOf(ReadRegisters()); }
#elif defined(__aarch64__) && defined(__linux__)
CpuFeatures DetectCpu() {
  CpuFeatures f;
  const uint64_t hwcap = getauxval(AT_HWCAP);
  f.neon = (hwcap & HWCAP_ASIMD) != 0;
  f.dotprod = f.neon && (hwcap & HWCAP_ASIMDDP) != 0;
  f.i8mm = f.dotprod && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
  return f;
}
#else
CpuFeatures DetectCpu() { return CpuFeatures(); }
#endif

}  // namespace edgemoe::simd
