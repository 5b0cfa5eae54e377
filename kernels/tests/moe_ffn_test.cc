// SPDX-License-Identifier: MIT
// Tensors that libedgemoe's own kernels multiply: interleaved as they arrive, products alone and whole feed-forward
// blocks. The reference is the portable table on the rows as they lie in the file, so equality is of bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "core/arithmetic.h"
#include "core/runtime.h"
#include "edgemoe/selection.h"
#include "tests/fakes.h"
#include "tests/own_model.h"

namespace edgemoe::test {
namespace {

using simd::Format;

void ExpectSameBits(const float* a, const float* b, size_t n, const std::string& what) {
  ASSERT_EQ(std::memcmp(a, b, n * sizeof(float)), 0) << what;
}

class OwnProductTest : public testing::TestWithParam<std::tuple<Format, int, int>> {};  // format, slots, threads

// More than what is multiplied at a time by several panels, and not whole groups.
constexpr size_t kRows = 293;

// Guards against: slices interleaved wrongly (on arrival, where slots are free, or on the way to a kernel; rows beyond
// the last group, any head of the aligned read), a prompt computed unlike its tokens, results that depend on slots or
// threads.
TEST_P(OwnProductTest, EqualsThePortableTableOnTheFilesRows) {
  const auto [format, n_slots, n_threads] = GetParam();
  Watchdog watchdog("EqualsThePortableTableOnTheFilesRows");
  for (const uint64_t offset : {uint64_t{0}, uint64_t{32}, uint64_t{4096 + 4064}}) {
    OwnModel model({{format, kRows, 512}}, offset);
    RuntimePtr runtime = model.Open(static_cast<uint64_t>(n_slots));
    if (edgemoe_runtime_is_own(runtime.get(), 0) == 0) GTEST_SKIP() << "this CPU has only the portable kernels";
    SessionPtr session = NewSession(runtime.get(), n_threads);
    std::mt19937 rng(11);
    for (const int n_tokens : {1, 2, 3, 5, 8, 19}) {
      const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, 2, kOwnExperts);
      const std::vector<float> x = RandomRows(&rng, n_tokens, 512);
      std::vector<float> y(static_cast<size_t>(n_tokens) * 2 * kRows);
      const int32_t tensor_idx = 0;
      ASSERT_EQ(edgemoe_session_begin_layer(session.get(), ids.data(), n_tokens, 2, 8, &tensor_idx, 1, nullptr), 0);
      const edgemoe_matmul m = model.Matmul(0, x.data(), 1, y.data(), 2);
      ASSERT_EQ(edgemoe_session_matmul(session.get(), &m, 1, nullptr), EDGEMOE_OK);
      edgemoe_session_end_layer(session.get());
      for (size_t pair = 0; pair < ids.size(); ++pair) {
        const std::vector<float> expected = model.Product(0, ids[pair], x.data() + pair / 2 * 512);
        ExpectSameBits(expected.data(), y.data() + pair * kRows, kRows,
                       std::to_string(n_tokens) + " tokens, pair " + std::to_string(pair));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, OwnProductTest,
                         testing::Combine(testing::Values(Format::kQ4_0, Format::kQ8_0, Format::kQ4_K, Format::kQ6_K,
                                                          Format::kMXFP4, Format::kBF16),
                                          testing::Values(2, 3, kOwnExperts), testing::Values(1, 3)));

// Guards against: reader threads that take the cores from those that compute while experts stream, and against packing
// that never happens where there is room for all.
TEST(OwnPackingTest, OnlySlicesThatFillFreeSlotsArePacked) {
  Watchdog watchdog("OnlySlicesThatFillFreeSlotsArePacked");
  OwnModel model({{Format::kQ4_K, 64, 512}}, 32);
  RuntimePtr runtime = model.Open(2);
  if (edgemoe_runtime_is_own(runtime.get(), 0) == 0) GTEST_SKIP() << "this CPU has only the portable kernels";
  SessionPtr session = NewSession(runtime.get(), 1);
  std::mt19937 rng(5);
  const std::vector<float> x = RandomRows(&rng, 1, 512);
  uint64_t pack_ns = 0;
  for (const int32_t first : {0, 2, 4, 0}) {
    const std::vector<int32_t> ids = {first, first + 1};
    std::vector<float> y(2 * 64);
    const int32_t tensor_idx = 0;
    ASSERT_EQ(edgemoe_session_begin_layer(session.get(), ids.data(), 1, 2, 8, &tensor_idx, 1, nullptr), 0);
    const edgemoe_matmul m = model.Matmul(0, x.data(), 1, y.data(), 2);
    ASSERT_EQ(edgemoe_session_matmul(session.get(), &m, 1, nullptr), EDGEMOE_OK);
    edgemoe_session_end_layer(session.get());
    for (size_t used = 0; used < 2; ++used) {
      const std::vector<float> expected = model.Product(0, ids[used], x.data());
      ExpectSameBits(expected.data(), y.data() + used * 64, 64, "expert " + std::to_string(ids[used]));
    }
    edgemoe_stats stats;
    edgemoe_runtime_stats(runtime.get(), &stats);
    if (pack_ns == 0) {
      pack_ns = stats.pack_ns;
      EXPECT_GT(pack_ns, 0u) << "both slots were free";
    }
    EXPECT_EQ(stats.pack_ns, pack_ns) << "experts from " << first;
  }
}

struct FfnCase {
  const char* name;
  edgemoe_glu glu;
  bool gate, merged, biases, sums;
};

class FfnTest : public testing::TestWithParam<std::tuple<FfnCase, int, int>> {};  // case, slots of each size, threads

constexpr int kEmbd = 96, kFf = 256, kUsed = 2;

// Guards against: a block that differs from its parts (activation, biases, mixing weights, order of the sum), or whose
// bits depend on what was resident, on threads, or on how many tokens came together.
TEST_P(FfnTest, EqualsItsPartsByThePortableTable) {
  const auto [c, n_slots, n_threads] = GetParam();
  Watchdog watchdog("EqualsItsPartsByThePortableTable");
  const int64_t up_rows = c.merged ? 2 * kFf : kFf;
  std::vector<Matrix> matrices = {{Format::kQ4_0, up_rows, kEmbd}, {Format::kQ4_K, kEmbd, kFf}};
  if (c.gate) matrices.push_back({Format::kQ8_0, kFf, kEmbd});
  OwnModel model(matrices, 4096 + 96);
  RuntimePtr runtime = model.Open(static_cast<uint64_t>(n_slots));
  if (edgemoe_runtime_is_own(runtime.get(), 0) == 0) GTEST_SKIP() << "this CPU has only the portable kernels";
  SessionPtr session = NewSession(runtime.get(), n_threads);
  std::mt19937 rng(17);
  const std::vector<float> gate_bias = RandomRows(&rng, kOwnExperts, kFf),
                           up_bias = RandomRows(&rng, kOwnExperts, 2 * kFf),
                           down_bias = RandomRows(&rng, kOwnExperts, kEmbd);
  for (const int n_tokens : {1, 2, 7, 20}) {
    const std::vector<int32_t> ids = RandomIds(&rng, n_tokens, kUsed, kOwnExperts);
    const std::vector<float> x = RandomRows(&rng, n_tokens, kEmbd), weights = RandomRows(&rng, n_tokens, kUsed);
    const size_t n_pairs = ids.size();
    std::vector<float> gate(n_pairs * kFf), up(n_pairs * static_cast<size_t>(up_rows)), down(n_pairs * kEmbd),
        out(static_cast<size_t>(n_tokens) * kEmbd);
    edgemoe_ffn ffn = {};
    ffn.up = model.Matmul(0, x.data(), 1, up.data(), kUsed);
    ffn.down = model.Matmul(1, nullptr, kUsed, down.data(), kUsed);
    if (c.gate) ffn.gate = model.Matmul(2, x.data(), 1, gate.data(), kUsed);
    ffn.merged = c.merged ? 1 : 0;
    ffn.glu = c.glu;
    ffn.alpha = 1.702f;
    ffn.limit = 7.0f;
    if (c.biases) {
      if (c.gate) ffn.gate_bias = gate_bias.data();
      ffn.up_bias = up_bias.data();
      ffn.down_bias = down_bias.data();
    }
    ffn.gate_bias_expert_bytes = kFf * sizeof(float);
    ffn.up_bias_expert_bytes = 2 * kFf * sizeof(float);
    ffn.down_bias_expert_bytes = kEmbd * sizeof(float);
    ffn.weights = weights.data();
    ffn.weights_used_bytes = sizeof(float);
    ffn.weights_token_bytes = kUsed * sizeof(float);
    ffn.out = c.sums ? out.data() : nullptr;
    ffn.out_token_bytes = kEmbd * sizeof(float);
    const int32_t tensor_idxs[] = {0, 1, 2};
    edgemoe_error error = {};
    ASSERT_EQ(edgemoe_session_begin_layer(session.get(), ids.data(), n_tokens, kUsed, kUsed * 4, tensor_idxs,
                                          c.gate ? 3 : 2, &error),
              EDGEMOE_OK)
        << error.message;
    ASSERT_EQ(edgemoe_session_ffn(session.get(), &ffn, &error), EDGEMOE_OK) << error.message;
    edgemoe_session_end_layer(session.get());

    for (int token = 0; token < n_tokens; ++token) {
      std::vector<std::vector<float>> downs;
      for (int used = 0; used < kUsed; ++used) {
        const size_t pair = static_cast<size_t>(token * kUsed + used);
        const int32_t expert = ids[pair];
        const std::vector<float> up_y = model.Product(0, expert, x.data() + token * kEmbd);
        std::vector<float> gate_y = up_y, act(kFf);
        if (c.gate) gate_y = model.Product(2, expert, x.data() + token * kEmbd);
        const float* up_b = c.biases ? up_bias.data() + expert * 2 * kFf : nullptr;
        const float* gate_b = c.biases && c.gate ? gate_bias.data() + expert * kFf : up_b;
        const float* up_part = up_y.data() + (c.merged ? kFf : 0);
        if (c.merged && up_b != nullptr) up_b += kFf;
        const bool alone = !c.gate && !c.merged;
        simd::Portable().glu({static_cast<simd::GluKind>(c.glu), 1.702f, 7.0f}, gate_y.data(), gate_b,
                             alone ? nullptr : up_part, alone ? nullptr : up_b, act.data(), kFf);
        downs.push_back(model.Product(1, expert, act.data()));
        ExpectSameBits(downs.back().data(), down.data() + pair * kEmbd, kEmbd, "down of pair " + std::to_string(pair));
      }
      if (!c.sums) continue;
      const float* const rows[] = {downs[0].data(), downs[1].data()};
      const float* const biases[] = {down_bias.data() + ids[static_cast<size_t>(token * kUsed)] * kEmbd,
                                     down_bias.data() + ids[static_cast<size_t>(token * kUsed) + 1] * kEmbd};
      std::vector<float> expected(kEmbd);
      simd::Portable().combine(rows, c.biases ? biases : nullptr, weights.data() + token * kUsed, kUsed,
                               expected.data(), kEmbd);
      ExpectSameBits(expected.data(), out.data() + token * kEmbd, kEmbd, "sum of token " + std::to_string(token));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, FfnTest,
    testing::Combine(testing::Values(FfnCase{"swiglu", EDGEMOE_SWIGLU, true, false, false, true},
                                     FfnCase{"oai_biases", EDGEMOE_SWIGLU_OAI, true, false, true, true},
                                     FfnCase{"merged", EDGEMOE_GEGLU, false, true, false, true},
                                     FfnCase{"merged_biases", EDGEMOE_SWIGLU, false, true, true, true},
                                     FfnCase{"alone", EDGEMOE_RELU_SQUARED, false, false, false, true},
                                     FfnCase{"no_sum", EDGEMOE_SWIGLU, true, false, false, false}),
                     testing::Values(2, 5, kOwnExperts), testing::Values(1, 2)),
    [](const auto& info) {
      return std::string(std::get<0>(info.param).name) + "_" + std::to_string(std::get<1>(info.param)) + "slots_" +
             std::to_string(std::get<2>(info.param)) + "threads";
    });

// Guards against: an empty place that takes part in the sum (with the last layer's row, or its bias and weight), a
// token without experts that keeps what the output held, and rows of products that are not zeros where there is no sum.
TEST(FfnNoExpertTest, EmptyPlacesAreNoPartOfTheSum) {
  Watchdog watchdog("EmptyPlacesAreNoPartOfTheSum");
  constexpr int32_t kNone = EDGEMOE_NO_EXPERT;
  OwnModel model({{Format::kQ4_0, kFf, kEmbd}, {Format::kQ4_K, kEmbd, kFf}, {Format::kQ8_0, kFf, kEmbd}}, 4096 + 96);
  for (const int n_slots : {2, kOwnExperts}) {
    RuntimePtr runtime = model.Open(static_cast<uint64_t>(n_slots));
    if (edgemoe_runtime_is_own(runtime.get(), 0) == 0) GTEST_SKIP() << "this CPU has only the portable kernels";
    for (const bool sums : {true, false}) {
      SessionPtr session = NewSession(runtime.get(), 2);
      std::mt19937 rng(23);
      const int n_tokens = 4;
      const std::vector<int32_t> ids = {3, kNone, kNone, 5, kNone, kNone, 6, 3};
      const std::vector<float> x = RandomRows(&rng, n_tokens, kEmbd), weights = RandomRows(&rng, n_tokens, kUsed),
                               down_bias = RandomRows(&rng, kOwnExperts, kEmbd);
      std::vector<float> gate(ids.size() * kFf, 7.0f), up(ids.size() * kFf, 7.0f), down(ids.size() * kEmbd, 7.0f),
          out(static_cast<size_t>(n_tokens) * kEmbd, 7.0f);
      edgemoe_ffn ffn = {};
      ffn.up = model.Matmul(0, x.data(), 1, up.data(), kUsed);
      ffn.down = model.Matmul(1, nullptr, kUsed, down.data(), kUsed);
      ffn.gate = model.Matmul(2, x.data(), 1, gate.data(), kUsed);
      ffn.glu = EDGEMOE_SWIGLU;
      ffn.down_bias = sums ? down_bias.data() : nullptr;
      ffn.down_bias_expert_bytes = kEmbd * sizeof(float);
      ffn.weights = weights.data();
      ffn.weights_used_bytes = sizeof(float);
      ffn.weights_token_bytes = kUsed * sizeof(float);
      ffn.out = sums ? out.data() : nullptr;
      ffn.out_token_bytes = kEmbd * sizeof(float);
      const int32_t tensor_idxs[] = {0, 1, 2};
      edgemoe_error error = {};
      ASSERT_EQ(
          edgemoe_session_begin_layer(session.get(), ids.data(), n_tokens, kUsed, kUsed * 4, tensor_idxs, 3, &error),
          EDGEMOE_OK)
          << error.message;
      ASSERT_EQ(edgemoe_session_ffn(session.get(), &ffn, &error), EDGEMOE_OK) << error.message;
      edgemoe_session_end_layer(session.get());
      const std::vector<float> zeros(kEmbd);
      for (size_t token = 0; token < static_cast<size_t>(n_tokens); ++token) {
        std::vector<std::vector<float>> downs;
        std::vector<const float*> rows, biases;
        std::vector<float> used_weights;
        for (size_t pair = token * kUsed; pair < (token + 1) * kUsed; ++pair) {
          const int32_t expert = ids[pair];
          if (expert == kNone) {
            if (!sums) ExpectSameBits(zeros.data(), down.data() + pair * kEmbd, kEmbd, "pair " + std::to_string(pair));
            continue;
          }
          const std::vector<float> up_y = model.Product(0, expert, x.data() + token * kEmbd),
                                   gate_y = model.Product(2, expert, x.data() + token * kEmbd);
          std::vector<float> act(kFf);
          simd::Portable().glu({static_cast<simd::GluKind>(EDGEMOE_SWIGLU), 0.0f, 0.0f}, gate_y.data(), nullptr,
                               up_y.data(), nullptr, act.data(), kFf);
          downs.push_back(model.Product(1, expert, act.data()));
          ExpectSameBits(downs.back().data(), down.data() + pair * kEmbd, kEmbd, "pair " + std::to_string(pair));
          biases.push_back(down_bias.data() + expert * kEmbd);
          used_weights.push_back(weights[pair]);
        }
        if (!sums) continue;
        std::vector<float> expected(kEmbd);
        for (const std::vector<float>& row : downs) rows.push_back(row.data());
        if (!rows.empty()) {
          simd::Portable().combine(rows.data(), biases.data(), used_weights.data(), static_cast<int>(rows.size()),
                                   expected.data(), kEmbd);
        }
        ExpectSameBits(expected.data(), out.data() + token * kEmbd, kEmbd, "sum of token " + std::to_string(token));
      }
    }
  }
}

// Guards against: a block of the wrong shape, or with a tensor of the plug-in's, computed as if it were right.
TEST(FfnErrorsTest, WhatDoesNotFitIsRefused) {
  OwnModel model({{Format::kQ4_0, kFf, kEmbd}, {Format::kQ4_K, kEmbd, kFf}}, 0);
  RuntimePtr runtime = model.Open(kOwnExperts), engine = model.Open(kOwnExperts, EDGEMOE_ARITHMETIC_PLUGIN);
  if (edgemoe_runtime_is_own(runtime.get(), 0) == 0) GTEST_SKIP() << "this CPU has only the portable kernels";
  EXPECT_EQ(edgemoe_runtime_is_own(engine.get(), 0), 0);
  EXPECT_EQ(edgemoe_runtime_is_own(runtime.get(), 2), 0);
  const std::vector<float> x(kEmbd), weights(kUsed);
  std::vector<float> up(kUsed * kFf), down(kUsed * kEmbd);
  const std::vector<int32_t> ids = {1, 2};
  const int32_t tensor_idxs[] = {0, 1};
  edgemoe_ffn good = {};
  good.up = model.Matmul(0, x.data(), 1, up.data(), kUsed);
  good.down = model.Matmul(1, nullptr, kUsed, down.data(), kUsed);
  good.glu = EDGEMOE_SILU;
  const auto run = [&](edgemoe_runtime* r, const edgemoe_ffn& ffn) {
    SessionPtr session = NewSession(r, 1);
    EXPECT_EQ(edgemoe_session_begin_layer(session.get(), ids.data(), 1, kUsed, kUsed * 4, tensor_idxs, 2, nullptr), 0);
    edgemoe_error error = {};
    const int32_t code = edgemoe_session_ffn(session.get(), &ffn, &error);
    EXPECT_EQ(code == EDGEMOE_OK, error.message[0] == '\0');
    return code;
  };
  EXPECT_EQ(run(runtime.get(), good), EDGEMOE_OK);
  EXPECT_EQ(run(engine.get(), good), EDGEMOE_INVALID_ARGUMENT);
  edgemoe_ffn bad = good;
  bad.glu = EDGEMOE_SWIGLU;
  EXPECT_EQ(run(runtime.get(), bad), EDGEMOE_INVALID_ARGUMENT) << "needs a gate";
  bad = good;
  bad.down.n_cols /= 2;
  EXPECT_EQ(run(runtime.get(), bad), EDGEMOE_INVALID_ARGUMENT);
  bad = good;
  bad.up.n_rows /= 2;
  bad.down.n_cols /= 2;
  EXPECT_EQ(run(runtime.get(), bad), EDGEMOE_INVALID_ARGUMENT) << "not the tensor's shape";
  bad = good;
  bad.down.tensor_idx = 7;
  EXPECT_EQ(run(runtime.get(), bad), EDGEMOE_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace edgemoe::test
