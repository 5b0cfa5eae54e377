// SPDX-License-Identifier: MIT
// The rules against oracles that keep the whole history and weigh it anew at every eviction.
#include "core/eviction.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace edgemoe::test {
namespace {

struct Use {
  double time;
  int n_uses;
};

// Decayed count of uses as of `now`.
double Frequency(const std::vector<Use>& history, double now) {
  double f = 0.0;
  for (const Use& u : history) f += u.n_uses * std::exp2(-(now - u.time) / kDecayHalfLifeTokens);
  return f;
}

// Guards against: an order that drifts from "least recently used" once slices were touched at different times.
TEST(EvictionTest, LruKeysOrderByLastUse) {
  std::mt19937 rng(1);
  std::vector<Heat> heats(20);
  std::vector<double> last(20, -1.0);
  for (int step = 0; step < 2000; ++step) {
    const size_t i = rng() % heats.size();
    Touch(EDGEMOE_EVICT_LRU, step, 1 + static_cast<int>(rng() % 3), &heats[i]);
    last[i] = step;
    for (size_t k = 0; k < heats.size(); ++k) {
      if (last[k] < 0 || k == i) continue;
      EXPECT_LT(heats[k].key, heats[i].key);
      EXPECT_EQ(heats[k].key < heats[(k + 7) % 20].key, last[k] < std::max(0.0, last[(k + 7) % 20]));
    }
  }
}

// Guards against: keys that need refreshing as time passes, so that a once popular slice is never evicted.
TEST(EvictionTest, LfuDecayKeysOrderByDecayedFrequencyAtAnyLaterTime) {
  std::mt19937 rng(2);
  std::vector<Heat> heats(20);
  std::vector<std::vector<Use>> histories(20);
  double now = 0.0;
  for (int step = 0; step < 500; ++step) {
    now += 0.25 * (rng() % 8);
    const size_t i = rng() % 3 == 0 ? rng() % 20 : rng() % 5;
    const int n_uses = 1 + static_cast<int>(rng() % 4);
    Touch(EDGEMOE_EVICT_LFU_DECAY, now, n_uses, &heats[i]);
    histories[i].push_back({now, n_uses});
    const double later = now + rng() % 40;
    for (size_t a = 0; a < 20; ++a) {
      for (size_t b = 0; b < a; ++b) {
        if (histories[a].empty() || histories[b].empty()) continue;
        const double fa = Frequency(histories[a], later), fb = Frequency(histories[b], later);
        if (std::abs(fa - fb) < 1e-9 * fa) continue;
        ASSERT_EQ(heats[a].key < heats[b].key, fa < fb) << "step " << step;
      }
    }
  }
}

// Guards against: decay by the wrong half-life.
TEST(EvictionTest, LfuDecayHalvesACountInSixteenTokens) {
  Heat once, twice;
  Touch(EDGEMOE_EVICT_LFU_DECAY, 0.0, 2, &twice);
  Touch(EDGEMOE_EVICT_LFU_DECAY, 15.9, 1, &once);
  EXPECT_LT(once.key, twice.key);
  Touch(EDGEMOE_EVICT_LFU_DECAY, 16.1, 1, &(once = Heat()));
  EXPECT_GT(once.key, twice.key);
}

// Guards against: very long runs in which keys overflow or lose the order of neighbouring layers.
TEST(EvictionTest, OrderOfLayersSurvivesABillionTokens) {
  for (edgemoe_eviction rule : {EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY}) {
    Heat a, b;
    const double t = 1e9;
    Touch(rule, t + 1.0 / 65536, 1, &a);
    Touch(rule, t + 2.0 / 65536, 1, &b);
    EXPECT_LT(a.key, b.key);
    EXPECT_TRUE(std::isfinite(a.key));
  }
}

}  // namespace
}  // namespace edgemoe::test
