/* SPDX-License-Identifier: MIT */
/* scheduler.h: the part of libedgemoe's C ABI that foresees and remembers which experts are needed; edgemoe.h is the
 * rest, with selection.h. Nothing here changes a result, it decides what is read early and what is kept.
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
struct edgemoe_choosers; /* of selection.h */
/* The tokens of the batch that comes next, at most 8, by their embeddings [n_tokens][n_cols], which foretell the first
 * layers: a token and the draft that follows it. choosers: who will choose for it, as edgemoe_session_set_choosers;
 * NULL: the model. */
EDGEMOE_API void edgemoe_runtime_foresee_tokens(edgemoe_runtime* runtime, const float* embeddings, int64_t n_tokens,
                                                int64_t n_cols, const struct edgemoe_choosers* choosers);
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

/* --- profile: where the time of an evaluation goes --- */

typedef enum edgemoe_phase {
  EDGEMOE_PHASE_OVERHEAD = 0, /* all that is nothing else */
  EDGEMOE_PHASE_ROUTER = 1,   /* scores of the experts */
  EDGEMOE_PHASE_SELECT = 2,   /* the choice, mixing weights; which slices that needs, reads asked for, predictions */
  EDGEMOE_PHASE_WAIT = 3,     /* for storage, with nothing else to do */
  EDGEMOE_PHASE_EXPERTS = 4,  /* products with experts and the nodes that follow from them */
  EDGEMOE_PHASE_DENSE = 5,    /* all other nodes */
  EDGEMOE_PHASE_SAMPLING = 6
} edgemoe_phase;
#define EDGEMOE_N_PHASES 7

/* From now on until it stops the clock, each moment of the calling thread belongs to exactly one phase: to that entered
 * last. Layers enter their phases by themselves; dense and router nodes are an engine's. Nothing is computed
 * differently. Fails when a clock of this runtime runs already. */
EDGEMOE_API int32_t edgemoe_runtime_start_clock(edgemoe_runtime* runtime, int32_t phase, edgemoe_error* error);
/* Returns the phase before, to go back to; -1: the clock does not run, or is another thread's. */
EDGEMOE_API int32_t edgemoe_runtime_enter_phase(edgemoe_runtime* runtime, int32_t phase);
/* Write the nanoseconds of each phase, ns[EDGEMOE_N_PHASES]; zeros when the clock is not this thread's. */
EDGEMOE_API void edgemoe_runtime_stop_clock(edgemoe_runtime* runtime, uint64_t* ns);

/* --- replay: the real cache over a simulated disk, by the selections of a trace --- */

typedef struct edgemoe_replay_layer {
  int32_t n_experts;
  int32_t n_used;   /* the most that a token selects */
  int32_t n_slices; /* projections, 1 to 4, in the order of use */
  int32_t reserved;
  uint64_t slice_bytes[4]; /* what reading one takes */
} edgemoe_replay_layer;

typedef struct edgemoe_replay_trace {
  int32_t n_layers;
  int32_t max_used;
  int64_t n_tokens;
  const edgemoe_replay_layer* layers;
  const int32_t* batch_of_token; /* [n_tokens] from 0, each as the one before or 1 more */
  const int16_t* experts;        /* [n_tokens][n_layers][max_used], -1: none */
  /* What was foreseen of each layer from one layer ahead and from two, the likeliest first; -1 behind them, and first
   * where nobody looked. [n_batches][n_layers][2][max_foreseen], or NULL. */
  const int16_t* foreseen;
  int32_t max_foreseen;
  int32_t reserved;
} edgemoe_replay_trace;

/* As edgemoe_eviction; and the one that knows the future. */
#define EDGEMOE_REPLAY_BELADY 100

typedef struct edgemoe_replay_options {
  uint32_t struct_size;
  int32_t policy; /* edgemoe_eviction or EDGEMOE_REPLAY_BELADY */
  uint64_t slots_bytes;
  double disk_bytes_per_s; /* of all reads together */
  double latency_us;       /* of a read, before its bytes flow; those of several overlap */
  double jitter;           /* 0 to 1: each read takes 1 - jitter to 1 + jitter times as long */
  int64_t change_token;    /* from the batch with this token on, the disk is change_factor times as fast; -1: never */
  double change_factor;
  double dense_us;           /* all but the routed experts, of one layer and token */
  double expert_us;          /* one expert and token */
  double row_share;          /* each further token of a batch costs this share of the first */
  double batch_us;           /* behind the layers of a batch: head, sampling, host */
  double hold_up_us_per_mib; /* by which reading so much holds computing up */
  double recall; /* where the trace has no predictions: each true expert is kept with this chance, else a wrong one */
  uint64_t seed;
  int32_t n_readers;
  int32_t prefetch_depth; /* layers ahead, 0 to 2 */
  int32_t adaptive;       /* as edgemoe_runtime_set_prefetch */
  int32_t reserved;
} edgemoe_replay_options;

typedef struct edgemoe_replay_phase {
  int64_t n_tokens;
  uint64_t hits, misses, late_hits; /* experts, as in edgemoe_stats */
  uint64_t slices;                  /* used: each distinct one of a batch counts once */
  uint64_t reads;
  uint64_t bytes_read;
  double stall_us; /* computing waited for the disk */
  double total_us;
} edgemoe_replay_phase;

typedef struct edgemoe_replay_result {
  edgemoe_replay_phase all;
  edgemoe_replay_phase decode; /* batches of one token */
  uint64_t evictions;
  edgemoe_prefetch_stats prefetch;
  uint64_t bound_reads; /* no rule reads less with these slots: each class's optimum for the whole trace */
  uint64_t bound_bytes;
  uint64_t slots_bytes; /* taken, of options.slots_bytes */
  int64_t n_slots;
} edgemoe_replay_result;

/* batch_us, depths: NULL, or [n_batches]: how long each took, and how many layers ahead it read. */
EDGEMOE_API int32_t edgemoe_replay(const edgemoe_replay_trace* trace, const edgemoe_replay_options* options,
                                   edgemoe_replay_result* result, double* batch_us, int32_t* depths,
                                   edgemoe_error* error);

#ifdef __cplusplus
}
#endif
#endif /* EDGEMOE_SCHEDULER_H_ */
