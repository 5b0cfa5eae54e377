// SPDX-License-Identifier: MIT
#include "benchmarks/ggml_paths.h"

#include <atomic>
#include <cstdlib>

#include "ggml-alloc.h"
#include "ggml-cpu.h"

namespace edgemoe::bench {
namespace {

constexpr int64_t kExpertsUsed = 8;

ggml_init_params NoData(size_t n_tensors, size_t n_nodes) {
  return {ggml_tensor_overhead() * n_tensors + (n_nodes > 0 ? ggml_graph_overhead_custom(n_nodes, false) : 0), nullptr,
          true};
}

// Whether `type` takes matrices like this as experts of a MUL_MAT_ID; asked as llama.cpp's loader asks.
bool Takes(ggml_backend_buffer_type_t type, ggml_backend_dev_t device, ggml_type weights_type) {
  const GgmlContext context(ggml_init(NoData(8, 0)));
  ggml_tensor* weights = ggml_new_tensor_3d(context.get(), weights_type, kCols, kRows, kExpertsUsed);
  ggml_tensor* x = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, kCols, 1, 1);
  ggml_tensor* ids = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, kExpertsUsed, 1);
  ggml_tensor* product = ggml_mul_mat_id(context.get(), weights, x, ids);
  const GgmlBuffer empty(ggml_backend_buft_alloc_buffer(type, 0));
  weights->buffer = empty.get();
  return ggml_backend_dev_supports_op(device, product);
}

ggml_backend_buffer_type_t FindRepacking(ggml_type weights_type) {
  ggml_backend_reg_t registry = ggml_backend_cpu_reg();
  ggml_backend_dev_t device = ggml_backend_reg_dev_get(registry, 0);
  const auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
  if (get == nullptr) return nullptr;
  for (ggml_backend_buffer_type_t* type = get(device); type != nullptr && *type != nullptr; ++type) {
    if (Takes(*type, device, weights_type)) return *type;
  }
  return nullptr;
}

}  // namespace

double VecDotDecode(const Bank& bank, const std::vector<int32_t>& order, const float* x, float* y, int n_threads) {
  const ggml_type_traits_cpu* traits = ggml_get_type_traits_cpu(GgmlTypeOf(bank.format));
  const ggml_from_float_t from_float = ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
  std::vector<uint8_t> row(ggml_row_size(traits->vec_dot_type, kCols));
  const size_t row_bytes = bank.matrix_bytes / kRows;
  std::atomic<int64_t> next{0};
  const int64_t n = static_cast<int64_t>(order.size());
  double begin = 0, end = 0;
#pragma omp parallel num_threads(n_threads)
  {
#pragma omp barrier
#pragma omp master
    {
      begin = NowSeconds();
      from_float(x, row.data(), kCols);
    }
#pragma omp barrier
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      const uint8_t* weights = bank.Matrix(order[static_cast<size_t>(i)]);
      for (int64_t r = 0; r < kRows; ++r, weights += row_bytes)
        traits->vec_dot(static_cast<int>(kCols), y + i * kRows + r, 0, weights, 0, row.data(), 0, 1);
    }
#pragma omp barrier
#pragma omp master
    end = NowSeconds();
  }
  return end - begin;
}

GgmlWeights::GgmlWeights(const Bank& bank, bool repacked, int64_t n_single) {
  const ggml_type type = GgmlTypeOf(bank.format);
  buffer_type_ = repacked ? FindRepacking(type) : ggml_backend_cpu_buffer_type();
  if (buffer_type_ == nullptr) return;
  const int64_t n_matrices = bank.n_matrices;
  context_.reset(ggml_init(NoData(static_cast<size_t>(n_single) + 1, 0)));
  experts_ = ggml_new_tensor_3d(context_.get(), type, kCols, kRows, n_matrices);
  for (int64_t i = 0; i < n_single; ++i) single_.push_back(ggml_new_tensor_2d(context_.get(), type, kCols, kRows));
  if (!repacked) {  // where they are, and in pages as large as ours
    uint8_t* bytes = bank.bytes.get();
    buffer_.reset(ggml_backend_cpu_buffer_from_ptr(bytes, bank.TotalBytes()));
    ggml_backend_tensor_alloc(buffer_.get(), experts_, bytes);
    for (int64_t i = 0; i < n_single; ++i)
      ggml_backend_tensor_alloc(buffer_.get(), single_[static_cast<size_t>(i)],
                                bytes + static_cast<size_t>(i) * bank.matrix_bytes);
    return;
  }
  buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), buffer_type_));
  AdviseHuge(ggml_backend_buffer_get_base(buffer_.get()), ggml_backend_buffer_get_size(buffer_.get()));
  ggml_backend_tensor_set(experts_, bank.bytes.get(), 0, bank.TotalBytes());
  for (int64_t i = 0; i < n_single; ++i)
    ggml_backend_tensor_set(single_[static_cast<size_t>(i)], bank.Matrix(i), 0, bank.matrix_bytes);
}

GgmlGraph::GgmlGraph(size_t n_nodes, size_t n_inputs) : backend_(ggml_backend_cpu_init()) {
  context_.reset(ggml_init(NoData(n_nodes + n_inputs, n_nodes + n_inputs)));
  graph_ = ggml_new_graph_custom(context_.get(), n_nodes + n_inputs, false);
}

void GgmlGraph::Allocate() {
  buffer_.reset(ggml_backend_alloc_ctx_tensors(context_.get(), backend_.get()));
  if (buffer_ == nullptr) std::abort();
}

GgmlGraph GgmlGraph::Decode(const GgmlWeights& weights, const std::vector<int32_t>& order, const float* x) {
  const size_t n_nodes = order.size() / kExpertsUsed;
  GgmlGraph graph(n_nodes, n_nodes + 1);
  ggml_context* context = graph.context_.get();
  ggml_tensor* row = ggml_new_tensor_3d(context, GGML_TYPE_F32, kCols, 1, 1);
  std::vector<ggml_tensor*> ids;
  for (size_t i = 0; i < n_nodes; ++i) {
    ids.push_back(ggml_new_tensor_2d(context, GGML_TYPE_I32, kExpertsUsed, 1));
    graph.last_ = ggml_mul_mat_id(context, weights.experts(), row, ids[i]);
    ggml_build_forward_expand(graph.graph_, graph.last_);
  }
  graph.Allocate();
  ggml_backend_tensor_set(row, x, 0, ggml_nbytes(row));
  for (size_t i = 0; i < n_nodes; ++i)
    ggml_backend_tensor_set(ids[i], order.data() + i * kExpertsUsed, 0, ggml_nbytes(ids[i]));
  return graph;
}

GgmlGraph GgmlGraph::Prefill(const GgmlWeights& weights, bool by_id, int64_t n_experts, int64_t n_tokens, int n_repeats,
                             const float* x) {
  const auto n_nodes = static_cast<size_t>(by_id ? n_repeats : n_repeats * n_experts);
  GgmlGraph graph(n_nodes, static_cast<size_t>(n_experts) + 2);
  ggml_context* context = graph.context_.get();
  std::vector<ggml_tensor*> inputs;
  ggml_tensor* ids = nullptr;
  if (by_id) {
    inputs.push_back(ggml_new_tensor_3d(context, GGML_TYPE_F32, kCols, 1, n_experts * n_tokens));
    ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, 1, n_experts * n_tokens);
  } else {
    for (int64_t i = 0; i < n_experts; ++i)
      inputs.push_back(ggml_new_tensor_2d(context, GGML_TYPE_F32, kCols, n_tokens));
  }
  for (size_t i = 0; i < n_nodes; ++i) {
    const auto expert = static_cast<int64_t>(i) % n_experts;
    graph.last_ = by_id ? ggml_mul_mat_id(context, weights.experts(), inputs[0], ids)
                        : ggml_mul_mat(context, weights.single(expert), inputs[static_cast<size_t>(expert)]);
    ggml_build_forward_expand(graph.graph_, graph.last_);
  }
  graph.Allocate();
  for (size_t i = 0; i < inputs.size(); ++i)
    ggml_backend_tensor_set(inputs[i], x + i * static_cast<size_t>(n_tokens * kCols), 0, ggml_nbytes(inputs[i]));
  if (by_id) {
    std::vector<int32_t> chosen(static_cast<size_t>(n_experts * n_tokens));
    for (size_t i = 0; i < chosen.size(); ++i) chosen[i] = static_cast<int32_t>(static_cast<int64_t>(i) / n_tokens);
    ggml_backend_tensor_set(ids, chosen.data(), 0, ggml_nbytes(ids));
  }
  return graph;
}

double GgmlGraph::Run(int n_threads) {
  ggml_backend_cpu_set_n_threads(backend_.get(), n_threads);
  const double begin = NowSeconds();
  if (ggml_backend_graph_compute(backend_.get(), graph_) != GGML_STATUS_SUCCESS) std::abort();
  return NowSeconds() - begin;
}

std::vector<float> GgmlGraph::Results() const {
  std::vector<float> all(static_cast<size_t>(ggml_nelements(last_)));
  ggml_backend_tensor_get(last_, all.data(), 0, ggml_nbytes(last_));
  return all;
}

}  // namespace edgemoe::bench
