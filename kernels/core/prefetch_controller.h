// SPDX-License-Identifier: MIT
// prefetch_controller.h: how many layers ahead to read, found by the clock. A *trial* sets a challenger against the
// depth in use: windows of kWindowTokens tokens at either, in the order a b b a a b b a, so that a drift of the text's
// locality cancels. Each pair of windows gives one logarithm of a quotient of times; the trial ends when their mean is
// certain, or after kMostPairs. The clock sees everything that a depth costs and saves: bytes read for nothing, and
// waiting that idle storage took over; counters of bytes do not tell whether storage would have been idle.
// What tells tokens apart where they wait for storage is how many bytes they need, whatever the depth: what they miss,
// and what is there only because it was foreseen. So logarithms are compared as a straight line through the pairs'
// differences in needed bytes says that they would be at equal needs (analysis of covariance). What a depth displaces
// is needed later, and so not held against it: less than 1 % of the bytes at any budget (docs/experiments.md). The
// first trial is the deepest against none. A depth that stands is left alone for a time that doubles; a token time that
// doubles or halves for kOddWindows windows starts anew. Pure: time and bytes come in from outside. Thread-compatible.
#ifndef EDGEMOE_CORE_PREFETCH_CONTROLLER_H_
#define EDGEMOE_CORE_PREFETCH_CONTROLLER_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace edgemoe {

class PrefetchController {
 public:
  // A disk that lends idle moments to what comes later shifts time across a window's ends, however long it is.
  static constexpr int kWindowTokens = 3;
  static constexpr int kFewestPairs = 2;
  static constexpr int kMostPairs = 20;
  // In standard errors of the mean of n pairs: kDecisive (1 + kFewness / n), as the spread of few is known less well.
  static constexpr double kDecisive = 1.5;
  static constexpr double kFewness = 1.5;
  // The spread of pairs at equal needs, as if so many had shown it: at first, and then that of the trial before.
  static constexpr double kUsualSpread = 0.1;
  static constexpr double kUsualPairs = 2.0;
  static constexpr double kLaterPairs = 4.0;
  static constexpr double kLeastSpread = 0.04;
  // Time grows by none to all of the share by which needs grow; the line begins in the middle, with the weight of a few
  // pairs.
  static constexpr double kUsualSlope = 0.5;
  static constexpr double kSlopeWeight = 0.04;
  // A factor of two, more than any depth makes: another disk does, or somebody else.
  static constexpr double kMostLogRatio = 0.7;
  static constexpr int kShortestWait = 192 / kWindowTokens;  // windows between trials
  static constexpr int kLongestWait = 1536 / kWindowTokens;
  static constexpr int kOddWindows = 4;

  // adaptive: as deep as pays, up to max_depth; else always max_depth.
  void Start(int max_depth, bool adaptive) {
    *this = PrefetchController();
    max_depth_ = depth_ = max_depth;
    adaptive_ = adaptive && max_depth > 0;
    if (adaptive_) BeginTrial(0);
  }
  // For the token that begins now.
  int depth() const { return in_challenge() ? challenger_ : depth_; }

  // A token of decode took so long, and needed so many bytes that would not have been there without predictions.
  void OnToken(double token_us, uint64_t needed_bytes) {
    if (!adaptive_) return;
    window_.us += token_us;
    window_.needed_bytes += static_cast<double>(needed_bytes);
    if (++n_tokens_ < kWindowTokens) return;
    const Window window = window_;
    window_ = Window();
    n_tokens_ = 0;
    if (in_trial_) {
      EndTrialWindow(window);
    } else {
      EndUsualWindow(window.us);
    }
  }
  // A batch begins at this time, with the bytes that all before it needed. is_token: it is one token of decode, whole.
  void OnBatch(double now_us, uint64_t needed_bytes, bool is_token) {
    if (is_token && in_decode_) {
      OnToken(now_us - batch_us_, needed_bytes - batch_needed_bytes_);
    } else {
      OnInterruption();
    }
    batch_us_ = now_us;
    batch_needed_bytes_ = needed_bytes;
    in_decode_ = is_token;
  }
  // Something other than decoding happened: the windows in progress say nothing.
  void OnInterruption() {
    window_ = Window();
    n_tokens_ = 0;
    is_second_ = false;
  }

 private:
  struct Window {
    double us = 0.0, needed_bytes = 0.0;
  };
  // Of the pairs of a trial: x, how much more the challenger's window needed, y, how much longer it took.
  struct Sums {
    double x = 0.0, y = 0.0, xx = 0.0, xy = 0.0, yy = 0.0;
  };

  // a b, then b a.
  bool is_reversed() const { return n_pairs_ % 2 == 1; }
  bool in_challenge() const { return in_trial_ && is_second_ != is_reversed(); }

  void BeginTrial(int challenger) {
    challenger_ = challenger;
    in_trial_ = true;
    is_second_ = false;
    n_pairs_ = 0;
    sums_ = Sums();
  }

  void EndTrialWindow(const Window& window) {
    NoteUsual(window.us);
    if (!is_second_) {
      first_ = window;
      is_second_ = true;
      return;
    }
    const double sign = is_reversed() ? -1.0 : 1.0;
    const double needed = first_.needed_bytes + window.needed_bytes;
    const double x = needed > 0.0 ? sign * 2.0 * (window.needed_bytes - first_.needed_bytes) / needed : 0.0;
    const double log_ratio = first_.us > 0.0 && window.us > 0.0 ? std::log(window.us / first_.us) : 0.0;
    const double y = sign * std::clamp(log_ratio, -kMostLogRatio, kMostLogRatio);
    is_second_ = false;
    ++n_pairs_;
    sums_.x += x;
    sums_.y += y;
    sums_.xx += x * x;
    sums_.xy += x * y;
    sums_.yy += y * y;
    if (n_pairs_ >= kFewestPairs) Judge();
  }

  void Judge() {
    const double n = n_pairs_, mean_x = sums_.x / n, mean_y = sums_.y / n;
    const double xx = sums_.xx - n * mean_x * mean_x, xy = sums_.xy - n * mean_x * mean_y;
    const double slope = std::clamp((xy + kSlopeWeight * kUsualSlope) / (xx + kSlopeWeight), 0.0, 1.0);
    const double log_ratio = mean_y - slope * mean_x;
    const double squares = sums_.yy - n * mean_y * mean_y - 2.0 * slope * xy + slope * slope * xx;
    const double spread =
        std::sqrt((std::max(0.0, squares) + spread_pairs_ * spread_ * spread_) / (n - 1.0 + spread_pairs_));
    const double error = spread * std::sqrt(1.0 / n + mean_x * mean_x / (xx + kSlopeWeight));
    if (std::abs(log_ratio) <= kDecisive * (1.0 + kFewness / n) * error && n_pairs_ < kMostPairs) return;
    spread_ = std::max(kLeastSpread, spread);
    spread_pairs_ = kLaterPairs;
    // Of two that are equally fast, the shallower reads less for nothing.
    EndTrial(challenger_ < depth_ ? log_ratio <= error : log_ratio <= -kDecisive * error);
  }

  void EndTrial(bool won) {
    in_trial_ = false;
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

  void NoteUsual(double window_us) { usual_us_ = usual_us_ > 0.0 ? 0.875 * usual_us_ + 0.125 * window_us : window_us; }

  void EndUsualWindow(double window_us) {
    const bool odd = usual_us_ > 0.0 && (window_us > 2.0 * usual_us_ || usual_us_ > 2.0 * window_us);
    n_odd_ = odd ? n_odd_ + 1 : 0;
    if (!odd) NoteUsual(window_us);
    if (n_odd_ >= kOddWindows) {
      // Another text, or another disk: what was learned before may not hold.
      wait_ = kShortestWait;
      usual_us_ = 0.0;
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
  // When the last batch began.
  double batch_us_ = 0.0;
  uint64_t batch_needed_bytes_ = 0;
  bool in_decode_ = false;  // it was a token
  Window window_;           // in progress
  int n_tokens_ = 0;
  // The trial in progress.
  bool in_trial_ = false;
  bool is_second_ = false;  // of a pair of windows
  int challenger_ = 0;
  Window first_;
  int n_pairs_ = 0;
  Sums sums_;
  double spread_ = kUsualSpread, spread_pairs_ = kUsualPairs;
  // Between trials.
  int n_trials_ = 0;
  int wait_ = kShortestWait;
  int left_ = 0;
  double usual_us_ = 0.0;  // of a window, in trials too
  int n_odd_ = 0;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_PREFETCH_CONTROLLER_H_
