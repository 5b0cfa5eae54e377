// SPDX-License-Identifier: MIT
// simd_fakes.h: what the tests of simd/ share: weights and activations that are random, or extreme in a given way; the
// formats' definitions once more, in double precision and written without a look at the kernels; products of matrices
// given as rows; comparison of bits.
#ifndef EDGEMOE_TESTS_SIMD_FAKES_H_
#define EDGEMOE_TESTS_SIMD_FAKES_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "simd/kernel_table.h"
#include "simd/pack.h"

namespace edgemoe::simd::test {

// Exactly n bytes, 64-byte aligned, so that AddressSanitizer sees a read past the end.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t n) : bytes_(static_cast<uint8_t*>(::operator new(n, std::align_val_t(64)))) {}
  uint8_t* data() const { return bytes_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<uint8_t, Free> bytes_;
};

enum class Weights {
  kOrdinary,  // scales as in a model, so that float64 can check the result
  kAnyFinite,
  kZeroScales,
  kDenormalScales,
  kHugeScales,
  kAllOnes,   // every bit of codes and sub-block scales set
  kAllZeros,  // none
  kExtremes,  // each field of a block filled with 0, 255, 127 or 128: the largest products, as signed and as unsigned
  kNanScales,
};
inline constexpr Weights kAllWeights[] = {Weights::kOrdinary,       Weights::kAnyFinite,  Weights::kZeroScales,
                                          Weights::kDenormalScales, Weights::kHugeScales, Weights::kAllOnes,
                                          Weights::kAllZeros,       Weights::kExtremes,   Weights::kNanScales};

enum class Values {
  kOrdinary,  // of both signs, magnitudes 2^-8 to 1
  kZeros,     // of both signs
  kDenormals,
  kHuge,  // around 1e30
  kSpike,
  kAllEqual,
  kPlusMinusOne,  // codes of +-127
  kWide,          // magnitudes 2^-120 to 2^120
  kInf,           // ordinary but for one
  kNan,           // ordinary but for one
};
inline constexpr Values kAllValues[] = {Values::kOrdinary, Values::kZeros,       Values::kDenormals, Values::kHuge,
                                        Values::kSpike,    Values::kAllEqual,    Values::kWide,      Values::kInf,
                                        Values::kNan,      Values::kPlusMinusOne};

std::vector<uint8_t> MakeRows(Format format, int64_t n_rows, int64_t n_cols, Weights kind, std::mt19937* rng);
std::vector<float> MakeValues(int64_t n, Values kind, std::mt19937* rng);

// One row in double: column i is main[i] + offset[i], with the part of the mins (and of Q4_1's m) apart.
struct DoubleRow {
  std::vector<double> main;
  std::vector<double> offset;
};
DoubleRow Dequantize(Format format, const uint8_t* row, int64_t n_cols);

// A row of activations as the table quantizes it: a panel of one.
AlignedBytes Quantize(const KernelTable& table, Activation activation, const std::vector<float>& x);

// y[t][row]: rows, as they lie in a file, times panels of one, T of them as one panel. n_rows is a multiple of
// rows_per_group.
std::vector<std::vector<float>> Multiply(const KernelTable& table, Format format, int64_t n_cols, int64_t n_rows,
                                         const std::vector<uint8_t>& rows, const std::vector<AlignedBytes>& panels);

// y[row] of one panel of one: the rows are not packed, and begin at an odd address.
std::vector<float> MultiplyRows(const KernelTable& table, Format format, int64_t n_cols, int64_t n_rows,
                                const std::vector<uint8_t>& rows, const AlignedBytes& panel);

// Bit for bit; every NaN is like every other.
::testing::AssertionResult SameBits(const std::vector<float>& got, const std::vector<float>& want);

// Numbers of columns are multiples of it: a block, or 32 for F16 and BF16.
int64_t ColumnUnit(Format format);
std::vector<Format> AllFormats();
std::vector<const KernelTable*> AllTables();

}  // namespace edgemoe::simd::test

// In the body of a test that cannot run on this CPU.
#define EDGEMOE_SKIP_IF_UNSUPPORTED(table) \
  if (!Supported(table)) GTEST_SKIP() << "this CPU lacks " << (table).isa

#endif  // EDGEMOE_TESTS_SIMD_FAKES_H_
