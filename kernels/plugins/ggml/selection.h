// SPDX-License-Identifier: MIT
// selection.h: changes the choice of experts, where a thread has asked for it. llama.cpp's CPU backend sorts the
// experts by their scores; right behind that node the graph is interrupted, and the order of each token rewritten so
// that the experts chosen by libedgemoe come first. The nodes that follow read from it which experts to multiply with,
// and gather the mixing weights from the model's own. Places that are to stay empty cannot be taken out of the graph:
// their experts' mixing weights become 0 (or a logit of minus infinity) before they are gathered, so that whatever
// normalization the model's graph has is over the others, and the plug-in's own products leave them out. Where a rule
// asks for the router's logits, the graph is interrupted before they become masses, too. Graph and splits stay as they
// are. Per thread, as lone_rows.h.
#ifndef EDGEMOE_PLUGINS_GGML_SELECTION_H_
#define EDGEMOE_PLUGINS_GGML_SELECTION_H_

#include "edgemoe/selection.h"
#include "plugins/ggml/ggml_abi.h"
#include "plugins/ggml/nodes.h"

namespace edgemoe_ggml {

// Whether this thread's choices are changed, and by whom.
bool HasChoosers();
const edgemoe_choosers* ThoseWhoChoose();

// `compute` applied to the graph, interrupted behind each choice of experts if this thread's choices are changed.
ggml_status ComputeChosen(GraphCompute compute, ggml_backend_t cpu, ggml_cgraph* graph);

// The ids of the choice made last, [n_tokens][n_used] as edgemoe_session_begin_layer takes them, for the products of
// that layer that are asked for now; null when the graph's ids hold. Given out once.
const int32_t* TakeChosen(const edgemoe_runtime* runtime, int32_t layer, int64_t n_tokens, int64_t n_used);

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_SELECTION_H_
