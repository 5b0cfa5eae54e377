// SPDX-License-Identifier: MIT
#include "plugins/ggml/buffers.h"

#include <cstring>
#include <unordered_map>

#include "plugins/ggml/loading.h"

namespace edgemoe_ggml {
namespace {

struct ExpertBuffer {
  edgemoe_runtime* runtime;
  void* base;
  std::unordered_map<const ggml_tensor*, int32_t> tensor_idx_of;
};

ExpertBuffer* Context(ggml_backend_buffer_t buffer) { return static_cast<ExpertBuffer*>(buffer->context); }

void FreeExpertBuffer(ggml_backend_buffer_t buffer) {
  edgemoe_runtime_release(Context(buffer)->runtime);
  delete Context(buffer);
}

void* Base(ggml_backend_buffer_t buffer) { return Context(buffer)->base; }

ggml_status InitTensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  const int32_t idx = edgemoe_runtime_find_tensor(Context(buffer)->runtime, tensor->name);
  if (idx < 0) return GGML_STATUS_FAILED;
  Context(buffer)->tensor_idx_of[tensor] = idx;
  CountPlaced();
  return GGML_STATUS_SUCCESS;
}

// The mapping behind an expert buffer stays, so reading a tensor as a whole works; it is only slow.
void GetTensor(ggml_backend_buffer_t, const ggml_tensor* tensor, void* to, size_t offset, size_t size) {
  std::memcpy(to, static_cast<const char*>(tensor->data) + offset, size);
}

// The mapping is read-only: writing experts is impossible, and llama.cpp never does.
void MemsetTensor(ggml_backend_buffer_t, ggml_tensor*, uint8_t, size_t, size_t) {}
void SetTensor(ggml_backend_buffer_t, ggml_tensor*, const void*, size_t, size_t) {}
void Clear(ggml_backend_buffer_t, uint8_t) {}

ggml_backend_buffer_t AllocateHostMemory(ggml_backend_buffer_type_t type, size_t size) {
  ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
  if (buffer != nullptr) buffer->buft = type;
  return buffer;
}

const char* Name(ggml_backend_buffer_type_t) { return "edgemoe"; }
size_t Alignment(ggml_backend_buffer_type_t) { return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type()); }
bool IsHost(ggml_backend_buffer_type_t) { return true; }

}  // namespace

ggml_backend_buffer_type_t BufferType(ggml_backend_dev_t device) {
  static ggml_backend_buffer_type type = {
      {Name, AllocateHostMemory, Alignment, nullptr, nullptr, IsHost}, nullptr, nullptr};
  type.device = device;
  return &type;
}

ggml_backend_buffer_t NewExpertBuffer(ggml_backend_buffer_type_t type, edgemoe_runtime* runtime, void* base,
                                      size_t size) {
  ggml_backend_buffer_i iface = {};
  iface.free_buffer = FreeExpertBuffer;
  iface.get_base = Base;
  iface.init_tensor = InitTensor;
  iface.memset_tensor = MemsetTensor;
  iface.set_tensor = SetTensor;
  iface.get_tensor = GetTensor;
  iface.clear = Clear;
  edgemoe_runtime_retain(runtime);
  return ggml_backend_buffer_init(type, iface, new ExpertBuffer{runtime, base, {}}, size);
}

ExpertWeights FindExpertWeights(const ggml_tensor* tensor) {
  ggml_backend_buffer_t buffer = tensor->buffer;
  if (buffer == nullptr || buffer->iface.free_buffer != FreeExpertBuffer) return {};
  const auto it = Context(buffer)->tensor_idx_of.find(tensor);
  if (it == Context(buffer)->tensor_idx_of.end()) return {};
  return {Context(buffer)->runtime, it->second};
}

bool IsExpertCandidate(const ggml_tensor* tensor, ggml_backend_buffer_type_t type) {
  edgemoe_runtime* runtime = LoadingRuntime();
  return runtime != nullptr && tensor->buffer != nullptr && tensor->buffer->buft == type &&
         edgemoe_runtime_find_tensor(runtime, tensor->name) >= 0;
}

}  // namespace edgemoe_ggml
