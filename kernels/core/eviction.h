// SPDX-License-Identifier: MIT
// eviction.h: which resident slice to give up. A rule is one number per slice, its key, set when the slice is
// touched; the smallest key goes first. Both rules keep their order while time passes, so keys never need
// refreshing: least recently used is the time of the last touch; decayed frequency f * 2^(-age/H) orders like
// log2(f) + t/H. Time is counted in tokens plus a fraction for the layer, so that a prompt evaluated layer by
// layer leaves the same order behind as its tokens would have one by one. Pure functions; thread-compatible.
#ifndef EDGEMOE_CORE_EVICTION_H_
#define EDGEMOE_CORE_EVICTION_H_

#include <cmath>
#include <cstdint>

#include "edgemoe/edgemoe.h"

namespace edgemoe {

// Tokens in which a count halves: Qwen3-30B reuses 80 % of its experts within 8 tokens (a peer's decode traces,
// kekzl/imp PR#1359); twice that keeps an expert through one miss of its rhythm.
inline constexpr double kDecayHalfLifeTokens = 16.0;

struct Heat {
  double frequency = 0.0;  // decayed count of uses, as of `time`
  double time = 0.0;
  double key = 0.0;
};

// `n_uses` tokens used the slice, the last one at `time`.
inline void Touch(edgemoe_eviction rule, double time, int n_uses, Heat* heat) {
  if (rule == EDGEMOE_EVICT_LRU) {
    heat->key = time;
  } else {
    const double age = time > heat->time ? time - heat->time : 0.0;
    heat->frequency = heat->frequency * std::exp2(-age / kDecayHalfLifeTokens) + n_uses;
    heat->key = std::log2(heat->frequency) + time / kDecayHalfLifeTokens;
  }
  heat->time = time;
}

// A slice that an earlier run needed and this one has not used yet: colder than all that were touched, whose times and
// keys are above zero, and the colder the higher its rank (from 0).
inline void Remember(int64_t rank, Heat* heat) {
  heat->frequency = 0.0;
  heat->time = heat->key = -static_cast<double>(rank + 1);
}

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_EVICTION_H_
