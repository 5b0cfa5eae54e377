/* SPDX-License-Identifier: MIT */
/* edgemoe_ort.h: what the ONNX Runtime plug-in offers beside ONNX Runtime's own entry points (CreateEpFactories,
 * ReleaseEpFactory, RegisterCustomOps). A host that is not ours needs none of it: it registers the library and appends
 * the provider EdgeMoEExecutionProvider; or, without plug-in providers, it sets config entries of the session called
 * ep.edgemoeexecutionprovider.OPTION and registers the library of custom operators. The options are
 *   slots_bytes   memory for resident experts; without it, all of them
 *   strict        1: a MoE node that we do not compute is an error; default 1 with slots_bytes, else 0
 *   n_threads, n_io_threads
 *   eviction      edgemoe_eviction, a number
 *   publish       1: the runtime of the model waits for edgemoe_ort_take_loaded
 *   model_path    custom operators: the session's .onnx file; needed. There, every node that we do not compute is an
 *                 error, as the built-in operators are replaced */
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_EDGEMOE_ORT_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_EDGEMOE_ORT_H_

#include <stdint.h>

#include "edgemoe/edgemoe.h"

#ifdef __cplusplus
extern "C" {
#endif

#define EDGEMOE_ORT_PROVIDER "EdgeMoEExecutionProvider"

typedef struct edgemoe_ort_loaded {
  edgemoe_runtime* runtime; /* one reference, the caller's; NULL: no node was claimed */
  uint64_t workspace_bytes; /* the most that one run takes beside the slots; runs of one model take turns */
  uint64_t kept_bytes;      /* biases, and scales and zero points that are not streamed */
  int32_t n_layers;         /* claimed */
  int32_t n_refused;        /* MoE nodes left to others, and why the first was */
  char refusal[512];
} edgemoe_ort_loaded;

/* What the session that this thread has made last, with `publish`, has loaded. */
EDGEMOE_API void edgemoe_ort_take_loaded(edgemoe_ort_loaded* loaded);
/* The libedgemoe that this plug-in uses; see edgemoe_instance_id. */
EDGEMOE_API const void* edgemoe_ort_instance_id(void);

#ifdef __cplusplus
}
#endif
#endif /* EDGEMOE_PLUGINS_ONNXRUNTIME_EDGEMOE_ORT_H_ */
