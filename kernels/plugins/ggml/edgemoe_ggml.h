/* SPDX-License-Identifier: MIT */
/* edgemoe_ggml.h: what the ggml plug-in offers beside ggml's own entry point (ggml_backend_init).
 *
 * Order of use: load llama.cpp; ggml_backend_load(this library); edgemoe_ggml_begin_load(runtime) on the thread
 * that loads the model; load the model and make its first context; edgemoe_ggml_end_load(). Between begin and
 * end, and on that thread only, expert tensors of the runtime's model are placed in the plug-in's buffer type;
 * other models and other threads do not notice the plug-in. */
#ifndef EDGEMOE_PLUGINS_GGML_EDGEMOE_GGML_H_
#define EDGEMOE_PLUGINS_GGML_EDGEMOE_GGML_H_

#include <stddef.h>
#include <stdint.h>

#include "edgemoe/edgemoe.h"
#include "edgemoe/scheduler.h"
#include "edgemoe/selection.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The versions this plug-in was built against: "0.25.3" and "0.3.36". */
EDGEMOE_API const char* edgemoe_ggml_built_against(void);
EDGEMOE_API const char* edgemoe_ggml_llama_cpp_python(void);
/* The version of the ggml in this process. */
EDGEMOE_API const char* edgemoe_ggml_loaded(void);
/* The libedgemoe this plug-in uses; see edgemoe_instance_id. */
EDGEMOE_API const void* edgemoe_ggml_instance_id(void);

/* Returns 1 when llama.cpp's loader was also told not to read the whole file ahead, 0 when that could not be
 * done: loading is then slower, and correct. */
EDGEMOE_API int32_t edgemoe_ggml_begin_load(edgemoe_runtime* runtime);
/* Returns how many of the runtime's tensors the model placed in the plug-in's buffers since begin_load. */
EDGEMOE_API int32_t edgemoe_ggml_end_load(void);
/* Replace file-backed pages of a mapping by private memory with the same contents, read with direct reads:
 * ranges[i].to is page-aligned inside a mapping of `path`. Such pages are never dropped under pressure. */
EDGEMOE_API int32_t edgemoe_ggml_populate(const char* path, const edgemoe_range* ranges, int32_t n_ranges,
                                          int32_t n_threads, edgemoe_error* error);
/* From now on, batches of n_tokens that this thread evaluates get the bits that their tokens would have one by one,
 * in contexts made between begin_load (which returned 1) and end_load. Below 2: no more. */
EDGEMOE_API void edgemoe_ggml_set_lone_rows(int64_t n_tokens);
/* From now on, graphs that this thread evaluates in such contexts enter the phases of the runtime's clock, if it runs;
 * NULL: no more. n_experts: the most in a layer, by which routers are told from other products. */
EDGEMOE_API void edgemoe_ggml_set_profiled(edgemoe_runtime* runtime, int32_t n_experts);
/* From now on, tokens that this thread evaluates in such contexts get the experts that the choosers select, given what
 * the runtime has resident; runtime NULL: the model's choice again. n_experts: the most in a layer. Returns how many
 * selections were made since the last call. */
EDGEMOE_API uint64_t edgemoe_ggml_set_choosers(edgemoe_runtime* runtime, const edgemoe_choosers* choosers,
                                               int32_t n_experts);

#ifdef __cplusplus
}
#endif
#endif /* EDGEMOE_PLUGINS_GGML_EDGEMOE_GGML_H_ */
