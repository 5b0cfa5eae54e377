// SPDX-License-Identifier: MIT
#include "core/reuse_bias.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace edgemoe {
namespace {

// Tokens after which the mean of the ranges of a layer's scores forgets: a few sentences.
constexpr int64_t kRangeTokens = 256;
// What an account saves at most: quiet tokens pay for a burst of about as many.
constexpr double kSavedSelections = 16.0;
// A guard that is at a 64th of the strength asked for selects exactly, until its accounts have recovered.
constexpr double kLeastShare = 1.0 / 64.0;
// How fast strength returns: twice as much after 15 selections that were not over the bound.
constexpr double kRecovery = 1.05;

// A probability of 0 is one that a float cannot hold.
double Logarithm(float probability) { return std::log(static_cast<double>(std::max(probability, FLT_MIN))); }

bool Pays(double cost, double balance) { return cost <= balance; }

}  // namespace

Status ReuseBias::Check(const edgemoe_reuse_options& o) {
  if (Status s = CheckStructSize("edgemoe_reuse_options", o.struct_size, sizeof(o)); !s.ok()) return s;
  if (o.method < EDGEMOE_REUSE_CACHE_PRIOR || o.method > EDGEMOE_REUSE_CUMULATIVE) {
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("reuse method %d, expected 0 (cache-prior), 1 (max-rank) or 2 (cumulative)",
                         static_cast<int>(o.method)));
  }
  if (o.n_layers < 1 || o.n_experts < 1) {
    return Status(
        EDGEMOE_INVALID_ARGUMENT,
        Format("reuse bias for %d layers of %d experts, expected at least 1 of each", o.n_layers, o.n_experts));
  }
  if (!(o.strength >= 0.0 && o.strength <= 1.0)) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("reuse bias %g, expected 0 to 1", o.strength));
  }
  if (o.top_j < 1) {
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("top-J %d, expected at least 1: the best expert is always kept", static_cast<int>(o.top_j)));
  }
  if (!(o.max_mass_moved >= 0.0 && o.max_kl >= 0.0)) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("bounds %g and %g, expected 0 or more", o.max_mass_moved, o.max_kl));
  }
  return Status();
}

ReuseBias::ReuseBias(const edgemoe_reuse_options& options)
    : options_(options),
      layers_(static_cast<size_t>(options.n_layers)),
      masses_(static_cast<size_t>(options.n_experts)),
      chosen_(static_cast<size_t>(options.n_experts)),
      rest_(static_cast<size_t>(options.n_experts)) {
  for (Layer& layer : layers_) {
    layer.strength = options.strength;
    layer.mass_moved.bound = options.max_mass_moved;
    layer.kl.bound = options.max_kl;
  }
}

Status ReuseBias::Select(const edgemoe_selection& s) {
  if (Status status = CheckOrder(s); !status.ok()) return status;
  const Loss loss = Apply(s, &layers_[static_cast<size_t>(s.layer)]);
  ++stats_.n_selections;
  stats_.n_chosen += static_cast<uint64_t>(s.n_used);
  stats_.n_changed += static_cast<uint64_t>(loss.n_changed);
  stats_.mass_moved += loss.mass_moved;
  stats_.kl += loss.kl;
  return Status();
}

Status ReuseBias::Foresee(const edgemoe_selection& s) {
  if (Status status = CheckOrder(s); !status.ok()) return status;
  Layer layer = layers_[static_cast<size_t>(s.layer)];
  layer.mean_range = 0.0;
  layer.n_ranges = 0;
  Apply(s, &layer);
  return Status();
}

// Writes the order; the layer learns.
ReuseBias::Loss ReuseBias::Apply(const edgemoe_selection& s, Layer* layer) {
  n_kept_ = std::min(options_.top_j, s.n_used);
  n_eligible_ = 0;
  while (n_eligible_ < s.n_experts && std::isfinite(s.scores[s.order[n_eligible_]])) ++n_eligible_;
  if (n_eligible_ <= s.n_used || layer->strength == 0.0) return Loss();
  ObserveRange(s, layer);
  ReadMasses(s, n_eligible_, masses_.data());
  for (Account* a : {&layer->mass_moved, &layer->kl}) {
    a->balance = std::min(a->balance + a->bound, kSavedSelections * a->bound);
  }
  const double least = kLeastShare * options_.strength;
  double strength = layer->strength;
  Loss loss;
  for (;; strength *= 0.5) {
    if (strength < least) {
      // Nothing that the rule would change is affordable.
      layer->strength = least;
      return Loss();
    }
    Choose(s, *layer, strength);
    loss = Lost(s);
    if (Pays(loss.mass_moved, layer->mass_moved.balance) && Pays(loss.kl, layer->kl.balance)) break;
  }
  layer->strength = strength < layer->strength ? strength : std::min(options_.strength, kRecovery * layer->strength);
  layer->mass_moved.balance -= loss.mass_moved;
  layer->kl.balance -= loss.kl;
  if (loss.n_changed > 0) WriteOrder(s);
  return loss;
}

Status ReuseBias::CheckOrder(const edgemoe_selection& s) {
  if (Status status = CheckShape(s, options_.n_layers, options_.n_experts); !status.ok()) return status;
  std::fill_n(chosen_.begin(), s.n_experts, uint8_t{0});
  for (int i = 0; i < s.n_experts; ++i) {
    const int32_t expert = s.order[i];
    if (expert < 0 || expert >= s.n_experts || chosen_[static_cast<size_t>(expert)] != 0) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    Format("order of %d experts in layer %d: place %d holds %d, expected each "
                           "of 0..%d once",
                           s.n_experts, s.layer, i, expert, s.n_experts - 1));
    }
    chosen_[static_cast<size_t>(expert)] = 1;
  }
  return Status();
}

// The paper's mean of the differences between the highest and the lowest score that can be chosen.
void ReuseBias::ObserveRange(const edgemoe_selection& s, Layer* layer) const {
  const float highest = s.scores[s.order[0]];
  const float lowest = s.scores[s.order[n_eligible_ - 1]];
  const double range = s.are_probabilities != 0 ? Logarithm(highest) - Logarithm(lowest)
                                                : static_cast<double>(highest) - static_cast<double>(lowest);
  layer->n_ranges = std::min(layer->n_ranges + 1, kRangeTokens);
  layer->mean_range += (range - layer->mean_range) / static_cast<double>(layer->n_ranges);
}

void ReuseBias::Choose(const edgemoe_selection& s, const Layer& layer, double strength) {
  std::fill_n(chosen_.begin(), n_kept_, uint8_t{1});
  std::fill(chosen_.begin() + n_kept_, chosen_.begin() + s.n_experts, uint8_t{0});
  if (options_.method == EDGEMOE_REUSE_CACHE_PRIOR) {
    ChooseByKey(s, strength, layer.mean_range);
  } else {
    ChooseAmong(s, Candidates(s, strength));
  }
}

// Cache-Prior. Residents and others are both in order already: merge them by score, residents' being higher by
// strength * mean_range. With probabilities that is a factor, for their logarithms are what is added to.
void ReuseBias::ChooseByKey(const edgemoe_selection& s, double strength, double mean_range) {
  const double advantage = strength * mean_range;
  const double factor = std::exp(advantage);
  int resident = n_kept_, other = n_kept_;
  for (int n_chosen = n_kept_; n_chosen < s.n_used; ++n_chosen) {
    while (resident < n_eligible_ && s.resident[s.order[resident]] == 0) ++resident;
    while (other < n_eligible_ && s.resident[s.order[other]] != 0) ++other;
    bool takes_resident = resident < n_eligible_;
    if (takes_resident && other < n_eligible_) {
      const float a = s.scores[s.order[resident]], b = s.scores[s.order[other]];
      const double x = s.are_probabilities != 0 ? static_cast<double>(std::max(a, FLT_MIN)) * factor
                                                : static_cast<double>(a) + advantage;
      const double y = s.are_probabilities != 0 ? static_cast<double>(std::max(b, FLT_MIN)) : static_cast<double>(b);
      takes_resident = x != y ? x > y : resident < other;
    }
    chosen_[static_cast<size_t>(takes_resident ? resident++ : other++)] = 1;
  }
}

// Max-Rank and cumulative threshold: how many of the best may stand in for each other.
int ReuseBias::Candidates(const edgemoe_selection& s, double strength) const {
  if (options_.method == EDGEMOE_REUSE_MAX_RANK) {
    return s.n_used + static_cast<int>(strength * static_cast<double>(n_eligible_ - s.n_used));
  }
  double total = 0.0, mass = 0.0;
  for (int i = 0; i < n_eligible_; ++i) total += masses_[static_cast<size_t>(i)];
  int n = 0;
  while (n < n_eligible_ && mass < strength * total) mass += masses_[static_cast<size_t>(n++)];
  return std::max(n, s.n_used);
}

void ReuseBias::ChooseAmong(const edgemoe_selection& s, int n_candidates) {
  int n_chosen = n_kept_;
  for (const bool resident : {true, false}) {
    for (int i = n_kept_; i < n_candidates && n_chosen < s.n_used; ++i) {
      if ((s.resident[s.order[i]] != 0) != resident) continue;
      chosen_[static_cast<size_t>(i)] = 1;
      ++n_chosen;
    }
  }
}

ReuseBias::Loss ReuseBias::Lost(const edgemoe_selection& s) const {
  Loss loss;
  double exact = 0.0, dropped = 0.0, taken = 0.0;
  for (int i = 0; i < n_eligible_; ++i) {
    const double mass = masses_[static_cast<size_t>(i)];
    if (i < s.n_used) exact += mass;
    if (i < s.n_used && chosen_[static_cast<size_t>(i)] == 0) {
      dropped += mass;
      ++loss.n_changed;
    }
    if (i >= s.n_used && chosen_[static_cast<size_t>(i)] != 0) taken += mass;
  }
  static_cast<RoutingLoss&>(loss) = LossOf(exact, dropped, taken, loss.n_changed, s.n_used);
  return loss;
}

// The chosen first, then the others, each in the order that they had.
void ReuseBias::WriteOrder(const edgemoe_selection& s) {
  int n_chosen = 0, n_rest = 0;
  for (int i = 0; i < s.n_experts; ++i) {
    if (chosen_[static_cast<size_t>(i)] != 0) {
      s.order[n_chosen++] = s.order[i];
    } else {
      rest_[static_cast<size_t>(n_rest++)] = s.order[i];
    }
  }
  std::copy_n(rest_.begin(), n_rest, s.order + n_chosen);
}

edgemoe_reuse_stats ReuseBias::Stats() const {
  edgemoe_reuse_stats stats = stats_;
  double sum = 0.0;
  int n = 0;
  for (const Layer& layer : layers_) {
    if (layer.n_ranges == 0) continue;  // no router, or none has selected yet
    sum += layer.strength;
    ++n;
  }
  stats.mean_strength = n > 0 ? sum / n : options_.strength;
  return stats;
}

}  // namespace edgemoe
