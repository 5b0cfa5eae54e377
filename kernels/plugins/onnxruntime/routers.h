// SPDX-License-Identifier: MIT
// routers.h: the router in front of a QMoE node, found in the graph: from the scores back, through what does not change
// the order of experts or shifts it by a constant, to the product of the node's own input with a constant matrix.
// It predicts the layer's experts from an earlier layer's hidden state, so what cannot be found costs speed alone.
// Thread promise: one thread; a GraphRouters lives no longer than its graph.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_ROUTERS_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_ROUTERS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "edgemoe/edgemoe.h"
#include "plugins/onnxruntime/ort_api.h"

namespace edgemoe_ort {

struct Router {
  bool is_known = false;
  bool is_sigmoid = false;
  // What the node's scores are.
  bool are_logits = true;          // a product, with a bias or not
  bool are_probabilities = false;  // a softmax as it came
  bool are_of_chosen = false;      // those of chosen experts, scattered among ones that say nothing
  int64_t n_experts = 0;
  int64_t n_cols = 0;
  // Empty unless their values were asked for.
  std::vector<float> weights;  // [n_experts][n_cols]
  std::vector<float> norm;     // [n_cols] of the hidden state before it; empty: none was found
  std::vector<float> bias;     // [n_experts] added to what experts are ranked by; empty: none
};

class GraphRouters {
 public:
  GraphRouters(const Ort& ort, const OrtGraph* graph);
  // Of the QMoE node `moe` with so many experts and columns. with_data: read the values, too.
  Router Find(const OrtNode* moe, int64_t n_experts, int64_t hidden, bool with_data) const;

 private:
  struct Producer {
    std::string type;  // "::Gemm", "com.microsoft::MatMulNBits"
    std::vector<ValueInfo> inputs;
    const OrtNode* node = nullptr;
  };
  bool ProducerOf(const std::string& value, Producer* producer) const;
  // Back over nodes that change a value's shape or type alone.
  std::string Origin(std::string value) const;
  // The input of a sigmoid that is written as 1 / (1 + exp(-x)); "": `p` ends none.
  std::string SigmoidInput(const Producer& p) const;
  bool Walk(const OrtNode* moe, int64_t n_experts, int64_t hidden, bool with_data, Router* router) const;
  bool ReadProduct(const Producer& product, const std::string& x, bool with_data, Router* router) const;
  bool ReadMatrix(const ValueInfo& matrix, bool is_transposed, bool with_data, Router* router) const;
  bool ReadPacked(const Producer& product, bool with_data, Router* router) const;
  void ReadNorm(const std::string& x, Router* router) const;
  std::vector<uint8_t> Bytes(const ValueInfo& constant, uint64_t n_bytes) const;
  // Of a constant of float32 or float16 of n elements; empty: it is none.
  std::vector<float> Floats(const ValueInfo& constant, int64_t n) const;

  const Ort& ort_;
  const std::string folder_;
  std::map<std::string, const OrtNode*> producer_of_;
};

// Predict with the routers that are known, layer i's being routers[i]: up to max_depth layers ahead, if adaptive as
// many as pay. Returns for how many layers.
int StartPrefetch(edgemoe_runtime* runtime, const std::vector<Router>& routers, int max_depth, bool is_adaptive);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_ROUTERS_H_
