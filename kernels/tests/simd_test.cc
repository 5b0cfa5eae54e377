// SPDX-License-Identifier: MIT
// Products and quantization: the scalar table against float64, every other table against the scalar one, bit for bit.
#include <cmath>
#include <cstring>

#include "simd/tables.h"
#include "tests/simd_fakes.h"

namespace edgemoe::simd::test {
namespace {

constexpr double kUnitRoundoff = 0x1p-24;

// A bound of the relative error of n roundings one after the other (Higham, Accuracy and Stability of Numerical
// Algorithms, 3.1).
double Gamma(int64_t n) {
  const double nu = static_cast<double>(n) * kUnitRoundoff;
  return nu / (1.0 - nu);
}

// The product in double, and how far rounding may take a float result from it.
struct Expectation {
  double value;
  double bound;
};

// x: the activations as quantized. Every block adds one term, two if the format has offsets; a term is made with at
// most two roundings (of wd * xd; of the integer sum to float) and goes through one per addition that follows it. F16:
// one product per column, a quarter of the columns in each sum, two more additions. The double arithmetic here errs by
// less than 2^-40 of the sum of magnitudes.
Expectation Expect(Format format, const DoubleRow& w, const std::vector<double>& x) {
  const size_t n = x.size();
  const bool is_float = Info(format).activation == kFloat;
  const size_t block_cols = is_float ? 1 : static_cast<size_t>(Info(format).block_cols);
  double value = 0.0, magnitudes = 0.0, all = 0.0;
  for (size_t begin = 0; begin < n; begin += block_cols) {
    double main = 0.0, offset = 0.0;
    for (size_t i = begin; i < begin + block_cols; ++i) {
      main += w.main[i] * x[i];
      offset += w.offset[i] * x[i];
      all += std::fabs(w.main[i] * x[i]) + std::fabs(w.offset[i] * x[i]);
    }
    value += main + offset;
    magnitudes += std::fabs(main) + std::fabs(offset);
  }
  const int64_t n_roundings = is_float ? static_cast<int64_t>(n) / 4 + 2 : 2 + 2 * static_cast<int64_t>(n / block_cols);
  const double largest_sum = is_float ? 0.0 : block_cols == 32 ? 0x1p19 : 0x1p27;
  const double from_denormals = static_cast<double>(n_roundings) * 0x1p-150 * (largest_sum + 1.0);
  return {value, Gamma(n_roundings) * magnitudes + from_denormals + 0x1p-40 * all};
}

std::vector<double> ActivationsAsQuantized(Activation activation, int64_t n_cols, const AlignedBytes& panel) {
  std::vector<double> x(static_cast<size_t>(n_cols));
  const size_t block = activation == kInt8x32 ? 32 : 256;
  for (size_t i = 0; i < x.size(); ++i) {
    float f = 0.0f;
    if (activation == kFloat) {
      std::memcpy(&f, panel.data() + 4 * i, sizeof(f));
      x[i] = f;
    } else {
      std::memcpy(&f, panel.data() + x.size() + i / block * 4, sizeof(f));
      x[i] = static_cast<double>(f) * static_cast<int8_t>(panel.data()[i]);
    }
  }
  return x;
}

std::string NameOf(const ::testing::TestParamInfo<Format>& info) { return Info(info.param).name; }

class SimdFormatTest : public ::testing::TestWithParam<Format> {};
INSTANTIATE_TEST_SUITE_P(Formats, SimdFormatTest, ::testing::ValuesIn(AllFormats()), NameOf);

// Guards against: an oracle that misreads a format, which every table would then agree with.
TEST_P(SimdFormatTest, ScalarIsCloseToFloat64) {
  const Format format = GetParam();
  const Activation activation = Info(format).activation;
  std::mt19937 rng(100u + static_cast<unsigned>(format));
  for (const int64_t n_units : {1, 2, 3, 8}) {
    const int64_t n_cols = n_units * ColumnUnit(format), n_rows = 32;
    for (const Weights kind : {Weights::kOrdinary, Weights::kAllOnes, Weights::kAllZeros, Weights::kZeroScales}) {
      const std::vector<uint8_t> rows = MakeRows(format, n_rows, n_cols, kind, &rng);
      std::vector<AlignedBytes> panel;
      panel.push_back(Quantize(kScalarTable, activation, MakeValues(n_cols, Values::kOrdinary, &rng)));
      const std::vector<double> x = ActivationsAsQuantized(activation, n_cols, panel[0]);
      const std::vector<float> y = Multiply(kScalarTable, format, n_cols, n_rows, rows, panel)[0];
      for (int64_t row = 0; row < n_rows; ++row) {
        const DoubleRow w = Dequantize(format, &rows[static_cast<size_t>(row * RowBytes(format, n_cols))], n_cols);
        const Expectation want = Expect(format, w, x);
        EXPECT_LE(std::fabs(y[static_cast<size_t>(row)] - want.value), want.bound)
            << "row " << row << " of " << n_cols << " columns, weights " << static_cast<int>(kind) << ": "
            << y[static_cast<size_t>(row)] << " for " << want.value;
      }
    }
  }
}

using TableAndFormat = std::tuple<const KernelTable*, Format>;
class SimdTableFormatTest : public ::testing::TestWithParam<TableAndFormat> {
 protected:
  // Rows of n_groups groups of that kind times panels of every T, against panels of one and the scalar table. The kinds
  // of a panel's activations are `values` and those after it, so that a NaN in one row cannot leak into another unseen.
  void CompareAllTiles(int64_t n_groups, int64_t n_cols, Weights weights, size_t values, std::mt19937* rng) {
    const auto [table, format] = GetParam();
    const int64_t n_rows = n_groups * table->rows_per_group;
    const std::vector<uint8_t> rows = MakeRows(format, n_rows, n_cols, weights, rng);
    std::vector<std::vector<float>> want;
    for (int T = 1; T <= kMaxTile; T *= 2) {
      std::vector<AlignedBytes> panels;
      for (int t = 0; t < T; ++t) panels.push_back(MakePanel(n_cols, values, t));
      for (size_t t = want.size(); t < panels.size(); ++t) {
        std::vector<AlignedBytes> panel;
        panel.push_back(MakePanel(n_cols, values, static_cast<int>(t)));
        want.push_back(Multiply(kScalarTable, format, n_cols, n_rows, rows, panel)[0]);
      }
      if (T == 1) {
        EXPECT_TRUE(SameBits(MultiplyRows(*table, format, n_cols, n_rows, rows, panels[0]), want[0]))
            << table->isa << " " << Info(format).name << ", rows as in a file, " << n_groups << " groups of " << n_cols
            << " columns, weights " << static_cast<int>(weights) << ", values " << values;
      }
      const std::vector<std::vector<float>> got = Multiply(*table, format, n_cols, n_rows, rows, panels);
      for (size_t t = 0; t < panels.size(); ++t) {
        EXPECT_TRUE(SameBits(got[t], want[t]))
            << table->isa << " " << Info(format).name << ", " << n_groups << " groups of " << n_cols << " columns, T "
            << T << ", row " << t << " of the panel, weights " << static_cast<int>(weights) << ", values " << values;
      }
    }
  }

 private:
  AlignedBytes MakePanel(int64_t n_cols, size_t values, int t) {
    std::mt19937 rng(static_cast<unsigned>(1000 * values + static_cast<size_t>(t)));
    const Values kind = kAllValues[(values + static_cast<size_t>(t)) % std::size(kAllValues)];
    return Quantize(kScalarTable, Info(std::get<1>(GetParam())).activation, MakeValues(n_cols, kind, &rng));
  }
};
INSTANTIATE_TEST_SUITE_P(Tables, SimdTableFormatTest,
                         ::testing::Combine(::testing::ValuesIn(AllTables()), ::testing::ValuesIn(AllFormats())),
                         [](const ::testing::TestParamInfo<TableAndFormat>& info) {
                           return std::string(std::get<0>(info.param)->isa) + "_" + Info(std::get<1>(info.param)).name;
                         });

// Guards against: an unrolled loop or a tile that is wrong at some size only.
TEST_P(SimdTableFormatTest, HasTheOraclesBitsAtEverySize) {
  const auto [table, format] = GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(*table);
  std::mt19937 rng(200u + static_cast<unsigned>(format));
  const int64_t unit = ColumnUnit(format);
  std::vector<int64_t> all_n_cols = {unit, 2 * unit, 3 * unit, 5 * unit, 8 * unit, 2048};
  if (unit == 32) all_n_cols.push_back(2880);  // gpt-oss: no multiple of 256
  for (const int64_t n_cols : all_n_cols) {
    for (const int64_t n_groups : {1, 3}) CompareAllTiles(n_groups, n_cols, Weights::kOrdinary, 0, &rng);
  }
  for (const int64_t n_groups : {2, 4, 5, 7}) CompareAllTiles(n_groups, 2 * unit, Weights::kAnyFinite, 0, &rng);
}

// Guards against: integers that overflow or saturate, denormals flushed, signs lost, NaN and Inf that vanish.
TEST_P(SimdTableFormatTest, HasTheOraclesBitsAtTheExtremes) {
  const auto [table, format] = GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(*table);
  std::mt19937 rng(300u + static_cast<unsigned>(format));
  for (const Weights weights : kAllWeights) {
    for (size_t values = 0; values < std::size(kAllValues); ++values) {
      CompareAllTiles(1, 2 * ColumnUnit(format), weights, values, &rng);
    }
  }
}

// Guards against: a result that depends on how rows are split among threads, or tokens into panels.
TEST_P(SimdTableFormatTest, SplitsOfRowsAndOfPanelsDoNotChangeBits) {
  const auto [table, format] = GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(*table);
  std::mt19937 rng(400u + static_cast<unsigned>(format));
  const int64_t n_cols = 4 * ColumnUnit(format), R = table->rows_per_group, n_rows = 5 * R;
  const std::vector<uint8_t> rows = MakeRows(format, n_rows, n_cols, Weights::kOrdinary, &rng);
  std::vector<AlignedBytes> panels;
  for (int t = 0; t < kMaxTile; ++t) {
    panels.push_back(Quantize(*table, Info(format).activation, MakeValues(n_cols, Values::kOrdinary, &rng)));
  }
  const std::vector<std::vector<float>> whole = Multiply(*table, format, n_cols, n_rows, rows, panels);
  const int64_t head_bytes = 2 * R * RowBytes(format, n_cols);
  for (size_t t = 0; t < panels.size(); ++t) {
    std::vector<AlignedBytes> alone;
    alone.push_back(std::move(panels[t]));
    std::vector<float> y = Multiply(*table, format, n_cols, 2 * R, {rows.begin(), rows.begin() + head_bytes}, alone)[0];
    const std::vector<float> tail =
        Multiply(*table, format, n_cols, 3 * R, {rows.begin() + head_bytes, rows.end()}, alone)[0];
    y.insert(y.end(), tail.begin(), tail.end());
    EXPECT_TRUE(SameBits(y, whole[t])) << "row " << t << " of the panel";
  }
}

class SimdTableTest : public ::testing::TestWithParam<const KernelTable*> {};
INSTANTIATE_TEST_SUITE_P(Tables, SimdTableTest, ::testing::ValuesIn(AllTables()),
                         [](const ::testing::TestParamInfo<const KernelTable*>& info) {
                           return std::string(info.param->isa);
                         });

// Guards against: codes rounded another way, a scale from an approximate division, sums that do not belong to the
// codes.
TEST_P(SimdTableTest, QuantizesToTheOraclesBytes) {
  const KernelTable& table = *GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(table);
  std::mt19937 rng(500);
  for (int a = 0; a < kActivationCount; ++a) {
    const Activation activation = static_cast<Activation>(a);
    const int64_t block = activation == kInt8x256 ? 256 : 32;
    for (const Values kind : kAllValues) {
      for (const int64_t n_blocks : {1, 2, 3, 7, 40}) {
        const std::vector<float> x = MakeValues(n_blocks * block, kind, &rng);
        const size_t n_bytes = static_cast<size_t>(PanelBytes(activation, n_blocks * block, 1));
        const AlignedBytes got = Quantize(table, activation, x), want = Quantize(kScalarTable, activation, x);
        EXPECT_EQ(std::memcmp(got.data(), want.data(), n_bytes), 0)
            << "activation " << a << ", values " << static_cast<int>(kind) << ", " << n_blocks << " blocks";
      }
    }
  }
}

// Ties: x * id is a half-integer in float for blocks whose largest magnitude is 127.
TEST_P(SimdTableTest, QuantizesHalvesToEven) {
  const KernelTable& table = *GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(table);
  for (const Activation activation : {kInt8x32, kInt8x256}) {
    std::vector<float> x(256);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 32) - 15.5f;
    for (size_t i = 0; i < x.size(); i += 32) x[i] = 127.0f;
    const AlignedBytes panel = Quantize(table, activation, x);
    for (size_t i = 0; i < x.size(); ++i) {
      const int want = i % 32 == 0 ? 127 : 2 * static_cast<int>(std::floor((x[i] + 0.5f) / 2.0f + 0.25f));
      EXPECT_EQ(static_cast<int8_t>(panel.data()[i]), want) << x[i];
    }
  }
}

// Guards against: scalar quantization that is consistently wrong. |x - d q| <= d / 2, but for rounding of x * id.
TEST(SimdScalarTest, QuantizationIsTheNearestCode) {
  std::mt19937 rng(600);
  for (const Activation activation : {kInt8x32, kInt8x256}) {
    const std::vector<float> x = MakeValues(2048, Values::kOrdinary, &rng);
    const AlignedBytes panel = Quantize(kScalarTable, activation, x);
    const std::vector<double> quantized = ActivationsAsQuantized(activation, 2048, panel);
    const size_t block = activation == kInt8x32 ? 32 : 256;
    for (size_t i = 0; i < x.size(); ++i) {
      float d = 0.0f;
      std::memcpy(&d, panel.data() + x.size() + i / block * 4, sizeof(d));
      EXPECT_LE(std::fabs(x[i] - quantized[i]), d * (0.5 + 127.0 * 4 * kUnitRoundoff));
    }
    for (size_t k = 0; k < x.size() / 16; ++k) {
      int32_t sum = 0;
      std::memcpy(&sum, panel.data() + x.size() + x.size() / block * 4 + k * 4, sizeof(sum));
      for (size_t i = 16 * k; i < 16 * k + 16; ++i) sum -= static_cast<int8_t>(panel.data()[i]);
      EXPECT_EQ(sum, 0);
    }
  }
}

// Guards against: an oracle that a compiler or processor family computes otherwise, with all tables of a build
// agreeing. The number is that of x86-64 and, under an emulator, of aarch64; it changes with the contract in scalar.cc
// only.
TEST(SimdScalarTest, BitsAreTheSameInEveryBuild) {
  std::mt19937 rng(800);
  uint64_t hash = 14695981039346656037u;  // FNV-1a of 32-bit words
  const auto add = [&hash](const std::vector<float>& values) {
    for (const float v : values) {
      uint32_t bits = 0;
      std::memcpy(&bits, &v, sizeof(bits));
      hash = (hash ^ bits) * 1099511628211u;
    }
  };
  for (const Format format : AllFormats()) {
    const std::vector<uint8_t> rows = MakeRows(format, 16, 512, Weights::kOrdinary, &rng);
    std::vector<AlignedBytes> panel;
    panel.push_back(Quantize(kScalarTable, Info(format).activation, MakeValues(512, Values::kOrdinary, &rng)));
    add(Multiply(kScalarTable, format, 512, 16, rows, panel)[0]);
  }
  std::vector<float> gate = MakeValues(4096, Values::kOrdinary, &rng), out(gate.size());
  for (float& g : gate) g *= 64.0f;
  for (int kind = 0; kind < kGluKindCount; ++kind) {
    kScalarTable.glu({static_cast<GluKind>(kind), 1.702f, 7.0f}, gate.data(), nullptr, gate.data(), nullptr, out.data(),
                     4096);
    add(out);
  }
  EXPECT_EQ(hash, 0x6401fa7c9b020da5u);
}

// Guards against: an Inf or NaN activation that becomes a plausible number.
TEST_P(SimdTableFormatTest, NonFiniteActivationsGiveNan) {
  const auto [table, format] = GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(*table);
  if (Info(format).activation == kFloat) return;  // arithmetic of floats: Inf may stay Inf
  std::mt19937 rng(700);
  const int64_t n_cols = 3 * ColumnUnit(format), n_rows = table->rows_per_group;
  const std::vector<uint8_t> rows = MakeRows(format, n_rows, n_cols, Weights::kOrdinary, &rng);
  for (const Values kind : {Values::kInf, Values::kNan}) {
    std::vector<AlignedBytes> panel;
    panel.push_back(Quantize(*table, Info(format).activation, MakeValues(n_cols, kind, &rng)));
    const std::vector<std::vector<float>> y = Multiply(*table, format, n_cols, n_rows, rows, panel);
    for (const float result : y[0]) EXPECT_TRUE(std::isnan(result));
  }
}

}  // namespace
}  // namespace edgemoe::simd::test
