// SPDX-License-Identifier: MIT
// selection.h: biases the choice of experts, where a thread has asked for it. llama.cpp's CPU backend sorts the experts
// by their scores; right behind that node the graph is interrupted, and the order of each token rewritten so that the
// experts chosen by libedgemoe come first. The nodes that follow read from it which experts to multiply with, and
// gather the mixing weights from the model's own: those are not touched. Graph and splits stay as they are. Per thread,
// as lone_rows.h.
#ifndef EDGEMOE_PLUGINS_GGML_SELECTION_H_
#define EDGEMOE_PLUGINS_GGML_SELECTION_H_

#include "plugins/ggml/ggml_abi.h"
#include "plugins/ggml/nodes.h"

namespace edgemoe_ggml {

// Whether this thread's choices are biased.
bool IsBiased();

// `compute` applied to the graph, interrupted behind each choice of experts if this thread's choices are biased.
ggml_status ComputeBiased(GraphCompute compute, ggml_backend_t cpu, ggml_cgraph* graph);

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_SELECTION_H_
