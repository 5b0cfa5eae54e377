// SPDX-License-Identifier: MIT
// moe_region.h: computes one split of a ggml graph. Products with expert weights go to libedgemoe: a whole feed-forward
// block at once where it is recognized and libedgemoe's own kernels have the formats, else grouped so that gate and
// up of a layer run together. Every other node is computed by an inner CPU backend, as it stands.
// Works on structure alone: expert products that share one tensor of ids belong to one layer.
// Thread promise: one thread, like the ggml backend that owns it.
#ifndef EDGEMOE_PLUGINS_GGML_MOE_REGION_H_
#define EDGEMOE_PLUGINS_GGML_MOE_REGION_H_

#include <memory>
#include <utility>
#include <vector>

#include "edgemoe/edgemoe.h"
#include "plugins/ggml/ffn_match.h"
#include "plugins/ggml/ggml_abi.h"
#include "plugins/ggml/kernels.h"

namespace edgemoe_ggml {

class MoeRegion {
 public:
  MoeRegion();
  ~MoeRegion();
  MoeRegion(const MoeRegion&) = delete;
  MoeRegion& operator=(const MoeRegion&) = delete;

  void SetThreads(int n_threads);
  ggml_status Compute(ggml_cgraph* graph);

 private:
  ggml_status ComputeOthers(ggml_cgraph* graph, int begin, int end);
  ggml_status ComputeProducts(ggml_cgraph* graph, int first);
  bool BeginLayer(ggml_cgraph* graph, int first);
  void EndLayer();
  edgemoe_session* SessionOf(edgemoe_runtime* runtime);

  ggml_backend_t cpu_;
  int n_threads_ = 1;
  GgmlKernels kernels_;
  std::vector<std::pair<edgemoe_runtime*, edgemoe_session*>> sessions_;
  edgemoe_session* layer_session_ = nullptr;
  const ggml_tensor* layer_ids_ = nullptr;
  std::vector<int32_t> tensor_idxs_;
  std::vector<edgemoe_matmul> matmuls_;
  FfnMatch ffn_;
  std::vector<char> done_;  // [node] computed ahead of its place
};

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_MOE_REGION_H_
