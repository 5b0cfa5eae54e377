// SPDX-License-Identifier: MIT
// moe_float.h: products with experts that are stored as floats of 32 or 16 bits (nodes com.microsoft::MoE). As
// qmoe_math.h: an element's bits depend on its operands alone. Pure functions, thread-safe.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_MOE_FLOAT_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_MOE_FLOAT_H_

#include "edgemoe/edgemoe.h"
#include "plugins/onnxruntime/qmoe_node.h"

namespace edgemoe_ort {

// product.x: rows of floats; bias: of product's first row, or null.
void MultiplyFloat(const Projection& p, const edgemoe_product& product, const float* bias);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_MOE_FLOAT_H_
