// SPDX-License-Identifier: MIT
// A decode step must not allocate: an allocator's lock or a page fault between the router and its experts is a stall
// that no profile shows. This binary counts every operator new of the process, the reading threads' among them.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "edgemoe/scheduler.h"
#include "edgemoe/selection.h"
#include "tests/fakes.h"
#include "tests/own_model.h"

namespace {
std::atomic<bool> g_counting{false};
std::atomic<int64_t> g_n_allocations{0};

void* CountedAllocateOrNull(std::size_t size) {
  if (g_counting.load(std::memory_order_relaxed)) g_n_allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(size > 0 ? size : 1);
}
void* CountedAllocate(std::size_t size) {
  void* const p = CountedAllocateOrNull(size);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace

// Not inlined: GCC would take one of a pair that it inlined and one that it did not for a mismatch.
__attribute__((noinline)) void* operator new(std::size_t size) { return CountedAllocate(size); }
__attribute__((noinline)) void* operator new[](std::size_t size) { return CountedAllocate(size); }
// The library's stable sorts allocate so.
__attribute__((noinline)) void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return CountedAllocateOrNull(size);
}
__attribute__((noinline)) void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete[](void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::size_t) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete[](void* p, std::size_t) noexcept { std::free(p); }

namespace edgemoe::test {
namespace {

struct Step {
  int32_t ids[4];
  float x[32];
};

// Those that foresee what they would choose.
struct AllChoosers {
  AllChoosers() {
    const edgemoe_count_options counting = {sizeof(counting), EDGEMOE_COUNT_MAP, 3, 16, nullptr, 1.0, 2, 4};
    const edgemoe_reuse_options reusing = {sizeof(reusing), EDGEMOE_REUSE_CACHE_PRIOR, 3, 16, 1, 0, 0.5, 0.2, 0.1};
    const edgemoe_miss_options missing = {sizeof(missing), 0, 3, 16, 0.8, 0.8};
    EXPECT_EQ(edgemoe_count_open(&counting, &all.count, nullptr), EDGEMOE_OK);
    EXPECT_EQ(edgemoe_reuse_open(&reusing, &all.reuse, nullptr), EDGEMOE_OK);
    EXPECT_EQ(edgemoe_miss_open(&missing, &all.miss, nullptr), EDGEMOE_OK);
  }
  ~AllChoosers() {
    edgemoe_count_close(all.count);
    edgemoe_reuse_close(all.reuse);
    edgemoe_miss_close(all.miss);
  }
  AllChoosers(const AllChoosers&) = delete;
  AllChoosers& operator=(const AllChoosers&) = delete;
  edgemoe_choosers all = {};
};

// Slots, eviction rule, whether a trace is recorded and a profile taken, whether choosers have a say.
class AllocationTest : public testing::TestWithParam<std::tuple<int, edgemoe_eviction, bool, bool>> {};

// Guards against: growth of a vector, a message or a map node in each token.
TEST_P(AllocationTest, DecodeStepsAllocateNothingAfterWarmUp) {
  const auto [n_slots, rule, is_recorded, is_chosen] = GetParam();
  const AllChoosers choosers;
  const edgemoe_choosers* const who = is_chosen ? &choosers.all : nullptr;
  ToyShape shape;
  shape.mixed = true;
  shape.n_embd = 32;
  ToyModel model(shape);
  TempDir dir;
  RuntimePtr runtime(model.Open(model.SlotsBytes(n_slots), 2, rule));
  // Routers for the prediction of coming layers.
  std::mt19937 rng(1);
  std::vector<float> weights(16 * 32);
  for (float& w : weights) w = static_cast<float>(rng() % 200) / 100.0f - 1.0f;
  std::vector<edgemoe_router> routers;
  for (int layer = 0; layer < 3; ++layer) routers.push_back({layer, 16, 32, weights.data(), nullptr, nullptr, 0, 0});
  ASSERT_EQ(edgemoe_runtime_set_prefetch(runtime.get(), routers.data(), 3, 2, 1, nullptr), EDGEMOE_OK);
  const edgemoe_kernels kernels = SerialToyKernels();
  edgemoe_session* session = nullptr;
  ASSERT_EQ(edgemoe_session_create(runtime.get(), &kernels, &session, nullptr), EDGEMOE_OK);
  std::vector<float> gate(4 * 300), up(4 * 300), y(4 * 32);
  const auto product = [&](int32_t tensor_idx, const float* x, int64_t x_n_used, float* to) {
    edgemoe_matmul m = {};
    m.tensor_idx = tensor_idx;
    m.type = model.Type(tensor_idx);
    m.n_cols = model.Cols(tensor_idx);
    m.n_rows = model.Rows(tensor_idx);
    m.row_bytes = model.RowBytes(tensor_idx);
    m.x = x;
    m.x_n_used = x_n_used;
    m.x_used_bytes = static_cast<uint64_t>(m.n_cols) * sizeof(float);
    m.x_token_bytes = m.x_used_bytes * static_cast<uint64_t>(x_n_used);
    m.y = to;
    m.y_used_bytes = static_cast<uint64_t>(m.n_rows) * sizeof(float);
    m.y_token_bytes = 4 * m.y_used_bytes;
    return m;
  };
  const auto run = [&](int layer, const Step& step) {
    const int32_t tensor_idxs[] = {model.Gate(layer), model.Up(layer), model.Down(layer)};
    const edgemoe_matmul gate_up[] = {product(tensor_idxs[0], step.x, 1, gate.data()),
                                      product(tensor_idxs[1], step.x, 1, up.data())};
    const edgemoe_matmul down = product(tensor_idxs[2], gate.data(), 4, y.data());
    edgemoe_session_set_choosers(session, who);
    int32_t failed = edgemoe_session_begin_layer(session, step.ids, 1, 4, sizeof(step.ids), tensor_idxs, 3, nullptr);
    failed |= edgemoe_session_matmul(session, gate_up, 2, nullptr);
    failed |= edgemoe_session_matmul(session, &down, 1, nullptr);
    edgemoe_session_end_layer(session);
    return failed;
  };
  std::vector<Step> steps(300);
  for (Step& step : steps) {
    const std::vector<int32_t> ids = RandomIds(&rng, 1, 4, 16);
    std::copy(ids.begin(), ids.end(), step.ids);
    for (float& v : step.x) v = static_cast<float>(rng() % 100) / 64.0f;
  }
  if (is_recorded) {
    ASSERT_EQ(edgemoe_runtime_start_trace(runtime.get(), dir.Path("trace").c_str(), "{}", nullptr), EDGEMOE_OK);
    ASSERT_EQ(edgemoe_runtime_start_clock(runtime.get(), EDGEMOE_PHASE_EXPERTS, nullptr), EDGEMOE_OK);
  }
  // Warm-up: one token, nothing of which is resident.
  edgemoe_runtime_foresee_tokens(runtime.get(), steps[0].x, 1, 32, who);
  for (int layer = 0; layer < 3; ++layer) ASSERT_EQ(run(layer, steps[0]), 0);
  g_n_allocations = 0;
  g_counting = true;
  int32_t failed = 0;
  for (size_t i = 1; i < steps.size(); ++i) {
    edgemoe_runtime_foresee_tokens(runtime.get(), steps[i].x, 1, 32, who);
    for (int layer = 0; layer < 3; ++layer) failed |= run(layer, steps[i]);
  }
  // Everything resident, if there is room: the most pins that a layer can take.
  for (int layer = 0; layer < 3; ++layer) failed |= run(layer, steps.back());
  g_counting = false;
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(g_n_allocations.load(), 0);
  edgemoe_stats stats;
  edgemoe_runtime_stats(runtime.get(), &stats);
  edgemoe_prefetch_stats prefetch;
  edgemoe_runtime_prefetch_stats(runtime.get(), &prefetch);
  EXPECT_EQ(prefetch.predicted > 0, n_slots < 32);
  EXPECT_TRUE(n_slots == 32 || stats.evictions > 1000) << stats.evictions << " evictions";
  edgemoe_session_destroy(session);
}

INSTANTIATE_TEST_SUITE_P(All, AllocationTest,
                         testing::Combine(testing::Values(2, 7, 16, 32),
                                          testing::Values(EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY,
                                                          EDGEMOE_EVICT_LEAST_STALE, EDGEMOE_EVICT_UTILITY,
                                                          EDGEMOE_EVICT_AUTO),
                                          testing::Bool(), testing::Values(false)));
// Choosers know nothing of rules: one is enough, as the sanitizers take minutes for the product.
INSTANTIATE_TEST_SUITE_P(Chosen, AllocationTest,
                         testing::Combine(testing::Values(2, 7, 16, 32), testing::Values(EDGEMOE_EVICT_AUTO),
                                          testing::Bool(), testing::Values(true)));

// One token's block of up, down and gate, in this order of the model's tensors; as many used as there are weights.
edgemoe_ffn GatedBlock(const OwnModel& model, const std::vector<float>& x, const std::vector<float>& weights,
                       std::vector<float>* gate, std::vector<float>* up, std::vector<float>* down,
                       std::vector<float>* out) {
  const auto n_used = static_cast<int64_t>(weights.size());
  edgemoe_ffn ffn = {};
  ffn.up = model.Matmul(0, x.data(), 1, up->data(), n_used);
  ffn.down = model.Matmul(1, nullptr, n_used, down->data(), n_used);
  ffn.gate = model.Matmul(2, x.data(), 1, gate->data(), n_used);
  ffn.weights = weights.data();
  ffn.weights_used_bytes = sizeof(float);
  ffn.out = out->data();
  return ffn;
}

// Guards against: the same in a whole feed-forward block by own kernels, whose slices are interleaved as they arrive,
// and whose mixing weights are recorded.
TEST(OwnAllocationTest, DecodeStepsOfWholeBlocksAllocateNothingAfterWarmUp) {
  constexpr int kEmbd = 64, kFf = 256, kUsed = 2;
  TempDir dir;
  OwnModel model({{simd::kQ4_0, kFf, kEmbd}, {simd::kQ4_K, kEmbd, kFf}, {simd::kQ8_0, kFf, kEmbd}}, 4096 + 96);
  for (const uint64_t n_slots : {2, 3, kOwnExperts}) {
    RuntimePtr runtime = model.Open(n_slots);
    if (edgemoe_runtime_is_own(runtime.get(), 0) == 0) GTEST_SKIP() << "this CPU has only the portable kernels";
    const edgemoe_kernels kernels = SerialToyKernels();
    edgemoe_session* session = nullptr;
    ASSERT_EQ(edgemoe_session_create(runtime.get(), &kernels, &session, nullptr), EDGEMOE_OK);
    ASSERT_EQ(edgemoe_runtime_start_trace(runtime.get(), dir.Path("trace").c_str(), "{}", nullptr), EDGEMOE_OK);
    std::mt19937 rng(2);
    const std::vector<float> x = RandomRows(&rng, 1, kEmbd), weights = RandomRows(&rng, 1, kUsed);
    const std::vector<int32_t> ids = RandomIds(&rng, 300, kUsed, kOwnExperts);
    std::vector<float> gate(kUsed * kFf), up(kUsed * kFf), down(kUsed * kEmbd), out(kEmbd);
    const edgemoe_ffn ffn = GatedBlock(model, x, weights, &gate, &up, &down, &out);
    const int32_t tensor_idxs[] = {0, 1, 2};
    int32_t failed = 0;
    for (int step = 0; step < 300; ++step) {
      if (step == 1) {
        g_n_allocations = 0;
        g_counting = true;
      }
      failed |= edgemoe_session_begin_layer(session, ids.data() + step * kUsed, 1, kUsed, kUsed * sizeof(int32_t),
                                            tensor_idxs, 3, nullptr);
      failed |= edgemoe_session_ffn(session, &ffn, nullptr);
      edgemoe_session_end_layer(session);
    }
    g_counting = false;
    EXPECT_EQ(failed, 0);
    EXPECT_EQ(g_n_allocations.load(), 0);
    edgemoe_session_destroy(session);
  }
}

// Guards against: rooms for low-bit copies that grow when the first of them is chosen, in the middle of an answer.
TEST(OwnAllocationTest, FirstUsesOfCopiesAllocateNothing) {
  constexpr int kEmbd = 256, kFf = 512, kUsed = 4;
  OwnModel model({{simd::kQ4_0, kFf, kEmbd}, {simd::kQ4_0, kEmbd, kFf}, {simd::kQ8_0, kFf, kEmbd}}, 4096 + 96,
                 {simd::kQ2_K, simd::kQ3_K, simd::kQ4_0});
  if (!model.TryToOpen().ok()) GTEST_SKIP() << "this CPU has only the portable kernels";
  RuntimePtr runtime = model.Open(4);
  const edgemoe_kernels kernels = SerialToyKernels();
  edgemoe_session* session = nullptr;
  ASSERT_EQ(edgemoe_session_create(runtime.get(), &kernels, &session, nullptr), EDGEMOE_OK);
  const edgemoe_miss_options options = {sizeof(edgemoe_miss_options), 1, 1, kOwnExperts, 0.3, 0.8};
  edgemoe_miss* miss = nullptr;
  ASSERT_EQ(edgemoe_miss_open(&options, &miss, nullptr), EDGEMOE_OK);
  std::mt19937 rng(2);
  const std::vector<float> x = RandomRows(&rng, 1, kEmbd), weights = RandomRows(&rng, 1, kUsed);
  std::vector<float> gate(kUsed * kFf), up(kUsed * kFf), down(kUsed * kEmbd), out(kEmbd), masses(kOwnExperts);
  std::vector<uint8_t> resident(kOwnExperts);
  std::vector<int32_t> order(kOwnExperts);
  const edgemoe_ffn ffn = GatedBlock(model, x, weights, &gate, &up, &down, &out);
  const int32_t tensor_idxs[] = {0, 2, 1};
  int32_t ids[kUsed] = {0, 1, 2, 3};
  int32_t failed = 0;
  for (int step = 0; step < 300; ++step) {
    if (step == 1) {
      g_n_allocations = 0;
      g_counting = true;
      edgemoe_miss_reset_stats(miss);
    }
    if (step > 0) {
      failed += edgemoe_runtime_residents(runtime.get(), 0, resident.data(), kOwnExperts) == kOwnExperts ? 0 : 1;
      for (int32_t e = 0; e < kOwnExperts; ++e) {
        order[static_cast<size_t>(e)] = (e + step) % kOwnExperts;
        masses[static_cast<size_t>(e)] = 1.0f / static_cast<float>(1 + (e + step) % 3);
      }
      const edgemoe_selection selection = {
          0, kOwnExperts, kUsed, 0, 0, 0, masses.data(), masses.data(), resident.data(), order.data(), nullptr};
      failed |= edgemoe_miss_select(miss, &selection, ids, nullptr);
    }
    failed |= edgemoe_session_begin_layer(session, ids, 1, kUsed, sizeof(ids), tensor_idxs, 3, nullptr);
    failed |= edgemoe_session_ffn(session, &ffn, nullptr);
    edgemoe_session_end_layer(session);
  }
  g_counting = false;
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(g_n_allocations.load(), 0);
  edgemoe_miss_stats stats;
  edgemoe_miss_read_stats(miss, &stats);
  EXPECT_EQ(stats.n_selections, 299u);
  EXPECT_GT(stats.n_copies, 20u);
  EXPECT_GT(stats.n_skipped, 20u);
  edgemoe_miss_close(miss);
  edgemoe_session_destroy(session);
}

// Guards against: an order, a list of residents or a message that is made anew for each token.
TEST(ReuseBiasAllocationTest, BiasedSelectionAllocatesNothing) {
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(24)));
  const int32_t n = model.shape().n_experts;
  for (const int32_t method : {EDGEMOE_REUSE_CACHE_PRIOR, EDGEMOE_REUSE_MAX_RANK, EDGEMOE_REUSE_CUMULATIVE}) {
    const edgemoe_reuse_options options = {sizeof(edgemoe_reuse_options), method, 1, n, 1, 0, 0.9, 1.0, 1.0};
    edgemoe_reuse* reuse = nullptr;
    ASSERT_EQ(edgemoe_reuse_open(&options, &reuse, nullptr), EDGEMOE_OK);
    std::vector<float> scores(static_cast<size_t>(n));
    std::vector<uint8_t> resident(static_cast<size_t>(n));
    std::vector<int32_t> order(static_cast<size_t>(n));
    int32_t failed = 0;
    g_n_allocations = 0;
    g_counting = true;
    for (int step = 0; step < 100; ++step) {
      failed += edgemoe_runtime_residents(runtime.get(), 0, resident.data(), n) == n ? 0 : 1;
      for (int32_t e = 0; e < n; ++e) {
        resident[static_cast<size_t>(e)] = static_cast<uint8_t>((e + step) % 2);
        scores[static_cast<size_t>(e)] = 1.0f / static_cast<float>(e + 2);
        order[static_cast<size_t>(e)] = e;
      }
      const edgemoe_selection selection = {
          0, n, 4, 1, 0, 0, scores.data(), scores.data(), resident.data(), order.data(), nullptr};
      failed |= edgemoe_reuse_select(reuse, &selection, nullptr);
    }
    g_counting = false;
    EXPECT_EQ(failed, 0);
    EXPECT_EQ(g_n_allocations.load(), 0);
    edgemoe_reuse_stats stats;
    edgemoe_reuse_read_stats(reuse, &stats);
    EXPECT_EQ(stats.n_selections, 100u);
    EXPECT_GT(stats.n_changed, 0u);
    edgemoe_reuse_close(reuse);
  }
}

// Guards against: a guard that counts nothing.
TEST(AllocationCounterTest, CountsAllocations) {
  g_n_allocations = 0;
  g_counting = true;
  std::vector<char>* volatile v = new std::vector<char>(1000);
  g_counting = false;
  delete v;
  EXPECT_EQ(g_n_allocations.load(), 2);
}

// Guards against: a list of masses or a message that is made anew for each token.
TEST(ExpertCountAllocationTest, CountingAllocatesNothing) {
  constexpr int32_t n = 32;
  const int32_t n_of_layer[] = {2};
  for (const int32_t rule : {EDGEMOE_COUNT_OF_LAYER, EDGEMOE_COUNT_TOP_P, EDGEMOE_COUNT_MAP}) {
    const edgemoe_count_options options = {sizeof(edgemoe_count_options), rule, 1, n, n_of_layer, 0.5, 1, 4};
    edgemoe_count* count = nullptr;
    ASSERT_EQ(edgemoe_count_open(&options, &count, nullptr), EDGEMOE_OK);
    std::vector<float> masses(n), logits(n);
    std::vector<int32_t> order(n);
    for (int32_t e = 0; e < n; ++e) {
      masses[static_cast<size_t>(e)] = 1.0f / static_cast<float>(e + 2);
      logits[static_cast<size_t>(e)] = 1.5f - static_cast<float>(e);
      order[static_cast<size_t>(e)] = e;
    }
    const edgemoe_selection selection = {
        0, n, 4, 1, 0, 0, masses.data(), masses.data(), nullptr, order.data(), logits.data()};
    int32_t failed = 0, n_used = 0;
    g_n_allocations = 0;
    g_counting = true;
    for (int step = 0; step < 100; ++step) failed |= edgemoe_count_select(count, &selection, &n_used, nullptr);
    g_counting = false;
    EXPECT_EQ(failed, 0);
    EXPECT_EQ(n_used, 2);
    EXPECT_EQ(g_n_allocations.load(), 0);
    edgemoe_count_stats stats;
    edgemoe_count_read_stats(count, &stats);
    EXPECT_EQ(stats.n_dropped, 200u);
    edgemoe_count_close(count);
  }
}

}  // namespace
}  // namespace edgemoe::test
