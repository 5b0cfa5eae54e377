// SPDX-License-Identifier: MIT
// eviction.h: which resident slice to give up. A rule is one number per slice, its key, set when the slice is
// touched; of one layer's slices the smallest key goes first. All rules keep their order while time passes, so keys
// never need refreshing. Slices of layers that stand at different tokens are compared by key less ClockKey; see
// eviction_order.h. Time is counted in tokens, so that a prompt evaluated layer by layer leaves the same order behind
// as its tokens would have one by one.
//  - LRU: the time of the last touch.
//  - LFU with decay: a count f that halves every H tokens, f * 2^(-age/H), orders like log2(f) + t/H. Uses by the
//    tokens of one batch count as if evenly spread over it; at full weight, what a prompt used would outlive it by far.
//  - Least-stale (SpecMD, arXiv 2602.03921), in the form of two generations, as two ports of it describe it; the
//    paper's own text could not be had. A slice that the pass in progress has not touched is stale and goes before all
//    that it has. A pass is a batch, and as ages are those of the slice's own layer, a layer that is still to come has
//    touched what it touched in the pass before; within a generation the ports' order, first in first out, would give
//    up just that first. While a pass is one token that is the order of LRU; it differs after prompts and drafts.
//  - Utility (MoE-SpAc, arXiv 2603.09983, as in its ggml-backend.cpp): u = 0..5 per slice; for the count c of its uses
//    in a window of tokens, u rises by 1 if c - u >= 5 and falls by 1 if c - u <= -1. Theirs breaks ties by number;
//    ours gives up what was used longest ago. An unused slice falls by 1 per window, so the window in which it reaches
//    0 orders all slices at any later time; counts of the window in progress count at once.
// Pure functions; thread-compatible.
#ifndef EDGEMOE_CORE_EVICTION_H_
#define EDGEMOE_CORE_EVICTION_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "edgemoe/edgemoe.h"

namespace edgemoe {

// Tokens in which a count halves. In replay of five fitted families (docs/experiments.md) 8, 16 and 32 hit alike within
// 3 points at a quarter of the experts; where routing only drifts, 8 hits 66 %, 16 58 % and 32 49 %.
inline constexpr double kDecayHalfLifeTokens = 8.0;

// Decayed count of `n_uses` uses, of which the last is now and the others are spread over the `n_tokens` before it.
inline double DecayedUses(int n_uses, double n_tokens) {
  const double kept = std::exp2(-n_tokens / n_uses / kDecayHalfLifeTokens);
  return kept < 1.0 ? (1.0 - std::pow(kept, n_uses)) / (1.0 - kept) : n_uses;
}

// MoE-SpAc's constants; its window is what a draft of 8 tokens asks for.
inline constexpr int kUtilityWindowTokens = 8;
inline constexpr int kMaxUtility = 5;
inline constexpr int kUtilityRise = 5;
// Divides ages, of up to kMaxUtility + 1 windows; a power of two, so that equal ages give equal keys.
inline constexpr int kUtilityAgeScale = 8;

// Where a pass through the layers, or a layer, stands: at a token and in a pass.
struct PassClock {
  double time = 0.0;
  double number = 0.0;
};

struct Heat {
  double frequency = 0.0;  // decayed count of uses, as of `time`; with utility: uses in the window of `time`
  double time = 0.0;
  double key = 0.0;
  int32_t utility = 0;  // at the beginning of the window of `time`
};

// A utility after a window in which the slice was used `count` times.
inline int32_t NextUtility(int32_t utility, double count) {
  if (count - utility >= kUtilityRise) return std::min(utility + 1, kMaxUtility);
  return count - utility <= -1 ? utility - 1 : utility;
}

// The logarithm in steps of 2^-30, so that equal counts of equal age compare as equal whatever the time: for 30 million
// tokens the sum is exact.
inline double FrequencyKey(const Heat& heat) {
  return std::round(std::log2(heat.frequency) * 0x1p30) * 0x1p-30 + heat.time / kDecayHalfLifeTokens;
}

inline void TouchUtility(double time, int n_uses, Heat* heat) {
  const double window = std::floor(time / kUtilityWindowTokens);
  const double n_windows = window - std::floor(heat->time / kUtilityWindowTokens);
  if (n_windows >= 1) {
    heat->utility = NextUtility(heat->utility, heat->frequency);
    heat->utility -= static_cast<int32_t>(std::min<double>(heat->utility, n_windows - 1));
    heat->frequency = 0.0;
  }
  heat->frequency += n_uses;
  const double zero_window = window + NextUtility(heat->utility, heat->frequency);
  // Slices that reach 0 in one window were used in the kMaxUtility + 1 windows up to it: their order within 1.
  const double age_windows = zero_window - time / kUtilityWindowTokens;
  heat->key = zero_window + 1.0 - (age_windows + 1.0) / kUtilityAgeScale;
}

// `n_uses` tokens used the slice, the last one at `time`, in a pass whose first token has the time `pass.time`.
inline void Touch(edgemoe_eviction rule, const PassClock& pass, double time, int n_uses, Heat* heat) {
  switch (rule) {
    case EDGEMOE_EVICT_LRU:
      heat->key = time;
      break;
    case EDGEMOE_EVICT_AUTO:  // its key follows by KeyBy
    case EDGEMOE_EVICT_LFU_DECAY: {
      const double age = time > heat->time ? time - heat->time : 0.0;
      heat->frequency =
          heat->frequency * std::exp2(-age / kDecayHalfLifeTokens) + DecayedUses(n_uses, std::floor(time - pass.time));
      heat->time = time;
      if (rule == EDGEMOE_EVICT_LFU_DECAY) heat->key = FrequencyKey(*heat);
      break;
    }
    case EDGEMOE_EVICT_LEAST_STALE:
      heat->key = pass.number;
      break;
    case EDGEMOE_EVICT_UTILITY:
      TouchUtility(time, n_uses, heat);
      break;
  }
  heat->time = time;
}

// The key by LRU or LFU_DECAY of what AUTO touches.
inline double KeyBy(edgemoe_eviction rule, const Heat& heat) {
  const bool was_touched = heat.time > 0.0 && heat.frequency > 0.0;
  return rule == EDGEMOE_EVICT_LFU_DECAY && was_touched ? FrequencyKey(heat) : heat.time;
}

// What a clock that stands at the last token `now.time`, of pass `now.number`, adds to the keys of what is touched
// then: key - ClockKey is the same for slices of the same age, whatever their clocks.
inline double ClockKey(edgemoe_eviction rule, const PassClock& now) {
  switch (rule) {
    case EDGEMOE_EVICT_LFU_DECAY:
      return now.time / kDecayHalfLifeTokens;
    case EDGEMOE_EVICT_LEAST_STALE:
      return now.number;
    case EDGEMOE_EVICT_UTILITY: {
      // Whole windows off the window of 0, and the rest off the age, which TouchUtility divides by as much.
      const double window = std::floor(now.time / kUtilityWindowTokens);
      return window + (now.time / kUtilityWindowTokens - window) / kUtilityAgeScale;
    }
    case EDGEMOE_EVICT_LRU:
    case EDGEMOE_EVICT_AUTO:  // has the clock of the rule in use
      break;
  }
  return now.time;
}

// A slice that an earlier run needed and this one has not used yet: colder than all that were touched, whose times and
// keys are above zero, by more than any two clocks differ, and the colder the higher its rank (from 0).
inline void Remember(int64_t rank, Heat* heat) {
  heat->frequency = 0.0;
  heat->time = heat->key = -1e12 - static_cast<double>(rank);
}

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_EVICTION_H_
