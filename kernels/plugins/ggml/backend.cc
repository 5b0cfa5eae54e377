// SPDX-License-Identifier: MIT
// backend.cc: edgemoe as a ggml backend of type ACCEL: registry, device and the backend that a llama_context makes
// of it. It claims products with expert weights, and the small nodes that follow from them, so that a layer's
// experts are one split; which nodes those are is decided by structure, never by a model's name.
#include <cstring>

#include "plugins/ggml/buffers.h"
#include "plugins/ggml/edgemoe_ggml.h"
#include "plugins/ggml/ggml_abi.h"
#include "plugins/ggml/loading.h"
#include "plugins/ggml/moe_region.h"

namespace edgemoe_ggml {
namespace {

// Nodes looked at when asking whether a node follows from an expert product: the sum over 8 experts is a chain
// of 7 additions, with a view beside each.
constexpr int kAncestryBudget = 64;

ggml_backend_dev_t Device();

bool IsSmallOp(const ggml_tensor* t) {
  switch (t->op) {
    case GGML_OP_GLU:
    case GGML_OP_UNARY:
    case GGML_OP_SCALE:
    case GGML_OP_CLAMP:
    case GGML_OP_MUL:
    case GGML_OP_DIV:
    case GGML_OP_ADD:
    case GGML_OP_SUB:
    case GGML_OP_SQR:
    case GGML_OP_ADD_ID:
    case GGML_OP_CONT:
      return true;
    default:
      return false;
  }
}

bool IsExpertWeights(const ggml_tensor* t) {
  return FindExpertWeights(t).runtime != nullptr || IsExpertCandidate(t, BufferType(Device()));
}

bool FollowsFromExperts(const ggml_tensor* t, int* budget) {
  if (t == nullptr || --*budget < 0) return false;
  if (t->op == GGML_OP_MUL_MAT_ID) return IsExpertWeights(t->src[0]);
  if (t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE) return FollowsFromExperts(t->src[0], budget);
  if (!IsSmallOp(t)) return false;
  return FollowsFromExperts(t->src[1], budget) || FollowsFromExperts(t->src[0], budget);
}

// --- backend ---

const char* BackendName(ggml_backend_t) { return "edgemoe"; }

void FreeBackend(ggml_backend_t backend) {
  delete static_cast<MoeRegion*>(backend->context);
  delete backend;
}

ggml_status GraphCompute(ggml_backend_t backend, ggml_cgraph* graph) {
  return static_cast<MoeRegion*>(backend->context)->Compute(graph);
}

ggml_guid_t Guid() {
  static ggml_guid guid = {0x65, 0x64, 0x67, 0x65, 0x6d, 0x6f, 0x65, 0x2d,
                           0x67, 0x67, 0x6d, 0x6c, 0x2d, 0x30, 0x30, 0x31};
  return &guid;
}

void SetThreads(ggml_backend_t backend, int n_threads) {
  static_cast<MoeRegion*>(backend->context)->SetThreads(n_threads);
}

// --- device ---

const char* DeviceName(ggml_backend_dev_t) { return "edgemoe"; }
const char* DeviceDescription(ggml_backend_dev_t) { return "routed experts streamed from storage"; }
void DeviceMemory(ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; }
enum ggml_backend_dev_type DeviceType(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void DeviceProps(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  *props = {};
  props->name = DeviceName(device);
  props->description = DeviceDescription(device);
  props->type = DeviceType(device);
  props->caps.buffer_from_host_ptr = true;
  props->caps.mmap_support = true;
}

ggml_backend_t InitBackend(ggml_backend_dev_t device, const char*) {
  ggml_backend_i iface = {};
  iface.get_name = BackendName;
  iface.free = FreeBackend;
  iface.graph_compute = GraphCompute;
  return new ggml_backend{Guid(), iface, device, new MoeRegion()};
}

ggml_backend_buffer_type_t DeviceBufferType(ggml_backend_dev_t device) { return BufferType(device); }

ggml_backend_buffer_t BufferFromHostPointer(ggml_backend_dev_t device, void* base, size_t size, size_t) {
  edgemoe_runtime* runtime = LoadingRuntime();
  return runtime == nullptr ? nullptr : NewExpertBuffer(BufferType(device), runtime, base, size);
}

bool SupportsOp(ggml_backend_dev_t, const ggml_tensor* op) {
  if (op->op == GGML_OP_MUL_MAT_ID) return IsExpertWeights(op->src[0]);
  int budget = kAncestryBudget;
  return IsSmallOp(op) && FollowsFromExperts(op, &budget);
}

bool SupportsBufferType(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); }

// --- registry ---

const char* RegistryName(ggml_backend_reg_t) { return "edgemoe"; }
size_t DeviceCount(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t GetDevice(ggml_backend_reg_t, size_t) { return Device(); }

void* GetProcAddress(ggml_backend_reg_t, const char* name) {
  if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) return reinterpret_cast<void*>(SetThreads);
  return nullptr;
}

ggml_backend_reg_t Registry() {
  static ggml_backend_reg registry = {
      EDGEMOE_GGML_BACKEND_API_VERSION, {RegistryName, DeviceCount, GetDevice, GetProcAddress}, nullptr};
  return &registry;
}

ggml_backend_dev_t Device() {
  static ggml_backend_device device = {
      {DeviceName, DeviceDescription, DeviceMemory, DeviceType, DeviceProps, InitBackend, DeviceBufferType, nullptr,
       BufferFromHostPointer, SupportsOp, SupportsBufferType, nullptr, nullptr, nullptr, nullptr},
      Registry(),
      nullptr};
  return &device;
}

}  // namespace
}  // namespace edgemoe_ggml

// ggml's entry point for a backend in a library of its own. The struct layouts are those of one version only.
extern "C" EDGEMOE_API ggml_backend_reg_t ggml_backend_init(void) {
  if (std::strcmp(ggml_version(), EDGEMOE_GGML_VERSION) != 0) return nullptr;
  return edgemoe_ggml::Registry();
}
