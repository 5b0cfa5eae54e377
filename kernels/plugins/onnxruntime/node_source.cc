// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/node_source.h"

#include <algorithm>

namespace edgemoe_ort {

bool IsMoe(const std::string& type) { return type == "com.microsoft::QMoE" || type == "com.microsoft::MoE"; }

uint64_t BytesOfType(int32_t element_type) {
  if (element_type == kOrtFloat) return 4;
  if (element_type == kOrtFloat16) return 2;
  return element_type == kOrtUint8 ? 1 : 0;
}

std::string FolderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, std::max<size_t>(slash, 1));
}

std::string JoinPath(const std::string& folder, const std::string& path) {
  if (folder.empty() || path.front() == '/') return path;
  return folder + (folder.back() == '/' ? "" : "/") + path;
}

GraphNode::GraphNode(const Ort& ort, const OrtGraph* graph, const OrtNode* node) : ort_(ort) {
  name = ort.NodeName(node);
  type = ort.NodeType(node);
  is_in_file = !ort.ModelPath(graph).empty();
  is_in_subgraph = ort.IsSubgraph(graph);
  inputs = ort.Inputs(node);
  attributes = ort.Attributes(node);
}

FileExtent GraphNode::Extent(const ValueInfo& constant) const { return ort_.Extent(constant); }

std::vector<uint8_t> GraphNode::Bytes(const ValueInfo& constant, uint64_t n_bytes) const {
  const auto* const data = static_cast<const uint8_t*>(ort_.Constant(constant));
  return std::vector<uint8_t>(data, data + n_bytes);
}

}  // namespace edgemoe_ort
