// SPDX-License-Identifier: MIT
// The rules against oracles that keep the whole history and weigh it anew at every eviction.
#include "core/eviction.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "core/eviction_duel.h"
#include "tests/eviction_oracle.h"

namespace edgemoe::test {
namespace {

// A pass that begins with the token of that time, when every pass before was one token.
PassClock At(double time) { return {time, time}; }

// Guards against: an order that drifts from "least recently used" once slices were touched at different times.
TEST(EvictionTest, LruKeysOrderByLastUse) {
  std::mt19937 rng(1);
  std::vector<Heat> heats(20);
  std::vector<double> last(20, -1.0);
  for (int step = 0; step < 2000; ++step) {
    const size_t i = rng() % heats.size();
    Touch(EDGEMOE_EVICT_LRU, At(step), step, 1 + static_cast<int>(rng() % 3), &heats[i]);
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
  std::vector<History> histories(20);
  double now = 0.0;
  for (int step = 0; step < 500; ++step) {
    now += 0.25 * (rng() % 8);
    const size_t i = rng() % 3 == 0 ? rng() % 20 : rng() % 5;
    const int n_uses = 1 + static_cast<int>(rng() % 4);
    Touch(EDGEMOE_EVICT_LFU_DECAY, At(now), now, n_uses, &heats[i]);
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

// Guards against: a prompt that counts more than its tokens would have counted one by one, so that its experts stay
// long after it.
TEST(EvictionTest, LfuDecayCountsAPromptAsItsTokensOneByOne) {
  for (int n_tokens : {1, 2, 16, 256}) {
    for (int every : {1, 2, 5, 16}) {
      const double begin = 1000.0;
      Heat alone, together;
      int n_uses = 0;
      double last = begin;
      for (int t = every - 1; t < n_tokens; t += every) {
        last = begin + t + 0.25;
        Touch(EDGEMOE_EVICT_LFU_DECAY, At(begin + t), last, 1, &alone);
        ++n_uses;
      }
      if (n_uses == 0) continue;
      Touch(EDGEMOE_EVICT_LFU_DECAY, At(begin), last, n_uses, &together);
      EXPECT_NEAR(together.frequency / alone.frequency, 1.0, 0.1) << n_uses << " uses in " << n_tokens << " tokens";
      EXPECT_NEAR(together.key, alone.key, 0.15);
    }
  }
}

// Guards against: decay by the wrong half-life.
TEST(EvictionTest, LfuDecayHalvesACountInEightTokens) {
  Heat once, twice;
  Touch(EDGEMOE_EVICT_LFU_DECAY, At(0.0), 0.0, 2, &twice);
  Touch(EDGEMOE_EVICT_LFU_DECAY, At(7.0), 7.9, 1, &once);
  EXPECT_LT(once.key, twice.key);
  Touch(EDGEMOE_EVICT_LFU_DECAY, At(8.0), 8.1, 1, &(once = Heat()));
  EXPECT_GT(once.key, twice.key);
}

// Guards against: generations counted in tokens, which would make a prompt's age that of its length.
TEST(EvictionTest, LeastStaleKeysCountPassesAndNotTokens) {
  std::mt19937 rng(3);
  std::vector<Heat> heats(20);
  std::vector<int> touched_in(heats.size(), 0);
  double time = 1.0;
  for (int pass = 1; pass <= 200; ++pass) {
    const int n_tokens = 1 + static_cast<int>(rng() % 9);
    const PassClock clock = {time, static_cast<double>(pass)};
    for (size_t i = 0; i < heats.size(); ++i) {
      if (rng() % 3 != 0) continue;
      const double last = time + static_cast<double>(rng() % static_cast<unsigned>(n_tokens));
      Touch(EDGEMOE_EVICT_LEAST_STALE, clock, last, 1, &heats[i]);
      touched_in[i] = pass;
    }
    for (size_t i = 0; i < heats.size(); ++i) {
      if (touched_in[i] == 0) continue;
      ASSERT_EQ(ClockKey(EDGEMOE_EVICT_LEAST_STALE, clock) - heats[i].key, pass - touched_in[i]);
    }
    time += n_tokens;
  }
}

// Guards against: a decode in which the two differ, which would make one of them wrong.
TEST(EvictionTest, LeastStaleIsLeastRecentlyUsedWhileEveryPassIsOneToken) {
  Heat lru, stale;
  for (int token = 1; token < 100; ++token) {
    Touch(EDGEMOE_EVICT_LRU, At(token), token, 1, &lru);
    Touch(EDGEMOE_EVICT_LEAST_STALE, At(token), token, 1, &stale);
    for (int later = token; later < token + 5; ++later) {
      ASSERT_EQ(ClockKey(EDGEMOE_EVICT_LRU, At(later)) - lru.key,
                ClockKey(EDGEMOE_EVICT_LEAST_STALE, At(later)) - stale.key);
    }
  }
}

// Guards against: a state that rises or falls at other counts than MoE-SpAc's, one that does not fall while the slice
// is not touched, or ties that keep what was used longest ago.
TEST(EvictionTest, UtilityKeysOrderByStateThenByLastUse) {
  std::mt19937 rng(5);
  std::vector<Heat> heats(16);
  std::vector<History> histories(16);
  int n_high = 0;
  double now = 0.0;
  for (int step = 0; step < 4000; ++step) {
    now += (rng() % 8) / 16.0;
    // A few slices are used so often that they rise to the top, for a while.
    const size_t i = (rng() % 4 != 0 ? 0 : rng() % 16) + (step / 700) % 3;
    if (i >= 16) continue;
    const int n_uses = 1 + static_cast<int>(rng() % 3);
    Touch(EDGEMOE_EVICT_UTILITY, At(std::floor(now)), now, n_uses, &heats[i]);
    histories[i].push_back({now, n_uses});
    const double later = now + rng() % 70;
    for (size_t a = 0; a < 16; ++a) {
      if (histories[a].empty()) continue;
      n_high += Utility(histories[a], now) == 5 ? 1 : 0;
      for (size_t b = 0; b < 16; ++b) {
        if (histories[b].empty()) continue;
        ASSERT_EQ(heats[a].key < heats[b].key, Weight(EDGEMOE_EVICT_UTILITY, histories[a], later) <
                                                   Weight(EDGEMOE_EVICT_UTILITY, histories[b], later))
            << "step " << step << ", slices " << a << " and " << b;
      }
    }
  }
  EXPECT_GT(n_high, 100);
}

// Guards against: MoE-SpAc's constants changed by accident.
TEST(EvictionTest, UtilityRisesByFiveMoreUsesThanItselfAndFallsAtOneFewer) {
  EXPECT_EQ(NextUtility(0, 4), 0);
  EXPECT_EQ(NextUtility(0, 5), 1);
  EXPECT_EQ(NextUtility(3, 7), 3);
  EXPECT_EQ(NextUtility(3, 8), 4);
  EXPECT_EQ(NextUtility(5, 10), 5);
  EXPECT_EQ(NextUtility(3, 3), 3);
  EXPECT_EQ(NextUtility(3, 2), 2);
  EXPECT_EQ(NextUtility(0, 0), 0);
}

// Guards against: very long runs in which keys overflow or lose the order of neighbouring tokens.
TEST(EvictionTest, OrderOfTokensSurvivesABillionOfThem) {
  for (edgemoe_eviction rule :
       {EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY, EDGEMOE_EVICT_LEAST_STALE, EDGEMOE_EVICT_UTILITY}) {
    Heat a, b, c;
    const double t = 1e9;
    Touch(rule, At(t), t, 1, &a);
    Touch(rule, At(t + 1.0), t + 1.0, 1, &b);
    Touch(rule, At(t + 2.0), t + 2.0, 1, &c);
    EXPECT_LT(a.key, b.key);
    EXPECT_TRUE(std::isfinite(a.key));
    // What was used a token ago, by clocks a token apart.
    EXPECT_NEAR(a.key - ClockKey(rule, At(t + 1.0)), b.key - ClockKey(rule, At(t + 2.0)), 1e-6);
    EXPECT_LT(a.key - ClockKey(rule, At(t + 1.0)), c.key - ClockKey(rule, At(t + 2.0)) - 1e-3);
  }
}

// Guards against: a duel of rules that begins again, and never decides, because a few slots are given up now and then.
TEST(EvictionDuelTest, FewerPlacesAreNoNewBeginning) {
  EvictionDuel duel;
  duel.Resize({{8, 3}});
  ASSERT_EQ(duel.rule(), EDGEMOE_EVICT_LFU_DECAY);
  const auto heat = [](double frequency, double time) {
    Heat h;
    h.frequency = frequency;
    h.time = time;
    return h;
  };
  for (int expert : {0, 1, 4}) duel.Use(0, expert, heat(1e9, 1.0), true);
  // By frequency the three that were popular leave no place for the two that are in use now.
  for (int token = 1; token <= EvictionDuel::kWindowTokens; ++token) {
    for (int expert : {2, 3}) duel.Use(0, expert, heat(1.0, 1.0 + token), true);
    if (token == EvictionDuel::kWindowTokens / 2) duel.Resize({{8, 2}});
    EXPECT_EQ(duel.EndToken(), token == EvictionDuel::kWindowTokens) << token;
  }
  EXPECT_EQ(duel.rule(), EDGEMOE_EVICT_LRU);
}

}  // namespace
}  // namespace edgemoe::test
