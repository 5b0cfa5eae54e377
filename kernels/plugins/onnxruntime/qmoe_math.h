// SPDX-License-Identifier: MIT
// qmoe_math.h: what QMoE computes besides its products: activation functions and the choice of experts. Pure functions,
// thread-safe.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MATH_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MATH_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "plugins/onnxruntime/qmoe_node.h"
#include "simd/kernel_table.h"

namespace edgemoe_ort {

// fc1's results of one token and expert, in place: [fc1.n_rows] -> the first [inter].
void Activate(const edgemoe::simd::KernelTable& table, const QmoeNode& node, float* row);
// One token: experts of the n_used highest scores, highest first, of equal ones the last; and their mixing weights.
// router_weights: [n_experts] or null. `order` is scratch.
void Route(const QmoeNode& node, const float* scores, const float* router_weights,
           std::vector<std::pair<float, int32_t>>* order, int32_t* experts, float* weights);
// The mixing weights of one token's chosen experts; EDGEMOE_NO_EXPERT has none, and no part in what is divided by.
void Mix(const QmoeNode& node, const float* scores, const float* router_weights, const int32_t* experts,
         float* weights);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MATH_H_
