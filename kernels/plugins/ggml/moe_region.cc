// SPDX-License-Identifier: MIT
#include "plugins/ggml/moe_region.h"

#include "ggml-cpu.h"
#include "plugins/ggml/buffers.h"
#include "plugins/ggml/cpu_phases.h"
#include "plugins/ggml/nodes.h"
#include "plugins/ggml/selection.h"

namespace edgemoe_ggml {
namespace {

// Elements of output below which one thread computes a range of small nodes: 32768 floats are about 10 us of
// work, what starting the other threads and meeting them at each node's barrier costs.
constexpr int64_t kSerialElements = 32768;

}  // namespace

MoeRegion::MoeRegion() : cpu_(ggml_backend_cpu_init()) {}

MoeRegion::~MoeRegion() {
  for (auto& entry : sessions_) edgemoe_session_destroy(entry.second);
  ggml_backend_free(cpu_);
}

void MoeRegion::SetThreads(int n_threads) {
  n_threads_ = n_threads > 0 ? n_threads : 1;
  kernels_.SetThreads(n_threads_);
  for (auto& entry : sessions_) edgemoe_session_set_threads(entry.second, n_threads_);
}

edgemoe_session* MoeRegion::SessionOf(edgemoe_runtime* runtime) {
  for (auto& entry : sessions_) {
    if (entry.first == runtime) return entry.second;
  }
  const edgemoe_kernels table = kernels_.Table();
  edgemoe_session* session = nullptr;
  if (edgemoe_session_create(runtime, &table, &session, nullptr) != EDGEMOE_OK) return nullptr;
  edgemoe_session_set_threads(session, n_threads_);
  sessions_.emplace_back(runtime, session);
  return session;
}

ggml_status MoeRegion::Compute(ggml_cgraph* graph) {
  const ProfiledPhase phase(EDGEMOE_PHASE_EXPERTS);
  const int n = ggml_graph_n_nodes(graph);
  done_.assign(static_cast<size_t>(n), 0);
  ggml_status status = GGML_STATUS_SUCCESS;
  for (int i = 0; i < n && status == GGML_STATUS_SUCCESS;) {
    if (done_[static_cast<size_t>(i)]) {
      ++i;
      continue;
    }
    if (IsExpertProduct(graph->nodes[i])) {
      status = ComputeProducts(graph, i);
      continue;
    }
    int end = i + 1;
    while (end < n && !IsExpertProduct(graph->nodes[end]) && !done_[static_cast<size_t>(end)]) ++end;
    status = ComputeOthers(graph, i, end);
    i = end;
  }
  EndLayer();
  return status;
}

ggml_status MoeRegion::ComputeOthers(ggml_cgraph* graph, int begin, int end) {
  int64_t n_elements = 0;
  for (int i = begin; i < end; ++i) {
    if (!IsView(graph->nodes[i])) n_elements += ggml_nelements(graph->nodes[i]);
  }
  if (n_elements == 0) return GGML_STATUS_SUCCESS;
  ggml_backend_cpu_set_n_threads(cpu_, n_elements <= kSerialElements ? 1 : n_threads_);
  ggml_cgraph view = ggml_graph_view(graph, begin, end);
  return ggml_backend_graph_compute(cpu_, &view);
}

bool MoeRegion::BeginLayer(ggml_cgraph* graph, int first) {
  EndLayer();
  const ggml_tensor* ids = graph->nodes[first]->src[2];
  edgemoe_runtime* runtime = FindExpertWeights(graph->nodes[first]->src[0]).runtime;
  tensor_idxs_.clear();
  for (int i = first; i < ggml_graph_n_nodes(graph); ++i) {
    const ggml_tensor* node = graph->nodes[i];
    if (IsExpertProduct(node) && node->src[2] == ids) {
      const ExpertWeights weights = FindExpertWeights(node->src[0]);
      if (weights.runtime == runtime) tensor_idxs_.push_back(weights.tensor_idx);
    }
  }
  layer_session_ = SessionOf(runtime);
  if (layer_session_ == nullptr) return false;
  layer_ids_ = ids;
  const int32_t* rows = static_cast<const int32_t*>(ids->data);
  uint64_t row_bytes = ids->nb[1];
  const int32_t layer = LayerOf(graph->nodes[first]->src[0]);
  if (const int32_t* chosen = TakeChosen(runtime, layer, ids->ne[1], ids->ne[0]); chosen != nullptr) {
    rows = chosen;
    row_bytes = static_cast<uint64_t>(ids->ne[0]) * sizeof(int32_t);
    edgemoe_session_set_choosers(layer_session_, ThoseWhoChoose());
  }
  return edgemoe_session_begin_layer(layer_session_, rows, ids->ne[1], ids->ne[0], row_bytes, tensor_idxs_.data(),
                                     static_cast<int32_t>(tensor_idxs_.size()), nullptr) == EDGEMOE_OK;
}

void MoeRegion::EndLayer() {
  if (layer_session_ != nullptr) edgemoe_session_end_layer(layer_session_);
  layer_session_ = nullptr;
  layer_ids_ = nullptr;
}

ggml_status MoeRegion::ComputeProducts(ggml_cgraph* graph, int first) {
  const ggml_tensor* head = graph->nodes[first];
  edgemoe_runtime* runtime = FindExpertWeights(head->src[0]).runtime;
  if (layer_ids_ != head->src[2] || SessionOf(runtime) != layer_session_) {
    if (!BeginLayer(graph, first)) return GGML_STATUS_FAILED;
  }
  kernels_.Forget();
  if (ffn_.Find(graph, first, done_)) {
    for (int i : ffn_.covered()) done_[static_cast<size_t>(i)] = 1;
    const int32_t code = edgemoe_session_ffn(layer_session_, &ffn_.ffn(), nullptr);
    return code == EDGEMOE_OK ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
  }
  matmuls_.clear();
  for (int i = first; i < ggml_graph_n_nodes(graph); ++i) {
    const ggml_tensor* node = graph->nodes[i];
    if (done_[static_cast<size_t>(i)] || !IsExpertProduct(node) || node->src[2] != layer_ids_) continue;
    const ExpertWeights weights = FindExpertWeights(node->src[0]);
    if (weights.runtime != runtime) continue;
    bool movable = true;
    for (int k = first; k < i && movable; ++k) {
      if (!done_[static_cast<size_t>(k)]) movable = Independent(node, graph->nodes[k]);
    }
    if (!movable) break;
    matmuls_.push_back(MatmulOf(node));
    done_[static_cast<size_t>(i)] = 1;
  }
  const int32_t code =
      edgemoe_session_matmul(layer_session_, matmuls_.data(), static_cast<int32_t>(matmuls_.size()), nullptr);
  return code == EDGEMOE_OK ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

}  // namespace edgemoe_ggml
