// SPDX-License-Identifier: MIT
// lone_rows.h: evaluates a batch of a few tokens with the bits that each of them would have had alone.
//
// ggml's CPU backend multiplies two or more columns with other code than one (llamafile_sgemm sums in another order),
// and splits flash attention of one token by threads. Nodes where that can happen are handed to it in a shape that has
// one column per matrix. Per thread: holds for the graphs that the thread which asked for it computes.
#ifndef EDGEMOE_PLUGINS_GGML_LONE_ROWS_H_
#define EDGEMOE_PLUGINS_GGML_LONE_ROWS_H_

#include "plugins/ggml/ggml_abi.h"

namespace edgemoe_ggml {

// To be called as the CPU backend's ggml_backend_set_n_threads, which llama.cpp calls with its own CPU backend before
// every graph: the one place where that backend can be met. Touches it only while this thread has lone rows or is
// profiled (cpu_phases.h).
void SetCpuThreads(ggml_backend_t cpu, int n_threads);

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_LONE_ROWS_H_
