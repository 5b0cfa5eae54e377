// SPDX-License-Identifier: MIT
// ggml_paths.h: the same products by ggml: its dot products called directly, and graphs of MUL_MAT and MUL_MAT_ID with
// weights as they lie in the file or repacked, which is llama.cpp's default.
#ifndef EDGEMOE_BENCHMARKS_GGML_PATHS_H_
#define EDGEMOE_BENCHMARKS_GGML_PATHS_H_

#include <memory>
#include <vector>

#include "benchmarks/workload.h"
#include "ggml-backend.h"

namespace edgemoe::bench {

struct GgmlDeleter {
  void operator()(ggml_context* p) const { ggml_free(p); }
  void operator()(ggml_backend_buffer* p) const { ggml_backend_buffer_free(p); }
  void operator()(ggml_backend* p) const { ggml_backend_free(p); }
};
using GgmlContext = std::unique_ptr<ggml_context, GgmlDeleter>;
using GgmlBuffer = std::unique_ptr<ggml_backend_buffer, GgmlDeleter>;
using GgmlBackend = std::unique_ptr<ggml_backend, GgmlDeleter>;

// One activation row times the matrices of `order` by vec_dot, over OpenMP's pool. Returns seconds.
// y: [order.size()][kRows].
double VecDotDecode(const Bank& bank, const std::vector<int32_t>& order, const float* x, float* y, int n_threads);

// A bank as one tensor of experts, and its first matrices as tensors of their own.
class GgmlWeights {
 public:
  // Repacked: by the first of the CPU's extra buffer types that takes the operation; none: is_there() is false.
  GgmlWeights(const Bank& bank, bool repacked, int64_t n_single);
  bool is_there() const { return experts_ != nullptr; }
  const char* buffer_name() const { return ggml_backend_buft_name(buffer_type_); }
  ggml_tensor* experts() const { return experts_; }
  ggml_tensor* single(int64_t i) const { return single_[static_cast<size_t>(i)]; }

 private:
  ggml_backend_buffer_type_t buffer_type_ = nullptr;
  GgmlContext context_;
  GgmlBuffer buffer_;
  ggml_tensor* experts_ = nullptr;
  std::vector<ggml_tensor*> single_;
};

// A graph that is run again and again. Many nodes each, so that what a call costs does not show.
class GgmlGraph {
 public:
  // One activation row times all matrices of `order`, 8 experts in a MUL_MAT_ID as OLMoE's layer has.
  static GgmlGraph Decode(const GgmlWeights& weights, const std::vector<int32_t>& order, const float* x);
  // n_tokens rows of x for each of the first n_experts matrices, n_repeats times: by a MUL_MAT for each, or
  // (by_id) by one MUL_MAT_ID for all, which is what llama.cpp computes for routed experts.
  static GgmlGraph Prefill(const GgmlWeights& weights, bool by_id, int64_t n_experts, int64_t n_tokens, int n_repeats,
                           const float* x);

  double Run(int n_threads);  // seconds
  // Results of the last node: kRows for the last matrix (Decode); for Prefill [n_tokens][kRows] of the last
  // matrix, or (by_id) of all.
  std::vector<float> Results() const;

 private:
  GgmlGraph(size_t n_nodes, size_t n_inputs);
  void Allocate();

  GgmlBackend backend_;
  GgmlContext context_;
  GgmlBuffer buffer_;
  ggml_cgraph* graph_ = nullptr;
  ggml_tensor* last_ = nullptr;
};

}  // namespace edgemoe::bench
#endif  // EDGEMOE_BENCHMARKS_GGML_PATHS_H_
