// SPDX-License-Identifier: MIT
// Gated activations and the weighted sum of experts: bits against the scalar table, and that against float64.
#include <cmath>

#include "simd/tables.h"
#include "tests/simd_fakes.h"

namespace edgemoe::simd::test {
namespace {

constexpr double kUnitRoundoff = 0x1p-24;
constexpr GluKind kAllKinds[] = {kSwiGlu, kSwiGluOai, kSwiGluClamp, kGeGlu, kReGlu, kSilu, kGelu, kReluSquared};
constexpr float kLimit = 7.0f, kAlpha = 1.702f;  // of gpt-oss

bool IsOfGateAlone(GluKind kind) { return kind == kSilu || kind == kGelu || kind == kReluSquared; }

class SimdGluTest : public ::testing::TestWithParam<const KernelTable*> {
 protected:
  static void ExpectTheOraclesBits(const KernelTable& table, const GluParams& params, const std::vector<float>& gate,
                                   const std::vector<float>& up, const float* gate_bias, const float* up_bias) {
    const float* const u = IsOfGateAlone(params.kind) ? nullptr : up.data();
    const float* const u_bias = IsOfGateAlone(params.kind) ? nullptr : up_bias;
    const int64_t n = static_cast<int64_t>(gate.size());
    std::vector<float> want(gate.size()), got(gate.size()), over_gate = gate, over_up = up;
    kScalarTable.glu(params, gate.data(), gate_bias, u, u_bias, want.data(), n);
    table.glu(params, gate.data(), gate_bias, u, u_bias, got.data(), n);
    EXPECT_TRUE(SameBits(got, want)) << table.isa << ", kind " << params.kind << ", " << n << " values";
    table.glu(params, over_gate.data(), gate_bias, u, u_bias, over_gate.data(), n);
    EXPECT_TRUE(SameBits(over_gate, want)) << "in place of gate";
    if (u == nullptr) return;
    table.glu(params, gate.data(), gate_bias, over_up.data(), u_bias, over_up.data(), n);
    EXPECT_TRUE(SameBits(over_up, want)) << "in place of up";
  }
};
INSTANTIATE_TEST_SUITE_P(Tables, SimdGluTest, ::testing::ValuesIn(AllTables()),
                         [](const ::testing::TestParamInfo<const KernelTable*>& info) {
                           return std::string(info.param->isa);
                         });

// Every pair of these as gate and up.
std::vector<float> SpecialValues() {
  std::vector<float> values = {NAN, -NAN};
  for (const float v : {0.0f, 1.0f, 7.0f, std::nextafter(7.0f, 8.0f), 86.9f, 87.0f, 87.4f, 88.0f, 88.8f, 1e-45f, 1e-39f,
                        1e-20f, 1e10f, 1e30f, 3.4e38f, INFINITY}) {
    values.push_back(v);
    values.push_back(-v);
  }
  return values;
}

// Guards against: a comparison that turns NaN into a number, or -0 into +0; another order of roundings.
TEST_P(SimdGluTest, HasTheOraclesBits) {
  const KernelTable& table = *GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(table);
  std::mt19937 rng(1);
  const std::vector<float> special = SpecialValues();
  std::vector<float> special_gate, special_up;
  for (const float g : special) {
    special_gate.insert(special_gate.end(), special.size(), g);
    special_up.insert(special_up.end(), special.begin(), special.end());
  }
  std::vector<float> sweep;  // where exp is neither 0 nor 1
  for (int i = -9000; i <= 9000; ++i) sweep.push_back(static_cast<float>(i) * 0.01f);
  ExpectTheOraclesBits(table, {kSwiGluOai, 1.0f, INFINITY, 0.0f}, special_gate, special_up, nullptr, nullptr);
  for (const GluKind kind : kAllKinds) {
    const GluParams params = {kind, kAlpha, kLimit};
    ExpectTheOraclesBits(table, params, special_gate, special_up, nullptr, nullptr);
    ExpectTheOraclesBits(table, params, sweep, MakeValues(18001, Values::kOrdinary, &rng), nullptr, nullptr);
    for (const int64_t n : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 1000}) {
      const std::vector<float> gate = MakeValues(n, Values::kWide, &rng), up = MakeValues(n, Values::kWide, &rng);
      const std::vector<float> gate_bias = MakeValues(n, Values::kWide, &rng);
      const std::vector<float> up_bias = MakeValues(n, Values::kOrdinary, &rng);
      ExpectTheOraclesBits(table, params, gate, up, nullptr, nullptr);
      ExpectTheOraclesBits(table, params, gate, up, gate_bias.data(), nullptr);
      ExpectTheOraclesBits(table, params, gate, up, nullptr, up_bias.data());
      ExpectTheOraclesBits(table, params, gate, up, gate_bias.data(), up_bias.data());
    }
  }
}

// In double: g * sigmoid(argument) * factor, or a polynomial of g.
struct Gated {
  double g;
  double argument;
  double factor;
  // Roundings of the argument itself; each moves exp by |argument| units.
  int n_argument_roundings;
};

Gated Describe(const GluParams& p, double g, double u) {
  const double limit = p.limit, alpha = p.alpha;
  const double tanh_argument = 2.0 * std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g);
  switch (p.kind) {
    case kSwiGlu:
      return {g, g, u, 0};
    case kSilu:
      return {g, g, 1.0, 0};
    case kSwiGluOai:
      g = std::fmin(g, limit);
      return {g, alpha * g, std::fmax(-limit, std::fmin(u, limit)) + 1.0, 1};
    case kSwiGluClamp:
      g = std::fmin(g, limit);
      return {g, g, std::fmax(-limit, std::fmin(u, limit)), 0};
    case kGeGlu:
      return {g, tanh_argument, u, 6};  // two constants, four operations
    case kGelu:
      return {g, tanh_argument, 1.0, 6};
    default:
      return {std::fmax(g, 0.0), INFINITY, p.kind == kReGlu ? u : std::fmax(g, 0.0), 0};
  }
}

// Guards against: a wrong formula or constant in the oracle. Error bound, in units of roundoff (half an ulp): 6 for exp
// (3 of them the polynomial's remainder, |r|^7 / 7! at |r| = ln(2) / 2), weighed by how much of 1 + exp it is; 4 for
// the addition, division, product and OAI's u + 1. (Measured for silu at -87..0 in steps of 1e-5: 4.9 in all.) Where
// exp is cut at e^88, g / e^88 remains of a 0.
TEST(SimdGluScalarTest, IsCloseToFloat64) {
  std::mt19937 rng(2);
  for (const GluKind kind : kAllKinds) {
    const GluParams params = {kind, kAlpha, kLimit};
    std::vector<float> gate;
    for (int i = -12000; i <= 12000; ++i) gate.push_back(static_cast<float>(i) * 0.01f);
    std::vector<float> up = MakeValues(static_cast<int64_t>(gate.size()), Values::kOrdinary, &rng);
    for (float& u : up) u *= 20.0f;
    std::vector<float> out(gate.size());
    kScalarTable.glu(params, gate.data(), nullptr, IsOfGateAlone(kind) ? nullptr : up.data(), nullptr, out.data(),
                     static_cast<int64_t>(gate.size()));
    for (size_t i = 0; i < gate.size(); ++i) {
      const Gated f = Describe(params, gate[i], up[i]);
      const double e = std::exp(-f.argument), want = f.g / (1.0 + e) * f.factor;
      const double share = std::isinf(e) ? 1.0 : e / (1.0 + e);
      const double from_argument = std::isinf(f.argument) ? 0.0 : f.n_argument_roundings * std::fabs(f.argument);
      const double units = 4.0 + share * (6.0 + from_argument);
      const double cut = std::fabs(f.g * f.factor) * std::exp(-87.9);
      const double error = std::fabs(out[i] - want);
      EXPECT_LE(error, std::fabs(want) * units * kUnitRoundoff + cut) << "kind " << kind << " of " << gate[i];
    }
  }
}

TEST_P(SimdGluTest, CombineHasTheOraclesBits) {
  const KernelTable& table = *GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(table);
  std::mt19937 rng(3);
  for (const Values kind : {Values::kOrdinary, Values::kWide, Values::kZeros, Values::kDenormals, Values::kNan}) {
    for (const int n_rows : {1, 2, 3, 4, 8, 9}) {
      for (const int64_t n : {1, 5, 8, 16, 31, 64, 257}) {
        std::vector<std::vector<float>> rows, biases;
        std::vector<const float*> row_data, bias_data;
        for (int u = 0; u < n_rows; ++u) rows.push_back(MakeValues(n, kind, &rng));
        for (int u = 0; u < n_rows; ++u) biases.push_back(MakeValues(n, Values::kOrdinary, &rng));
        for (const std::vector<float>& row : rows) row_data.push_back(row.data());
        for (const std::vector<float>& bias : biases) bias_data.push_back(bias.data());
        const std::vector<float> weights = MakeValues(n_rows, Values::kOrdinary, &rng);
        std::vector<float> got(static_cast<size_t>(n)), want(static_cast<size_t>(n));
        for (const bool biased : {false, true}) {
          const float* const* b = biased ? bias_data.data() : nullptr;
          kScalarTable.combine(row_data.data(), b, weights.data(), n_rows, want.data(), n);
          table.combine(row_data.data(), b, weights.data(), n_rows, got.data(), n);
          EXPECT_TRUE(SameBits(got, want)) << table.isa << ", " << n_rows << " rows of " << n;
        }
        std::vector<float>& last = rows.back();  // in place; biases are added as above
        table.combine(row_data.data(), bias_data.data(), weights.data(), n_rows, last.data(), n);
        EXPECT_TRUE(SameBits(last, want)) << table.isa << ", in place, " << n_rows << " rows of " << n;
      }
    }
  }
}

// n_rows roundings of each product at most, and one of the bias.
TEST(SimdGluScalarTest, CombineIsCloseToFloat64) {
  std::mt19937 rng(4);
  const size_t n = 500;
  std::vector<std::vector<float>> rows;
  std::vector<const float*> row_data;
  for (int u = 0; u < 8; ++u) rows.push_back(MakeValues(static_cast<int64_t>(n), Values::kOrdinary, &rng));
  for (const std::vector<float>& row : rows) row_data.push_back(row.data());
  const std::vector<float> weights = MakeValues(8, Values::kOrdinary, &rng);
  std::vector<float> out(n);
  kScalarTable.combine(row_data.data(), row_data.data(), weights.data(), 8, out.data(), static_cast<int64_t>(n));
  for (size_t i = 0; i < n; ++i) {
    double want = 0.0, magnitudes = 0.0;
    for (size_t u = 0; u < 8; ++u) {
      const double term = static_cast<double>(weights[u]) * (2.0 * rows[u][i]);
      want += term;
      magnitudes += std::fabs(term);
    }
    EXPECT_LE(std::fabs(out[i] - want), 9.1 * kUnitRoundoff * magnitudes);
  }
}

}  // namespace
}  // namespace edgemoe::simd::test
