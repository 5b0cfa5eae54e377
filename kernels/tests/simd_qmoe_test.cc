// SPDX-License-Identifier: MIT
// Products with QMoE's weights: bits against the scalar table, and that against float64.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd/qmoe.h"
#include "simd/tables.h"
#include "tests/simd_fakes.h"

namespace edgemoe::simd::test {
namespace {

struct Case {
  QmoeShape shape;
  int64_t n_rows;
  bool packs_row_zero_points;  // of all rows, one after the other; else each row's begin a byte
};

// A matrix and activation rows, each array exactly as long as it has to be.
class Problem {
 public:
  Problem(const Case& c, Values values, int n_x, std::mt19937* rng)
      : case_(c),
        n_blocks_(c.shape.n_cols / c.shape.block),
        row_bytes_(c.shape.n_cols * c.shape.bits / 8),
        zero_row_bits_(c.packs_row_zero_points ? c.shape.bits : (n_blocks_ * c.shape.bits + 7) / 8 * 8),
        weights_(static_cast<size_t>(c.n_rows * row_bytes_)),
        scales_(static_cast<size_t>(c.n_rows * n_blocks_ * 4)),
        zero_points_(static_cast<size_t>((c.n_rows * zero_row_bits_ + 7) / 8)),
        bias_(MakeValues(c.n_rows, Values::kOrdinary, rng)) {
    for (uint8_t& byte : weights_) byte = static_cast<uint8_t>((*rng)());
    for (uint8_t& byte : zero_points_) byte = static_cast<uint8_t>((*rng)());
    const std::vector<float> scales = MakeValues(c.n_rows * n_blocks_, Values::kOrdinary, rng);
    memcpy(scales_.data(), scales.data(), scales_.size());
    for (int i = 0; i < n_x; ++i) x_.push_back(MakeValues(c.shape.n_cols, values, rng));
    for (const std::vector<float>& x : x_) {
      panels_.emplace_back(static_cast<size_t>(QmoePanelBytes(c.shape)));
      QmoePanel(c.shape, x.data(), panels_.back().data());
    }
  }

  // [x][row], of the activation rows from `first` on.
  std::vector<std::vector<float>> Multiply(const KernelTable& table, size_t first, size_t n_x, bool has_bias) const {
    std::vector<std::vector<float>> y(n_x, std::vector<float>(static_cast<size_t>(case_.n_rows), 7.0f));
    std::vector<float*> y_rows;
    std::vector<const void*> x_rows;
    for (size_t i = 0; i < n_x; ++i) {
      y_rows.push_back(y[i].data());
      x_rows.push_back(panels_[first + i].data());
    }
    QmoeProduct p = {};
    p.shape = case_.shape;
    p.weights = weights_.data();
    p.n_rows = case_.n_rows;
    p.scales = scales_.data();
    p.zero_points = case_.shape.has_zero_points ? zero_points_.data() : nullptr;
    p.zero_point_row_bits = zero_row_bits_;
    p.bias = has_bias ? bias_.data() : nullptr;
    p.n_x = static_cast<int32_t>(n_x);
    p.x = x_rows.data();
    p.y = y_rows.data();
    table.qmoe(p);
    return y;
  }

  // Rows from `first` on, alone.
  std::vector<float> MultiplyRowsFrom(const KernelTable& table, int64_t first) const {
    std::vector<float> y(static_cast<size_t>(case_.n_rows - first));
    float* const y_row = y.data();
    const void* const x_row = panels_[0].data();
    QmoeProduct p = {};
    p.shape = case_.shape;
    p.weights = weights_.data() + first * row_bytes_;
    p.n_rows = case_.n_rows - first;
    p.scales = scales_.data() + first * n_blocks_ * 4;
    p.zero_points = case_.shape.has_zero_points ? zero_points_.data() : nullptr;
    p.zero_points_bit = first * zero_row_bits_;
    p.zero_point_row_bits = zero_row_bits_;
    p.n_x = 1;
    p.x = &x_row;
    p.y = &y_row;
    table.qmoe(p);
    return y;
  }

  // In double.
  struct Exact {
    double product = 0.0;
    double magnitudes = 0.0;        // of its terms, as they are summed: codes less 2^(bits - 1), then the zero point
    double activation_error = 0.0;  // what half a step of 8-bit activations makes at most
  };
  Exact Of(size_t x, int64_t row) const {
    const QmoeShape& s = case_.shape;
    const std::vector<double> steps = Steps(x_[x]);
    Exact exact;
    for (int64_t col = 0; col < s.n_cols; ++col) {
      const int64_t block = col / s.block;
      float scale;
      memcpy(&scale, scales_.data() + (row * n_blocks_ + block) * 4, sizeof(scale));
      const int zero =
          s.has_zero_points ? Code(zero_points_, row * zero_row_bits_ + block * s.bits) : 1 << (s.bits - 1);
      const double w = static_cast<double>(scale) * (Code(weights_, row * row_bytes_ * 8 + col * s.bits) - zero);
      const double value = x_[x][static_cast<size_t>(col)];
      exact.product += w * value;
      exact.magnitudes += std::fabs(static_cast<double>(scale) * (1 << s.bits) * value);
      exact.activation_error += std::fabs(w) * steps[static_cast<size_t>(col)] * 0.5001;
    }
    return exact;
  }

 private:
  int Code(const std::vector<uint8_t>& bytes, int64_t bit) const {
    return bytes[static_cast<size_t>(bit / 8)] >> (bit % 8) & ((1 << case_.shape.bits) - 1);
  }

  // [column] of 8-bit activations.
  std::vector<double> Steps(const std::vector<float>& x) const {
    const size_t group = case_.shape.block == 16 ? 16 : 32;
    std::vector<double> steps(x.size());
    for (size_t first = 0; first < x.size(); first += group) {
      const auto begin = x.begin() + static_cast<std::ptrdiff_t>(first);
      const auto end = x.begin() + static_cast<std::ptrdiff_t>(std::min(first + group, x.size()));
      const auto [least, most] = std::minmax_element(begin, end);
      const double step = std::max<double>(*most, -*least) / 127.0;
      std::fill(steps.begin() + (begin - x.begin()), steps.begin() + (end - x.begin()), step);
    }
    return steps;
  }

  const Case case_;
  const int64_t n_blocks_, row_bytes_, zero_row_bits_;
  std::vector<uint8_t> weights_, scales_, zero_points_;
  std::vector<float> bias_;
  std::vector<std::vector<float>> x_;
  std::vector<AlignedBytes> panels_;
};

// All widths, blocks of 16 to 256 columns and one of a whole row, whole lines and not.
std::vector<Case> AllCases() {
  std::vector<Case> cases;
  for (const QmoeArithmetic arithmetic : {kQmoeFloat, kQmoeInt8}) {
    for (const int bits : {2, 4, 8}) {
      for (const bool has_zero_points : {false, true}) {
        const auto add = [&](int64_t n_cols, int64_t block, int64_t n_rows, bool packs) {
          cases.push_back({{bits, arithmetic, has_zero_points, n_cols, block}, n_rows, packs});
        };
        for (const int64_t block : {16, 32, 64, 128, 256}) {
          add(block, block, 3, false);
          add(3 * block, block, 5, false);
          add(7 * block, block, 2, false);
          add(1024, block, 9, false);
        }
        for (const int64_t n_cols : {8, 20, 36, 68, 132, 260, 300, 1032}) {
          add(n_cols, n_cols, 7, true);
          add(n_cols, n_cols, 3, false);
        }
        add(512, 32, 131, false);
      }
    }
    for (const int64_t n_cols : {1, 3, 5, 65}) cases.push_back({{8, arithmetic, true, n_cols, n_cols}, 5, true});
    for (const int64_t n_cols : {2, 6, 66}) cases.push_back({{4, arithmetic, true, n_cols, n_cols}, 5, true});
  }
  return cases;
}

std::string Name(const Case& c) {
  const QmoeShape& s = c.shape;
  return std::to_string(s.bits) + " bits, arithmetic " + std::to_string(s.arithmetic) + ", " +
         std::to_string(s.n_cols) + " columns in blocks of " + std::to_string(s.block) +
         (s.has_zero_points ? ", zero points" : "");
}

class SimdQmoeTest : public ::testing::TestWithParam<const KernelTable*> {};
INSTANTIATE_TEST_SUITE_P(Tables, SimdQmoeTest, ::testing::ValuesIn(AllTables()),
                         [](const ::testing::TestParamInfo<const KernelTable*>& info) {
                           return std::string(info.param->isa);
                         });

// Guards against: another order of roundings in one table, or for another number of activation rows or of rows; a read
// past the end of rows, scales or zero points (with AddressSanitizer).
TEST_P(SimdQmoeTest, HasTheOraclesBits) {
  const KernelTable& table = *GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(table);
  std::mt19937 rng(1);
  for (const Case& c : AllCases()) {
    const Problem problem(c, Values::kOrdinary, 9, &rng);
    const std::vector<std::vector<float>> want = problem.Multiply(kScalarTable, 0, 9, false);
    for (size_t n_x = 1; n_x <= 9; ++n_x) {
      const std::vector<std::vector<float>> got = problem.Multiply(table, 9 - n_x, n_x, false);
      for (size_t i = 0; i < n_x; ++i) ASSERT_TRUE(SameBits(got[i], want[9 - n_x + i])) << Name(c) << ", " << n_x;
    }
    for (int64_t first = 0; first < std::min<int64_t>(c.n_rows, 3); ++first) {
      const std::vector<float> rest(want[0].begin() + first, want[0].end());
      ASSERT_TRUE(SameBits(problem.MultiplyRowsFrom(table, first), rest)) << Name(c) << ", from row " << first;
    }
    ASSERT_TRUE(SameBits(problem.Multiply(table, 0, 1, true)[0], problem.Multiply(kScalarTable, 0, 1, true)[0]))
        << Name(c) << ", bias";
  }
}

// Guards against: saturation of sums of bytes; denormals, NaN and Inf treated differently.
TEST_P(SimdQmoeTest, HasTheOraclesBitsForAllValues) {
  const KernelTable& table = *GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(table);
  std::mt19937 rng(2);
  for (const Values values : kAllValues) {
    for (const QmoeArithmetic arithmetic : {kQmoeFloat, kQmoeInt8}) {
      for (const int bits : {2, 4, 8}) {
        for (const bool has_zero_points : {false, true}) {
          const Case c = {{bits, arithmetic, has_zero_points, 352, 32}, 6, false};
          const Problem problem(c, values, 3, &rng);
          const auto want = problem.Multiply(kScalarTable, 0, 3, false), got = problem.Multiply(table, 0, 3, false);
          for (size_t i = 0; i < 3; ++i) ASSERT_TRUE(SameBits(got[i], want[i])) << Name(c);
          if (arithmetic == kQmoeInt8 && (values == Values::kNan || values == Values::kInf)) {
            for (const float y : got[0]) EXPECT_TRUE(std::isnan(y)) << Name(c);
          }
        }
      }
    }
  }
}

// Guards against: a wrong code, scale or zero point in the oracle. Float: each lane adds up at most
// columns / 16 + 6 roundings of terms no larger than `magnitudes`.
TEST(SimdQmoeScalarTest, IsCloseToFloat64) {
  std::mt19937 rng(3);
  for (const Case& c : AllCases()) {
    const Problem problem(c, Values::kOrdinary, 2, &rng);
    const auto got = problem.Multiply(kScalarTable, 0, 2, false);
    for (size_t x = 0; x < 2; ++x) {
      for (int64_t row = 0; row < c.n_rows; ++row) {
        const Problem::Exact want = problem.Of(x, row);
        const double roundings = static_cast<double>(c.shape.n_cols) / 16 + 22;
        double bound = want.magnitudes * roundings * 0x1p-24;
        if (c.shape.arithmetic == kQmoeInt8) bound += want.activation_error;
        ASSERT_LE(std::fabs(got[x][static_cast<size_t>(row)] - want.product), bound) << Name(c) << ", row " << row;
      }
    }
  }
}

}  // namespace
}  // namespace edgemoe::simd::test
