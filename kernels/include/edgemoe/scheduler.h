/* SPDX-License-Identifier: MIT */
/* scheduler.h: the part of libedgemoe's C ABI that foresees and remembers which experts are needed; edgemoe.h is the
 * rest. Nothing here changes a result: it decides what is read early and what is kept.
 * Thread promise: as edgemoe.h; what configures a runtime is called before its first layer. */
#ifndef EDGEMOE_SCHEDULER_H_
#define EDGEMOE_SCHEDULER_H_

#include "edgemoe/edgemoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A layer's router: logits = weights * (x / rms(x) * norm), of which the highest `logit + bias`, or with
 * sigmoid != 0 the highest `sigmoid(logit) + bias`, are selected. */
typedef struct edgemoe_router {
  int32_t layer;
  int32_t n_experts;
  int64_t n_cols;       /* elements of the hidden state, a multiple of 32 */
  const float* weights; /* [n_experts][n_cols] */
  const float* norm;    /* [n_cols], NULL: ones */
  const float* bias;    /* [n_experts], NULL: zeros */
  int32_t sigmoid;
  int32_t reserved;
} edgemoe_router;

typedef struct edgemoe_prefetch_stats {
  uint64_t used_bytes;   /* read for a prediction, and resident when first used */
  uint64_t late_bytes;   /* read for a prediction, and still being read when first used */
  uint64_t wasted_bytes; /* read for a prediction, and evicted unused */
  uint64_t predicted;    /* experts predicted, and how many of them the layer then chose */
  uint64_t predicted_right;
  uint64_t chosen; /* experts chosen by layers for which there was a prediction */
  int32_t depth;   /* layers ahead, now */
  int32_t reserved;
} edgemoe_prefetch_stats;

/* Predict the experts of the next `max_depth` layers (0 to 2) by their routers on the present layer's hidden state, as
 * mixtral-offloading (arXiv 2312.17238) and Fate (arXiv 2502.12224) do. Predicted experts that are resident are kept;
 * the others are read while storage has nothing else to do. adaptive != 0: as deep as pays by the clock, from not at
 * all to max_depth; 0: always max_depth. The routers' data is copied, as 8-bit integers. */
EDGEMOE_API int32_t edgemoe_runtime_set_prefetch(edgemoe_runtime* runtime, const edgemoe_router* routers,
                                                 int32_t n_routers, int32_t max_depth, int32_t adaptive,
                                                 edgemoe_error* error);
/* The token whose batch comes next, by its embedding [n_cols], which foretells the first layers. */
EDGEMOE_API void edgemoe_runtime_foresee_token(edgemoe_runtime* runtime, const float* embedding, int64_t n_cols);
/* Bytes that edgemoe_runtime_set_prefetch keeps for such routers, of which only the shapes are read. */
EDGEMOE_API uint64_t edgemoe_prefetch_bytes(const edgemoe_router* routers, int32_t n_routers, int32_t max_depth);
EDGEMOE_API void edgemoe_runtime_prefetch_stats(edgemoe_runtime* runtime, edgemoe_prefetch_stats* stats);

/* Warm start: what a run needed most, for the next one to read while storage is idle. A slice is one expert of one
 * tensor; slices are numbered tensor by tensor in the order of edgemoe_options. These functions may be called at any
 * time from any thread, layers in progress or not. */
typedef struct edgemoe_preload_stats {
  uint64_t read_bytes; /* read to preload slices */
  uint64_t used_bytes; /* of these, resident when a layer first used them */
  int64_t n_slices;    /* of the model */
  int64_t n_left;      /* slices still to be preloaded, with those being read; 0 when preloading has ended */
} edgemoe_preload_stats;

/* Write the resident slices, the hottest first, at most `capacity` of them. Returns how many; -1: out of memory. */
EDGEMOE_API int64_t edgemoe_runtime_hot_slices(edgemoe_runtime* runtime, int64_t* slices, int64_t capacity,
                                               edgemoe_error* error);
/* Write for each slice, at most `capacity` of them, how many tokens used it since the runtime was opened; resetting
 * statistics does not touch these. Returns how many were written; -1: out of memory. */
EDGEMOE_API int64_t edgemoe_runtime_slice_uses(edgemoe_runtime* runtime, uint64_t* n_uses, int64_t capacity,
                                               edgemoe_error* error);
/* Read slices, the hottest first, into free slots: nothing is evicted for them, reads that a layer waits for go first
 * and find at most half of the reader threads busy with them, and until they are used they are the first to be evicted.
 * Returns at once. What an earlier call has left to read is dropped. Ends when all are read or no slot is free, when
 * the slots are resized, or, quietly, when a read fails. */
EDGEMOE_API int32_t edgemoe_runtime_preload(edgemoe_runtime* runtime, const int64_t* slices, int64_t n_slices,
                                            edgemoe_error* error);
EDGEMOE_API void edgemoe_runtime_preload_stats(edgemoe_runtime* runtime, edgemoe_preload_stats* stats);

/* Record what each layer of each batch chooses, waits for and reads, into a file of docs/trace-format.md, whose
 * `header` (JSON) describes the model. Nothing is at `path` before the recording is stopped. No layer ever waits for
 * the file: when it fails or is too slow, the recording ends early. A record is made when a layer ends. Any time, any
 * thread. */
EDGEMOE_API int32_t edgemoe_runtime_start_trace(edgemoe_runtime* runtime, const char* path, const char* header,
                                                edgemoe_error* error);
/* Why the recording under way has ended early, if it has. */
EDGEMOE_API int32_t edgemoe_runtime_check_trace(edgemoe_runtime* runtime, edgemoe_error* error);
/* Write the rest, and give the file its name. A failure leaves no file. */
EDGEMOE_API int32_t edgemoe_runtime_stop_trace(edgemoe_runtime* runtime, edgemoe_error* error);

#ifdef __cplusplus
}
#endif
#endif /* EDGEMOE_SCHEDULER_H_ */
