// SPDX-License-Identifier: MIT
// selection.h: what those who change a selection of experts have in common: the mixing weights in the order of the
// selection, and what is lost when some of them are dropped or replaced. docs/routing.md defines both losses.
#ifndef EDGEMOE_CORE_SELECTION_H_
#define EDGEMOE_CORE_SELECTION_H_

#include "core/status.h"
#include "edgemoe/selection.h"

namespace edgemoe {

struct RoutingLoss {
  double mass_moved = 0.0;  // the share of the exact choice's mixing weight that was dropped
  double kl = 0.0;          // nats
};

// Options of whoever includes another version of the header are refused.
Status CheckStructSize(const char* name, uint32_t found, size_t expected);
// The shape of a selection, against the model's.
Status CheckShape(const edgemoe_selection& selection, int n_layers, int n_experts);

// masses[i]: of the expert at place i of the order, 0 or more, for the first n places; comparable with each other only.
void ReadMasses(const edgemoe_selection& selection, int n, double* masses);

// exact: the mass of the exact choice; dropped: of its experts that are not used; taken: of those used instead.
// Where the masses are no numbers, or all zero, the experts count: n_dropped of n_used.
RoutingLoss LossOf(double exact, double dropped, double taken, int n_dropped, int n_used);

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_SELECTION_H_
