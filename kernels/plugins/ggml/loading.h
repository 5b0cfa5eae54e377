// SPDX-License-Identifier: MIT
// loading.h: what is special while a model loads: which runtime its experts belong to, and the hook that keeps
// llama.cpp's loader from reading the whole file ahead. Per thread, between begin_load and end_load.
#ifndef EDGEMOE_PLUGINS_GGML_LOADING_H_
#define EDGEMOE_PLUGINS_GGML_LOADING_H_

#include "edgemoe/edgemoe.h"

namespace edgemoe_ggml {

// The runtime whose model this thread is loading, or null.
edgemoe_runtime* LoadingRuntime();
// A tensor of that model was placed in an expert buffer.
void CountPlaced();

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_LOADING_H_
