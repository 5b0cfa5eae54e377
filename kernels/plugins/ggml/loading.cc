// SPDX-License-Identifier: MIT
#include "plugins/ggml/loading.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "ggml-cpu.h"
#include "plugins/ggml/edgemoe_ggml.h"
#include "plugins/ggml/ggml_abi.h"
#include "plugins/ggml/lone_rows.h"

namespace edgemoe_ggml {
namespace {

struct Loading {
  edgemoe_runtime* runtime = nullptr;
  int n_placed = 0;
  bool hooked = false;
};
thread_local Loading t_loading;

// llama.cpp maps the file with MAP_POPULATE and POSIX_MADV_WILLNEED, which reads every expert, except on machines
// with several NUMA nodes. It asks the CPU backend's registry; while a load is under way that answer is replaced,
// for the loading thread only.
struct LoaderHook {
  std::mutex mutex;
  int n_users = 0;
  void* (*original)(ggml_backend_reg_t, const char*) = nullptr;
};
LoaderHook& Hook() {
  static LoaderHook hook;
  return hook;
}

bool AlwaysTrue() { return true; }

void* GetProcAddress(ggml_backend_reg_t reg, const char* name) {
  if (t_loading.runtime != nullptr && std::strcmp(name, "ggml_backend_cpu_is_numa") == 0) {
    return reinterpret_cast<void*>(AlwaysTrue);
  }
  if (t_loading.runtime != nullptr && std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
    return reinterpret_cast<void*>(SetCpuThreads);
  }
  return Hook().original(reg, name);
}

ggml_backend_reg_t CpuRegistry() {
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  return cpu == nullptr ? nullptr : ggml_backend_dev_backend_reg(cpu);
}

bool Writable(const void* address) {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (maps == nullptr) return false;
  char line[512];
  bool writable = false;
  while (std::fgets(line, sizeof(line), maps) != nullptr) {
    unsigned long long begin = 0, end = 0;
    char permissions[5] = "";
    if (std::sscanf(line, "%llx-%llx %4s", &begin, &end, permissions) != 3) continue;
    const unsigned long long a = reinterpret_cast<unsigned long long>(address);
    if (a >= begin && a < end) writable = permissions[1] == 'w';
  }
  std::fclose(maps);
  return writable;
}

bool PlaceHook() {
  LoaderHook& hook = Hook();
  std::lock_guard<std::mutex> lock(hook.mutex);
  ggml_backend_reg_t reg = CpuRegistry();
  if (reg == nullptr || reg->iface.get_proc_address == nullptr || !Writable(reg)) return false;
  if (hook.n_users++ == 0) {
    hook.original = reg->iface.get_proc_address;
    reg->iface.get_proc_address = GetProcAddress;
  }
  return true;
}

void RemoveHook() {
  LoaderHook& hook = Hook();
  std::lock_guard<std::mutex> lock(hook.mutex);
  if (--hook.n_users == 0) CpuRegistry()->iface.get_proc_address = hook.original;
}

}  // namespace

edgemoe_runtime* LoadingRuntime() { return t_loading.runtime; }
void CountPlaced() { ++t_loading.n_placed; }

}  // namespace edgemoe_ggml

int32_t edgemoe_ggml_begin_load(edgemoe_runtime* runtime) {
  edgemoe_ggml::t_loading = {runtime, 0, edgemoe_ggml::PlaceHook()};
  return edgemoe_ggml::t_loading.hooked ? 1 : 0;
}

int32_t edgemoe_ggml_end_load(void) {
  if (edgemoe_ggml::t_loading.hooked) edgemoe_ggml::RemoveHook();
  const int n_placed = edgemoe_ggml::t_loading.n_placed;
  edgemoe_ggml::t_loading = {};
  return n_placed;
}

int32_t edgemoe_ggml_populate(const char* path, const edgemoe_range* ranges, int32_t n_ranges, int32_t n_threads,
                              edgemoe_error* error) {
  for (int32_t i = 0; i < n_ranges; ++i) {
    void* p =
        ::mmap(ranges[i].to, ranges[i].length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (p == MAP_FAILED) {
      if (error != nullptr) {
        error->code = EDGEMOE_NO_MEMORY;
        std::snprintf(error->message, sizeof(error->message), "cannot allocate %llu bytes for dense weights: %s (%s)",
                      static_cast<unsigned long long>(ranges[i].length), std::strerror(errno), path);
      }
      return EDGEMOE_NO_MEMORY;
    }
    ::madvise(p, ranges[i].length, MADV_HUGEPAGE);
  }
  return edgemoe_read_ranges(path, ranges, n_ranges, n_threads, error);
}

const char* edgemoe_ggml_built_against(void) { return EDGEMOE_GGML_VERSION; }
const char* edgemoe_ggml_llama_cpp_python(void) { return EDGEMOE_LLAMA_CPP_PYTHON_VERSION; }
const char* edgemoe_ggml_loaded(void) { return ggml_version(); }
const void* edgemoe_ggml_instance_id(void) { return edgemoe_instance_id(); }
