// SPDX-License-Identifier: MIT
// ggml_abi.h: the layout of the ggml structs that a backend must fill in and that ggml does not install a header
// for (its ggml-backend-impl.h and ggml-impl.h). ABI facts of the one ggml version named below; the plug-in
// refuses to load beside any other. tests/native/test_ggml_abi.py compares every size and offset with ggml's own
// headers from the llama-cpp-python source distribution.
#ifndef EDGEMOE_PLUGINS_GGML_GGML_ABI_H_
#define EDGEMOE_PLUGINS_GGML_GGML_ABI_H_

#include <cstddef>
#include <cstdint>

#include "ggml-backend.h"
#include "ggml.h"

#define EDGEMOE_GGML_VERSION "0.25.3"
#define EDGEMOE_LLAMA_CPP_PYTHON_VERSION "0.3.36"
#define EDGEMOE_GGML_BACKEND_API_VERSION 2

extern "C" {

struct ggml_backend_buffer_type_i {
  const char* (*get_name)(ggml_backend_buffer_type_t);
  ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t);
  size_t (*get_alignment)(ggml_backend_buffer_type_t);
  size_t (*get_max_size)(ggml_backend_buffer_type_t);
  size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor*);
  bool (*is_host)(ggml_backend_buffer_type_t);
};

struct ggml_backend_buffer_type {
  ggml_backend_buffer_type_i iface;
  ggml_backend_dev_t device;
  void* context;
};

struct ggml_backend_buffer_i {
  void (*free_buffer)(ggml_backend_buffer_t);
  void* (*get_base)(ggml_backend_buffer_t);
  ggml_status (*init_tensor)(ggml_backend_buffer_t, ggml_tensor*);
  void (*memset_tensor)(ggml_backend_buffer_t, ggml_tensor*, uint8_t, size_t, size_t);
  void (*set_tensor)(ggml_backend_buffer_t, ggml_tensor*, const void*, size_t, size_t);
  void (*get_tensor)(ggml_backend_buffer_t, const ggml_tensor*, void*, size_t, size_t);
  void (*set_tensor_2d)(ggml_backend_buffer_t, ggml_tensor*, const void*, size_t, size_t, size_t, size_t, size_t);
  void (*get_tensor_2d)(ggml_backend_buffer_t, const ggml_tensor*, void*, size_t, size_t, size_t, size_t, size_t);
  bool (*cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor*, ggml_tensor*);
  void (*clear)(ggml_backend_buffer_t, uint8_t);
  void (*reset)(ggml_backend_buffer_t);
};

struct ggml_backend_buffer {
  ggml_backend_buffer_i iface;
  ggml_backend_buffer_type_t buft;
  void* context;
  size_t size;
  ggml_backend_buffer_usage usage;
};

struct ggml_backend_graph_optimize_params;

struct ggml_backend_i {
  const char* (*get_name)(ggml_backend_t);
  void (*free)(ggml_backend_t);
  void (*set_tensor_async)(ggml_backend_t, ggml_tensor*, const void*, size_t, size_t);
  void (*get_tensor_async)(ggml_backend_t, const ggml_tensor*, void*, size_t, size_t);
  void (*set_tensor_2d_async)(ggml_backend_t, ggml_tensor*, const void*, size_t, size_t, size_t, size_t, size_t);
  void (*get_tensor_2d_async)(ggml_backend_t, const ggml_tensor*, void*, size_t, size_t, size_t, size_t, size_t);
  bool (*cpy_tensor_async)(ggml_backend_t, ggml_backend_t, const ggml_tensor*, ggml_tensor*);
  void (*synchronize)(ggml_backend_t);
  ggml_backend_graph_plan_t (*graph_plan_create)(ggml_backend_t, const ggml_cgraph*);
  void (*graph_plan_free)(ggml_backend_t, ggml_backend_graph_plan_t);
  void (*graph_plan_update)(ggml_backend_t, ggml_backend_graph_plan_t, const ggml_cgraph*);
  ggml_status (*graph_plan_compute)(ggml_backend_t, ggml_backend_graph_plan_t);
  ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph*);
  void (*event_record)(ggml_backend_t, ggml_backend_event_t);
  void (*event_wait)(ggml_backend_t, ggml_backend_event_t);
  void (*graph_optimize)(ggml_backend_t, ggml_cgraph*, ggml_backend_graph_optimize_params*);
};

struct ggml_backend {
  ggml_guid_t guid;
  ggml_backend_i iface;
  ggml_backend_dev_t device;
  void* context;
};

struct ggml_backend_device_i {
  const char* (*get_name)(ggml_backend_dev_t);
  const char* (*get_description)(ggml_backend_dev_t);
  void (*get_memory)(ggml_backend_dev_t, size_t*, size_t*);
  enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
  void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props*);
  ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char*);
  ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
  ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t);
  ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t, void*, size_t, size_t);
  bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor*);
  bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
  bool (*offload_op)(ggml_backend_dev_t, const ggml_tensor*);
  ggml_backend_event_t (*event_new)(ggml_backend_dev_t);
  void (*event_free)(ggml_backend_dev_t, ggml_backend_event_t);
  void (*event_synchronize)(ggml_backend_dev_t, ggml_backend_event_t);
};

struct ggml_backend_device {
  ggml_backend_device_i iface;
  ggml_backend_reg_t reg;
  void* context;
};

struct ggml_backend_reg_i {
  const char* (*get_name)(ggml_backend_reg_t);
  size_t (*get_device_count)(ggml_backend_reg_t);
  ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t);
  void* (*get_proc_address)(ggml_backend_reg_t, const char*);
};

struct ggml_backend_reg {
  int api_version;
  ggml_backend_reg_i iface;
  void* context;
};

struct ggml_hash_set {
  size_t size;
  uint32_t* used;
  ggml_tensor** keys;
};

struct ggml_cgraph {
  int size;
  int n_nodes;
  int n_leafs;
  ggml_tensor** nodes;
  ggml_tensor** grads;
  ggml_tensor** grad_accs;
  ggml_tensor** leafs;
  int32_t* use_counts;
  ggml_hash_set visited_hash_set;
  int order;
  uint64_t uid;
};

GGML_API ggml_backend_buffer_t ggml_backend_buffer_init(ggml_backend_buffer_type_t buft, ggml_backend_buffer_i iface,
                                                        void* context, size_t size);
// Nodes [begin, end) of a graph as a graph of their own; shares the nodes.
GGML_API ggml_cgraph ggml_graph_view(ggml_cgraph* graph, int begin, int end);

}  // extern "C"

static_assert(sizeof(void*) == 8, "the layouts below are those of a 64-bit build");
static_assert(sizeof(ggml_backend_buffer_type) == 64, "ggml_backend_buffer_type");
static_assert(sizeof(ggml_backend_buffer) == 120, "ggml_backend_buffer");
static_assert(offsetof(ggml_backend_buffer, buft) == 88, "ggml_backend_buffer::buft");
static_assert(sizeof(ggml_backend) == 152, "ggml_backend");
static_assert(sizeof(ggml_backend_device) == 136, "ggml_backend_device");
static_assert(sizeof(ggml_backend_reg) == 48, "ggml_backend_reg");
static_assert(offsetof(ggml_backend_reg, iface) == 8, "ggml_backend_reg::iface");
static_assert(sizeof(ggml_cgraph) == 96, "ggml_cgraph");

#endif  // EDGEMOE_PLUGINS_GGML_GGML_ABI_H_
