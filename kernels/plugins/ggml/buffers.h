// SPDX-License-Identifier: MIT
// buffers.h: the plug-in's buffer type. A buffer of it is one of two kinds. An *expert buffer* covers a mapped
// model file and holds no memory: its tensors are only located, their bytes come through libedgemoe. Any other
// buffer is ordinary host memory, for the results of the nodes that the plug-in computes.
// Thread-compatible, as ggml's buffers are.
#ifndef EDGEMOE_PLUGINS_GGML_BUFFERS_H_
#define EDGEMOE_PLUGINS_GGML_BUFFERS_H_

#include "edgemoe/edgemoe.h"
#include "plugins/ggml/ggml_abi.h"

namespace edgemoe_ggml {

ggml_backend_buffer_type_t BufferType(ggml_backend_dev_t device);
ggml_backend_buffer_t NewExpertBuffer(ggml_backend_buffer_type_t type, edgemoe_runtime* runtime, void* base,
                                      size_t size);

struct ExpertWeights {
  edgemoe_runtime* runtime = nullptr;
  int32_t tensor_idx = -1;
};
// Where a tensor's experts lie; runtime is null when it is not in an expert buffer.
ExpertWeights FindExpertWeights(const ggml_tensor* tensor);
// True while a model loads and asks whether this tensor could live in an expert buffer.
bool IsExpertCandidate(const ggml_tensor* tensor, ggml_backend_buffer_type_t type);

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_BUFFERS_H_
