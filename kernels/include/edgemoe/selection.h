/* SPDX-License-Identifier: MIT */
/* selection.h: the part of libedgemoe's C ABI that changes which experts a token gets, and so changes results;
 * edgemoe.h is the rest, with scheduler.h. All is arithmetic on one token's scores in one layer, for whoever has a
 * router's scores at hand. An engine asks in this order: how many experts (edgemoe_count), then which (edgemoe_reuse),
 * then what becomes of those that would have to be read (edgemoe_miss); places beyond the count get EDGEMOE_NO_EXPERT
 * in the ids of edgemoe_session_begin_layer, and no mixing weight. Thread promise: each object for one thread at a
 * time. Selecting allocates nothing. */
#ifndef EDGEMOE_SELECTION_H_
#define EDGEMOE_SELECTION_H_

#include "edgemoe/edgemoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Ids for edgemoe_session_begin_layer, in a layer of n experts: 0 to n - 1 are the experts, n to 2n - 1 their low-bit
 * copies, where all tensors have some (edgemoe_tensor.copy_of), and this is no expert: its results are zeros, it is no
 * part of a sum, and nothing is read. A copy has the shape of what it copies and a format of its own, which
 * libedgemoe's kernels multiply; biases and mixing weights are the expert's. */
#define EDGEMOE_NO_EXPERT (-1)

/* One token in one layer. Scores that are not finite mark experts that may not be chosen. */
typedef struct edgemoe_selection {
  int32_t layer, n_experts, n_used;
  int32_t are_probabilities; /* the scores are a softmax: what is added to is their logarithm */
  int32_t are_logits;        /* the masses are logits of a softmax over the chosen */
  int32_t reserved;
  const float* scores;     /* [n_experts] the model selects the n_used highest */
  const float* masses;     /* [n_experts] mixing weights, before those of the chosen are normalized */
  const uint8_t* resident; /* [n_experts] 1: need not be read */
  int32_t* order;          /* [n_experts] by falling score; on return the chosen first */
  const float* logits; /* [n_experts] the router's, before any softmax or sigmoid; read by EDGEMOE_COUNT_MAP alone */
} edgemoe_selection;

/* Write resident[n_experts]: 1 where all of an expert is resident or being read. Returns how many experts the layer
 * has; nothing is written when that is not n_experts. */
EDGEMOE_API int32_t edgemoe_runtime_residents(edgemoe_runtime* runtime, int32_t layer, uint8_t* resident,
                                              int32_t n_experts);

/* --- count: fewer experts for tokens or layers that lose little by it --- */

typedef enum edgemoe_count_rule {
  EDGEMOE_COUNT_OF_LAYER = 0, /* as many as n_of_layer says */
  EDGEMOE_COUNT_TOP_P = 1,    /* the fewest of the best that hold top_p of the mass of the n_used best */
  EDGEMOE_COUNT_MAP = 2       /* as many as have a positive logit, from n_min to n_max */
} edgemoe_count_rule;

typedef struct edgemoe_count_options {
  uint32_t struct_size;
  int32_t rule; /* edgemoe_count_rule */
  int32_t n_layers;
  int32_t n_experts;         /* the most in a layer */
  const int32_t* n_of_layer; /* [n_layers], copied; 0: as many as the model has; NULL: the rule is another one */
  double top_p;              /* 0 to 1; 1 is exact; read by that rule alone, as the others */
  int32_t n_min, n_max;      /* 1 to n_experts; never more than the model has */
} edgemoe_count_options;

typedef struct edgemoe_count_stats {
  uint64_t n_selections;
  uint64_t n_chosen;  /* experts that the model would have used */
  uint64_t n_dropped; /* of them, those that were left out */
  double mass_moved;  /* sums over selections: the share of the chosen's mass that was left out */
  double kl;          /* the same in nats */
} edgemoe_count_stats;

typedef struct edgemoe_count edgemoe_count;

EDGEMOE_API int32_t edgemoe_count_open(const edgemoe_count_options* options, edgemoe_count** count,
                                       edgemoe_error* error);
EDGEMOE_API void edgemoe_count_close(edgemoe_count* count);
/* 1: selections must bring the router's logits. */
EDGEMOE_API int32_t edgemoe_count_needs_logits(const edgemoe_count* count);
/* Write how many of the selection's n_used best are to be used: 1 to n_used. */
EDGEMOE_API int32_t edgemoe_count_select(edgemoe_count* count, const edgemoe_selection* selection, int32_t* n_used,
                                         edgemoe_error* error);
EDGEMOE_API void edgemoe_count_read_stats(const edgemoe_count* count, edgemoe_count_stats* stats);
EDGEMOE_API void edgemoe_count_reset_stats(edgemoe_count* count);

/* --- reuse bias: experts that need not be read are preferred --- */

typedef enum edgemoe_reuse_method {
  EDGEMOE_REUSE_CACHE_PRIOR = 0, /* their scores are higher by strength * the mean range of the layer's scores */
  EDGEMOE_REUSE_MAX_RANK = 1,    /* of the n_used + strength * (n_experts - n_used) best, they come first */
  EDGEMOE_REUSE_CUMULATIVE = 2   /* the same of the best that hold `strength` of all mass */
} edgemoe_reuse_method;

typedef struct edgemoe_reuse_options {
  uint32_t struct_size;
  int32_t method; /* edgemoe_reuse_method */
  int32_t n_layers;
  int32_t n_experts; /* the most in a layer */
  int32_t top_j;     /* the best are chosen whatever is resident; at least 1 */
  int32_t reserved;
  double strength;       /* 0 to 1; 0 is exact */
  double max_mass_moved; /* per selection on average, see docs/routing.md: above, a layer's strength is lowered */
  double max_kl;         /* the same; nats */
} edgemoe_reuse_options;

typedef struct edgemoe_reuse_stats {
  uint64_t n_selections;
  uint64_t n_chosen;  /* experts */
  uint64_t n_changed; /* of them, those that the model would not have chosen */
  double mass_moved;  /* sums over selections */
  double kl;
  double mean_strength; /* of all layers, now */
} edgemoe_reuse_stats;

typedef struct edgemoe_reuse edgemoe_reuse;

EDGEMOE_API int32_t edgemoe_reuse_open(const edgemoe_reuse_options* options, edgemoe_reuse** reuse,
                                       edgemoe_error* error);
EDGEMOE_API void edgemoe_reuse_close(edgemoe_reuse* reuse);
EDGEMOE_API int32_t edgemoe_reuse_select(edgemoe_reuse* reuse, const edgemoe_selection* selection,
                                         edgemoe_error* error);
EDGEMOE_API void edgemoe_reuse_read_stats(const edgemoe_reuse* reuse, edgemoe_reuse_stats* stats);
EDGEMOE_API void edgemoe_reuse_reset_stats(edgemoe_reuse* reuse);

/* --- miss: experts that matter little are not waited for --- */

typedef struct edgemoe_miss_options {
  uint32_t struct_size;
  int32_t has_copies; /* 1: low-bit copies stand in, 0: experts are left out */
  int32_t n_layers;
  int32_t n_experts; /* the most in a layer */
  double wait_mass;  /* 0 to 1: behind so much of the chosen's mass nothing is waited for; 1 is exact */
  double copy_mass;  /* wait_mass to 1: behind so much of it not even for a copy */
} edgemoe_miss_options;

typedef struct edgemoe_miss_stats {
  uint64_t n_selections;
  uint64_t n_chosen;  /* experts */
  uint64_t n_copies;  /* of them, those that a low-bit copy stands in for */
  uint64_t n_skipped; /* of them, those that were left out */
  double mass_moved;  /* sums over selections: the share of the chosen's mass that was left out */
  double kl;          /* the same in nats */
} edgemoe_miss_stats;

typedef struct edgemoe_miss edgemoe_miss;

EDGEMOE_API int32_t edgemoe_miss_open(const edgemoe_miss_options* options, edgemoe_miss** miss, edgemoe_error* error);
EDGEMOE_API void edgemoe_miss_close(edgemoe_miss* miss);
/* Write ids[n_used] for edgemoe_session_begin_layer, from the first places of the selection's order. */
EDGEMOE_API int32_t edgemoe_miss_select(edgemoe_miss* miss, const edgemoe_selection* selection, int32_t* ids,
                                        edgemoe_error* error);
EDGEMOE_API void edgemoe_miss_read_stats(const edgemoe_miss* miss, edgemoe_miss_stats* stats);
EDGEMOE_API void edgemoe_miss_reset_stats(edgemoe_miss* miss);

/* --- all of them --- */

/* Who has a say in which experts a token gets, in this order; NULL: nobody. */
typedef struct edgemoe_choosers {
  edgemoe_count* count;
  edgemoe_reuse* reuse;
  edgemoe_miss* miss;
} edgemoe_choosers;

/* The layer that the session begins next was chosen by these, and so will be those behind it: what is read ahead for
 * them is what these would select of the predicted scores, with their state as it is then. choosers is copied; whom it
 * names must live until that layer has ended, and choose for no other thread meanwhile. Without a call, or with NULL,
 * the model alone has chosen. Changes what is read, and no selection but by what is resident then. */
EDGEMOE_API void edgemoe_session_set_choosers(edgemoe_session* session, const edgemoe_choosers* choosers);

#ifdef __cplusplus
}
#endif
#endif /* EDGEMOE_SELECTION_H_ */
