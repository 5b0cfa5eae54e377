// SPDX-License-Identifier: MIT
// runtime_ext.h: libedgemoe as Python sees it: its runtime, what is asked of it before one is open, and its errors.
// The GIL is released around everything that can block; no Python object is kept in native code.
#ifndef EDGEMOE_PLUGINS_PYTHON_RUNTIME_EXT_H_
#define EDGEMOE_PLUGINS_PYTHON_RUNTIME_EXT_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "edgemoe/edgemoe.h"
#include "edgemoe/scheduler.h"

namespace edgemoe_python {

namespace nb = nanobind;

// Becomes _core.CoreError(code, message) in Python.
class CoreError : public std::runtime_error {
 public:
  CoreError(int32_t code, const std::string& message) : std::runtime_error(message), code_(code) {}
  int32_t code() const { return code_; }

 private:
  int32_t code_;
};

inline void Check(int32_t code, const edgemoe_error& error) {
  if (code != EDGEMOE_OK) throw CoreError{code, error.message};
}

// (name, file_idx, layer, n_experts, n_experts_used, offset, expert_bytes, n_cols, n_rows, format, copy_of or -1)
using TensorTuple = std::tuple<std::string, int, int, int, int, uint64_t, uint64_t, int64_t, int64_t, int, int>;

struct Options {
  std::vector<const char*> paths;
  std::vector<edgemoe_tensor> tensors;
  edgemoe_options options = {};

  Options(const std::vector<std::string>& files, const std::vector<TensorTuple>& tuples, uint64_t slots_bytes,
          int n_io_threads, int eviction, int arithmetic) {
    for (const std::string& f : files) paths.push_back(f.c_str());
    for (const auto& [name, file_idx, layer, n_experts, n_experts_used, offset, expert_bytes, n_cols, n_rows, format,
                      copy_of] : tuples) {
      tensors.push_back({name.c_str(), file_idx, layer, n_experts, n_experts_used, offset, expert_bytes, n_cols, n_rows,
                         format, copy_of + 1});
    }
    options.struct_size = sizeof(options);
    options.n_files = static_cast<int32_t>(paths.size());
    options.file_paths = paths.data();
    options.n_tensors = static_cast<int32_t>(tensors.size());
    options.tensors = tensors.data();
    options.n_io_threads = n_io_threads;
    options.slots_bytes = slots_bytes;
    options.eviction = eviction;
    options.arithmetic = arithmetic;
  }
};

inline edgemoe_sizes Measure(const std::vector<TensorTuple>& tensors, uint64_t slots_bytes) {
  const Options options({}, tensors, slots_bytes, 1, EDGEMOE_EVICT_LRU, EDGEMOE_ARITHMETIC_AUTO);
  edgemoe_sizes sizes = {};
  edgemoe_error error = {};
  Check(edgemoe_measure(&options.options, &sizes, &error), error);
  return sizes;
}

// shapes: (layer, n_experts, n_cols) of routers.
inline uint64_t PrefetchBytes(const std::vector<std::tuple<int, int, int64_t>>& shapes, int max_depth) {
  std::vector<edgemoe_router> routers;
  for (const auto& [layer, n_experts, n_cols] : shapes) {
    routers.push_back({layer, n_experts, n_cols, nullptr, nullptr, nullptr, 0, 0});
  }
  return edgemoe_prefetch_bytes(routers.data(), static_cast<int32_t>(routers.size()), max_depth);
}

// (name, whether this CPU has it) of the instruction sets compiled for, best first.
inline std::vector<std::tuple<std::string, bool>> Isas() {
  std::vector<std::tuple<std::string, bool>> isas;
  for (int32_t i = 0; edgemoe_isa_name(i) != nullptr; ++i) {
    isas.emplace_back(edgemoe_isa_name(i), edgemoe_isa_is_supported(i) != 0);
  }
  return isas;
}

inline std::string ActiveIsa() {
  const char* name = nullptr;
  edgemoe_error error = {};
  Check(edgemoe_isa_active(&name, &error), error);
  return name;
}

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// (layer, weights [n_experts][n_cols], norm [n_cols], bias [n_experts], sigmoid)
using RouterTuple = std::tuple<int, FloatRows, std::optional<Floats>, std::optional<Floats>, bool>;

using ReplayIds = nb::ndarray<const int16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using ReplayForeseen = nb::ndarray<const int16_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using ReplayBatches = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReplayTimes = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReplayDepths = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// (n_experts, n_used, bytes of each projection)
using ReplayLayerTuple = std::tuple<int, int, std::vector<uint64_t>>;

// experts: [n_tokens][n_layers][max_used]; batch_us and depths: [n_batches], written.
inline edgemoe_replay_result Replay(const std::vector<ReplayLayerTuple>& tuples, const ReplayBatches& batch_of_token,
                                    const ReplayIds& experts, const ReplayForeseen& foreseen,
                                    const edgemoe_replay_options& options, const ReplayTimes& batch_us,
                                    const ReplayDepths& depths) {
  std::vector<edgemoe_replay_layer> layers;
  for (const auto& [n_experts, n_used, slice_bytes] : tuples) {
    edgemoe_replay_layer layer = {n_experts, n_used, static_cast<int32_t>(slice_bytes.size()), 0, {}};
    for (size_t i = 0; i < slice_bytes.size() && i < 4; ++i) layer.slice_bytes[i] = slice_bytes[i];
    layers.push_back(layer);
  }
  const size_t n_tokens = batch_of_token.shape(0);
  const size_t n_batches = n_tokens == 0 ? 0 : static_cast<size_t>(batch_of_token.data()[n_tokens - 1]) + 1;
  if (experts.shape(0) != n_tokens || experts.shape(1) != layers.size() || batch_us.shape(0) != n_batches ||
      depths.shape(0) != n_batches || foreseen.shape(0) != n_batches || foreseen.shape(1) != layers.size() ||
      foreseen.shape(2) != 2) {
    throw CoreError{EDGEMOE_INVALID_ARGUMENT, "replay: arrays of lengths that do not belong to one trace"};
  }
  const edgemoe_replay_trace trace = {static_cast<int32_t>(layers.size()),
                                      static_cast<int32_t>(experts.shape(2)),
                                      static_cast<int64_t>(n_tokens),
                                      layers.data(),
                                      batch_of_token.data(),
                                      experts.data(),
                                      foreseen.data(),
                                      static_cast<int32_t>(foreseen.shape(3)),
                                      0};
  edgemoe_replay_result result;
  edgemoe_error error = {};
  int32_t code;
  {
    nb::gil_scoped_release release;
    code = edgemoe_replay(&trace, &options, &result, batch_us.data(), depths.data(), &error);
  }
  Check(code, error);
  return result;
}

class Runtime {
 public:
  Runtime(const std::vector<std::string>& files, const std::vector<TensorTuple>& tensors, uint64_t slots_bytes,
          int n_io_threads, int eviction, int arithmetic) {
    const Options options(files, tensors, slots_bytes, n_io_threads, eviction, arithmetic);
    edgemoe_error error = {};
    int32_t code;
    {
      nb::gil_scoped_release release;
      code = edgemoe_runtime_open(&options.options, &runtime_, &error);
    }
    Check(code, error);
  }
  // Takes over a reference.
  explicit Runtime(edgemoe_runtime* runtime) : runtime_(runtime) {}
  ~Runtime() { Close(); }
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  void Close() {
    nb::gil_scoped_release release;
    if (runtime_ != nullptr) edgemoe_runtime_release(runtime_);
    runtime_ = nullptr;
  }
  void SetSlotsBytes(uint64_t slots_bytes) {
    edgemoe_error error = {};
    int32_t code;
    {
      nb::gil_scoped_release release;
      code = edgemoe_runtime_set_slots_bytes(get(), slots_bytes, &error);
    }
    Check(code, error);
  }
  edgemoe_stats Stats() {
    edgemoe_stats stats;
    nb::gil_scoped_release release;
    edgemoe_runtime_stats(get(), &stats);
    return stats;
  }
  void SetPrefetch(const std::vector<RouterTuple>& tuples, int max_depth, bool adaptive) {
    std::vector<edgemoe_router> routers;
    for (const auto& [layer, weights, norm, bias, sigmoid] : tuples) {
      if ((norm && norm->shape(0) != weights.shape(1)) || (bias && bias->shape(0) != weights.shape(0))) {
        throw CoreError{EDGEMOE_INVALID_ARGUMENT, "router of layer " + std::to_string(layer) +
                                                      ": norm or bias is of another length than weights"};
      }
      routers.push_back({layer, static_cast<int32_t>(weights.shape(0)), static_cast<int64_t>(weights.shape(1)),
                         weights.data(), norm ? norm->data() : nullptr, bias ? bias->data() : nullptr, sigmoid, 0});
    }
    edgemoe_error error = {};
    int32_t code;
    {
      nb::gil_scoped_release release;
      code = edgemoe_runtime_set_prefetch(get(), routers.data(), static_cast<int32_t>(routers.size()), max_depth,
                                          adaptive, &error);
    }
    Check(code, error);
  }
  edgemoe_prefetch_stats PrefetchStats() {
    edgemoe_prefetch_stats stats;
    nb::gil_scoped_release release;
    edgemoe_runtime_prefetch_stats(get(), &stats);
    return stats;
  }
  void StartTrace(const std::string& path, const std::string& header) {
    edgemoe_error error = {};
    int32_t code;
    {
      nb::gil_scoped_release release;
      code = edgemoe_runtime_start_trace(get(), path.c_str(), header.c_str(), &error);
    }
    Check(code, error);
  }
  void CheckTrace() {
    edgemoe_error error = {};
    int32_t code;
    {
      nb::gil_scoped_release release;
      code = edgemoe_runtime_check_trace(get(), &error);
    }
    Check(code, error);
  }
  void StopTrace() {
    edgemoe_error error = {};
    int32_t code;
    {
      nb::gil_scoped_release release;
      code = edgemoe_runtime_stop_trace(get(), &error);
    }
    Check(code, error);
  }
  void StartClock(int phase) {
    edgemoe_error error = {};
    Check(edgemoe_runtime_start_clock(get(), phase, &error), error);
  }
  int EnterPhase(int phase) { return edgemoe_runtime_enter_phase(get(), phase); }
  std::vector<uint64_t> StopClock() {
    std::vector<uint64_t> ns(EDGEMOE_N_PHASES);
    edgemoe_runtime_stop_clock(get(), ns.data());
    return ns;
  }
  // Whether libedgemoe's kernels multiply by the tensor of that name.
  bool IsOwn(const std::string& name) {
    const int32_t tensor_idx = edgemoe_runtime_find_tensor(get(), name.c_str());
    return tensor_idx >= 0 && edgemoe_runtime_is_own(get(), tensor_idx) != 0;
  }
  std::vector<int64_t> HotSlices() {
    edgemoe_preload_stats sizes;
    edgemoe_runtime_preload_stats(get(), &sizes);
    std::vector<int64_t> slices(static_cast<size_t>(sizes.n_slices));
    edgemoe_error error = {};
    const int64_t n = edgemoe_runtime_hot_slices(get(), slices.data(), sizes.n_slices, &error);
    Check(error.code, error);
    slices.resize(static_cast<size_t>(n));
    return slices;
  }
  std::vector<uint64_t> SliceUses() {
    edgemoe_preload_stats sizes;
    edgemoe_runtime_preload_stats(get(), &sizes);
    std::vector<uint64_t> n_uses(static_cast<size_t>(sizes.n_slices));
    edgemoe_error error = {};
    edgemoe_runtime_slice_uses(get(), n_uses.data(), sizes.n_slices, &error);
    Check(error.code, error);
    return n_uses;
  }
  void Preload(const std::vector<int64_t>& slices) {
    edgemoe_error error = {};
    Check(edgemoe_runtime_preload(get(), slices.data(), static_cast<int64_t>(slices.size()), &error), error);
  }
  edgemoe_preload_stats PreloadStats() {
    edgemoe_preload_stats stats;
    edgemoe_runtime_preload_stats(get(), &stats);
    return stats;
  }
  void ResetStats() { edgemoe_runtime_reset_stats(get()); }
  // (code, message) of the last failed read, taken away; code 0 when there was none.
  std::tuple<int, std::string> TakeError() {
    edgemoe_error error = {};
    edgemoe_runtime_take_error(get(), &error);
    return {error.code, error.message};
  }
  edgemoe_runtime* get() {
    if (runtime_ == nullptr) throw CoreError{EDGEMOE_INVALID_ARGUMENT, "the runtime is closed"};
    return runtime_;
  }

 private:
  edgemoe_runtime* runtime_ = nullptr;
};

}  // namespace edgemoe_python
#endif  // EDGEMOE_PLUGINS_PYTHON_RUNTIME_EXT_H_
