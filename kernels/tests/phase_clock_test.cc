// SPDX-License-Identifier: MIT
// The clock that says where a token's time goes: every moment belongs to one phase, and to the one it should.
#include <gtest/gtest.h>

#include <chrono>
#include <numeric>
#include <random>
#include <thread>

#include "edgemoe/scheduler.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

using Nanoseconds = std::vector<uint64_t>;

Nanoseconds Stop(edgemoe_runtime* runtime) {
  Nanoseconds ns(EDGEMOE_N_PHASES, 1);
  edgemoe_runtime_stop_clock(runtime, ns.data());
  return ns;
}

uint64_t Sum(const Nanoseconds& ns) { return std::accumulate(ns.begin(), ns.end(), uint64_t{0}); }

uint64_t Now() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

void Sleep() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

constexpr uint64_t kSleepNs = 20'000'000;

// Guards against: time counted twice or lost where phases follow each other, nest, or are entered again.
TEST(PhaseClockTest, PhasesAddUpToTheTimeBetweenStartAndStop) {
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(144)));
  const uint64_t before = Now();
  ASSERT_EQ(edgemoe_runtime_start_clock(runtime.get(), EDGEMOE_PHASE_OVERHEAD, nullptr), EDGEMOE_OK);
  const uint64_t begin = Now();
  Sleep();
  EXPECT_EQ(edgemoe_runtime_enter_phase(runtime.get(), EDGEMOE_PHASE_DENSE), EDGEMOE_PHASE_OVERHEAD);
  Sleep();
  EXPECT_EQ(edgemoe_runtime_enter_phase(runtime.get(), EDGEMOE_PHASE_ROUTER), EDGEMOE_PHASE_DENSE);
  EXPECT_EQ(edgemoe_runtime_enter_phase(runtime.get(), EDGEMOE_PHASE_DENSE), EDGEMOE_PHASE_ROUTER);
  Sleep();
  const uint64_t end = Now();
  const Nanoseconds ns = Stop(runtime.get());
  const uint64_t after = Now();
  EXPECT_GE(ns[EDGEMOE_PHASE_OVERHEAD], kSleepNs);
  EXPECT_GE(ns[EDGEMOE_PHASE_DENSE], 2 * kSleepNs);
  EXPECT_EQ(ns[EDGEMOE_PHASE_WAIT] + ns[EDGEMOE_PHASE_EXPERTS] + ns[EDGEMOE_PHASE_SAMPLING], 0u);
  // A few roundings down to whole nanoseconds.
  EXPECT_GE(Sum(ns) + 10, end - begin);
  EXPECT_LE(Sum(ns), after - before);
}

// Guards against: a clock that another thread's layers advance, a second profile that takes the first one's time, and
// phases out of bounds.
TEST(PhaseClockTest, BelongsToTheThreadThatStartedIt) {
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(144)));
  edgemoe_error error = {};
  EXPECT_EQ(edgemoe_runtime_enter_phase(runtime.get(), EDGEMOE_PHASE_DENSE), -1);
  EXPECT_EQ(Sum(Stop(runtime.get())), 0u);
  for (const int32_t phase : {-1, EDGEMOE_N_PHASES}) {
    EXPECT_EQ(edgemoe_runtime_start_clock(runtime.get(), phase, &error), EDGEMOE_INVALID_ARGUMENT);
    EXPECT_NE(std::string(error.message).find("expected 0..6"), std::string::npos) << error.message;
  }
  ASSERT_EQ(edgemoe_runtime_start_clock(runtime.get(), EDGEMOE_PHASE_DENSE, nullptr), EDGEMOE_OK);
  EXPECT_EQ(edgemoe_runtime_start_clock(runtime.get(), EDGEMOE_PHASE_DENSE, &error), EDGEMOE_INVALID_ARGUMENT);
  EXPECT_EQ(edgemoe_runtime_enter_phase(runtime.get(), EDGEMOE_N_PHASES), -1);
  std::thread other([&] {
    EXPECT_EQ(edgemoe_runtime_enter_phase(runtime.get(), EDGEMOE_PHASE_SAMPLING), -1);
    EXPECT_EQ(Sum(Stop(runtime.get())), 0u);
    std::mt19937 rng(1);
    ToySession session(runtime.get(), &model);
    EXPECT_EQ(session.RunLayer(0, {0, 1, 2, 3}, 1, RandomRows(&rng, 1, 16)), EDGEMOE_OK);
  });
  other.join();
  const Nanoseconds ns = Stop(runtime.get());
  EXPECT_GT(ns[EDGEMOE_PHASE_DENSE], 0u);
  EXPECT_EQ(Sum(ns), ns[EDGEMOE_PHASE_DENSE]);
  EXPECT_EQ(edgemoe_runtime_start_clock(runtime.get(), EDGEMOE_PHASE_DENSE, nullptr), EDGEMOE_OK);
  (void)Stop(runtime.get());
}

// Guards against: waiting for storage that is called computing, and the reverse.
TEST(PhaseClockTest, LayersTellWaitingFromSelectingAndComputing) {
  Watchdog watchdog("LayersTellWaitingFromSelectingAndComputing");
  ToyModel model({});
  RuntimePtr runtime(model.Open(model.SlotsBytes(144)));
  std::mt19937 rng(1);
  const std::vector<float> x = RandomRows(&rng, 1, 16);
  ToySession session(runtime.get(), &model, 2);
  const auto profile = [&] {
    EXPECT_EQ(edgemoe_runtime_start_clock(runtime.get(), EDGEMOE_PHASE_EXPERTS, nullptr), EDGEMOE_OK);
    EXPECT_EQ(session.RunLayer(0, {0, 1, 2, 3}, 1, x), EDGEMOE_OK);
    return Stop(runtime.get());
  };
  model.storage().on_read = [](int64_t, uint64_t) {
    Sleep();
    return Status();
  };
  const Nanoseconds cold = profile();
  edgemoe_stats stats;
  edgemoe_runtime_stats(runtime.get(), &stats);
  // Within one reading of the clock per wait.
  EXPECT_GE(cold[EDGEMOE_PHASE_WAIT], stats.stall_ns);
  EXPECT_GE(cold[EDGEMOE_PHASE_WAIT], kSleepNs);
  EXPECT_GT(cold[EDGEMOE_PHASE_SELECT], 0u);
  EXPECT_GT(cold[EDGEMOE_PHASE_EXPERTS], 0u);
  const Nanoseconds warm = profile();
  EXPECT_EQ(warm[EDGEMOE_PHASE_WAIT], 0u);
  EXPECT_GT(warm[EDGEMOE_PHASE_SELECT], 0u);
  EXPECT_EQ(warm[EDGEMOE_PHASE_SELECT] + warm[EDGEMOE_PHASE_EXPERTS], Sum(warm));
}

}  // namespace
}  // namespace edgemoe::test
