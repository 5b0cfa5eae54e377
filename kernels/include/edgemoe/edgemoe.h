/* SPDX-License-Identifier: MIT */
/* edgemoe.h: the C ABI of libedgemoe, and all that a plug-in may include.
 *
 * The library keeps the routed experts of one model on storage and the ones in use in a fixed amount of
 * memory. It knows neither ggml nor ONNX nor Python: a plug-in tells it where the expert tensors lie, hands
 * it a table of arithmetic (edgemoe_kernels), and asks it to multiply by the experts that a router chose.
 *
 * Functions return an edgemoe_code; a failing call fills `error` (may be NULL). No exception crosses.
 * Thread promise: a runtime is thread-safe; a session is used by one calling thread at a time. */
#ifndef EDGEMOE_EDGEMOE_H_
#define EDGEMOE_EDGEMOE_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define EDGEMOE_API __attribute__((visibility("default")))
#else
#define EDGEMOE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a function below changes its meaning. */
#define EDGEMOE_ABI_VERSION 4

typedef enum edgemoe_code {
  EDGEMOE_OK = 0,
  EDGEMOE_INVALID_ARGUMENT = 1,
  EDGEMOE_BAD_FILE = 2, /* an extent passes the end of its file */
  EDGEMOE_IO = 3,       /* open or read failed, or the file shrank */
  EDGEMOE_NO_MEMORY = 4,
  EDGEMOE_BUDGET = 5, /* the slots cannot hold what one layer needs */
  EDGEMOE_INTERNAL = 6
} edgemoe_code;

typedef struct edgemoe_error {
  int32_t code;
  char message[508];
} edgemoe_error;

/* Quantization formats that libedgemoe multiplies itself; the bytes of a block are those of GGUF. */
typedef enum edgemoe_format {
  /* clang-format off */
  EDGEMOE_FORMAT_OTHER = 0, /* the plug-in's arithmetic only */
  EDGEMOE_FORMAT_F16, EDGEMOE_FORMAT_BF16, EDGEMOE_FORMAT_Q4_0, EDGEMOE_FORMAT_Q4_1, EDGEMOE_FORMAT_Q8_0,
  EDGEMOE_FORMAT_Q2_K, EDGEMOE_FORMAT_Q3_K, EDGEMOE_FORMAT_Q4_K, EDGEMOE_FORMAT_Q5_K, EDGEMOE_FORMAT_Q6_K,
  EDGEMOE_FORMAT_IQ4_NL, EDGEMOE_FORMAT_IQ4_XS, EDGEMOE_FORMAT_MXFP4
  /* clang-format on */
} edgemoe_format;

/* One expert projection of one layer, stacked over the experts: expert e occupies
 * [offset + e * expert_bytes, offset + (e + 1) * expert_bytes) of file `file_idx`. */
typedef struct edgemoe_tensor {
  const char* name;
  int32_t file_idx;
  int32_t layer;
  int32_t n_experts;
  int32_t n_experts_used; /* experts that one token selects in this layer */
  uint64_t offset;
  uint64_t expert_bytes;
  int64_t n_cols; /* of one expert's matrix; 0 where format is EDGEMOE_FORMAT_OTHER and nobody knows */
  int64_t n_rows;
  int32_t format, copy_of; /* edgemoe_format; 1 + the tensor that this is the low-bit copy of (selection.h), or 0 */
} edgemoe_tensor;

typedef enum edgemoe_eviction {
  EDGEMOE_EVICT_LRU = 0,         /* least recently used */
  EDGEMOE_EVICT_LFU_DECAY = 1,   /* least frequently used, counts halving every 8 tokens */
  EDGEMOE_EVICT_LEAST_STALE = 2, /* what the batch in progress has not used, then by layer */
  EDGEMOE_EVICT_UTILITY = 3,     /* MoE-SpAc's states, slow up and fast down */
  EDGEMOE_EVICT_AUTO = 4         /* LRU or LFU_DECAY, whichever has missed less lately */
} edgemoe_eviction;

typedef enum edgemoe_arithmetic {
  EDGEMOE_ARITHMETIC_AUTO = 0,  /* libedgemoe's kernels where the format has them, else the plug-in's */
  EDGEMOE_ARITHMETIC_PLUGIN = 1 /* the plug-in's: the bits of its engine */
} edgemoe_arithmetic;

typedef struct edgemoe_options {
  uint32_t struct_size;
  int32_t n_files;
  const char* const* file_paths;
  int32_t n_tensors;
  int32_t n_io_threads;
  const edgemoe_tensor* tensors;
  uint64_t slots_bytes; /* memory for resident experts, now; see edgemoe_runtime_set_slots_bytes */
  int32_t eviction;     /* edgemoe_eviction */
  int32_t arithmetic;   /* edgemoe_arithmetic */
} edgemoe_options;

/* What a set of tensors needs, computed without opening a file. Bytes are those of slots: whole pages. */
typedef struct edgemoe_sizes {
  uint64_t bank_slot_bytes;  /* every expert resident */
  uint64_t cycle_slot_bytes; /* the experts of one token */
  uint64_t slots_bytes;      /* what options.slots_bytes really takes */
  int64_t n_slots, n_slices; /* slots in options.slots_bytes; slots for every expert resident */
} edgemoe_sizes;

typedef struct edgemoe_stats {
  uint64_t hits;       /* experts found resident */
  uint64_t misses;     /* experts found absent */
  uint64_t late_hits;  /* experts found still loading */
  uint64_t bytes_read; /* from storage, whole pages */
  uint64_t reads;
  uint64_t stall_ns; /* computing waited for storage with nothing else to do */
  uint64_t evictions;
  int64_t n_slots;
  uint64_t slots_bytes;
  uint64_t pack_ns;      /* reader threads interleaved rows for libedgemoe's kernels */
  int32_t direct_io;     /* 1: the files are read with O_DIRECT; 0: buffered, then dropped from the page cache */
  int32_t n_own_tensors; /* tensors that libedgemoe's kernels multiply */
} edgemoe_stats;

typedef struct edgemoe_runtime edgemoe_runtime;
typedef struct edgemoe_session edgemoe_session;

/* Rows [first_row, first_row + n_rows) of one expert matrix times n_x quantized activation rows. */
typedef struct edgemoe_product {
  int32_t type; /* the plug-in's weight type, as given in edgemoe_matmul */
  int32_t n_x;
  int64_t n_cols; /* K, elements of a weight row and of an activation row */
  int64_t n_rows;
  const void* weights; /* first row */
  uint64_t row_bytes;
  const void* const* x; /* [n_x] activation rows in the type's activation format */
  float* const* y;      /* [n_x] where the n_rows results of each activation row go, contiguous */
  uint64_t x_key;       /* equal for equal lists x within one call of edgemoe_session_matmul */
  int64_t stays;        /* 1: the weights lie there until the layer ends; 0: while they are multiplied */
} edgemoe_product;

/* Arithmetic and threads, provided by the plug-in. All functions are called from several threads at once. */
typedef struct edgemoe_kernels {
  uint32_t struct_size;
  uint32_t reserved;
  void* context;
  /* Run fn(arg, thread_idx, n_threads) once on each of up to n_threads threads, the caller's among them. */
  void (*parallel)(void* context, int32_t n_threads, void (*fn)(void*, int32_t, int32_t), void* arg);
  /* Bytes of an activation row of n_cols elements in the format that `type` multiplies with. */
  uint64_t (*activation_row_bytes)(void* context, int32_t type, int64_t n_cols);
  /* x: [n_cols] f32 -> y: one activation row. */
  void (*quantize_row)(void* context, int32_t type, const float* x, void* y, int64_t n_cols);
  void (*multiply)(void* context, int32_t thread_idx, const edgemoe_product* product);
} edgemoe_kernels;

/* y[token][used] = experts[ids[token][used]] * x[token][used % x_n_used], for every token and used slot. */
typedef struct edgemoe_matmul {
  int32_t tensor_idx;
  int32_t type;
  int64_t n_cols, n_rows;
  uint64_t row_bytes;
  const float* x;
  int64_t x_n_used;      /* 1: the same activation for every used expert */
  uint64_t x_used_bytes; /* strides */
  uint64_t x_token_bytes;
  float* y;
  uint64_t y_used_bytes;
  uint64_t y_token_bytes;
} edgemoe_matmul;

typedef enum edgemoe_glu {
  /* clang-format off */
  EDGEMOE_SWIGLU = 0, EDGEMOE_SWIGLU_OAI = 1, EDGEMOE_SWIGLU_CLAMP = 2, EDGEMOE_GEGLU = 3, EDGEMOE_REGLU = 4,
  EDGEMOE_SILU = 5, EDGEMOE_GELU = 6, EDGEMOE_RELU_SQUARED = 7 /* these without gate_proj */
  /* clang-format on */
} edgemoe_glu;

/* For edgemoe_session_ffn, a whole expert feed-forward block: out[token] = sum over used of weights[token][used] *
 * down(act(gate(x), up(x))). All its tensors are multiplied by libedgemoe's kernels (edgemoe_runtime_is_own). Results
 * of gate, up and down go to their y, where gate's and up's may not overlap; what act gives is kept inside. */
typedef struct edgemoe_ffn {
  edgemoe_matmul gate; /* gate.n_rows 0: none, `up` holds gate and up (merged) or act needs no gate */
  edgemoe_matmul up;
  edgemoe_matmul down; /* x is ignored */
  int32_t merged;      /* 1: the first half of up's rows is gate */
  int32_t glu;         /* edgemoe_glu */
  float alpha, limit;
  const float *gate_bias, *up_bias, *down_bias; /* of expert 0; NULL: none. Merged: up_bias covers both halves */
  uint64_t gate_bias_expert_bytes, up_bias_expert_bytes, down_bias_expert_bytes;
  const float* weights; /* [n_tokens][n_used] mixing weights */
  uint64_t weights_used_bytes, weights_token_bytes;
  float* out; /* [n_tokens][down.n_rows]; NULL: the caller biases, weighs and sums down.y itself */
  uint64_t out_token_bytes;
} edgemoe_ffn;

EDGEMOE_API int32_t edgemoe_abi_version(void);
EDGEMOE_API const char* edgemoe_version(void);
/* An address that is the same for every user of this copy of the library in the process. */
EDGEMOE_API const void* edgemoe_instance_id(void);

/* Instruction sets that libedgemoe's kernels were compiled for, best first; NULL past the last. */
EDGEMOE_API const char* edgemoe_isa_name(int32_t idx);
EDGEMOE_API int32_t edgemoe_isa_is_supported(int32_t idx);
/* The one in use: that named by the environment's EDGEMOE_ISA (an error when it cannot be had), or the best. */
EDGEMOE_API int32_t edgemoe_isa_active(const char** name, edgemoe_error* error);
/* The format that ggml calls by that name, in capitals; EDGEMOE_FORMAT_OTHER for all others. */
EDGEMOE_API int32_t edgemoe_format_find(const char* ggml_name);

/* Sizes of slots for options->tensors; options->file_paths is not read. */
EDGEMOE_API int32_t edgemoe_measure(const edgemoe_options* options, edgemoe_sizes* sizes, edgemoe_error* error);

/* Open the files and check every extent against them. The runtime starts with one reference. */
EDGEMOE_API int32_t edgemoe_runtime_open(const edgemoe_options* options, edgemoe_runtime** runtime,
                                         edgemoe_error* error);
EDGEMOE_API void edgemoe_runtime_retain(edgemoe_runtime* runtime);
EDGEMOE_API void edgemoe_runtime_release(edgemoe_runtime* runtime);
/* Index of the tensor of that name, or -1. */
EDGEMOE_API int32_t edgemoe_runtime_find_tensor(const edgemoe_runtime* runtime, const char* name);
/* 1: its products are computed by libedgemoe's kernels, 0: by the plug-in's. */
EDGEMOE_API int32_t edgemoe_runtime_is_own(const edgemoe_runtime* runtime, int32_t tensor_idx);
/* Grow or shrink the slots; what no longer fits is evicted, coldest first. Waits for a layer in progress. */
EDGEMOE_API int32_t edgemoe_runtime_set_slots_bytes(edgemoe_runtime* runtime, uint64_t slots_bytes,
                                                    edgemoe_error* error);
EDGEMOE_API void edgemoe_runtime_stats(edgemoe_runtime* runtime, edgemoe_stats* stats);
EDGEMOE_API void edgemoe_runtime_reset_stats(edgemoe_runtime* runtime);
/* The first failed read or session call since the last time, taken away; code EDGEMOE_OK when there was none. */
EDGEMOE_API void edgemoe_runtime_take_error(edgemoe_runtime* runtime, edgemoe_error* error);

/* Bytes [offset, offset + length) of a file, read to `to`; all three are multiples of 4096, and the file may end
 * inside the last page of the range. */
typedef struct edgemoe_range {
  uint64_t offset;
  uint64_t length;
  void* to;
} edgemoe_range;
/* Read ranges with the same direct reads as experts, n_threads at a time. */
EDGEMOE_API int32_t edgemoe_read_ranges(const char* path, const edgemoe_range* ranges, int32_t n_ranges,
                                        int32_t n_threads, edgemoe_error* error);

EDGEMOE_API int32_t edgemoe_session_create(edgemoe_runtime* runtime, const edgemoe_kernels* kernels,
                                           edgemoe_session** session, edgemoe_error* error);
EDGEMOE_API void edgemoe_session_destroy(edgemoe_session* session);
EDGEMOE_API void edgemoe_session_set_threads(edgemoe_session* session, int32_t n_threads);
/* One layer of one batch: which experts the router chose, and the tensors that will multiply, in the order of use.
 * ids: [n_tokens][n_used], more in selection.h, rows `ids_token_bytes` apart. Reads begin with the first product. */
EDGEMOE_API int32_t edgemoe_session_begin_layer(edgemoe_session* session, const int32_t* ids, int64_t n_tokens,
                                                int64_t n_used, uint64_t ids_token_bytes, const int32_t* tensor_idxs,
                                                int32_t n_tensors, edgemoe_error* error);
/* Products that do not depend on each other; experts already resident are computed while others load. */
EDGEMOE_API int32_t edgemoe_session_matmul(edgemoe_session* session, const edgemoe_matmul* matmuls, int32_t n_matmuls,
                                           edgemoe_error* error);
EDGEMOE_API int32_t edgemoe_session_ffn(edgemoe_session* session, const edgemoe_ffn* ffn, edgemoe_error* error);
EDGEMOE_API void edgemoe_session_end_layer(edgemoe_session* session);

#ifdef __cplusplus
}
#endif
#endif /* EDGEMOE_EDGEMOE_H_ */
