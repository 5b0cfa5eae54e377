// SPDX-License-Identifier: MIT
// provider.cc: edgemoe as a plug-in execution provider of ONNX Runtime: the factory that ONNX Runtime finds, and the
// provider of one session, which claims QMoE nodes and gives each its computation. Claiming a node with its constants
// dropped keeps ONNX Runtime from ever touching the bytes of experts.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "plugins/onnxruntime/edgemoe_ort.h"
#include "plugins/onnxruntime/provider_options.h"
#include "plugins/onnxruntime/qmoe_model.h"

struct edgemoe_ort_counting {
  std::shared_ptr<edgemoe_ort::Choosers> choosers;
};

namespace edgemoe_ort {
namespace {

thread_local edgemoe_ort_loaded t_loaded = {};
thread_local std::vector<edgemoe_ort_tensor> t_tensors;

class Provider;

struct Computation : OrtNodeComputeInfo {
  Provider* provider = nullptr;
  size_t node_idx = 0;
  QmoeModel::InputIdxs inputs;
};

class Provider : public OrtEp {
 public:
  Provider(const Ort& ort, const OrtSessionOptions* session_options) : OrtEp(), ort_(ort) {
    ort_version_supported = kOrtApiVersion;
    OrtEp::GetName = [](const OrtEp*) { return EDGEMOE_ORT_PROVIDER; };
    OrtEp::GetCapability = [](OrtEp* self, const OrtGraph* graph, OrtEpGraphSupportInfo* info) -> OrtStatus* {
      auto* const p = static_cast<Provider*>(self);
      return p->ort_.Guard([&] { p->Claim(graph, info); });
    };
    OrtEp::Compile = [](OrtEp* self, const OrtGraph** graphs, const OrtNode** nodes, size_t n,
                        OrtNodeComputeInfo** infos, OrtNode**) -> OrtStatus* {
      auto* const p = static_cast<Provider*>(self);
      return p->ort_.Guard([&] { p->CompileAll(graphs, nodes, n, infos); });
    };
    OrtEp::ReleaseNodeComputeInfos = [](OrtEp*, OrtNodeComputeInfo** infos, size_t n) {
      for (size_t i = 0; i < n; ++i) delete static_cast<Computation*>(infos[i]);
    };
    ProviderOptions options = ReadOptions(ort, session_options);
    is_strict_ = options.is_strict;
    publishes_ = options.publishes;
    options_ = std::move(options.model);
    if (publishes_) DropLoaded();
  }

  void Run(const Computation& c, OrtKernelContext* context) { model_->Run(c.node_idx, c.inputs, context); }
  const Ort& ort() const { return ort_; }

  static void DropLoaded() {
    if (t_loaded.runtime != nullptr) edgemoe_runtime_release(t_loaded.runtime);
    delete t_loaded.counting;
    t_loaded = {};
    t_tensors.clear();
  }

 private:
  void Claim(const OrtGraph* graph, OrtEpGraphSupportInfo* info) {
    const GraphRouters routers(ort_, graph);
    for (const OrtNode* node : ort_.Nodes(graph)) {
      const std::string type = ort_.NodeType(node);
      if (type != "com.microsoft::QMoE" && type != "com.microsoft::MoE") continue;
      QmoeNode read;
      std::string reason;
      if (type == "com.microsoft::MoE") {
        read.name = ort_.NodeName(node);
        reason = "experts that are not quantized are not implemented";
      } else if (ort_.IsSubgraph(graph)) {
        read.name = ort_.NodeName(node);
        reason = "it lies inside of a Loop, If or Scan, which is not implemented";
      } else {
        reason = ReadQmoe(ort_, graph, node, false, &read);
      }
      if (!reason.empty()) {
        if (refusal_.empty()) refusal_ = "node " + read.name + " (" + type + "): " + reason;
        if (publishes_ && t_loaded.n_refused++ == 0) {
          std::snprintf(t_loaded.refusal, sizeof(t_loaded.refusal), "%s", refusal_.c_str());
        }
        // ONNX Runtime takes an error here for "nothing to claim", but passes on one of Compile.
        if (!is_strict_) continue;
      } else {
        // Compile sees the node alone.
        router_of_[ort_.Outputs(node)[0]] =
            routers.Find(node, read.n_experts, read.hidden, options_.prefetch_depth > 0);
      }
      const OrtNodeFusionOptions fusion = {kOrtApiVersion, true};
      ort_.Check(ep_api::EpGraphSupportInfo_AddNodesToFuse::Call(ort_.ep_table(), info, &node, 1, &fusion));
    }
  }

  void CompileAll(const OrtGraph** graphs, const OrtNode** fused_nodes, size_t n, OrtNodeComputeInfo** infos) {
    if (n == 0) return;
    if (is_strict_ && !refusal_.empty()) {
      throw Error("cannot stream the experts of " + refusal_ +
                  "; without a memory budget ONNX Runtime's own kernel computes it, all experts in memory");
    }
    if (model_ != nullptr) throw Error("ONNX Runtime compiles a session's nodes in parts, expected all at once");
    std::vector<QmoeNode> nodes(n);
    std::vector<Router> routers(n);
    for (size_t i = 0; i < n; ++i) {
      const std::vector<const OrtNode*> inner = ort_.Nodes(graphs[i]);
      if (inner.size() != 1) throw Error("a fused node of " + std::to_string(inner.size()) + " nodes, expected one");
      const std::string reason = ReadQmoe(ort_, graphs[i], inner[0], true, &nodes[i]);
      if (!reason.empty()) throw Error("node " + nodes[i].name + ": " + reason);
      routers[i] = std::move(router_of_[ort_.Outputs(inner[0])[0]]);
    }
    std::vector<QmoeModel::InputIdxs> inputs(n);
    for (size_t i = 0; i < n; ++i) {
      const std::vector<ValueInfo> given = ort_.Inputs(fused_nodes[i]);
      const auto find = [&](const std::string& name) {
        for (size_t k = 0; k < given.size(); ++k) {
          if (given[k].name == name) return static_cast<int>(k);
        }
        throw Error("node " + nodes[i].name + ": ONNX Runtime does not pass its input " + name);
      };
      inputs[i].x = find(nodes[i].x);
      inputs[i].router = find(nodes[i].router);
      inputs[i].router_weights = nodes[i].router_weights.empty() ? -1 : find(nodes[i].router_weights);
    }
    const std::string model_path = ort_.ModelPath(graphs[0]);
    const size_t slash = model_path.rfind('/');
    const std::string folder = slash == std::string::npos ? "" : model_path.substr(0, slash);
    router_of_.clear();
    const auto n_routers = std::count_if(routers.begin(), routers.end(), [](const Router& r) { return r.is_known; });
    model_ = std::make_unique<QmoeModel>(&ort_, folder, std::move(nodes), std::move(routers), options_);
    for (size_t i = 0; i < n; ++i) {
      auto* const c = new Computation();
      c->ort_version_supported = kOrtApiVersion;
      c->provider = this;
      c->node_idx = i;
      c->inputs = inputs[i];
      c->CreateState = [](OrtNodeComputeInfo*, OrtNodeComputeContext*, void** state) -> OrtStatus* {
        *state = nullptr;
        return nullptr;
      };
      c->Compute = [](OrtNodeComputeInfo* self, void*, OrtKernelContext* context) -> OrtStatus* {
        const auto& computation = *static_cast<Computation*>(self);
        return computation.provider->ort().Guard([&] { computation.provider->Run(computation, context); });
      };
      c->ReleaseState = [](OrtNodeComputeInfo*, void*) {};
      infos[i] = c;
    }
    if (!publishes_) return;
    edgemoe_runtime_retain(model_->runtime());
    t_loaded.runtime = model_->runtime();
    t_loaded.workspace_bytes = model_->workspace_bytes();
    t_loaded.kept_bytes = model_->kept_bytes();
    t_loaded.n_layers = static_cast<int32_t>(n);
    t_loaded.n_routers = static_cast<int32_t>(n_routers);
    t_loaded.counting = new edgemoe_ort_counting{model_->choosers()};
    t_tensors = model_->Tensors();
  }

  const Ort& ort_;
  ModelOptions options_;
  bool is_strict_ = false;
  bool publishes_ = false;
  std::string refusal_;                      // the first node that is not ours, and why
  std::map<std::string, Router> router_of_;  // by the name of a node's result, until the model is made
  std::unique_ptr<QmoeModel> model_;
};

class Factory : public OrtEpFactory {
 public:
  explicit Factory(const OrtApiBase* base) : OrtEpFactory(), ort_(base) {
    ort_version_supported = kOrtApiVersion;
    OrtEpFactory::GetName = [](const OrtEpFactory*) { return EDGEMOE_ORT_PROVIDER; };
    OrtEpFactory::GetVendor = [](const OrtEpFactory*) { return "edgemoe"; };
    OrtEpFactory::GetVendorId = [](const OrtEpFactory*) -> uint32_t { return 0; };
    OrtEpFactory::GetVersion = [](const OrtEpFactory*) { return edgemoe_version(); };
    OrtEpFactory::GetSupportedDevices = [](OrtEpFactory* self, const OrtHardwareDevice* const* devices,
                                           size_t n_devices, OrtEpDevice** ep_devices, size_t max_ep_devices,
                                           size_t* n_ep_devices) -> OrtStatus* {
      const Ort& ort = static_cast<Factory*>(self)->ort_;
      *n_ep_devices = 0;
      return ort.Guard([&] {
        for (size_t i = 0; i < n_devices && *n_ep_devices < max_ep_devices; ++i) {
          if (api::HardwareDevice_Type::Call(ort.table(), devices[i]) != kOrtCpu) continue;
          ort.Check(ep_api::CreateEpDevice::Call(ort.ep_table(), self, devices[i], nullptr, nullptr,
                                                 &ep_devices[*n_ep_devices]));
          ++*n_ep_devices;
        }
      });
    };
    OrtEpFactory::CreateEp = [](OrtEpFactory* self, const OrtHardwareDevice* const*, const OrtKeyValuePairs* const*,
                                size_t, const OrtSessionOptions* options, const OrtLogger*, OrtEp** ep) -> OrtStatus* {
      const Ort& ort = static_cast<Factory*>(self)->ort_;
      *ep = nullptr;
      return ort.Guard([&] { *ep = new Provider(ort, options); });
    };
    // Memory, copies and streams are those of the CPU.
    OrtEpFactory::ValidateCompiledModelCompatibilityInfo = [](OrtEpFactory*, const OrtHardwareDevice* const*, size_t,
                                                              const char*, int32_t* compatibility) -> OrtStatus* {
      *compatibility = 0;  // does not apply
      return nullptr;
    };
    OrtEpFactory::CreateAllocator = [](OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*,
                                       OrtAllocator** allocator) -> OrtStatus* {
      *allocator = nullptr;
      return nullptr;
    };
    OrtEpFactory::ReleaseAllocator = [](OrtEpFactory*, OrtAllocator*) {};
    OrtEpFactory::CreateDataTransfer = [](OrtEpFactory*, OrtDataTransferImpl** transfer) -> OrtStatus* {
      *transfer = nullptr;
      return nullptr;
    };
    OrtEpFactory::IsStreamAware = [](const OrtEpFactory*) { return false; };
    OrtEpFactory::CreateSyncStreamForDevice = [](OrtEpFactory*, const OrtMemoryDevice*, const OrtKeyValuePairs*,
                                                 OrtSyncStreamImpl** stream) -> OrtStatus* {
      *stream = nullptr;
      return nullptr;
    };
    OrtEpFactory::ReleaseEp = [](OrtEpFactory*, OrtEp* ep) { delete static_cast<Provider*>(ep); };
  }

 private:
  const Ort ort_;
};

}  // namespace
}  // namespace edgemoe_ort

extern "C" {

// ONNX Runtime's entry points for a library of execution providers.
EDGEMOE_API OrtStatus* CreateEpFactories(const char*, const OrtApiBase* base, const OrtLogger*,
                                         OrtEpFactory** factories, size_t max_factories, size_t* n_factories) {
  *n_factories = 0;
  try {
    if (max_factories == 0) throw edgemoe_ort::Error("no room for a factory of execution providers");
    factories[0] = new edgemoe_ort::Factory(base);
    *n_factories = 1;
    return nullptr;
  } catch (const std::exception& e) {
    // Any version of the API can make a status.
    return edgemoe_ort::api::CreateStatus::Call(base->GetApi(1), edgemoe_ort::kOrtFail, e.what());
  }
}

EDGEMOE_API OrtStatus* ReleaseEpFactory(OrtEpFactory* factory) {
  delete static_cast<edgemoe_ort::Factory*>(factory);
  return nullptr;
}

void edgemoe_ort_take_loaded(edgemoe_ort_loaded* loaded) {
  *loaded = edgemoe_ort::t_loaded;
  edgemoe_ort::t_loaded = {};
  edgemoe_ort::t_tensors.clear();
}

int32_t edgemoe_ort_loaded_tensors(edgemoe_ort_tensor* tensors, int32_t capacity) {
  const auto n = static_cast<int32_t>(edgemoe_ort::t_tensors.size());
  std::copy_n(edgemoe_ort::t_tensors.begin(), std::min(n, capacity), tensors);
  return n;
}

void edgemoe_ort_read_counters(const edgemoe_ort_counting* counting, edgemoe_ort_counters* counters) {
  counting->choosers->Read(counters);
}

void edgemoe_ort_reset_counters(edgemoe_ort_counting* counting) { counting->choosers->Reset(); }

void edgemoe_ort_release_counting(edgemoe_ort_counting* counting) { delete counting; }

const void* edgemoe_ort_instance_id(void) { return edgemoe_instance_id(); }

}  // extern "C"
