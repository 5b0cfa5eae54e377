// SPDX-License-Identifier: MIT
// corrections.h: what predictions get wrong again and again, learnt while decoding. The next router applied to the
// present state knows nothing of what the layers between will add. Much of that depends on which experts they choose:
// so each expert of the present layer has a row of corrections, one for each expert of the layer foreseen, and the rows
// of the chosen are added to the scores, in units of their standard deviation. After each token the rows of the chosen
// move towards the experts that were missed and away from those that were named in vain: a perceptron. Nothing is
// needed beforehand, and no result depends on it. Corrections are used only while they name more experts rightly than
// the scores alone. On the tiny trained model (tests/data/tiny_moe) recall rises from .67, .78, .80 to .78, .82, .83
// one layer ahead and from .56, .69 to .70, .75 two ahead; mean expert outputs added to the state, the "default
// vectors" of arXiv 2603.19289, give at most .01 there (docs/experiments.md). Thread-safe.
#ifndef EDGEMOE_CORE_CORRECTIONS_H_
#define EDGEMOE_CORE_CORRECTIONS_H_

#include <cstdint>
#include <mutex>
#include <vector>

#include "core/predictor.h"

namespace edgemoe {

// One token's prediction, until its layer has chosen.
struct Guess {
  int layer = Predictor::kToken;  // it was made in
  int distance = 0;
  int target = -1;                 // -1: no guess
  std::vector<int32_t> chosen;     // in `layer`
  std::vector<int32_t> plain;      // by the scores alone, best first
  std::vector<int32_t> corrected;  // with corrections
};

class Corrections {
 public:
  // What stands for a token's choice where its embedding is the state: one of so many rows, by a hash of the embedding.
  static constexpr int kTokenRows = 1024;
  static int32_t TokenRow(const float* embedding, int64_t n_cols);

  // For the targets of a predictor made of the same routers.
  void Start(const edgemoe_router* routers, int n_routers, int max_depth);
  static uint64_t Bytes(const edgemoe_router* routers, int n_routers, int max_depth);

  // scores[n_experts of the target], the router's alone -> corrected by the rows of the experts chosen in `layer`; ids
  // as a layer begins with them, so below 0 are none, and an expert's low-bit copy counts as the expert. Returns
  // whether corrected scores have been the better ones so far.
  bool Apply(int layer, int distance, const int32_t* chosen, int64_t n_chosen, float* scores);
  // The guess's target has chosen the ids with chosen_of_id >= 0: those of its experts, and of their copies if it has
  // any.
  void Learn(const Guess& guess, const std::vector<int32_t>& chosen_of_id);

 private:
  struct Table {
    int n_sources = 0;
    int n_targets = 0;        // 0: no table
    std::vector<float> rows;  // [n_sources + 1][n_targets], the last row for every choice
    double advantage = 0.0;   // experts named rightly with corrections, less those without: a moving mean
  };
  Table* Find(int layer, int distance);

  std::mutex mutex_;
  std::vector<Table> tables_;  // [layer + 1][distance - 1]
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_CORRECTIONS_H_
