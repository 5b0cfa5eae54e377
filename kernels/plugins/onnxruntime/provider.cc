// SPDX-License-Identifier: MIT
// provider.cc: edgemoe as a plug-in execution provider of ONNX Runtime: the factory that ONNX Runtime finds, and the
// provider of one session, which claims QMoE nodes and gives each its computation. Claiming a node with its constants
// dropped keeps ONNX Runtime from ever touching the bytes of experts.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "plugins/onnxruntime/edgemoe_ort.h"
#include "plugins/onnxruntime/qmoe_model.h"
#include "plugins/onnxruntime/session_options.h"

namespace edgemoe_ort {
namespace {

class Provider;

struct Computation : OrtNodeComputeInfo {
  Provider* provider = nullptr;
  size_t node_idx = 0;
  QmoeModel::InputIdxs inputs;
};

class Provider : public OrtEp {
 public:
  Provider(const Ort& ort, const OrtSessionOptions* session_options)
      : OrtEp(), ort_(ort), options_(ReadOptions(ort, session_options)) {
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
    if (options_.publishes) DropLoaded();
  }

  void Run(const Computation& c, OrtKernelContext* context) { model_->Run(c.node_idx, c.inputs, context); }
  const Ort& ort() const { return ort_; }

 private:
  void Claim(const OrtGraph* graph, OrtEpGraphSupportInfo* info) {
    const GraphRouters routers(ort_, graph);
    for (const OrtNode* node : ort_.Nodes(graph)) {
      if (!IsMoe(ort_.NodeType(node))) continue;
      const GraphNode source(ort_, graph, node);
      QmoeNode read;
      const std::string reason = ReadMoe(source, false, &read);
      if (!reason.empty()) {
        if (refusal_.empty()) refusal_ = "node " + source.name + " (" + source.type + "): " + reason;
        if (options_.publishes) PublishRefusal(refusal_);
        // ONNX Runtime takes an error here for "nothing to claim", but passes on one of Compile.
        if (!options_.is_strict) continue;
      } else {
        // Compile sees the node alone.
        router_of_[ort_.Outputs(node)[0]] =
            routers.Find(node, read.n_experts, read.hidden, options_.model.prefetch_depth > 0);
      }
      const OrtNodeFusionOptions fusion = {kOrtApiVersion, true};
      ort_.Check(ep_api::EpGraphSupportInfo_AddNodesToFuse::Call(ort_.ep_table(), info, &node, 1, &fusion));
    }
  }

  void CompileAll(const OrtGraph** graphs, const OrtNode** fused_nodes, size_t n, OrtNodeComputeInfo** infos) {
    if (n == 0) return;
    if (options_.is_strict && !refusal_.empty()) {
      throw Error("cannot stream the experts of " + refusal_ +
                  "; without a memory budget ONNX Runtime's own kernel computes it, all experts in memory");
    }
    if (model_ != nullptr) throw Error("ONNX Runtime compiles a session's nodes in parts, expected all at once");
    std::vector<QmoeNode> nodes(n);
    std::vector<Router> routers(n);
    for (size_t i = 0; i < n; ++i) {
      const std::vector<const OrtNode*> inner = ort_.Nodes(graphs[i]);
      if (inner.size() != 1) throw Error("a fused node of " + std::to_string(inner.size()) + " nodes, expected one");
      const std::string reason = ReadMoe(GraphNode(ort_, graphs[i], inner[0]), true, &nodes[i]);
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
    const std::string folder = FolderOf(ort_.ModelPath(graphs[0]));
    router_of_.clear();
    const auto n_routers = std::count_if(routers.begin(), routers.end(), [](const Router& r) { return r.is_known; });
    model_ = std::make_unique<QmoeModel>(&ort_, folder, std::move(nodes), std::move(routers), options_.model);
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
    if (options_.publishes) PublishLoaded(*model_, static_cast<int32_t>(n_routers));
  }

  const Ort& ort_;
  const SessionOptions options_;
  std::string refusal_;                      // the first node that is not ours, and why
  std::map<std::string, Router> router_of_;  // by the name of a node's result, until the model is made
  std::unique_ptr<QmoeModel> model_;
};

class Factory : public OrtEpFactory {
 public:
  explicit Factory(const OrtApiBase* base) : OrtEpFactory(), ort_(base, kOrtApiVersion) {
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

}  // extern "C"
