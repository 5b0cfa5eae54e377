// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/ort_api.h"

namespace edgemoe_ort {
namespace {

// A text that a function of the API copies out: its size first, with the zero at its end.
template <typename Copy>
std::string CopiedText(Copy copy) {
  size_t length = 0;
  copy(nullptr, &length);
  std::string text(length, '\0');
  copy(text.data(), &length);
  while (!text.empty() && text.back() == '\0') text.pop_back();
  return text;
}

}  // namespace

Ort::Ort(const OrtApiBase* base, uint32_t version) : api_(base->GetApi(version)), ep_api_(nullptr) {
  if (api_ == nullptr) {
    throw Error(std::string("cannot use this ONNX Runtime: it is ") + base->GetVersionString() + ", expected 1." +
                std::to_string(version) + " or newer; pip install -U onnxruntime");
  }
  if (version < kOrtApiVersion) return;
  ep_api_ = api::GetEpApi::Call(api_);
  if (ep_api_ == nullptr) throw Error("cannot use this ONNX Runtime: it was built without plug-in execution providers");
}

void Ort::Check(OrtStatus* status) const {
  if (status == nullptr) return;
  const std::string message = api::GetErrorMessage::Call(api_, status);
  api::ReleaseStatus::Call(api_, status);
  throw Error(message);
}

std::vector<const OrtNode*> Ort::Nodes(const OrtGraph* graph) const {
  size_t n = 0;
  Check(api::Graph_GetNumNodes::Call(api_, graph, &n));
  std::vector<const OrtNode*> nodes(n);
  Check(api::Graph_GetNodes::Call(api_, graph, nodes.data(), n));
  return nodes;
}

std::string Ort::ModelPath(const OrtGraph* graph) const {
  const char* path = nullptr;
  Check(api::Graph_GetModelPath::Call(api_, graph, &path));
  return path == nullptr ? "" : path;
}

bool Ort::IsSubgraph(const OrtGraph* graph) const {
  const OrtNode* parent = nullptr;
  Check(api::Graph_GetParentNode::Call(api_, graph, &parent));
  return parent != nullptr;
}

std::string Ort::NodeName(const OrtNode* node) const {
  const char* name = nullptr;
  Check(api::Node_GetName::Call(api_, node, &name));
  return name == nullptr ? "" : name;
}

std::string Ort::NodeType(const OrtNode* node) const {
  const char *domain = nullptr, *type = nullptr;
  Check(api::Node_GetDomain::Call(api_, node, &domain));
  Check(api::Node_GetOperatorType::Call(api_, node, &type));
  return std::string(domain) + "::" + type;
}

std::vector<int64_t> Ort::DimsOf(const OrtTensorTypeAndShapeInfo* shape) const {
  size_t n = 0;
  Check(api::GetDimensionsCount::Call(api_, shape, &n));
  std::vector<int64_t> dims(n);
  Check(api::GetDimensions::Call(api_, shape, dims.data(), n));
  return dims;
}

std::vector<ValueInfo> Ort::Inputs(const OrtNode* node) const {
  size_t n = 0;
  Check(api::Node_GetNumInputs::Call(api_, node, &n));
  std::vector<const OrtValueInfo*> infos(n);
  Check(api::Node_GetInputs::Call(api_, node, infos.data(), n));
  std::vector<ValueInfo> values(n);
  for (size_t i = 0; i < n; ++i) {
    if (infos[i] == nullptr) continue;
    ValueInfo& v = values[i];
    const char* name = nullptr;
    Check(api::GetValueInfoName::Call(api_, infos[i], &name));
    if (name == nullptr || *name == '\0') continue;
    v.is_given = true;
    v.info = infos[i];
    v.name = name;
    Check(api::ValueInfo_IsConstantInitializer::Call(api_, v.info, &v.is_constant));
    const OrtTypeInfo* type = nullptr;
    Check(api::GetValueInfoTypeInfo::Call(api_, v.info, &type));
    const OrtTensorTypeAndShapeInfo* shape = nullptr;
    if (type != nullptr) Check(api::CastTypeInfoToTensorInfo::Call(api_, type, &shape));
    if (shape == nullptr) continue;
    Check(api::GetTensorElementType::Call(api_, shape, &v.element_type));
    v.dims = DimsOf(shape);
  }
  return values;
}

std::vector<std::string> Ort::Outputs(const OrtNode* node) const {
  size_t n = 0;
  Check(api::Node_GetNumOutputs::Call(api_, node, &n));
  std::vector<const OrtValueInfo*> infos(n);
  Check(api::Node_GetOutputs::Call(api_, node, infos.data(), n));
  std::vector<std::string> names(n);
  for (size_t i = 0; i < n; ++i) {
    const char* name = nullptr;
    if (infos[i] != nullptr) Check(api::GetValueInfoName::Call(api_, infos[i], &name));
    if (name != nullptr) names[i] = name;
  }
  return names;
}

std::map<std::string, Attribute> Ort::Attributes(const OrtNode* node) const {
  size_t n = 0;
  Check(api::Node_GetNumAttributes::Call(api_, node, &n));
  std::vector<const OrtOpAttr*> raw(n);
  Check(api::Node_GetAttributes::Call(api_, node, raw.data(), n));
  std::map<std::string, Attribute> attributes;
  for (const OrtOpAttr* attr : raw) {
    const char* name = nullptr;
    Attribute a;
    Check(api::OpAttr_GetName::Call(api_, attr, &name));
    Check(api::OpAttr_GetType::Call(api_, attr, &a.type));
    size_t length = 0;
    if (a.type == kOrtAttrInt) {
      Check(api::ReadOpAttr::Call(api_, attr, a.type, &a.i, sizeof(a.i), &length));
    } else if (a.type == kOrtAttrFloat) {
      Check(api::ReadOpAttr::Call(api_, attr, a.type, &a.f, sizeof(a.f), &length));
    } else if (a.type == kOrtAttrString) {
      char text[256];
      Check(api::ReadOpAttr::Call(api_, attr, a.type, text, sizeof(text), &length));
      a.s.assign(text, length);
      while (!a.s.empty() && a.s.back() == '\0') a.s.pop_back();
    }
    attributes[name] = a;
  }
  return attributes;
}

FileExtent Ort::Extent(const ValueInfo& value) const {
  OrtExternalInitializerInfo* info = nullptr;
  Check(api::ValueInfo_GetExternalInitializerInfo::Call(api_, value.info, &info));
  FileExtent extent;
  if (info == nullptr) return extent;
  extent.path = api::ExternalInitializerInfo_GetFilePath::Call(api_, info);
  const int64_t offset = api::ExternalInitializerInfo_GetFileOffset::Call(api_, info);
  extent.offset = static_cast<uint64_t>(offset);
  extent.length = api::ExternalInitializerInfo_GetByteSize::Call(api_, info);
  api::ReleaseExternalInitializerInfo::Call(api_, info);
  if (offset < 0) throw Error("tensor " + value.name + ": negative offset in its external data; the model is corrupt");
  return extent;
}

const void* Ort::Constant(const ValueInfo& value) const {
  const OrtValue* constant = nullptr;
  Check(api::ValueInfo_GetInitializerValue::Call(api_, value.info, &constant));
  if (constant == nullptr) throw Error("tensor " + value.name + ": has no value");
  return Data(const_cast<OrtValue*>(constant));
}

std::vector<int64_t> Ort::Dims(const OrtValue* value, int32_t* element_type) const {
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  Check(api::GetTensorTypeAndShape::Call(api_, value, &shape));
  // Not an exception's way: what GetDimensions* can fail at is a null pointer.
  std::vector<int64_t> dims = DimsOf(shape);
  Check(api::GetTensorElementType::Call(api_, shape, element_type));
  api::ReleaseTensorTypeAndShapeInfo::Call(api_, shape);
  return dims;
}

void* Ort::Data(OrtValue* value) const {
  void* data = nullptr;
  Check(api::GetTensorMutableData::Call(api_, value, &data));
  return data;
}

std::string Ort::Option(const OrtSessionOptions* options, const std::string& key, const std::string& fallback) const {
  int exists = 0;
  Check(api::HasSessionConfigEntry::Call(api_, options, key.c_str(), &exists));
  if (exists == 0) return fallback;
  return CopiedText([&](char* to, size_t* length) {
    Check(api::GetSessionConfigEntry::Call(api_, options, key.c_str(), to, length));
  });
}

std::string Ort::KernelNodeName(const OrtKernelInfo* info) const {
  return CopiedText(
      [&](char* to, size_t* length) { Check(api::KernelInfo_GetNodeName::Call(api_, info, to, length)); });
}

std::string Ort::InputName(const OrtKernelInfo* info, size_t idx) const {
  return CopiedText(
      [&](char* to, size_t* length) { Check(api::KernelInfo_GetInputName::Call(api_, info, idx, to, length)); });
}

std::string Ort::OutputName(const OrtKernelInfo* info, size_t idx) const {
  return CopiedText(
      [&](char* to, size_t* length) { Check(api::KernelInfo_GetOutputName::Call(api_, info, idx, to, length)); });
}

const OrtValue* Ort::ConstantInput(const OrtKernelInfo* info, size_t idx) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  Check(api::KernelInfoGetConstantInput_tensor::Call(api_, info, idx, &is_constant, &value));
  return is_constant != 0 ? value : nullptr;
}

}  // namespace edgemoe_ort
