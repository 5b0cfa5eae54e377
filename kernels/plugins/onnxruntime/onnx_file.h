// SPDX-License-Identifier: MIT
// onnx_file.h: what an .onnx file says about its MoE nodes and about where tensors lie, for hosts that do not tell us.
// The file is a protobuf message; field numbers are those of the public onnx.proto. It is read with pread, never
// mapped: a file that shrinks is an error, and tensors inside of it are passed over.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_ONNX_FILE_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_ONNX_FILE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "plugins/onnxruntime/node_source.h"

namespace edgemoe_ort {

class FileReader;

struct FileTensor {
  int32_t element_type = 0;
  std::vector<int64_t> dims;
  FileExtent extent;    // with a path: beside the .onnx file. Else inside of it, as raw or float data
  bool is_raw = false;  // its bytes are those of the extent; else numbers that we do not decode
};

class OnnxFile {
 public:
  // Throws Error: the file cannot be read, or is no ONNX model; the message names the byte.
  explicit OnnxFile(const std::string& path);
  ~OnnxFile();

  struct Node {
    std::string name, type;
    std::vector<std::string> inputs, outputs;
    std::map<std::string, Attribute> attributes;
  };
  // MoE nodes of the main graph, in the order of the file.
  const std::vector<Node>& nodes() const { return nodes_; }
  const FileTensor* Find(const std::string& name) const;
  // All n_bytes of a tensor; only the first ones.
  std::vector<uint8_t> Bytes(const std::string& name, uint64_t n_bytes) const;
  std::vector<uint8_t> FirstBytes(const std::string& name, uint64_t n_bytes) const;
  const std::string& path() const { return path_; }
  std::string folder() const;

 private:
  void ReadGraph(uint64_t begin, uint64_t end);
  void ReadNode(uint64_t begin, uint64_t end);
  void ReadTensor(uint64_t begin, uint64_t end);

  const std::string path_;
  std::unique_ptr<FileReader> reader_;
  std::vector<Node> nodes_;
  std::map<std::string, FileTensor> tensors_;
};

// A node of the file as the reader of nodes wants it.
class FileNode : public NodeSource {
 public:
  FileNode(const OnnxFile& file, const OnnxFile::Node& node);
  FileExtent Extent(const ValueInfo& constant) const override;
  std::vector<uint8_t> Bytes(const ValueInfo& constant, uint64_t n_bytes) const override;

 private:
  const OnnxFile& file_;
};

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_ONNX_FILE_H_
