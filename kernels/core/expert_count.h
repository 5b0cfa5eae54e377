// SPDX-License-Identifier: MIT
// expert_count.h: how many experts a token gets, at most as many as the model has it use: a number for each layer, or
// as many as hold a share of the mass, or as many as the router gives a positive logit. Who is left out has the least
// mixing weight. Arithmetic only; allocates when it is opened.
#ifndef EDGEMOE_CORE_EXPERT_COUNT_H_
#define EDGEMOE_CORE_EXPERT_COUNT_H_

#include <cstdint>
#include <vector>

#include "core/selection.h"

namespace edgemoe {

class ExpertCount {
 public:
  static Status Check(const edgemoe_count_options& options);
  explicit ExpertCount(const edgemoe_count_options& options);

  // As edgemoe_count_select.
  Status Select(const edgemoe_selection& selection, int32_t* n_used);
  // The same of scores that are predicted: not counted.
  Status Foresee(const edgemoe_selection& selection, int32_t* n_used);
  bool NeedsLogits() const { return rule_ == EDGEMOE_COUNT_MAP; }
  const edgemoe_count_stats& stats() const { return stats_; }
  void ResetStats() { stats_ = {}; }

 private:
  int Count(const edgemoe_selection& selection) const;

  const edgemoe_count_rule rule_;
  const int n_experts_;
  const double top_p_;
  const int n_min_, n_max_;
  std::vector<int32_t> n_of_layer_;
  std::vector<double> masses_;  // [place in the order], of the selection in progress
  edgemoe_count_stats stats_ = {};
};

}  // namespace edgemoe

struct edgemoe_count {
  edgemoe::ExpertCount count;
};
#endif  // EDGEMOE_CORE_EXPERT_COUNT_H_
