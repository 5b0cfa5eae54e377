// SPDX-License-Identifier: MIT
// prefetch_controller.h: how many layers ahead to read, found by the clock. A *trial* sets a challenger against the
// depth in use: windows of kWindowTokens tokens at either, in the order a b b a a b b a, so that a drift of the text's
// locality cancels. Each pair of windows gives one logarithm of a quotient of times; the trial ends when their mean is
// kDecisive standard errors from zero, or after kMostPairs. The clock sees everything that a depth costs and saves:
// bytes read for nothing, what they displaced, and waiting that idle storage took over; counters of bytes do not tell
// whether storage would have been idle. The first trial is the deepest against none. A depth that stands is left
// alone for a time that doubles; a token time that doubles or halves for kOddWindows windows starts anew.
// What a losing challenger costs: one that is 30 % slower takes 2 windows, 1.2 tokens' time, of the 8 of a trial and
// the 192 to 1536 that follow: 0.6 % at first, 0.1 % later. Smaller losses take longer to see. In 400 simulated runs
// of 320 tokens each, whose times are lognormal with a spread of 10 or 30 %, a depth that is 5 to 30 % slower left
// 0.976 to 0.993 of the speed without it (medians), one that is 26 % faster gave 1.235 to 1.25 times.
// Pure: time comes in from outside. Thread-compatible.
#ifndef EDGEMOE_CORE_PREFETCH_CONTROLLER_H_
#define EDGEMOE_CORE_PREFETCH_CONTROLLER_H_

#include <algorithm>
#include <cmath>

namespace edgemoe {

class PrefetchController {
 public:
  static constexpr int kWindowTokens = 2;
  // One less to refuse a challenger, once it is known what is usual.
  static constexpr int kFewestPairs = 3;
  static constexpr int kMostPairs = 32;
  static constexpr double kDecisive = 2.5;
  // Of one pair of windows: times that agree by chance to less than this are not believed.
  static constexpr double kLeastSpread = 0.05;
  static constexpr int kShortestWait = 192 / kWindowTokens;  // windows between trials
  static constexpr int kLongestWait = 1536 / kWindowTokens;
  static constexpr int kOddWindows = 6;

  // adaptive: as deep as pays, up to max_depth; else always max_depth.
  void Start(int max_depth, bool adaptive) {
    *this = PrefetchController();
    max_depth_ = depth_ = max_depth;
    adaptive_ = adaptive && max_depth > 0;
    if (adaptive_) BeginTrial(0);
  }
  // For the token that begins now.
  int depth() const { return in_challenge() ? challenger_ : depth_; }

  // A token of decode took so long.
  void OnToken(double token_us) {
    if (!adaptive_) return;
    sum_us_ += token_us;
    if (++n_tokens_ < kWindowTokens) return;
    const double window_us = sum_us_;
    sum_us_ = 0.0;
    n_tokens_ = 0;
    if (in_trial_) {
      EndTrialWindow(window_us);
    } else {
      EndUsualWindow(window_us);
    }
  }
  // Something other than decoding happened: the windows in progress say nothing.
  void OnInterruption() {
    sum_us_ = 0.0;
    n_tokens_ = 0;
    is_second_ = false;
  }

 private:
  // a b, then b a.
  bool in_challenge() const { return in_trial_ && is_second_ != (n_pairs_ % 2 == 1); }

  void BeginTrial(int challenger) {
    challenger_ = challenger;
    in_trial_ = true;
    is_second_ = false;
    n_pairs_ = 0;
    mean_ = squares_ = 0.0;
  }

  void EndTrialWindow(double window_us) {
    if (!is_second_) {
      first_us_ = window_us;
      is_second_ = true;
      return;
    }
    const double log_ratio = std::log(window_us / first_us_) * (n_pairs_ % 2 == 1 ? -1.0 : 1.0);
    is_second_ = false;
    ++n_pairs_;
    const double delta = log_ratio - mean_;  // Welford's recurrence
    mean_ += delta / n_pairs_;
    squares_ += delta * (log_ratio - mean_);
    if (n_pairs_ < 2) return;
    const double spread = std::max(kLeastSpread, std::sqrt(squares_ / (n_pairs_ - 1)));
    const double margin = kDecisive * spread / std::sqrt(static_cast<double>(n_pairs_));
    const bool stands = mean_ > margin && n_pairs_ >= (n_trials_ == 0 ? kFewestPairs : kFewestPairs - 1);
    const bool falls = mean_ < -margin && n_pairs_ >= kFewestPairs;
    if (!stands && !falls && n_pairs_ < kMostPairs) return;
    // Of two that are equally fast, the shallower reads less for nothing.
    const double error = margin / kDecisive;
    EndTrial(challenger_ < depth_ ? mean_ <= error : mean_ <= -error);
  }

  void EndTrial(bool won) {
    in_trial_ = false;
    usual_us_ = 0.0;
    n_odd_ = 0;
    if (won) {
      depth_ = challenger_;
      wait_ = kShortestWait;
    } else {
      wait_ = n_trials_ == 0 ? kShortestWait : std::min(2 * wait_, kLongestWait);
    }
    ++n_trials_;
    left_ = wait_;
  }

  void EndUsualWindow(double window_us) {
    const bool odd = usual_us_ > 0.0 && (window_us > 2.0 * usual_us_ || usual_us_ > 2.0 * window_us);
    n_odd_ = odd ? n_odd_ + 1 : 0;
    if (!odd) usual_us_ = usual_us_ > 0.0 ? 0.875 * usual_us_ + 0.125 * window_us : window_us;
    if (n_odd_ >= kOddWindows) {
      // Another text, or another disk: what was learned before may not hold.
      wait_ = kShortestWait;
      BeginTrial(depth_ > 0 ? 0 : max_depth_);
      return;
    }
    if (--left_ > 0) return;
    // Each of the others in turn; one that has just been left is asked again last.
    int next = (challenger_ + 1) % (max_depth_ + 1);
    if (next == depth_) next = (next + 1) % (max_depth_ + 1);
    BeginTrial(next);
  }

  int max_depth_ = 0;
  bool adaptive_ = false;
  int depth_ = 0;
  double sum_us_ = 0.0;
  int n_tokens_ = 0;
  // The trial in progress.
  bool in_trial_ = false;
  bool is_second_ = false;  // of a pair of windows
  int challenger_ = 0;
  double first_us_ = 0.0;
  int n_pairs_ = 0;
  double mean_ = 0.0, squares_ = 0.0;  // of the pairs' logarithms of challenger / depth in use
  // Between trials.
  int n_trials_ = 0;
  int wait_ = kShortestWait;
  int left_ = 0;
  double usual_us_ = 0.0;
  int n_odd_ = 0;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_PREFETCH_CONTROLLER_H_
