// SPDX-License-Identifier: MIT
#include "plugins/ggml/kernels.h"

#include <omp.h>

#include <cstring>

#include "ggml-cpu.h"
#include "plugins/ggml/ggml_abi.h"

namespace edgemoe_ggml {
namespace {

// Activation rows from which ggml's MUL_MAT_ID is called; below, its dot products are called directly. ggml
// itself uses those dot products for fewer than 8 rows, so either way gives its bits.
constexpr int kManyRows = 4;

void SetShape(ggml_tensor* t, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1, size_t nb2,
              void* data) {
  t->type = type;
  t->ne[0] = ne0;
  t->ne[1] = ne1;
  t->ne[2] = ne2;
  t->ne[3] = 1;
  t->nb[0] = ggml_type_size(type);
  t->nb[1] = nb1;
  t->nb[2] = nb2;
  t->nb[3] = nb2 * static_cast<size_t>(ne2);
  t->data = data;
}

}  // namespace

// A graph of one MUL_MAT_ID with one expert, and the single-threaded CPU backend that runs it.
class ExpertMultiplier {
 public:
  ExpertMultiplier() {
    ggml_init_params params = {ggml_tensor_overhead() * 8 + ggml_graph_overhead_custom(8, false), nullptr, true};
    context_ = ggml_init(params);
    weights_ = ggml_new_tensor_3d(context_, GGML_TYPE_F32, 32, 1, 1);
    x_ = ggml_new_tensor_3d(context_, GGML_TYPE_F32, 32, 1, 1);
    ids_ = ggml_new_tensor_2d(context_, GGML_TYPE_I32, 1, 1);
    y_ = ggml_mul_mat_id(context_, weights_, x_, ids_);
    graph_ = ggml_new_graph_custom(context_, 8, false);
    ggml_build_forward_expand(graph_, y_);
    backend_ = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend_, 1);
  }
  ~ExpertMultiplier() {
    ggml_backend_free(backend_);
    ggml_free(context_);
  }
  ExpertMultiplier(const ExpertMultiplier&) = delete;
  ExpertMultiplier& operator=(const ExpertMultiplier&) = delete;

  void Forget() { gathered_key_ = 0; }

  void Multiply(const edgemoe_product& p) {
    const ggml_type type = static_cast<ggml_type>(p.type);
    const ggml_type x_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
    const size_t x_bytes = ggml_row_size(x_type, p.n_cols);
    const size_t n_x = static_cast<size_t>(p.n_x);
    if (gathered_key_ != p.x_key) {
      if (gathered_.size() < n_x * x_bytes) gathered_.resize(n_x * x_bytes);
      for (size_t i = 0; i < n_x; ++i) std::memcpy(gathered_.data() + i * x_bytes, p.x[i], x_bytes);
      gathered_key_ = p.x_key;
    }
    const size_t y_row = static_cast<size_t>(p.n_rows);
    if (results_.size() < n_x * y_row) results_.resize(n_x * y_row);
    if (zeros_.size() < n_x) zeros_.resize(n_x, 0);
    SetShape(weights_, type, p.n_cols, p.n_rows, 1, p.row_bytes, p.row_bytes * static_cast<size_t>(p.n_rows),
             const_cast<void*>(p.weights));
    SetShape(x_, x_type, p.n_cols, 1, p.n_x, x_bytes, x_bytes, gathered_.data());
    SetShape(ids_, GGML_TYPE_I32, 1, p.n_x, 1, sizeof(int32_t), sizeof(int32_t) * n_x, zeros_.data());
    SetShape(y_, GGML_TYPE_F32, p.n_rows, 1, p.n_x, sizeof(float) * y_row, sizeof(float) * y_row, results_.data());
    ggml_backend_graph_compute(backend_, graph_);
    for (size_t i = 0; i < n_x; ++i) std::memcpy(p.y[i], results_.data() + i * y_row, sizeof(float) * y_row);
  }

 private:
  ggml_context* context_;
  ggml_tensor* weights_;
  ggml_tensor* x_;
  ggml_tensor* ids_;
  ggml_tensor* y_;
  ggml_cgraph* graph_;
  ggml_backend_t backend_;
  uint64_t gathered_key_ = 0;
  std::vector<char> gathered_;
  std::vector<float> results_;
  std::vector<int32_t> zeros_;
};

namespace {

void MultiplyFew(const edgemoe_product& p) {
  const ggml_vec_dot_t vec_dot = ggml_get_type_traits_cpu(static_cast<ggml_type>(p.type))->vec_dot;
  const char* row = static_cast<const char*>(p.weights);
  const int n_cols = static_cast<int>(p.n_cols);
  for (int64_t r = 0; r < p.n_rows; ++r, row += p.row_bytes) {
    for (int32_t i = 0; i < p.n_x; ++i) vec_dot(n_cols, p.y[i] + r, 0, row, 0, p.x[i], 0, 1);
  }
}

void Parallel(void*, int32_t n_threads, void (*fn)(void*, int32_t, int32_t), void* arg) {
  if (n_threads <= 1) {
    fn(arg, 0, 1);
    return;
  }
#pragma omp parallel num_threads(n_threads)
  fn(arg, omp_get_thread_num(), omp_get_num_threads());
}

uint64_t ActivationRowBytes(void*, int32_t type, int64_t n_cols) {
  return ggml_row_size(ggml_get_type_traits_cpu(static_cast<ggml_type>(type))->vec_dot_type, n_cols);
}

void QuantizeRow(void*, int32_t type, const float* x, void* y, int64_t n_cols) {
  const ggml_type x_type = ggml_get_type_traits_cpu(static_cast<ggml_type>(type))->vec_dot_type;
  if (x_type == GGML_TYPE_F32) {
    std::memcpy(y, x, sizeof(float) * static_cast<size_t>(n_cols));
    return;
  }
  ggml_get_type_traits_cpu(x_type)->from_float(x, y, n_cols);
}

}  // namespace

GgmlKernels::GgmlKernels() { SetThreads(1); }
GgmlKernels::~GgmlKernels() = default;

void GgmlKernels::SetThreads(int n_threads) {
  while (per_thread_.size() < static_cast<size_t>(n_threads))
    per_thread_.push_back(std::make_unique<ExpertMultiplier>());
}

void GgmlKernels::Forget() {
  for (auto& multiplier : per_thread_) multiplier->Forget();
}

edgemoe_kernels GgmlKernels::Table() {
  edgemoe_kernels table = {};
  table.struct_size = sizeof(table);
  table.context = this;
  table.parallel = Parallel;
  table.activation_row_bytes = ActivationRowBytes;
  table.quantize_row = QuantizeRow;
  table.multiply = [](void* context, int32_t thread_idx, const edgemoe_product* product) {
    if (product->n_x < kManyRows) {
      MultiplyFew(*product);
    } else {
      static_cast<GgmlKernels*>(context)->per_thread_[static_cast<size_t>(thread_idx)]->Multiply(*product);
    }
  };
  return table;
}

}  // namespace edgemoe_ggml
