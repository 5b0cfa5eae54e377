// SPDX-License-Identifier: MIT
// reuse_bias.h: which experts a token gets when those that need not be read have an advantage. Only the choice is
// biased: the mixing weights stay the model's own, and so does the order among the chosen. Three rules, the first two
// of "Mixture of Cache-Conditional Experts" (arXiv 2412.00099), which has the third as well; each has one strength in
// 0..1 and is exact at 0. A guard bounds what may be lost. Arithmetic only: no cache, no lock; allocates when it is
// opened.
#ifndef EDGEMOE_CORE_REUSE_BIAS_H_
#define EDGEMOE_CORE_REUSE_BIAS_H_

#include <cstdint>
#include <vector>

#include "core/selection.h"

namespace edgemoe {

class ReuseBias {
 public:
  static Status Check(const edgemoe_reuse_options& options);
  explicit ReuseBias(const edgemoe_reuse_options& options);

  // As edgemoe_reuse_select.
  Status Select(const edgemoe_selection& selection);
  // What Select would do if these scores, which are predicted, were the true ones: neither guard nor counters notice.
  // Their range stands for the mean of the true ones', for they may be in another unit (a logarithm for a probability).
  Status Foresee(const edgemoe_selection& selection);
  edgemoe_reuse_stats Stats() const;
  void ResetStats() { stats_ = {}; }

 private:
  // What is left to spend of a quantity: each selection earns `bound`, and what is not spent is kept, up to
  // kSavedSelections of it. So the first n selections cost n * bound at most, any n others kSavedSelections more.
  struct Account {
    double bound = 0.0;
    double balance = 0.0;
  };
  struct Layer {
    double strength = 0.0;  // now; the guard lowers it
    double mean_range = 0.0;
    int64_t n_ranges = 0;
    Account mass_moved, kl;
  };
  struct Loss : RoutingLoss {
    int n_changed = 0;
  };

  Status CheckOrder(const edgemoe_selection& selection);
  Loss Apply(const edgemoe_selection& selection, Layer* layer);
  void ObserveRange(const edgemoe_selection& selection, Layer* layer) const;
  void Choose(const edgemoe_selection& selection, const Layer& layer, double strength);
  void ChooseByKey(const edgemoe_selection& selection, double strength, double mean_range);
  void ChooseAmong(const edgemoe_selection& selection, int n_candidates);
  int Candidates(const edgemoe_selection& selection, double strength) const;
  Loss Lost(const edgemoe_selection& selection) const;
  void WriteOrder(const edgemoe_selection& selection);

  const edgemoe_reuse_options options_;
  std::vector<Layer> layers_;
  edgemoe_reuse_stats stats_ = {};
  // Of the selection in progress.
  int n_eligible_ = 0;           // experts at the head of the order with a finite score
  int n_kept_ = 0;               // top-J
  std::vector<double> masses_;   // [place in the order], 0 or more
  std::vector<uint8_t> chosen_;  // [place in the order]
  std::vector<int32_t> rest_;    // experts not chosen
};

}  // namespace edgemoe

struct edgemoe_reuse {
  edgemoe::ReuseBias bias;
};
#endif  // EDGEMOE_CORE_REUSE_BIAS_H_
