// SPDX-License-Identifier: MIT
// choosers.h: which experts a token gets where that is not left to the model: how many, with what advantage for those
// that need not be read, and whether a missing one is left out (edgemoe/selection.h). They need the scores of experts
// that are not chosen; where a graph has none (they are no finite number, -10000 or less, or their mixing weight is 0),
// a bias has nothing to choose from, and the layer stays exact.
// Thread promise: Choose by one thread at a time; Read and Reset by any.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_CHOOSERS_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_CHOOSERS_H_

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "edgemoe/selection.h"
#include "plugins/onnxruntime/edgemoe_ort.h"
#include "plugins/onnxruntime/qmoe_node.h"
#include "plugins/onnxruntime/routers.h"

namespace edgemoe_ort {

struct ChooserOptions {
  bool has_reuse = false;
  double reuse_bias = 0.0;
  int reuse_method = EDGEMOE_REUSE_CACHE_PRIOR;
  int top_j = 0;  // 0: 1 where experts are few, else 2
  double max_mass_moved = 0.2, max_kl = 0.1;
  bool has_count = false;
  int count_rule = EDGEMOE_COUNT_OF_LAYER;
  int n_of_layer = 0;
  double top_p = 1.0;
  int n_min = 1, n_max = 0;  // n_max 0: the model's
  bool skips = false;
  double on_miss_mass = 0.6;

  bool any() const { return has_reuse || has_count || skips; }
};

class Choosers {
 public:
  // Layer i is nodes[i], its router routers[i], known or not.
  Choosers(const ChooserOptions& options, const std::vector<QmoeNode>& nodes, const std::vector<Router>& routers);
  ~Choosers();
  Choosers(const Choosers&) = delete;
  Choosers& operator=(const Choosers&) = delete;

  // One token's experts [node.n_used], EDGEMOE_NO_EXPERT where there is none. scores, router_weights: [n_experts],
  // the latter null where the mixing weights are the softmax of the chosen scores.
  void Choose(edgemoe_runtime* runtime, int32_t layer, const QmoeNode& node, const float* scores,
              const float* router_weights, int32_t* experts);
  void CountTokens(int64_t n_tokens);
  // For edgemoe_session_set_choosers.
  edgemoe_choosers native() const { return {count_, reuse_, miss_}; }
  bool any() const { return count_ != nullptr || reuse_ != nullptr || miss_ != nullptr; }
  void Read(edgemoe_ort_counters* counters) const;
  void Reset();

 private:
  void Open(const ChooserOptions& options, const std::vector<QmoeNode>& nodes);
  void Close();

  edgemoe_count* count_ = nullptr;
  edgemoe_reuse* reuse_ = nullptr;
  edgemoe_miss* miss_ = nullptr;
  std::vector<char> are_probabilities_;  // [layer]
  std::vector<uint8_t> resident_;
  std::vector<int32_t> order_;
  std::vector<float> scores_;
  mutable std::mutex mutex_;  // of what is above and below
  uint64_t n_tokens_ = 0;
};

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_CHOOSERS_H_
