// SPDX-License-Identifier: MIT
// foreseen_choice.h: which experts the choosers of edgemoe/selection.h would select of scores that are only predicted:
// their own rules, with their state and what is resident now. So who is named is who would be used: an expert in whose
// place a resident one would be taken is not, that resident one is, and where a miss is not waited for, the low-bit
// copy is or nobody. Knows neither routers nor a cache. Allocates in Reserve alone.
#ifndef EDGEMOE_CORE_FORESEEN_CHOICE_H_
#define EDGEMOE_CORE_FORESEEN_CHOICE_H_

#include <cstdint>
#include <vector>

#include "edgemoe/selection.h"

namespace edgemoe {

class ForeseenChoice {
 public:
  void Reserve(int max_experts);
  // [n_experts] of the token at hand, for selection.masses.
  float* masses() { return masses_.data(); }

  // order: all experts by falling score, selection.order's -> ids as edgemoe_session_begin_layer takes them, without
  // places that stay empty. Who cannot tell has no say.
  void Choose(const edgemoe_choosers& choosers, edgemoe_selection selection, std::vector<int32_t>* order);

 private:
  std::vector<float> masses_, logits_;
  std::vector<int32_t> ids_;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_FORESEEN_CHOICE_H_
