// SPDX-License-Identifier: MIT
// Low-bit copies of experts: which are multiplied, in their own formats and in the same layer as full experts, what is
// read for them, and what they may take of the memory. The reference is the portable table on the rows as they lie in
// the file, so equality is of bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "core/runtime.h"
#include "edgemoe/selection.h"
#include "tests/fakes.h"
#include "tests/own_model.h"

namespace edgemoe::test {
namespace {

using simd::Format;

constexpr int kEmbd = 256, kFf = 512, kUsed = 3;
// Copies whose activation rows are those of their expert (down: blocks of 256 columns), and others (up and gate).
const std::vector<Matrix> kUpDownGate = {
    {Format::kQ4_0, kFf, kEmbd}, {Format::kQ6_K, kEmbd, kFf}, {Format::kQ8_0, kFf, kEmbd}};
const std::vector<Format> kCopies = {Format::kQ2_K, Format::kQ4_0, Format::kQ3_K};

// Of experts, of their copies, of nobody; all of a token distinct, but two tokens may take an expert and its copy.
std::vector<int32_t> RandomChoice(std::mt19937* rng, int n_tokens) {
  std::vector<int32_t> ids = RandomIds(rng, n_tokens, kUsed, kOwnExperts);
  for (int32_t& id : ids) {
    const uint32_t kind = (*rng)() % 5;
    id = kind == 0 ? EDGEMOE_NO_EXPERT : kind < 3 ? id + kOwnExperts : id;
  }
  return ids;
}

std::vector<float> ProductOf(const OwnModel& model, size_t matrix, int32_t id, const float* x) {
  const size_t n_matrices = kUpDownGate.size();
  return id < kOwnExperts ? model.Product(matrix, id, x) : model.Product(n_matrices + matrix, id - kOwnExperts, x);
}

bool SameBits(const std::vector<float>& a, const float* b) {
  return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
}

class CopiesTest : public testing::TestWithParam<std::tuple<int, int>> {};  // slots, threads

// Guards against: a copy multiplied as if it had its expert's format or activations, an expert's rows in the place of
// its copy's, another expert's bias or mixing weight, and results that depend on what is resident or on threads.
TEST_P(CopiesTest, BlocksEqualTheirPartsByThePortableTable) {
  const auto [n_slots, n_threads] = GetParam();
  Watchdog watchdog("BlocksEqualTheirPartsByThePortableTable");
  OwnModel model(kUpDownGate, 4096 + 96, kCopies);
  if (!model.TryToOpen().ok()) GTEST_SKIP() << "this CPU has only the portable kernels";
  RuntimePtr runtime = model.Open(static_cast<uint64_t>(n_slots));
  SessionPtr session = NewSession(runtime.get(), n_threads);
  std::mt19937 rng(23);
  const std::vector<float> biases = RandomRows(&rng, kOwnExperts, kFf);
  int n_copies = 0;
  for (const int n_tokens : {1, 1, 1, 2, 5, 8, 20, 1}) {
    const std::vector<int32_t> ids = RandomChoice(&rng, n_tokens);
    const std::vector<float> x = RandomRows(&rng, n_tokens, kEmbd), weights = RandomRows(&rng, n_tokens, kUsed);
    std::vector<float> gate(ids.size() * kFf), up(ids.size() * kFf), down(ids.size() * kEmbd),
        out(static_cast<size_t>(n_tokens) * kEmbd);
    edgemoe_ffn ffn = {};
    ffn.up = model.Matmul(0, x.data(), 1, up.data(), kUsed);
    ffn.down = model.Matmul(1, nullptr, kUsed, down.data(), kUsed);
    ffn.gate = model.Matmul(2, x.data(), 1, gate.data(), kUsed);
    ffn.glu = EDGEMOE_SWIGLU;
    ffn.gate_bias = ffn.up_bias = ffn.down_bias = biases.data();
    ffn.gate_bias_expert_bytes = ffn.up_bias_expert_bytes = ffn.down_bias_expert_bytes = kFf * sizeof(float);
    ffn.weights = weights.data();
    ffn.weights_used_bytes = sizeof(float);
    ffn.weights_token_bytes = kUsed * sizeof(float);
    ffn.out = out.data();
    ffn.out_token_bytes = kEmbd * sizeof(float);
    const int32_t tensor_idxs[] = {0, 2, 1};
    edgemoe_error error = {};
    ASSERT_EQ(
        edgemoe_session_begin_layer(session.get(), ids.data(), n_tokens, kUsed, kUsed * 4, tensor_idxs, 3, &error),
        EDGEMOE_OK)
        << error.message;
    ASSERT_EQ(edgemoe_session_ffn(session.get(), &ffn, &error), EDGEMOE_OK) << error.message;
    edgemoe_session_end_layer(session.get());
    for (int token = 0; token < n_tokens; ++token) {
      const float* const x_row = x.data() + token * kEmbd;
      std::vector<std::vector<float>> downs;
      std::vector<const float*> rows, bias_rows;
      std::vector<float> used_weights;
      for (int used = 0; used < kUsed; ++used) {
        const int32_t id = ids[static_cast<size_t>(token * kUsed + used)];
        if (id == EDGEMOE_NO_EXPERT) continue;
        n_copies += id >= kOwnExperts ? 1 : 0;
        const float* const bias = biases.data() + id % kOwnExperts * kFf;
        const std::vector<float> gate_y = ProductOf(model, 2, id, x_row), up_y = ProductOf(model, 0, id, x_row);
        std::vector<float> act(kFf);
        simd::Portable().glu({simd::GluKind(EDGEMOE_SWIGLU), 0.0f, 0.0f}, gate_y.data(), bias, up_y.data(), bias,
                             act.data(), kFf);
        downs.push_back(ProductOf(model, 1, id, act.data()));
        bias_rows.push_back(bias);
        used_weights.push_back(weights[static_cast<size_t>(token * kUsed + used)]);
      }
      for (const std::vector<float>& y : downs) rows.push_back(y.data());
      std::vector<float> expected(kEmbd);
      if (!rows.empty()) {
        simd::Portable().combine(rows.data(), bias_rows.data(), used_weights.data(), static_cast<int>(rows.size()),
                                 expected.data(), kEmbd);
      }
      ASSERT_TRUE(SameBits(expected, out.data() + token * kEmbd)) << n_tokens << " tokens, token " << token;
    }
  }
  EXPECT_GT(n_copies, 20);
}

// Guards against: the same where products are asked for one by one.
TEST_P(CopiesTest, ProductsEqualThePortableTable) {
  const auto [n_slots, n_threads] = GetParam();
  Watchdog watchdog("ProductsEqualThePortableTable");
  OwnModel model(kUpDownGate, 32, kCopies);
  if (!model.TryToOpen().ok()) GTEST_SKIP() << "this CPU has only the portable kernels";
  RuntimePtr runtime = model.Open(static_cast<uint64_t>(n_slots));
  SessionPtr session = NewSession(runtime.get(), n_threads);
  std::mt19937 rng(29);
  for (const int n_tokens : {1, 3, 8, 19}) {
    const std::vector<int32_t> ids = RandomChoice(&rng, n_tokens);
    const std::vector<float> x = RandomRows(&rng, n_tokens, kEmbd), h = RandomRows(&rng, n_tokens * kUsed, kFf);
    std::vector<float> up(ids.size() * kFf, 1.0f), gate(ids.size() * kFf, 1.0f), down(ids.size() * kEmbd, 1.0f);
    const int32_t tensor_idxs[] = {0, 2, 1};
    ASSERT_EQ(
        edgemoe_session_begin_layer(session.get(), ids.data(), n_tokens, kUsed, kUsed * 4, tensor_idxs, 3, nullptr),
        EDGEMOE_OK);
    const edgemoe_matmul in[] = {model.Matmul(0, x.data(), 1, up.data(), kUsed),
                                 model.Matmul(2, x.data(), 1, gate.data(), kUsed)};
    ASSERT_EQ(edgemoe_session_matmul(session.get(), in, 2, nullptr), EDGEMOE_OK);
    const edgemoe_matmul out = model.Matmul(1, h.data(), kUsed, down.data(), kUsed);
    ASSERT_EQ(edgemoe_session_matmul(session.get(), &out, 1, nullptr), EDGEMOE_OK);
    edgemoe_session_end_layer(session.get());
    for (size_t pair = 0; pair < ids.size(); ++pair) {
      const bool is_none = ids[pair] == EDGEMOE_NO_EXPERT;
      const float* const x_row = x.data() + pair / kUsed * kEmbd;
      const std::vector<float> none_ff(kFf), none_embd(kEmbd);
      EXPECT_TRUE(SameBits(is_none ? none_ff : ProductOf(model, 0, ids[pair], x_row), up.data() + pair * kFf));
      EXPECT_TRUE(SameBits(is_none ? none_ff : ProductOf(model, 2, ids[pair], x_row), gate.data() + pair * kFf));
      EXPECT_TRUE(SameBits(is_none ? none_embd : ProductOf(model, 1, ids[pair], h.data() + pair * kFf),
                           down.data() + pair * kEmbd));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CopiesTest, testing::Combine(testing::Values(2, 4, kOwnExperts), testing::Values(1, 2)));

edgemoe_stats StatsOf(edgemoe_runtime* runtime) {
  edgemoe_stats stats;
  edgemoe_runtime_stats(runtime, &stats);
  return stats;
}

// Guards against: a copy that is read together with its expert or instead of it twice, one that counts as the expert
// being there, and a layer without copies that takes their ids for anything.
TEST(CopiesCacheTest, OnlyTheCopyIsReadAndItsExpertStaysAbsent) {
  OwnModel model(kUpDownGate, 0, kCopies);
  if (!model.TryToOpen().ok()) GTEST_SKIP() << "this CPU has only the portable kernels";
  RuntimePtr runtime = model.Open(kOwnExperts);
  SessionPtr session = NewSession(runtime.get(), 1);
  const std::vector<float> x(kEmbd, 0.5f);
  std::vector<float> up(kUsed * kFf);
  const int32_t ids[] = {2, kOwnExperts + 3, EDGEMOE_NO_EXPERT};
  const int32_t tensor_idxs[] = {0, 1, 2};
  const auto run = [&](const int32_t* chosen) {
    const int32_t code = edgemoe_session_begin_layer(session.get(), chosen, 1, kUsed, 0, tensor_idxs, 1, nullptr);
    if (code != EDGEMOE_OK) return code;
    const edgemoe_matmul m = model.Matmul(0, x.data(), 1, up.data(), kUsed);
    EXPECT_EQ(edgemoe_session_matmul(session.get(), &m, 1, nullptr), EDGEMOE_OK);
    edgemoe_session_end_layer(session.get());
    return code;
  };
  ASSERT_EQ(run(ids), EDGEMOE_OK);
  const auto& file = runtime->cache.file();
  const int64_t copy = file.tensors()[3].first_slice + 3;
  EXPECT_EQ(StatsOf(runtime.get()).bytes_read, file.Extent(2).length + file.Extent(copy).length);
  EXPECT_EQ(StatsOf(runtime.get()).misses, 2u);
  ASSERT_EQ(run(ids), EDGEMOE_OK);
  EXPECT_EQ(StatsOf(runtime.get()).hits, 2u);
  {
    std::lock_guard<std::mutex> lock(runtime->cache.mutex());
    EXPECT_TRUE(runtime->cache.Resident(copy));
    EXPECT_TRUE(runtime->cache.Absent(3));
  }
  // All of an expert: gate and down are still to come.
  std::vector<uint8_t> here(kOwnExperts);
  EXPECT_EQ(runtime->cache.Residents(0, here.data(), kOwnExperts), kOwnExperts);
  EXPECT_EQ(here, std::vector<uint8_t>(kOwnExperts));
  const int32_t all[] = {2, 4, EDGEMOE_NO_EXPERT};
  std::vector<float> gate(kUsed * kFf), down(kUsed * kEmbd), h(kUsed * kFf, 0.5f);
  ASSERT_EQ(edgemoe_session_begin_layer(session.get(), all, 1, kUsed, 0, tensor_idxs, 3, nullptr), EDGEMOE_OK);
  const edgemoe_matmul matmuls[] = {model.Matmul(0, x.data(), 1, up.data(), kUsed),
                                    model.Matmul(1, h.data(), kUsed, down.data(), kUsed),
                                    model.Matmul(2, x.data(), 1, gate.data(), kUsed)};
  ASSERT_EQ(edgemoe_session_matmul(session.get(), matmuls, 3, nullptr), EDGEMOE_OK);
  edgemoe_session_end_layer(session.get());
  runtime->cache.Residents(0, here.data(), kOwnExperts);
  EXPECT_EQ(here, (std::vector<uint8_t>{0, 0, 1, 0, 1, 0, 0, 0})) << "whether their copies are there or not";
  const int32_t beyond[] = {0, 1, 2 * kOwnExperts};
  EXPECT_EQ(run(beyond), EDGEMOE_INVALID_ARGUMENT);
  OwnModel alone(kUpDownGate, 0);
  RuntimePtr without = alone.Open(kOwnExperts);
  session = NewSession(without.get(), 1);
  EXPECT_EQ(run(ids), EDGEMOE_INVALID_ARGUMENT);
}

// Guards against: a copy of another shape multiplied over the end of its slot, a copy of a copy, and one that would
// need arithmetic that nobody has given for it.
TEST(CopiesCacheTest, CopiesThatCannotBeUsedAreRefused) {
  OwnModel model(kUpDownGate, 0, kCopies);
  if (!model.TryToOpen().ok()) GTEST_SKIP() << "this CPU has only the portable kernels";
  EXPECT_EQ(model.TryToOpen(EDGEMOE_ARITHMETIC_PLUGIN).code(), EDGEMOE_INVALID_ARGUMENT);
  edgemoe_tensor& copy = model.tensors()[4];
  const edgemoe_tensor good = copy;
  const auto refused = [&] {
    const Status s = model.TryToOpen();
    copy = good;
    return s.code() == EDGEMOE_INVALID_ARGUMENT && s.message().find("blk.0.b copy") != std::string::npos;
  };
  copy.n_rows /= 2;
  EXPECT_TRUE(refused());
  copy.layer = 1;
  EXPECT_TRUE(refused());
  copy.n_experts = copy.n_experts_used = 2;
  EXPECT_TRUE(refused());
  copy.copy_of = 1;  // which has one
  EXPECT_TRUE(refused());
  copy.copy_of = 4;  // a copy
  EXPECT_TRUE(refused());
  copy.copy_of = 5;  // itself
  EXPECT_TRUE(refused());
  copy.copy_of = 9;
  EXPECT_TRUE(refused());
  copy.format = EDGEMOE_FORMAT_OTHER;
  EXPECT_TRUE(refused());
  EXPECT_TRUE(model.TryToOpen().ok());
}

// Guards against: memory for copies that a model's own experts need more, or none, which makes every use of one a read.
TEST(CopiesMemoryTest, CopiesGetTheirShareBehindTheFloorOfOneLayer) {
  OwnModel model(kUpDownGate, 0, {Format::kQ2_K, Format::kQ5_K, Format::kQ3_K});
  std::vector<ExpertTensor> tensors;
  ASSERT_TRUE(ExpertFile::Describe(model.Options(EDGEMOE_ARITHMETIC_AUTO), &tensors).ok());
  const std::vector<ExpertTensor> first_layer = tensors;
  for (int layer = 1; layer < 10; ++layer) {
    for (ExpertTensor t : first_layer) {
      t.layer = layer;
      t.first_slice += 6 * kOwnExperts * layer;
      t.name += std::to_string(layer);
      tensors.push_back(t);
    }
  }
  std::vector<int> class_of_tensor;
  std::vector<SlotClass> classes = SlotPool::Classes(tensors, &class_of_tensor);
  uint64_t floor = 0, bank = 0;
  for (size_t c = 0; c < classes.size(); ++c) {
    const bool is_of_copies = tensors[c].copy_of >= 0;
    ASSERT_EQ(class_of_tensor[c], static_cast<int>(c)) << "six sizes";
    EXPECT_EQ(classes[c].n_cycle_slices, is_of_copies ? 2 : 20);
    EXPECT_EQ(classes[c].n_copy_slices, is_of_copies ? 80 : 0);
    floor += static_cast<uint64_t>(classes[c].n_floor_slots()) * classes[c].slot_bytes;
    bank += 80 * classes[c].slot_bytes;
  }
  SlotPool::Distribute(floor, &classes);
  for (const SlotClass& c : classes) EXPECT_EQ(c.n_slots, c.n_floor_slots());
  SlotPool::Distribute(bank / 2, &classes);
  for (const SlotClass& c : classes) {
    const double share = static_cast<double>(classes[0].n_slots - 20) / 60.0;
    const double expected = c.n_copy_slices > 0 ? 2.0 + kCopyShare * share * 78.0 : 20.0 + share * 60.0;
    EXPECT_NEAR(static_cast<double>(c.n_slots), expected, 2.0);
  }
  EXPECT_EQ(SlotPool::Distribute(bank, &classes), bank);
}

}  // namespace
}  // namespace edgemoe::test
