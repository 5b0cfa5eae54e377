// SPDX-License-Identifier: MIT
// Which table is chosen on which CPU, and what is said when it cannot be.
#include <cstring>

#include "simd/tables.h"
#include "tests/simd_fakes.h"

namespace edgemoe::simd::test {
namespace {

std::string ErrorOf(const CpuFeatures& cpu, const char* isa) {
  char error[300];
  std::memset(error, '#', sizeof(error));
  EXPECT_EQ(ChooseOn(cpu, isa, error, sizeof(error)), nullptr);
  return error;
}

TEST(SimdTableChoiceTest, EverySupportedTableCanBeNamed) {
  char error[100];
  for (const KernelTable* table : AllTables()) {
    if (Supported(*table)) {
      EXPECT_EQ(Choose(table->isa, error, sizeof(error)), table);
    } else {
      std::printf("this CPU lacks %s\n", table->isa);
      EXPECT_EQ(Choose(table->isa, error, sizeof(error)), nullptr);
    }
  }
}

TEST(SimdTableChoiceTest, TheFirstSupportedOneIsTheDefault) {
  const KernelTable* best = nullptr;
  for (const KernelTable* table : AllTables()) {
    if (best == nullptr && Supported(*table)) best = table;
  }
  char error[100];
  EXPECT_EQ(Choose(nullptr, error, sizeof(error)), best);
  EXPECT_EQ(Choose("", error, sizeof(error)), best);
}

TEST(SimdTableChoiceTest, TablesAreComplete) {
  EXPECT_STREQ(AllTables().back()->isa, "scalar");
  for (const KernelTable* table : AllTables()) {
    for (const auto quantize : table->quantize) EXPECT_NE(quantize, nullptr) << table->isa;
    for (int f = 0; f < kFormatCount; ++f) {
      for (const MultiplyFunction multiply : table->multiply[f]) {
        EXPECT_EQ(multiply == nullptr, f == kNoFormat) << table->isa << ", format " << f;
      }
    }
    EXPECT_NE(table->glu, nullptr);
    EXPECT_NE(table->combine, nullptr);
  }
}

TEST(SimdTableChoiceTest, AnUnknownNameSaysWhatThereIs) {
  const std::string error = ErrorOf(DetectCpu(), "avx9");
  EXPECT_EQ(error.find("EDGEMOE_ISA=avx9: no such instruction set; compiled here: "), 0u) << error;
  for (const KernelTable* table : AllTables()) {
    EXPECT_NE(error.find(table->isa), std::string::npos) << error;
    const std::string lacking = std::string(table->isa) + " (this CPU lacks it)";
    EXPECT_EQ(error.find(lacking) != std::string::npos, !Supported(*table)) << error;
  }
}

TEST(SimdTableChoiceTest, ACpuWithoutVectorsGetsScalar) {
  const CpuFeatures none;
  char error[100];
  EXPECT_EQ(ChooseOn(none, nullptr, error, sizeof(error)), &kScalarTable);
  EXPECT_EQ(ChooseOn(none, "scalar", error, sizeof(error)), &kScalarTable);
  for (const KernelTable* table : AllTables()) {
    if (table == &kScalarTable) continue;
    const std::string text = ErrorOf(none, table->isa);
    EXPECT_EQ(text.find("EDGEMOE_ISA=" + std::string(table->isa) + ": this CPU lacks it; compiled here: "), 0u) << text;
  }
}

TEST(SimdTableChoiceTest, ErrorsAreCutToTheirBuffer) {
  for (const size_t n : {size_t{0}, size_t{1}, size_t{2}, size_t{20}, size_t{60}}) {
    char error[61];
    std::memset(error, '#', sizeof(error));
    EXPECT_EQ(Choose("avx9", error, n), nullptr);
    EXPECT_EQ(error[n], '#');
    if (n > 0) {
      EXPECT_EQ(std::strlen(error), n - 1);
    }
  }
}

// Guards against: an instruction set that the CPU has and the operating system does not keep registers for.
TEST(SimdCpuFeaturesTest, RegistersThatTheSystemDoesNotKeepAreNotUsed) {
  X86Registers r;
  r.leaf1_ecx = r.leaf7_ebx = r.leaf7_ecx = r.leaf7_1_eax = 0xffffffffu;
  r.xcr0 = 0;
  CpuFeatures f = FeaturesOf(r);
  EXPECT_FALSE(f.avx2 || f.fma || f.f16c || f.avx_vnni || f.avx512 || f.avx512_vnni);
  r.xcr0 = 0x03;  // x87, SSE
  f = FeaturesOf(r);
  EXPECT_FALSE(f.avx2 || f.fma || f.f16c || f.avx_vnni || f.avx512 || f.avx512_vnni);
  r.xcr0 = 0x07;  // and AVX
  f = FeaturesOf(r);
  EXPECT_TRUE(f.avx2 && f.fma && f.f16c && f.avx_vnni);
  EXPECT_FALSE(f.avx512 || f.avx512_vnni);
  r.xcr0 = 0xe7;  // and AVX-512
  f = FeaturesOf(r);
  EXPECT_TRUE(f.avx512 && f.avx512_vnni);
}

// Haswell: AVX2 without any VNNI. Skylake-X: AVX-512 without VNNI. Alder Lake: AVX-VNNI without AVX-512.
TEST(SimdCpuFeaturesTest, KnownCpus) {
  X86Registers haswell;
  haswell.leaf1_ecx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
  haswell.leaf7_ebx = 1u << 5;
  haswell.xcr0 = 0x07;
  CpuFeatures f = FeaturesOf(haswell);
  EXPECT_TRUE(f.avx2 && f.fma && f.f16c);
  EXPECT_FALSE(f.avx_vnni || f.avx512 || f.avx512_vnni);

  X86Registers skylake_x = haswell;
  skylake_x.leaf7_ebx |= 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  skylake_x.xcr0 = 0xe7;
  f = FeaturesOf(skylake_x);
  EXPECT_TRUE(f.avx512);
  EXPECT_FALSE(f.avx_vnni || f.avx512_vnni);

  X86Registers alder_lake = haswell;
  alder_lake.leaf7_1_eax = 1u << 4;
  f = FeaturesOf(alder_lake);
  EXPECT_TRUE(f.avx2 && f.avx_vnni);
  EXPECT_FALSE(f.avx512 || f.avx512_vnni);
}

}  // namespace
}  // namespace edgemoe::simd::test
