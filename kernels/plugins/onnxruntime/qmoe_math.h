// SPDX-License-Identifier: MIT
// qmoe_math.h: the arithmetic of QMoE in float: rows of weights become floats and are multiplied, whatever the number
// of activation rows, so an element's bits depend on its operands alone. Pure functions, thread-safe.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MATH_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MATH_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "plugins/onnxruntime/qmoe_node.h"

namespace edgemoe_ort {

// Where what belongs to one expert's rows lies, from row 0.
struct ExpertSides {
  const uint8_t* scales = nullptr;       // float, of any alignment
  const uint8_t* zero_points = nullptr;  // null: 8 or 128
  const float* bias = nullptr;           // null: none
};

// x: [n_cols] -> y: [n_cols] as DequantizeRow orders columns: with 4 bits, even ones and then odd ones.
void OrderColumns(int bits, int64_t n_cols, const float* x, float* y);
// One row of weights -> w: [n_cols], columns as OrderColumns gives them.
void DequantizeRow(const Projection& p, const uint8_t* packed, const ExpertSides& sides, int64_t row, float* w);
float Dot(const float* a, const float* b, int64_t n);
// fc1's results of one token and expert, in place: [fc1.n_rows] -> the first [inter].
void Activate(const QmoeNode& node, float* rows);
// One token: experts of the n_used highest scores, highest first, of equal ones the last; and their mixing weights.
// router_weights: [n_experts] or null. `order` is scratch.
void Route(const QmoeNode& node, const float* scores, const float* router_weights,
           std::vector<std::pair<float, int32_t>>* order, int32_t* experts, float* weights);
// The mixing weights of one token's chosen experts; EDGEMOE_NO_EXPERT has none, and no part in what is divided by.
void Mix(const QmoeNode& node, const float* scores, const float* router_weights, const int32_t* experts,
         float* weights);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MATH_H_
