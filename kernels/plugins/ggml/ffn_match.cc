// SPDX-License-Identifier: MIT
#include "plugins/ggml/ffn_match.h"

#include <algorithm>
#include <cstring>

#include "plugins/ggml/buffers.h"
#include "plugins/ggml/nodes.h"

namespace edgemoe_ggml {
namespace {

float FloatParam(const ggml_tensor* t, int i) {
  float value;
  std::memcpy(&value, &t->op_params[i], sizeof(value));
  return value;
}

bool IsActivation(const ggml_tensor* t) {
  return t->op == GGML_OP_GLU || t->op == GGML_OP_UNARY || t->op == GGML_OP_SQR;
}

bool IsUnary(const ggml_tensor* t, ggml_unary_op op) { return t->op == GGML_OP_UNARY && t->op_params[0] == op; }

}  // namespace

bool FfnMatch::Find(const ggml_cgraph* graph, int first, const std::vector<char>& is_done) {
  graph_ = graph;
  first_ = first;
  ids_ = graph->nodes[first]->src[2];
  runtime_ = FindExpertWeights(graph->nodes[first]->src[0]).runtime;
  for (int i = first + 1; i < graph->n_nodes; ++i) {
    const ggml_tensor* node = graph->nodes[i];
    if (is_done[static_cast<size_t>(i)] || !IsOwnProduct(node) || !IsActivation(node->src[1])) continue;
    return FindBlock(node) && std::find(covered_.begin(), covered_.end(), first) != covered_.end() &&
           MayRunFirst(is_done);
  }
  return false;
}

bool FfnMatch::FindBlock(const ggml_tensor* down) {
  covered_.clear();
  ffn_ = {};
  const ggml_tensor* act = down->src[1];
  const ggml_tensor *gate_node = nullptr, *up_node = nullptr;
  if (!SetActivation(act, &gate_node, &up_node) || !Cover(act)) return false;
  Projection gate, up;
  if (!FindProjection(up_node, &up)) return false;
  if (gate_node != nullptr && !FindProjection(gate_node, &gate)) return false;
  ffn_.up = MatmulOf(up.product);
  ffn_.down = MatmulOf(down);
  const int64_t n_ff = down->src[0]->ne[0];
  if (gate_node == nullptr) {
    if (up.first_row != 0 || ffn_.up.n_rows != n_ff) return false;
  } else if (gate.product == up.product) {
    ffn_.merged = 1;
    if (gate.first_row != 0 || up.first_row != n_ff || ffn_.up.n_rows != 2 * n_ff) return false;
    if (gate.bias != up.bias) return false;
  } else {
    ffn_.gate = MatmulOf(gate.product);
    if (gate.first_row != 0 || up.first_row != 0 || ffn_.up.n_rows != n_ff || ffn_.gate.n_rows != n_ff) return false;
    // Both are written while the other's input is still read.
    if (Overlap(gate.product, up.product) || Overlap(gate.product, up.product->src[1]) ||
        Overlap(up.product, gate.product->src[1])) {
      return false;
    }
    if (gate.bias != nullptr) {
      ffn_.gate_bias = static_cast<const float*>(gate.bias->data);
      ffn_.gate_bias_expert_bytes = gate.bias->nb[1];
    }
  }
  if (up.bias != nullptr) {
    ffn_.up_bias = static_cast<const float*>(up.bias->data);
    ffn_.up_bias_expert_bytes = up.bias->nb[1];
  }
  if (!Cover(down)) return false;
  const size_t n_covered = covered_.size();
  if (FindSum(down)) return true;
  covered_.resize(n_covered);
  ffn_.down_bias = nullptr;
  ffn_.weights = nullptr;
  ffn_.out = nullptr;
  return NobodyElseReads(down);
}

bool FfnMatch::SetActivation(const ggml_tensor* act, const ggml_tensor** gate, const ggml_tensor** up) {
  *gate = nullptr;
  if (act->op == GGML_OP_GLU) {
    if (act->src[1] == nullptr || act->op_params[1] != 0) return false;
    *gate = act->src[0];
    *up = act->src[1];
    ffn_.alpha = FloatParam(act, 2);
    ffn_.limit = FloatParam(act, 3);
    switch (act->op_params[0]) {
      case GGML_GLU_OP_SWIGLU:
        ffn_.glu = EDGEMOE_SWIGLU;
        return true;
      case GGML_GLU_OP_SWIGLU_OAI:
        ffn_.glu = EDGEMOE_SWIGLU_OAI;
        return true;
      case GGML_GLU_OP_SWIGLU_CLAMP:
        ffn_.glu = EDGEMOE_SWIGLU_CLAMP;
        return true;
      case GGML_GLU_OP_GEGLU:
        ffn_.glu = EDGEMOE_GEGLU;
        return true;
      case GGML_GLU_OP_REGLU:
        ffn_.glu = EDGEMOE_REGLU;
        return true;
      default:
        return false;
    }
  }
  *up = act->src[0];
  if (IsUnary(act, GGML_UNARY_OP_SILU)) {
    ffn_.glu = EDGEMOE_SILU;
    return true;
  }
  if (IsUnary(act, GGML_UNARY_OP_GELU)) {
    ffn_.glu = EDGEMOE_GELU;
    return true;
  }
  if (act->op == GGML_OP_SQR && IsUnary(act->src[0], GGML_UNARY_OP_RELU)) {
    ffn_.glu = EDGEMOE_RELU_SQUARED;
    *up = act->src[0]->src[0];
    return Cover(act->src[0]);
  }
  return false;
}

bool FfnMatch::FindProjection(const ggml_tensor* t, Projection* projection) {
  if (t->op == GGML_OP_VIEW) {
    // Half of the rows of a merged product, or of its sum with a bias.
    const ggml_tensor* whole = t->src[0];
    if (whole->view_src != nullptr || t->nb[1] != whole->nb[1] || t->nb[2] != whole->nb[2]) return false;
    projection->first_row = static_cast<int64_t>(t->view_offs / sizeof(float));
    if (!Cover(t)) return false;
    t = whole;
  }
  if (t->op == GGML_OP_ADD_ID) {
    const ggml_tensor* bias = t->src[1];
    if (t->src[2] != ids_ || bias->type != GGML_TYPE_F32 || bias->nb[0] != sizeof(float) || !Cover(t)) return false;
    projection->bias = bias;
    t = t->src[0];
  }
  projection->product = t;
  return IsOwnProduct(t) && Cover(t);
}

// out[token] = sum over used, in order, of weights[token][used] * (down[token][used] + bias): views of the weighted
// product, one for each used expert, and the chain of their additions.
bool FfnMatch::FindSum(const ggml_tensor* down) {
  const ggml_tensor* t = down;
  const ggml_tensor* user = UserOf(t);
  if (user != nullptr && user->op == GGML_OP_ADD_ID && user->src[0] == t) {
    const ggml_tensor* bias = user->src[1];
    if (user->src[2] != ids_ || bias->type != GGML_TYPE_F32 || bias->nb[0] != sizeof(float) || !Cover(user)) {
      return false;
    }
    ffn_.down_bias = static_cast<const float*>(bias->data);
    ffn_.down_bias_expert_bytes = bias->nb[1];
    t = user;
    user = UserOf(t);
  }
  const int64_t n_used = down->ne[1], n_tokens = down->ne[2];
  if (user == nullptr || user->op != GGML_OP_MUL || user->src[0] != t || n_used < 2) return false;
  const ggml_tensor* weights = user->src[1];
  if (weights->type != GGML_TYPE_F32 || weights->ne[0] != 1 || weights->ne[1] != n_used || weights->ne[2] != n_tokens ||
      weights->ne[3] != 1 || !Cover(user)) {
    return false;
  }
  const ggml_tensor* weighted = user;
  const ggml_tensor* sum = nullptr;
  int64_t n_views = 0;
  for (int i = first_; i < graph_->n_nodes && n_views < n_used; ++i) {
    const ggml_tensor* view = graph_->nodes[i];
    if (view->op != GGML_OP_VIEW || view->src[0] != weighted) continue;
    if (view->ne[0] != weighted->ne[0] || view->ne[1] != n_tokens || ggml_nelements(view) != view->ne[0] * n_tokens ||
        view->nb[1] != weighted->nb[2] ||
        static_cast<const char*>(view->data) !=
            static_cast<const char*>(weighted->data) + static_cast<size_t>(n_views) * weighted->nb[1]) {
      return false;
    }
    if (!Cover(view)) return false;
    if (n_views == 0) {
      sum = view;
    } else {
      const ggml_tensor* add = UserOf(view);
      if (add == nullptr || add->op != GGML_OP_ADD || add->src[0] != sum || add->src[1] != view || !Cover(add)) {
        return false;
      }
      sum = add;
    }
    ++n_views;
  }
  if (n_views != n_used || sum->type != GGML_TYPE_F32 || !NobodyElseReads(sum)) return false;
  // The block writes gate, up and down before it reads the weights, and with several tokens the sum of one before it
  // reads the next one's rows.
  if (Overlap(weights, down) || (n_tokens > 1 && (Overlap(sum, down) || Overlap(sum, weights)))) return false;
  for (int i : covered_) {
    if (IsExpertProduct(graph_->nodes[i]) && Overlap(weights, graph_->nodes[i])) return false;
  }
  ffn_.weights = static_cast<const float*>(weights->data);
  ffn_.weights_used_bytes = weights->nb[1];
  ffn_.weights_token_bytes = weights->nb[2];
  ffn_.out = static_cast<float*>(sum->data);
  ffn_.out_token_bytes = sum->nb[1];
  return true;
}

bool FfnMatch::IsOwnProduct(const ggml_tensor* t) const {
  if (!IsExpertProduct(t) || t->src[2] != ids_) return false;
  const ExpertWeights weights = FindExpertWeights(t->src[0]);
  return weights.runtime == runtime_ && edgemoe_runtime_is_own(runtime_, weights.tensor_idx) != 0;
}

bool FfnMatch::Cover(const ggml_tensor* t) {
  for (int i = first_; i < graph_->n_nodes; ++i) {
    if (graph_->nodes[i] != t) continue;
    if (std::find(covered_.begin(), covered_.end(), i) == covered_.end()) covered_.push_back(i);
    return true;
  }
  return false;
}

const ggml_tensor* FfnMatch::UserOf(const ggml_tensor* t) const {
  for (int i = first_; i < graph_->n_nodes; ++i) {
    const ggml_tensor* node = graph_->nodes[i];
    for (int k = 0; k < GGML_MAX_SRC && node->src[k] != nullptr; ++k) {
      if (node->src[k] == t) return node;
    }
  }
  return nullptr;
}

bool FfnMatch::NobodyElseReads(const ggml_tensor* result) const {
  for (int i : covered_) {
    const ggml_tensor* t = graph_->nodes[i];
    if (t == result) continue;
    int n_uses = 0;
    for (int j : covered_) {
      const ggml_tensor* node = graph_->nodes[j];
      for (int k = 0; k < GGML_MAX_SRC && node->src[k] != nullptr; ++k) n_uses += node->src[k] == t ? 1 : 0;
    }
    if ((t->flags & GGML_TENSOR_FLAG_OUTPUT) != 0 || UseCount(graph_, t) != n_uses) return false;
  }
  return true;
}

bool FfnMatch::MayRunFirst(const std::vector<char>& is_done) const {
  int last = first_;
  for (int i : covered_) last = std::max(last, i);
  for (int other = first_; other < last; ++other) {
    if (is_done[static_cast<size_t>(other)] || IsView(graph_->nodes[other]) ||
        std::find(covered_.begin(), covered_.end(), other) != covered_.end()) {
      continue;
    }
    for (int i : covered_) {
      if (i > other && !Independent(graph_->nodes[i], graph_->nodes[other])) return false;
    }
  }
  return true;
}

}  // namespace edgemoe_ggml
