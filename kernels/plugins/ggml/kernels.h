// SPDX-License-Identifier: MIT
// kernels.h: ggml's arithmetic as an edgemoe_kernels table: its dot products for a few activation rows, its own
// MUL_MAT_ID on one expert for many. Each output element is computed by the same ggml code as in an unmodified
// llama.cpp without repacking, so the bits are the same. Threads are OpenMP's, shared with ggml's CPU backend.
// Thread promise: multiply may run on several threads at once with distinct thread indices.
#ifndef EDGEMOE_PLUGINS_GGML_KERNELS_H_
#define EDGEMOE_PLUGINS_GGML_KERNELS_H_

#include <memory>
#include <vector>

#include "edgemoe/edgemoe.h"

namespace edgemoe_ggml {

class ExpertMultiplier;

class GgmlKernels {
 public:
  GgmlKernels();
  ~GgmlKernels();
  GgmlKernels(const GgmlKernels&) = delete;
  GgmlKernels& operator=(const GgmlKernels&) = delete;

  edgemoe_kernels Table();
  // Threads that may call multiply from now on.
  void SetThreads(int n_threads);
  // To be called before each edgemoe_session_matmul: activation rows gathered earlier are stale.
  void Forget();

 private:
  std::vector<std::unique_ptr<ExpertMultiplier>> per_thread_;
};

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_KERNELS_H_
