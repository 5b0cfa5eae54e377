// SPDX-License-Identifier: MIT
#include "core/on_miss.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace edgemoe {

Status OnMiss::Check(const edgemoe_miss_options& o) {
  if (Status s = CheckStructSize("edgemoe_miss_options", o.struct_size, sizeof(o)); !s.ok()) return s;
  if (o.n_layers < 1 || o.n_experts < 1) {
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("misses in %d layers of %d experts, expected at least 1 of each", o.n_layers, o.n_experts));
  }
  if (!(o.wait_mass >= 0.0 && o.wait_mass <= o.copy_mass && o.copy_mass <= 1.0)) {
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("misses behind %g of the mass are not waited for, nor their copies behind %g, expected "
                         "0 to 1 in rising order",
                         o.wait_mass, o.copy_mass));
  }
  return Status();
}

OnMiss::OnMiss(const edgemoe_miss_options& options)
    : options_(options),
      masses_(static_cast<size_t>(options.n_experts)),
      places_(static_cast<size_t>(options.n_experts)) {}

Status OnMiss::Apply(const edgemoe_selection& s, int32_t* ids, edgemoe_miss_stats* stats) {
  if (Status status = CheckShape(s, options_.n_layers, options_.n_experts); !status.ok()) return status;
  for (int i = 0; i < s.n_used; ++i) {
    if (s.order[i] >= 0 && s.order[i] < s.n_experts) continue;
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("order in layer %d: place %d holds %d, expected 0..%d", s.layer, i,
                                                   s.order[i], s.n_experts - 1));
  }
  ReadMasses(s, s.n_used, masses_.data());
  std::iota(places_.begin(), places_.begin() + s.n_used, 0);
  const bool is_known = std::isfinite(std::accumulate(masses_.begin(), masses_.begin() + s.n_used, 0.0));
  if (is_known) {
    // Of equals, the one with the higher score first.
    std::sort(places_.begin(), places_.begin() + s.n_used, [&](int32_t a, int32_t b) {
      const double x = masses_[static_cast<size_t>(a)], y = masses_[static_cast<size_t>(b)];
      return x != y ? x > y : a < b;
    });
  }
  // In the order in which parts of it are compared with it, so that none is more than all, as floats round.
  double total = 0.0;
  for (int i = 0; i < s.n_used; ++i) total += masses_[static_cast<size_t>(places_[static_cast<size_t>(i)])];
  double before = 0.0, dropped = 0.0;
  int n_skipped = 0;
  for (int i = 0; i < s.n_used; ++i) {
    const int32_t place = places_[static_cast<size_t>(i)];
    const int32_t expert = s.order[place];
    const double mass = masses_[static_cast<size_t>(place)];
    ids[place] = expert;
    if (is_known && s.resident[expert] == 0 && before > options_.wait_mass * total) {
      if (options_.has_copies != 0 && !(before > options_.copy_mass * total)) {
        ids[place] = s.n_experts + expert;
        ++stats->n_copies;
      } else {
        ids[place] = EDGEMOE_NO_EXPERT;
        dropped += mass;
        ++n_skipped;
      }
    }
    before += mass;
  }
  ++stats->n_selections;
  stats->n_chosen += static_cast<uint64_t>(s.n_used);
  stats->n_skipped += static_cast<uint64_t>(n_skipped);
  const RoutingLoss loss = LossOf(total, dropped, 0.0, n_skipped, s.n_used);
  stats->mass_moved += loss.mass_moved;
  stats->kl += loss.kl;
  return Status();
}

}  // namespace edgemoe
