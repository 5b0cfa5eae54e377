// SPDX-License-Identifier: MIT
// qmoe_model.h: the QMoE nodes of one session, over one runtime of libedgemoe: runs them, layer by layer.
// Scales and zero points are tensors of their own in an ONNX file. Those of the experts that a layer has chosen are
// copied out of their slots where those may come and go, so that the products with the weights find them; slots that
// stay, as those of experts that were resident, are read in place.
// Thread promise: Run may be called by several threads; they take turns, and so share one workspace.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MODEL_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MODEL_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "edgemoe/edgemoe.h"
#include "plugins/onnxruntime/choosers.h"
#include "plugins/onnxruntime/ort_api.h"
#include "plugins/onnxruntime/qmoe_node.h"
#include "plugins/onnxruntime/routers.h"
#include "simd/kernel_table.h"
#include "simd/qmoe.h"

namespace edgemoe_ort {

struct ModelOptions {
  bool has_slots_bytes = false;
  uint64_t slots_bytes = 0;
  int n_threads = 1;
  int n_io_threads = 4;
  int eviction = EDGEMOE_EVICT_AUTO;
  int prefetch_depth = 2;
  bool is_prefetch_adaptive = true;
  ChooserOptions choosers;
};

class QmoeModel {
 public:
  // folder: of the .onnx file, to which the paths of its external data are relative.
  // routers: [node], known or not; or none.
  QmoeModel(const Ort* ort, const std::string& folder, std::vector<QmoeNode> nodes, std::vector<Router> routers,
            const ModelOptions& options);
  ~QmoeModel();
  QmoeModel(const QmoeModel&) = delete;
  QmoeModel& operator=(const QmoeModel&) = delete;

  // Positions of a node's inputs among those of the call; router_weights -1: none.
  struct InputIdxs {
    int x = 0;
    int router = 1;
    int router_weights = -1;
  };
  void Run(size_t node_idx, const InputIdxs& inputs, OrtKernelContext* context);

  edgemoe_runtime* runtime() const { return runtime_; }
  size_t n_nodes() const { return nodes_.size(); }
  uint64_t workspace_bytes() const { return workspace_bytes_; }
  uint64_t kept_bytes() const { return kept_bytes_; }
  const std::shared_ptr<Choosers>& choosers() const { return choosers_; }
  std::vector<edgemoe_ort_tensor> Tensors() const;

 private:
  // What a product reads or writes; the `type` of edgemoe_matmul.
  enum Product : int32_t { kWeights1, kScales1, kZeroPoints1, kWeights2, kScales2, kZeroPoints2, kNProducts };
  struct Layer {
    int32_t tensor_idxs[kNProducts];  // -1: not streamed
    int64_t max_tokens = 0;           // computed at once
  };

  // An input of a call, floats or halves.
  struct Numbers {
    const void* data = nullptr;
    bool is_half = false;
  };

  static const ExpertBytes& BytesOf(const QmoeNode& node, int product);
  void AddTensor(const std::string& folder, size_t node_idx, int product);
  void OpenRuntime(const ModelOptions& options, const std::vector<Router>& routers);
  void SizeWorkspace();
  Numbers Input(int idx, const std::string& name, std::vector<int64_t>* dims) const;
  // n of them from `first` on, as floats; `copy` holds them if they have to be made. Null where there are none.
  static const float* Floats(const Numbers& numbers, int64_t first, int64_t n, std::vector<float>* copy);
  void RunTokens(const float* x, const float* scores, const float* router_weights, int64_t n_tokens, float* out);
  edgemoe_matmul Matmul(int product) const;
  void Products(const int* products, int n_products);
  void Multiply(const edgemoe_product& product);
  void Prepare(int32_t product, const float* x, void* panel);
  void Combine(int64_t token, float* out);
  uint64_t SideRowBytes(int product) const;
  void Check(int32_t code, const edgemoe_error& error) const;
  template <typename Fn>
  void ForEach(int64_t n, Fn fn);
  static void Parallel(void* self, int32_t n_threads, void (*fn)(void*, int32_t, int32_t), void* arg);

  const Ort& ort_;
  std::vector<QmoeNode> nodes_;
  std::vector<Layer> layers_;
  std::vector<std::string> tensor_names_;
  std::vector<edgemoe_tensor> tensors_;
  std::vector<std::string> paths_;
  edgemoe_runtime* runtime_ = nullptr;
  edgemoe_session* session_ = nullptr;
  const int n_threads_;
  const edgemoe::simd::KernelTable& table_;
  uint64_t workspace_bytes_ = 0;
  uint64_t kept_bytes_ = 0;
  std::shared_ptr<Choosers> choosers_;

  // The layer in progress, and the workspace of all.
  std::mutex mutex_;
  const QmoeNode* node_ = nullptr;
  const Layer* layer_ = nullptr;
  const OrtKernelContext* context_ = nullptr;
  const float* x_ = nullptr;
  bool is_decode_ = false;    // one row: choosers have a say
  bool copies_only_ = false;  // the products in progress have no weights
  std::vector<std::pair<float, int32_t>> order_;
  std::vector<int32_t> experts_;                       // [token][used]
  std::vector<float> weights_;                         // [token][used]
  std::vector<int32_t> place_;                         // [expert] where its sides are copied to
  std::vector<float> rows1_;                           // [token][used][fc1.n_rows]
  std::vector<float> rows2_;                           // [token][used][hidden]
  std::vector<const float*> row2_ptrs_;                // [token][used] rows of rows2_
  std::vector<uint8_t> sides_[kNProducts];             // [place][expert_bytes] of scales and zero points
  std::vector<const uint8_t*> side_ptrs_[kNProducts];  // [place] where those of one expert are
  // Copies of 16-bit inputs, and the output before it is rounded.
  std::vector<float> x_floats_, scores_floats_, mixing_floats_, out_floats_;
};

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_QMOE_MODEL_H_
