// SPDX-License-Identifier: MIT
// eviction_oracle.h: what the rules of eviction mean, from the whole history of a slice. Slow and plain.
#ifndef EDGEMOE_TESTS_EVICTION_ORACLE_H_
#define EDGEMOE_TESTS_EVICTION_ORACLE_H_

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/eviction.h"

namespace edgemoe::test {

struct Use {
  double time;
  int n_uses;
};
using History = std::vector<Use>;

// Decayed count of uses as of `now`.
inline double Frequency(const History& history, double now) {
  double f = 0.0;
  for (const Use& u : history) f += u.n_uses * std::exp2(-(now - u.time) / kDecayHalfLifeTokens);
  return f;
}

// MoE-SpAc's state after all windows of 8 tokens up to the one of `now`; below 0: for so many windows it has been 0.
inline int Utility(const History& history, double now) {
  int u = 0;
  size_t next = 0;
  for (int window = 0; window <= static_cast<int>(now / 8.0); ++window) {
    int count = 0;
    for (; next < history.size() && history[next].time < 8.0 * (window + 1); ++next) count += history[next].n_uses;
    if (count == 0) {
      --u;
      continue;
    }
    u = std::max(u, 0);
    if (count - u >= 5) {
      u = std::min(u + 1, 5);
    } else if (u - count >= 1) {
      --u;
    }
  }
  return u;
}

// What the rule gives up first, as of `now`, is the smallest.
inline std::pair<double, double> Weight(edgemoe_eviction rule, const History& history, double now) {
  const double last = history.back().time;
  if (rule == EDGEMOE_EVICT_LFU_DECAY) return {Frequency(history, now), last};
  if (rule == EDGEMOE_EVICT_UTILITY) return {Utility(history, now), last};
  return {last, last};
}

}  // namespace edgemoe::test
#endif  // EDGEMOE_TESTS_EVICTION_ORACLE_H_
