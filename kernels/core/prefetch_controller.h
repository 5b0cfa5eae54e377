// SPDX-License-Identifier: MIT
// prefetch_controller.h: how many layers ahead to read, found by the clock. Decode runs in windows of kWindowTokens
// tokens at one depth. Now and then a window, the *probe*, runs at a neighbouring depth; it is compared with the mean
// of the windows just before and after it, so that a drift of the text's locality cancels. A probe that was faster is
// repeated, and two faster ones in a row move the depth. Each probe that was not faster doubles the time to the next,
// so that what is tried and does not pay costs little: with a probe in every 16th to 64th window, a depth that is 30 %
// slower costs at most 1.9 % at first and 0.5 % later. A change of the token time by more than half starts anew.
// Pure: time comes in from outside. Thread-compatible.
#ifndef EDGEMOE_CORE_PREFETCH_CONTROLLER_H_
#define EDGEMOE_CORE_PREFETCH_CONTROLLER_H_

#include <algorithm>
#include <cstdint>

namespace edgemoe {

class PrefetchController {
 public:
  static constexpr int kWindowTokens = 8;
  static constexpr int kFirstWait = 1;  // windows between probes: none to lose after the start or a move
  static constexpr int kShortestWait = 16;
  static constexpr int kLongestWait = 64;
  // A deeper probe must be faster by more than its noise; a shallower one, which wastes less, only no slower.
  static constexpr double kGain = 0.99;

  // adaptive: from max_depth down, and up again; else always max_depth. Reads for the farther layer come behind those
  // for the nearer and take only idle time, so the deepest is the best guess.
  void Start(int max_depth, bool adaptive) {
    max_depth_ = max_depth;
    adaptive_ = adaptive && max_depth > 0;
    depth_ = max_depth;
    Restart();
  }
  // For the token that begins now.
  int depth() const { return probing_ ? probe_depth_ : depth_; }

  // A token of decode took so long.
  void OnToken(double token_us) {
    if (!adaptive_) return;
    sum_us_ += token_us;
    if (++n_tokens_ < kWindowTokens) return;
    const double window_us = sum_us_;
    sum_us_ = 0.0;
    n_tokens_ = 0;
    EndWindow(window_us);
  }
  // Something other than decoding happened: the window in progress says nothing.
  void OnInterruption() {
    sum_us_ = 0.0;
    n_tokens_ = 0;
  }

 private:
  void Restart() {
    probing_ = judging_ = false;
    n_wins_ = 0;
    wait_ = left_ = kFirstWait;
    up_next_ = false;  // first: does it pay at all?
    before_us_ = usual_us_ = 0.0;
    OnInterruption();
  }

  void EndWindow(double window_us) {
    if (probing_) {
      probe_us_ = window_us;
      probing_ = false;
      judging_ = true;
      return;
    }
    if (usual_us_ > 0.0 && (window_us > 1.5 * usual_us_ || usual_us_ > 1.5 * window_us)) {
      // Another text, or another disk: what was learned before may not hold.
      const double now = window_us;
      Restart();
      usual_us_ = before_us_ = now;
      return;
    }
    usual_us_ = usual_us_ > 0.0 ? 0.75 * usual_us_ + 0.25 * window_us : window_us;
    if (judging_) {
      judging_ = false;
      Judge(0.5 * (before_us_ + window_us));
    }
    before_us_ = window_us;
    if (--left_ > 0) return;
    if (n_wins_ == 0) {
      up_next_ = depth_ == 0 || (depth_ < max_depth_ && up_next_);
      probe_depth_ = up_next_ ? depth_ + 1 : depth_ - 1;
      up_next_ = !up_next_;
    }
    probing_ = true;
  }

  void Judge(double around_us) {
    const bool deeper = probe_depth_ > depth_;
    const bool won = probe_us_ < (deeper ? kGain : 1.0) * around_us;
    if (!won) {
      n_wins_ = 0;
      wait_ = std::clamp(2 * wait_, kShortestWait, kLongestWait);
      left_ = wait_;
      return;
    }
    left_ = 1;  // and again, to be sure
    if (++n_wins_ < 2) return;
    n_wins_ = 0;
    depth_ = probe_depth_;
    wait_ = left_ = kFirstWait;
    up_next_ = deeper;
    usual_us_ = 0.0;
  }

  int max_depth_ = 0;
  bool adaptive_ = false;
  int depth_ = 0;
  double sum_us_ = 0.0;
  int n_tokens_ = 0;
  bool probing_ = false;
  bool judging_ = false;  // the probe has ended, the window after it has not
  int probe_depth_ = 0;
  int n_wins_ = 0;
  int wait_ = kFirstWait;
  int left_ = kFirstWait;
  bool up_next_ = false;
  double before_us_ = 0.0, probe_us_ = 0.0, usual_us_ = 0.0;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_PREFETCH_CONTROLLER_H_
