// SPDX-License-Identifier: MIT
#include "core/foreseen_choice.h"

#include <algorithm>

#include "core/expert_count.h"
#include "core/on_miss.h"
#include "core/reuse_bias.h"

namespace edgemoe {

void ForeseenChoice::Reserve(int max_experts) {
  masses_.resize(static_cast<size_t>(max_experts));
  logits_.resize(static_cast<size_t>(max_experts));
  ids_.resize(static_cast<size_t>(max_experts));
}

void ForeseenChoice::Choose(const edgemoe_choosers& choosers, edgemoe_selection s, std::vector<int32_t>* order) {
  s.order = order->data();
  if (choosers.count != nullptr) {
    // Only their signs are asked for, and a sigmoid is above a half where its logit is positive.
    const float zero = s.are_logits != 0 ? 0.0f : 0.5f;
    std::transform(s.masses, s.masses + s.n_experts, logits_.begin(), [zero](float mass) { return mass - zero; });
    s.logits = logits_.data();
    int32_t n_used = s.n_used;
    if (choosers.count->count.Foresee(s, &n_used).ok()) s.n_used = n_used;
  }
  if (choosers.reuse != nullptr) (void)choosers.reuse->bias.Foresee(s);
  order->resize(static_cast<size_t>(s.n_used));
  if (choosers.miss == nullptr || !choosers.miss->rule.Foresee(s, ids_.data()).ok()) return;
  const auto end = std::copy_if(ids_.begin(), ids_.begin() + s.n_used, order->begin(),
                                [](int32_t id) { return id != EDGEMOE_NO_EXPERT; });
  order->erase(end, order->end());
}

}  // namespace edgemoe
