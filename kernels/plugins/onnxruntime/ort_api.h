// SPDX-License-Identifier: MIT
// ort_api.h: ONNX Runtime's graph and tensors as C++ values. Failures are exceptions inside the plug-in and become an
// OrtStatus where ONNX Runtime called us (Guard). Thread-safe: it only holds the two tables of functions.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_ORT_API_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_ORT_API_H_

#include <cstdint>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "plugins/onnxruntime/ort_abi.h"

namespace edgemoe_ort {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Attribute {
  int32_t type = 0;
  int64_t i = 0;
  float f = 0.0f;
  std::string s;
};

// An input of a node: a value that is computed, or a constant of the model.
struct ValueInfo {
  bool is_given = false;               // false: the optional input is left out
  const OrtValueInfo* info = nullptr;  // of ONNX Runtime's graph
  std::string name;
  int32_t element_type = 0;   // 0: not known
  std::vector<int64_t> dims;  // -1: not known before the model runs
  bool is_constant = false;
};

// Where the bytes of a constant lie in a file beside the model; without a path they lie in the model itself.
struct FileExtent {
  std::string path;  // as the model names it
  uint64_t offset = 0;
  uint64_t length = 0;
};

class Ort {
 public:
  // Throws when the runtime's C API is older than `version`: kOrtApiVersion, or kOrtCustomOpApiVersion, with which
  // only tensors, options and kernels may be asked for.
  Ort(const OrtApiBase* base, uint32_t version);

  const void* table() const { return api_; }
  const void* ep_table() const { return ep_api_; }
  void Check(OrtStatus* status) const;
  OrtStatus* Status(const char* message) const { return api::CreateStatus::Call(api_, kOrtFail, message); }
  template <typename Fn>
  OrtStatus* Guard(Fn&& fn) const noexcept {
    try {
      fn();
      return nullptr;
    } catch (const std::exception& e) {
      return Status(e.what());
    }
  }

  std::vector<const OrtNode*> Nodes(const OrtGraph* graph) const;
  std::string ModelPath(const OrtGraph* graph) const;  // empty: not known
  bool IsSubgraph(const OrtGraph* graph) const;
  std::string NodeName(const OrtNode* node) const;
  // "domain::type"
  std::string NodeType(const OrtNode* node) const;
  std::vector<ValueInfo> Inputs(const OrtNode* node) const;
  // Names; "" where an optional output is left out.
  std::vector<std::string> Outputs(const OrtNode* node) const;
  std::map<std::string, Attribute> Attributes(const OrtNode* node) const;
  FileExtent Extent(const ValueInfo& value) const;
  // The bytes of a constant of n_bytes; valid as long as the graph.
  const void* Constant(const ValueInfo& value) const;
  // Of a tensor at run time.
  std::vector<int64_t> Dims(const OrtValue* value, int32_t* element_type) const;
  void* Data(OrtValue* value) const;
  // An option of the session for this provider, or `fallback`.
  std::string Option(const OrtSessionOptions* options, const std::string& key, const std::string& fallback) const;

  // Of the node that a custom operator's kernel is made for.
  std::string KernelNodeName(const OrtKernelInfo* info) const;
  std::string InputName(const OrtKernelInfo* info, size_t idx) const;
  std::string OutputName(const OrtKernelInfo* info, size_t idx) const;
  // Null: the input is no constant.
  const OrtValue* ConstantInput(const OrtKernelInfo* info, size_t idx) const;

 private:
  std::vector<int64_t> DimsOf(const OrtTensorTypeAndShapeInfo* shape) const;

  const void* api_;
  const void* ep_api_;
};

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_ORT_API_H_
