/* SPDX-License-Identifier: MIT */
/* edgemoe_ort.h: what the ONNX Runtime plug-in offers beside ONNX Runtime's own entry points (CreateEpFactories,
 * ReleaseEpFactory, RegisterCustomOps). A host that is not ours needs none of it: it registers the library and appends
 * the provider EdgeMoEExecutionProvider; or, without plug-in providers, it sets config entries of the session called
 * ep.edgemoeexecutionprovider.OPTION and registers the library of custom operators. The options are
 *   slots_bytes   memory for resident experts; without it, all of them
 *   strict        1: a MoE node that we do not compute is an error; default 1 with slots_bytes, else 0
 *   n_threads, n_io_threads
 *   eviction      auto (the default), lru, lfu, least-stale or utility; or edgemoe_eviction, a number
 *   prefetch      auto (the default), off, 1 or 2: layers ahead whose experts are predicted, kept and read
 *   reuse_bias    off (the default), or 0 (exact) to 1, with reuse_method (cache-prior, max-rank, cumulative) and
 * top_j; this and the next two change what nodes with one row of input compute, see docs/routing.md expert_top_k  off
 * (the default), a number, top-p:P, map or map:MIN-MAX on_miss       wait (the default) or skip, with on_miss_mass
 *   model_path    custom operators: the session's .onnx file; needed. There, every node that we do not compute is an
 *                 error, as the built-in operators are replaced
 *   publish       for edgemoe's own Python, 1: the runtime of the model waits for edgemoe_ort_take_loaded */
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_EDGEMOE_ORT_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_EDGEMOE_ORT_H_

#include <stdint.h>

#include "edgemoe/edgemoe.h"
#include "edgemoe/selection.h"

#ifdef __cplusplus
extern "C" {
#endif

#define EDGEMOE_ORT_PROVIDER "EdgeMoEExecutionProvider"

/* Since the session was made or its counters were reset. */
typedef struct edgemoe_ort_counters {
  uint64_t n_tokens; /* rows of the first node's input */
  edgemoe_count_stats count;
  edgemoe_reuse_stats reuse;
  edgemoe_miss_stats miss;
} edgemoe_ort_counters;

/* What counts in a session, which may end before it does. Thread-safe. */
typedef struct edgemoe_ort_counting edgemoe_ort_counting;
EDGEMOE_API void edgemoe_ort_read_counters(const edgemoe_ort_counting* counting, edgemoe_ort_counters* counters);
EDGEMOE_API void edgemoe_ort_reset_counters(edgemoe_ort_counting* counting);
EDGEMOE_API void edgemoe_ort_release_counting(edgemoe_ort_counting* counting);

/* One stacked tensor of experts that is streamed, in the order of the runtime's slices. */
typedef struct edgemoe_ort_tensor {
  int32_t layer; /* the runtime's number of the node */
  int32_t n_experts;
  int32_t n_used;
  int32_t stage; /* 0: scales and zero points of fc1, 1: its weights, 2 and 3: those of fc2 */
  uint64_t expert_bytes;
} edgemoe_ort_tensor;

typedef struct edgemoe_ort_loaded {
  edgemoe_runtime* runtime; /* one reference, the caller's; NULL: no node was claimed */
  uint64_t workspace_bytes; /* the most that one run takes beside the slots; runs of one model take turns */
  uint64_t kept_bytes;      /* biases, and scales and zero points that are not streamed */
  int32_t n_layers;         /* claimed */
  int32_t n_routers;        /* layers whose experts are predicted, or could be */
  int32_t n_refused;        /* MoE nodes left to others, and why the first was */
  char refusal[512];
  edgemoe_ort_counting* counting; /* the caller's; NULL as the runtime */
} edgemoe_ort_loaded;

/* The tensors of what edgemoe_ort_take_loaded will give, at most `capacity` of them; returns how many there are. */
EDGEMOE_API int32_t edgemoe_ort_loaded_tensors(edgemoe_ort_tensor* tensors, int32_t capacity);

/* What the session that this thread has made last, with `publish`, has loaded. */
EDGEMOE_API void edgemoe_ort_take_loaded(edgemoe_ort_loaded* loaded);
/* The libedgemoe that this plug-in uses; see edgemoe_instance_id. */
EDGEMOE_API const void* edgemoe_ort_instance_id(void);

#ifdef __cplusplus
}
#endif
#endif /* EDGEMOE_PLUGINS_ONNXRUNTIME_EDGEMOE_ORT_H_ */
