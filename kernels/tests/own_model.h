// SPDX-License-Identifier: MIT
// own_model.h: a layer of tensors in formats that libedgemoe's own kernels multiply, in a file in memory, and the
// portable table on the rows as they lie in it.
#ifndef EDGEMOE_TESTS_OWN_MODEL_H_
#define EDGEMOE_TESTS_OWN_MODEL_H_

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/arithmetic.h"
#include "core/runtime.h"
#include "tests/fakes.h"

namespace edgemoe::test {

inline constexpr int kOwnExperts = 8;

// Random bytes of blocks whose 16-bit scales are finite: every byte above 0x3f is kept out of them by halving.
inline std::vector<char> RandomWeights(std::mt19937* rng, simd::Format format, int64_t n_rows, int64_t n_cols) {
  std::vector<char> bytes(static_cast<size_t>(n_rows * simd::RowBytes(format, n_cols)));
  for (char& b : bytes) b = static_cast<char>((*rng)() % 64);
  return bytes;
}

struct Matrix {
  simd::Format format;
  int64_t n_rows, n_cols;
};

struct SessionDestroy {
  void operator()(edgemoe_session* session) const { edgemoe_session_destroy(session); }
};
using SessionPtr = std::unique_ptr<edgemoe_session, SessionDestroy>;

inline SessionPtr NewSession(edgemoe_runtime* runtime, int n_threads) {
  const edgemoe_kernels kernels = ToyKernels();
  edgemoe_session* session = nullptr;
  EXPECT_EQ(edgemoe_session_create(runtime, &kernels, &session, nullptr), EDGEMOE_OK);
  edgemoe_session_set_threads(session, n_threads);
  return SessionPtr(session);
}

// One layer of gate, up and down (or up and down, or up alone) in a file in memory.
class OwnModel {
 public:
  // copies: formats of low-bit copies, as many as matrices or none; they are tensors behind the others.
  OwnModel(const std::vector<Matrix>& matrices, uint64_t first_offset, const std::vector<simd::Format>& copies = {})
      : matrices_(WithCopies(matrices, copies)) {
    std::mt19937 rng(3);
    std::vector<char> bytes(first_offset);
    for (size_t i = 0; i < matrices_.size(); ++i) {
      const Matrix& m = matrices_[i];
      edgemoe_tensor t = {};
      t.name = kNames[i];
      t.n_experts = kOwnExperts;
      t.n_experts_used = 2;
      t.offset = bytes.size();
      t.expert_bytes = static_cast<uint64_t>(m.n_rows * simd::RowBytes(m.format, m.n_cols));
      t.n_rows = m.n_rows;
      t.n_cols = m.n_cols;
      t.format = m.format;
      t.copy_of = i < matrices.size() ? 0 : static_cast<int32_t>(i - matrices.size()) + 1;
      const std::vector<char> weights = RandomWeights(&rng, m.format, m.n_rows * kOwnExperts, m.n_cols);
      bytes.insert(bytes.end(), weights.begin(), weights.end());
      tensors_.push_back(t);
    }
    storage_ = std::make_unique<FakeStorage>(std::move(bytes));
  }

  std::vector<edgemoe_tensor>& tensors() { return tensors_; }

  edgemoe_options Options(edgemoe_arithmetic arithmetic) {
    static const char* const kPath = "own.gguf";
    edgemoe_options options = {};
    options.struct_size = sizeof(options);
    options.n_files = 1;
    options.file_paths = &kPath;
    options.n_tensors = static_cast<int32_t>(tensors_.size());
    options.n_io_threads = 2;
    options.tensors = tensors_.data();
    options.arithmetic = arithmetic;
    return options;
  }

  // n_slots_each: as many slots of each tensor, where no class has low-bit copies; the same bytes otherwise.
  RuntimePtr Open(uint64_t n_slots_each, edgemoe_arithmetic arithmetic = EDGEMOE_ARITHMETIC_AUTO) {
    edgemoe_options options = Options(arithmetic);
    std::vector<ExpertTensor> described;
    EXPECT_TRUE(ExpertFile::Describe(options, &described).ok());
    for (const ExpertTensor& t : described) options.slots_bytes += n_slots_each * SlotBytes(t);
    edgemoe_runtime* runtime = nullptr;
    const Status s = OpenRuntime(options, storage_->Opener(), &runtime);
    EXPECT_TRUE(s.ok()) << s.message();
    return RuntimePtr(runtime);
  }
  Status TryToOpen(edgemoe_arithmetic arithmetic = EDGEMOE_ARITHMETIC_AUTO) {
    edgemoe_options options = Options(arithmetic);
    options.slots_bytes = UINT64_MAX;
    edgemoe_runtime* runtime = nullptr;
    const Status s = OpenRuntime(options, storage_->Opener(), &runtime);
    if (runtime != nullptr) edgemoe_runtime_release(runtime);
    return s;
  }

  const Matrix& matrix(size_t i) const { return matrices_[i]; }

  edgemoe_matmul Matmul(size_t i, const float* x, int64_t x_n_used, float* y, int64_t n_used) const {
    edgemoe_matmul m = {};
    m.tensor_idx = static_cast<int32_t>(i);
    m.n_cols = matrices_[i].n_cols;
    m.n_rows = matrices_[i].n_rows;
    m.row_bytes = static_cast<uint64_t>(simd::RowBytes(matrices_[i].format, m.n_cols));
    m.x = x;
    m.x_n_used = x_n_used;
    m.x_used_bytes = static_cast<uint64_t>(m.n_cols) * sizeof(float);
    m.x_token_bytes = m.x_used_bytes * static_cast<uint64_t>(x_n_used);
    m.y = y;
    m.y_used_bytes = static_cast<uint64_t>(m.n_rows) * sizeof(float);
    m.y_token_bytes = m.y_used_bytes * static_cast<uint64_t>(n_used);
    return m;
  }

  // One expert's matrix times one row of floats, by the portable table.
  std::vector<float> Product(size_t i, int32_t expert, const float* x) const {
    const Matrix& m = matrices_[i];
    std::vector<char> panel(static_cast<size_t>(simd::PanelBytes(simd::Info(m.format).activation, m.n_cols, 1)));
    simd::Portable().quantize[simd::Info(m.format).activation](x, panel.data(), m.n_cols);
    std::vector<float> y(static_cast<size_t>(m.n_rows));
    float* const rows[] = {y.data()};
    const edgemoe_tensor& t = tensors_[i];
    simd::Portable().multiply[m.format][0]({reinterpret_cast<const uint8_t*>(storage_->bytes.data()) + t.offset +
                                                static_cast<uint64_t>(expert) * t.expert_bytes,
                                            m.n_rows, m.n_cols, panel.data(), rows});
    return y;
  }

 private:
  static std::vector<Matrix> WithCopies(std::vector<Matrix> matrices, const std::vector<simd::Format>& copies) {
    for (size_t i = 0; i < copies.size(); ++i) matrices.push_back({copies[i], matrices[i].n_rows, matrices[i].n_cols});
    return matrices;
  }

  static constexpr const char* kNames[] = {"blk.0.a",      "blk.0.b",      "blk.0.c",
                                           "blk.0.a copy", "blk.0.b copy", "blk.0.c copy"};
  const std::vector<Matrix> matrices_;
  std::vector<edgemoe_tensor> tensors_;
  std::unique_ptr<FakeStorage> storage_;
};

}  // namespace edgemoe::test
#endif  // EDGEMOE_TESTS_OWN_MODEL_H_
