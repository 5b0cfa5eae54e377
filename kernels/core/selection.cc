// SPDX-License-Identifier: MIT
#include "core/selection.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace edgemoe {

Status CheckStructSize(const char* name, uint32_t found, size_t expected) {
  if (found == expected) return Status();
  return Status(EDGEMOE_INVALID_ARGUMENT, Format("%s has %u bytes, expected %zu; rebuild", name, found, expected));
}

Status CheckShape(const edgemoe_selection& s, int n_layers, int n_experts) {
  if (s.layer >= 0 && s.layer < n_layers && s.n_experts >= 1 && s.n_experts <= n_experts && s.n_used >= 1 &&
      s.n_used <= s.n_experts) {
    return Status();
  }
  return Status(EDGEMOE_INVALID_ARGUMENT,
                Format("selection of %d of %d experts in layer %d, expected up to %d experts and layers below %d",
                       s.n_used, s.n_experts, s.layer, n_experts, n_layers));
}

void ReadMasses(const edgemoe_selection& s, int n, double* masses) {
  double highest = -INFINITY;
  if (s.are_logits != 0) {
    for (int i = 0; i < n; ++i) highest = std::max(highest, static_cast<double>(s.masses[s.order[i]]));
  }
  for (int i = 0; i < n; ++i) {
    const double mass = static_cast<double>(s.masses[s.order[i]]);
    masses[i] = s.are_logits != 0 ? std::exp(mass - highest) : std::max(mass, 0.0);
  }
}

RoutingLoss LossOf(double exact, double dropped, double taken, int n_dropped, int n_used) {
  RoutingLoss loss;
  if (n_dropped == 0) return loss;
  if (!(exact > 0.0) || !std::isfinite(exact + taken)) {
    loss.mass_moved = static_cast<double>(n_dropped) / static_cast<double>(n_used);
    return loss;
  }
  loss.mass_moved = std::min(dropped / exact, 1.0);
  const double left = std::max(exact - dropped + taken, exact * FLT_MIN);
  loss.kl = std::max(std::log(exact / left), 0.0);
  return loss;
}

}  // namespace edgemoe
