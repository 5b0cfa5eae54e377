// SPDX-License-Identifier: MIT
// phase_clock.h: where the time of a token goes. One clock that always runs for exactly one phase, so that the phases
// add up to the time between Start and Stop, whatever is measured or forgotten in between.
// Invariant: a stopped clock costs one relaxed load wherever a phase begins or ends, a running one a reading of the
// steady clock (some 25 ns) as well; neither allocates. Thread promise: it belongs to the thread that started it until
// that thread stops it; for all others Enter does nothing.
#ifndef EDGEMOE_CORE_PHASE_CLOCK_H_
#define EDGEMOE_CORE_PHASE_CLOCK_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "edgemoe/scheduler.h"

namespace edgemoe {

class PhaseClock {
 public:
  // False when it is running already.
  bool Start(edgemoe_phase phase) {
    std::thread::id nobody;
    if (!owner_.compare_exchange_strong(nobody, std::this_thread::get_id(), std::memory_order_acquire)) return false;
    for (uint64_t& ns : ns_) ns = 0;
    phase_ = phase;
    since_ = std::chrono::steady_clock::now();
    return true;
  }

  // The nanoseconds of each phase since Start, or zeros when the clock is not this thread's.
  void Stop(uint64_t ns[EDGEMOE_N_PHASES]) {
    const bool is_mine = IsMine();
    if (is_mine) (void)Enter(phase_);
    for (int i = 0; i < EDGEMOE_N_PHASES; ++i) ns[i] = is_mine ? ns_[i] : 0;
    if (is_mine) owner_.store(std::thread::id(), std::memory_order_release);
  }

  bool IsMine() const { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

  // From now on the time is `phase`'s; returns the phase before.
  edgemoe_phase Enter(edgemoe_phase phase) {
    if (!IsMine()) return phase;
    const auto now = std::chrono::steady_clock::now();
    ns_[phase_] += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now - since_).count());
    since_ = now;
    const edgemoe_phase before = phase_;
    phase_ = phase;
    return before;
  }

 private:
  std::atomic<std::thread::id> owner_{};
  // The owner's.
  edgemoe_phase phase_ = EDGEMOE_PHASE_OVERHEAD;
  std::chrono::steady_clock::time_point since_;
  uint64_t ns_[EDGEMOE_N_PHASES] = {};
};

// A phase as long as this lives.
class PhaseScope {
 public:
  PhaseScope(PhaseClock* clock, edgemoe_phase phase) : clock_(clock), before_(clock->Enter(phase)) {}
  ~PhaseScope() { (void)clock_->Enter(before_); }
  PhaseScope(const PhaseScope&) = delete;
  PhaseScope& operator=(const PhaseScope&) = delete;

 private:
  PhaseClock* const clock_;
  const edgemoe_phase before_;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_PHASE_CLOCK_H_
