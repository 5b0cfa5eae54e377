// SPDX-License-Identifier: MIT
#include "core/expert_count.h"

#include <algorithm>
#include <numeric>

namespace edgemoe {

Status ExpertCount::Check(const edgemoe_count_options& o) {
  if (Status s = CheckStructSize("edgemoe_count_options", o.struct_size, sizeof(o)); !s.ok()) return s;
  if (o.rule < EDGEMOE_COUNT_OF_LAYER || o.rule > EDGEMOE_COUNT_MAP) {
    return Status(
        EDGEMOE_INVALID_ARGUMENT,
        Format("rule %d for the number of experts, expected 0 (of each layer), 1 (top-p) or 2 (MAP)", o.rule));
  }
  if (o.n_layers < 1 || o.n_experts < 1) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("number of experts for %d layers of %d, expected at least 1 of each",
                                                   o.n_layers, o.n_experts));
  }
  if (o.rule == EDGEMOE_COUNT_OF_LAYER) {
    if (o.n_of_layer == nullptr) {
      return Status(EDGEMOE_INVALID_ARGUMENT, "no numbers of experts, expected one for each layer");
    }
    for (int i = 0; i < o.n_layers; ++i) {
      if (o.n_of_layer[i] >= 0 && o.n_of_layer[i] <= o.n_experts) continue;
      return Status(EDGEMOE_INVALID_ARGUMENT, Format("%d experts for a token in layer %d, expected 0 (the model's) to "
                                                     "%d",
                                                     o.n_of_layer[i], i, o.n_experts));
    }
  } else if (o.rule == EDGEMOE_COUNT_MAP) {
    if (o.n_min < 1 || o.n_min > o.n_max || o.n_max > o.n_experts) {
      return Status(EDGEMOE_INVALID_ARGUMENT, Format("%d to %d experts for a token, expected a range within 1 to %d",
                                                     o.n_min, o.n_max, o.n_experts));
    }
  } else if (!(o.top_p >= 0.0 && o.top_p <= 1.0)) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("top-p %g for experts, expected 0 to 1", o.top_p));
  }
  return Status();
}

ExpertCount::ExpertCount(const edgemoe_count_options& options)
    : rule_(static_cast<edgemoe_count_rule>(options.rule)),
      n_experts_(options.n_experts),
      top_p_(options.top_p),
      n_min_(options.n_min),
      n_max_(options.n_max),
      n_of_layer_(static_cast<size_t>(options.n_layers)),
      masses_(static_cast<size_t>(options.n_experts)) {
  if (options.n_of_layer != nullptr) std::copy_n(options.n_of_layer, options.n_layers, n_of_layer_.begin());
}

Status ExpertCount::Foresee(const edgemoe_selection& s, int32_t* n_used) {
  if (Status status = CheckShape(s, static_cast<int>(n_of_layer_.size()), n_experts_); !status.ok()) return status;
  if (NeedsLogits() && s.logits == nullptr) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("no logits of layer %d to count experts by", s.layer));
  }
  ReadMasses(s, s.n_used, masses_.data());
  *n_used = Count(s);
  return Status();
}

Status ExpertCount::Select(const edgemoe_selection& s, int32_t* n_used) {
  if (Status status = Foresee(s, n_used); !status.ok()) return status;
  ++stats_.n_selections;
  stats_.n_chosen += static_cast<uint64_t>(s.n_used);
  const int n_dropped = s.n_used - *n_used;
  if (n_dropped == 0) return Status();
  const double exact = std::accumulate(masses_.begin(), masses_.begin() + s.n_used, 0.0);
  const double dropped = std::accumulate(masses_.begin() + *n_used, masses_.begin() + s.n_used, 0.0);
  const RoutingLoss loss = LossOf(exact, dropped, 0.0, n_dropped, s.n_used);
  stats_.n_dropped += static_cast<uint64_t>(n_dropped);
  stats_.mass_moved += loss.mass_moved;
  stats_.kl += loss.kl;
  return Status();
}

int ExpertCount::Count(const edgemoe_selection& s) const {
  if (rule_ == EDGEMOE_COUNT_OF_LAYER) {
    const int n = n_of_layer_[static_cast<size_t>(s.layer)];
    return n == 0 ? s.n_used : std::min(n, s.n_used);
  }
  if (rule_ == EDGEMOE_COUNT_MAP) {
    const auto n_positive = std::count_if(s.logits, s.logits + s.n_experts, [](float logit) { return logit > 0.0f; });
    return std::min(std::clamp(static_cast<int>(n_positive), n_min_, n_max_), s.n_used);
  }
  if (top_p_ >= 1.0) return s.n_used;
  const double wanted = top_p_ * std::accumulate(masses_.begin(), masses_.begin() + s.n_used, 0.0);
  double mass = 0.0;
  int n = 0;
  // No numbers: all of them.
  while (n < s.n_used && !(n > 0 && mass >= wanted)) mass += masses_[static_cast<size_t>(n++)];
  return n;
}

}  // namespace edgemoe
