// SPDX-License-Identifier: MIT
// node_source.h: a MoE node as somebody describes it: ONNX Runtime's graph, or an .onnx file that we read ourselves.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_NODE_SOURCE_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_NODE_SOURCE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "plugins/onnxruntime/ort_api.h"

namespace edgemoe_ort {

class NodeSource {
 public:
  virtual ~NodeSource() = default;
  // Where a constant's bytes lie beside the model; without a path they lie in the model itself.
  virtual FileExtent Extent(const ValueInfo& constant) const = 0;
  // The n_bytes of a constant.
  virtual std::vector<uint8_t> Bytes(const ValueInfo& constant, uint64_t n_bytes) const = 0;

  std::string name;
  std::string type;         // "domain::type"
  bool is_in_file = false;  // not a model given as bytes, whose external data nobody can find
  bool is_in_subgraph = false;
  std::vector<ValueInfo> inputs;
  std::map<std::string, Attribute> attributes;
};

bool IsMoe(const std::string& type);
// Of an element; 0: a type that no input of ours has.
uint64_t BytesOfType(int32_t element_type);
// Of a file: the folder that it lies in; empty: the working directory.
std::string FolderOf(const std::string& path);
// Of external data, whose path is relative to the folder of the model.
std::string JoinPath(const std::string& folder, const std::string& path);

class GraphNode : public NodeSource {
 public:
  GraphNode(const Ort& ort, const OrtGraph* graph, const OrtNode* node);
  FileExtent Extent(const ValueInfo& constant) const override;
  std::vector<uint8_t> Bytes(const ValueInfo& constant, uint64_t n_bytes) const override;

 private:
  const Ort& ort_;
};

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_NODE_SOURCE_H_
