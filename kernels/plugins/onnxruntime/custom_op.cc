// SPDX-License-Identifier: MIT
// custom_op.cc: QMoE and MoE as custom operators, for hosts without plug-in execution providers (ONNX Runtime 1.18 to
// 1.22, or a build without them). Operators of the names of built-in ones take their place. ONNX Runtime gives a custom
// operator pointers into its map of the external data, and tells it no file: what it maps is never touched, as custom
// operators are not prepacked; file and offset of each expert tensor we read from the .onnx file, which the session's
// option model_path names.
#include <algorithm>
#include <climits>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "plugins/onnxruntime/onnx_file.h"
#include "plugins/onnxruntime/qmoe_model.h"
#include "plugins/onnxruntime/session_options.h"

namespace edgemoe_ort {
namespace {

// Compared with what ONNX Runtime has of each fc1, so that the file of another model is found out. One page of its map.
constexpr uint64_t kComparedBytes = 64;

// The MoE nodes of one file, over one runtime and one budget. Lives as long as one of its kernels.
struct Loaded {
  explicit Loaded(const std::string& path) : file(path) {}
  OnnxFile file;
  std::unique_ptr<QmoeModel> model;
};

struct Registration;

struct Operator : OrtCustomOp {
  Operator() : OrtCustomOp() {}
  Registration* registration = nullptr;
  const char* name = nullptr;
  int32_t element_type = 0;        // of activations
  int32_t scale_element_type = 0;  // 0: MoE
};

// What one call of RegisterCustomOps has added to a session's options.
struct Registration {
  Registration(const OrtApiBase* base, const OrtSessionOptions* session_options)
      : ort(base, kOrtCustomOpApiVersion), options(ReadOptions(ort, session_options)) {
    if (options.model.prefetch_depth > 0 && !options.model.is_prefetch_adaptive) {
      throw Error("option prefetch of " EDGEMOE_ORT_PROVIDER ": '" + std::to_string(options.model.prefetch_depth) +
                  "', expected auto or off: custom operators know no routers to predict experts with");
    }
  }

  const Ort ort;
  const SessionOptions options;
  Operator operators[6];
  std::mutex mutex;
  std::weak_ptr<Loaded> loaded;
};

struct Kernel {
  const Ort* ort;
  std::shared_ptr<Loaded> loaded;
  size_t node_idx;
  QmoeModel::InputIdxs inputs;
};

std::shared_ptr<Loaded> Load(Registration* r) {
  const std::lock_guard<std::mutex> lock(r->mutex);
  if (std::shared_ptr<Loaded> loaded = r->loaded.lock()) return loaded;
  if (r->options.publishes) DropLoaded();
  auto loaded = std::make_shared<Loaded>(r->options.model_path);
  std::vector<QmoeNode> nodes(loaded->file.nodes().size());
  for (size_t i = 0; i < nodes.size(); ++i) {
    const FileNode source(loaded->file, loaded->file.nodes()[i]);
    const std::string reason = ReadMoe(source, true, &nodes[i]);
    if (!reason.empty()) {
      throw Error("cannot stream the experts of node " + source.name + " (" + source.type + "): " + reason +
                  "; without our operators ONNX Runtime's own kernel computes it, all experts in memory");
    }
  }
  loaded->model = std::make_unique<QmoeModel>(&r->ort, loaded->file.folder(), std::move(nodes), std::vector<Router>(),
                                              r->options.model);
  if (r->options.publishes) PublishLoaded(*loaded->model, 0);
  r->loaded = loaded;
  return loaded;
}

// The node of the file that a kernel is of: by its name, or by its output if it has none.
size_t FindNode(const OnnxFile& file, const std::string& name, const std::string& output) {
  const auto& nodes = file.nodes();
  const auto is_named = [&](const OnnxFile::Node& n) { return !name.empty() && n.name == name; };
  const auto has_output = [&](const OnnxFile::Node& n) { return !n.outputs.empty() && n.outputs[0] == output; };
  auto found = std::find_if(nodes.begin(), nodes.end(), is_named);
  if (found == nodes.end()) found = std::find_if(nodes.begin(), nodes.end(), has_output);
  if (found == nodes.end()) {
    throw Error("node " + name + " with output " + output + " is not among the MoE nodes of the main graph (" +
                file.path() +
                "); model_path has to be the session's own .onnx file, and nodes inside of a Loop, If or "
                "Scan are not implemented");
  }
  return static_cast<size_t>(found - nodes.begin());
}

// Throws unless the session's node has the file's tensors.
void CompareInputs(const Ort& ort, const OrtKernelInfo* info, const OnnxFile& file, const OnnxFile::Node& node) {
  for (size_t i = 2; i < node.inputs.size(); ++i) {
    const std::string& expected = node.inputs[i];
    const FileTensor* const tensor = expected.empty() ? nullptr : file.Find(expected);
    if (tensor == nullptr) continue;
    const std::string found = ort.InputName(info, i);
    const OrtValue* const value = ort.ConstantInput(info, i);
    bool is_same = found == expected && value != nullptr;
    if (is_same) {
      int32_t element_type = 0;
      is_same = ort.Dims(value, &element_type) == tensor->dims && element_type == tensor->element_type;
    }
    if (is_same && i == 2 && tensor->extent.length >= kComparedBytes) {
      const std::vector<uint8_t> bytes = file.FirstBytes(expected, kComparedBytes);
      is_same = std::memcmp(bytes.data(), ort.Data(const_cast<OrtValue*>(value)), kComparedBytes) == 0;
    }
    if (!is_same) {
      throw Error("node " + node.name + ": its input " + std::to_string(i) + " is tensor " + found +
                  " with other bytes, shape or type than tensor " + expected + " of the file (" + file.path() +
                  "); model_path has to be the session's own .onnx file");
    }
  }
}

std::unique_ptr<Kernel> MakeKernel(Registration* r, const OrtKernelInfo* info) {
  if (r->options.model_path.empty()) {
    throw Error(
        "the operators of edgemoe do not know the model's file; set the session's config entry "
        "ep.edgemoeexecutionprovider.model_path to its path before the library of custom operators is registered");
  }
  auto kernel = std::make_unique<Kernel>();
  kernel->ort = &r->ort;
  kernel->loaded = Load(r);
  const OnnxFile& file = kernel->loaded->file;
  kernel->node_idx = FindNode(file, r->ort.KernelNodeName(info), r->ort.OutputName(info, 0));
  const OnnxFile::Node& node = file.nodes()[kernel->node_idx];
  CompareInputs(r->ort, info, file, node);
  const bool has_weights = node.inputs.size() > 14 && !node.inputs[14].empty();
  kernel->inputs = {0, 1, has_weights ? 14 : -1};
  return kernel;
}

// Types of inputs by position, from the operators' schemas: t of activations, s of scales, w of packed weights, f
// float.
constexpr char kQuantizedInputs[] = "ttwstwstwstwwwtffffss";
constexpr char kFloatInputs[] = "tttttttt";
constexpr size_t kNRequired = 3;

const char* InputsOf(const Operator& op) { return op.scale_element_type != 0 ? kQuantizedInputs : kFloatInputs; }

void Fill(Registration* r, const char* name, int32_t element_type, int32_t scale_element_type, Operator* op) {
  op->registration = r;
  op->name = name;
  op->element_type = element_type;
  op->scale_element_type = scale_element_type;
  op->version = kOrtCustomOpVersion;
  op->GetName = [](const OrtCustomOp* self) { return static_cast<const Operator*>(self)->name; };
  op->GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op->GetInputTypeCount = [](const OrtCustomOp* self) {
    return std::strlen(InputsOf(*static_cast<const Operator*>(self)));
  };
  op->GetInputType = [](const OrtCustomOp* self, size_t i) -> int32_t {
    const auto& o = *static_cast<const Operator*>(self);
    const char kind = InputsOf(o)[i];
    return kind == 't' ? o.element_type : kind == 's' ? o.scale_element_type : kind == 'w' ? kOrtUint8 : kOrtFloat;
  };
  op->GetInputCharacteristic = [](const OrtCustomOp* self, size_t i) -> int32_t {
    const bool is_fc2 = i == (static_cast<const Operator*>(self)->scale_element_type != 0 ? 5 : 4);
    return i < kNRequired || is_fc2 ? kOrtRequired : kOrtOptional;
  };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int32_t { return kOrtMemTypeDefault; };
  op->GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op->GetOutputType = [](const OrtCustomOp* self, size_t) { return static_cast<const Operator*>(self)->element_type; };
  op->GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int32_t { return kOrtRequired; };
  op->GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op->GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op->CreateKernelV2 = [](const OrtCustomOp* self, const void*, const OrtKernelInfo* info,
                          void** kernel) -> OrtStatus* {
    Registration* const registration = static_cast<const Operator*>(self)->registration;
    *kernel = nullptr;
    return registration->ort.Guard([&] { *kernel = MakeKernel(registration, info).release(); });
  };
  op->KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    const Kernel& k = *static_cast<Kernel*>(kernel);
    return k.ort->Guard([&] { k.loaded->model->Run(k.node_idx, k.inputs, context); });
  };
  op->KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op->GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op->GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
}

void Register(OrtSessionOptions* session_options, const OrtApiBase* base) {
  auto r = std::make_unique<Registration>(base, session_options);
  const Ort& ort = r->ort;
  size_t n = 0;
  for (const int32_t type : {kOrtFloat, kOrtFloat16}) {
    for (const int32_t scales : {kOrtFloat, kOrtFloat16}) Fill(r.get(), "QMoE", type, scales, &r->operators[n++]);
    Fill(r.get(), "MoE", type, 0, &r->operators[n++]);
  }
  OrtCustomOpDomain* domain = nullptr;
  ort.Check(api::CreateCustomOpDomain::Call(ort.table(), "com.microsoft", &domain));
  for (const Operator& op : r->operators) ort.Check(api::CustomOpDomain_Add::Call(ort.table(), domain, &op));
  ort.Check(api::AddCustomOpDomain::Call(ort.table(), session_options, domain));
  // ONNX Runtime keeps pointers to both in the options and every session made of them, and never says when it has
  // dropped the last one: the 2 KB of a registration stay for the life of the process. What is loaded does not.
  static_cast<void>(r.release());
}

}  // namespace
}  // namespace edgemoe_ort

// ONNX Runtime's entry point for a library of custom operators.
extern "C" EDGEMOE_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  try {
    edgemoe_ort::Register(options, base);
    return nullptr;
  } catch (const std::exception& e) {
    // Any version of the API can make a status.
    return edgemoe_ort::api::CreateStatus::Call(base->GetApi(1), edgemoe_ort::kOrtFail, e.what());
  }
}
