// SPDX-License-Identifier: MIT
// ffn_match.h: recognizes a whole expert feed-forward block among the nodes of a split, by structure: products that
// share their ids, an activation of one or two of them, a product of that, and perhaps biases, mixing weights and the
// sum. What is recognized is computed by one call; what is not stays with the nodes as they are.
// Thread promise: one thread.
#ifndef EDGEMOE_PLUGINS_GGML_FFN_MATCH_H_
#define EDGEMOE_PLUGINS_GGML_FFN_MATCH_H_

#include <vector>

#include "edgemoe/edgemoe.h"
#include "plugins/ggml/ggml_abi.h"

namespace edgemoe_ggml {

class FfnMatch {
 public:
  // Look from node `first`, an expert product. True: ffn() computes the nodes covered(); of what they compute, nobody
  // outside reads anything but the result of the last, and they may run before all nodes between that is_done does
  // not mark.
  bool Find(const ggml_cgraph* graph, int first, const std::vector<char>& is_done);
  const edgemoe_ffn& ffn() const { return ffn_; }
  const std::vector<int>& covered() const { return covered_; }

 private:
  // Rows [first_row, ..) of a product, with its bias.
  struct Projection {
    const ggml_tensor* product = nullptr;
    const ggml_tensor* bias = nullptr;
    int64_t first_row = 0;
  };
  bool FindBlock(const ggml_tensor* down);
  bool SetActivation(const ggml_tensor* act, const ggml_tensor** gate, const ggml_tensor** up);
  bool FindProjection(const ggml_tensor* t, Projection* projection);
  bool FindSum(const ggml_tensor* down);
  bool IsOwnProduct(const ggml_tensor* t) const;
  bool Cover(const ggml_tensor* t);  // add a node of the block; false when it lies outside of this split
  const ggml_tensor* UserOf(const ggml_tensor* t) const;  // the first node that reads t, or null
  bool NobodyElseReads(const ggml_tensor* result) const;
  bool MayRunFirst(const std::vector<char>& is_done) const;

  const ggml_cgraph* graph_ = nullptr;
  int first_ = 0;
  const ggml_tensor* ids_ = nullptr;
  edgemoe_runtime* runtime_ = nullptr;
  edgemoe_ffn ffn_ = {};
  std::vector<int> covered_;
};

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_FFN_MATCH_H_
