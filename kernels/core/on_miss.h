// SPDX-License-Identifier: MIT
// on_miss.h: what becomes of a token's experts that would have to be read: they are waited for, replaced by their
// low-bit copies, or left out. As in HOBBIT (arXiv 2411.01433), what counts is s, the mass of the experts with more
// mixing weight as a share of the mass of all chosen: what comes behind most of it can change little. Arithmetic only;
// allocates when it is opened.
#ifndef EDGEMOE_CORE_ON_MISS_H_
#define EDGEMOE_CORE_ON_MISS_H_

#include <cstdint>
#include <vector>

#include "core/selection.h"

namespace edgemoe {

class OnMiss {
 public:
  static Status Check(const edgemoe_miss_options& options);
  explicit OnMiss(const edgemoe_miss_options& options);

  // As edgemoe_miss_select.
  Status Select(const edgemoe_selection& selection, int32_t* ids) { return Apply(selection, ids, &stats_); }
  // The same of scores that are predicted: not counted.
  Status Foresee(const edgemoe_selection& selection, int32_t* ids) {
    edgemoe_miss_stats nobodys = {};
    return Apply(selection, ids, &nobodys);
  }
  const edgemoe_miss_stats& stats() const { return stats_; }
  void ResetStats() { stats_ = {}; }

 private:
  Status Apply(const edgemoe_selection& selection, int32_t* ids, edgemoe_miss_stats* stats);

  const edgemoe_miss_options options_;
  edgemoe_miss_stats stats_ = {};
  // Of the selection in progress.
  std::vector<double> masses_;   // [place in the order]
  std::vector<int32_t> places_;  // by falling mass
};

}  // namespace edgemoe

struct edgemoe_miss {
  edgemoe::OnMiss rule;
};
#endif  // EDGEMOE_CORE_ON_MISS_H_
