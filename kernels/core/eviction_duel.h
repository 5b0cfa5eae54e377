// SPDX-License-Identifier: MIT
// eviction_duel.h: which of two rules suits the text, found by keeping two directories without contents. The experts of
// a few sampled layers pass through one small cache by recency and one by decayed frequency, each with as many places
// as its layer has slots; the rule whose directory misses less is the one for all layers. Which rule wins depends on
// the text: in replay of five families fitted to published locality frequency gives up to 22 % more tokens/s, where
// routing only drifts recency does (docs/experiments.md). Sampling a few sets to choose a rule for all is set dueling
// (Qureshi et al., ISCA 2007); here the layers take the place of the sets.
// A use costs one comparison per expert of the layer and directory that misses. Thread-compatible.
#ifndef EDGEMOE_CORE_EVICTION_DUEL_H_
#define EDGEMOE_CORE_EVICTION_DUEL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/eviction.h"

namespace edgemoe {

class EvictionDuel {
 public:
  static constexpr int kMaxSamples = 4;
  static constexpr int kWindowTokens = 16;  // between decisions
  static constexpr double kKept = 0.8;      // of the misses of earlier windows, at a decision: about 80 tokens count
  // The other rule must miss this much less: a change evicts what the rule before had kept.
  static constexpr double kMargin = 0.95;
  static constexpr double kFewestMisses = 32.0;  // of the rule in use, to decide upon

  struct Sample {
    int n_experts = 0;
    int n_places = 0;
  };

  // The samples, or the places of the same samples: a directory with fewer drops its coldest.
  void Resize(const std::vector<Sample>& samples) {
    samples_ = samples;
    for (size_t r = 0; r < kRules.size(); ++r) {
      directories_[r].resize(samples.size());
      for (size_t i = 0; i < samples.size(); ++i) {
        Directory& d = directories_[r][i];
        d.keys.resize(static_cast<size_t>(samples[i].n_experts), kOut);
        while (d.n_in > samples[i].n_places) EvictFrom(&d);
      }
    }
  }
  edgemoe_eviction rule() const { return kRules[static_cast<size_t>(in_use_)]; }

  // An expert was touched and is as hot as that; counts: whether a miss of this use is to be counted.
  void Use(int sample, int expert, const Heat& heat, bool counts) {
    for (size_t r = 0; r < kRules.size(); ++r) {
      Directory& d = directories_[r][static_cast<size_t>(sample)];
      double& key = d.keys[static_cast<size_t>(expert)];
      if (key == kOut) {
        if (counts) misses_[r] += 1.0;
        if (d.n_in >= samples_[static_cast<size_t>(sample)].n_places) EvictFrom(&d);
        ++d.n_in;
      }
      key = KeyBy(kRules[r], heat);
    }
  }

  // A token of decode has ended; true: the rule has changed.
  bool EndToken() {
    if (++n_tokens_ < kWindowTokens) return false;
    n_tokens_ = 0;
    const size_t other = static_cast<size_t>(1 - in_use_);
    const double own = misses_[static_cast<size_t>(in_use_)];
    const bool changes = own >= kFewestMisses && misses_[other] < kMargin * own;
    if (changes) in_use_ = 1 - in_use_;
    for (double& m : misses_) m *= kKept;
    return changes;
  }

 private:
  static constexpr std::array<edgemoe_eviction, 2> kRules = {EDGEMOE_EVICT_LRU, EDGEMOE_EVICT_LFU_DECAY};

  static constexpr double kOut = -std::numeric_limits<double>::infinity();  // the key of an expert that has no place

  struct Directory {
    std::vector<double> keys;  // [expert]
    int n_in = 0;
  };
  using Directories = std::vector<Directory>;  // [sample]

  static void EvictFrom(Directory* d) {
    double* coldest = nullptr;
    for (double& key : d->keys) {
      if (key != kOut && (coldest == nullptr || key < *coldest)) coldest = &key;
    }
    if (coldest == nullptr) return;
    *coldest = kOut;
    --d->n_in;
  }

  std::vector<Sample> samples_;
  std::array<Directories, 2> directories_;
  std::array<double, 2> misses_{};
  int in_use_ = 1;  // frequency, which suits the models that were measured
  int n_tokens_ = 0;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_EVICTION_DUEL_H_
