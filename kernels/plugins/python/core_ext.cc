// SPDX-License-Identifier: MIT
// core_ext.cc: the Python module edgemoe._core: libedgemoe's runtime, and the ggml plug-in's loading calls, which
// are looked up in the plug-in after llama_cpp has been imported. Only edgemoe/_native.py imports it.
// The GIL is released around everything that can block; no Python object is kept in native code.
#include <dlfcn.h>
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
#include "plugins/ggml/edgemoe_ggml.h"
#include "plugins/ort/edgemoe_ort.h"

namespace nb = nanobind;

namespace {

// Becomes _core.CoreError(code, message) in Python.
class CoreError : public std::runtime_error {
 public:
  CoreError(int32_t code, const std::string& message) : std::runtime_error(message), code_(code) {}
  int32_t code() const { return code_; }

 private:
  int32_t code_;
};

void Check(int32_t code, const edgemoe_error& error) {
  if (code != EDGEMOE_OK) throw CoreError{code, error.message};
}

// (name, file_idx, layer, n_experts, n_experts_used, offset, expert_bytes, n_cols, n_rows, format)
using TensorTuple = std::tuple<std::string, int, int, int, int, uint64_t, uint64_t, int64_t, int64_t, int>;

struct Options {
  std::vector<const char*> paths;
  std::vector<edgemoe_tensor> tensors;
  edgemoe_options options = {};

  Options(const std::vector<std::string>& files, const std::vector<TensorTuple>& tuples, uint64_t slots_bytes,
          int n_io_threads, int eviction, int arithmetic) {
    for (const std::string& f : files) paths.push_back(f.c_str());
    for (const auto& [name, file_idx, layer, n_experts, n_experts_used, offset, expert_bytes, n_cols, n_rows, format] :
         tuples) {
      tensors.push_back(
          {name.c_str(), file_idx, layer, n_experts, n_experts_used, offset, expert_bytes, n_cols, n_rows, format, 0});
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

edgemoe_sizes Measure(const std::vector<TensorTuple>& tensors, uint64_t slots_bytes) {
  const Options options({}, tensors, slots_bytes, 1, EDGEMOE_EVICT_LRU, EDGEMOE_ARITHMETIC_AUTO);
  edgemoe_sizes sizes = {};
  edgemoe_error error = {};
  Check(edgemoe_measure(&options.options, &sizes, &error), error);
  return sizes;
}

// shapes: (layer, n_experts, n_cols) of routers.
uint64_t PrefetchBytes(const std::vector<std::tuple<int, int, int64_t>>& shapes, int max_depth) {
  std::vector<edgemoe_router> routers;
  for (const auto& [layer, n_experts, n_cols] : shapes) {
    routers.push_back({layer, n_experts, n_cols, nullptr, nullptr, nullptr, 0, 0});
  }
  return edgemoe_prefetch_bytes(routers.data(), static_cast<int32_t>(routers.size()), max_depth);
}

// (name, whether this CPU has it) of the instruction sets compiled for, best first.
std::vector<std::tuple<std::string, bool>> Isas() {
  std::vector<std::tuple<std::string, bool>> isas;
  for (int32_t i = 0; edgemoe_isa_name(i) != nullptr; ++i) {
    isas.emplace_back(edgemoe_isa_name(i), edgemoe_isa_is_supported(i) != 0);
  }
  return isas;
}

std::string ActiveIsa() {
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
using ReplayBatches = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReplayTimes = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReplayDepths = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// (n_experts, n_used, bytes of each projection)
using ReplayLayerTuple = std::tuple<int, int, std::vector<uint64_t>>;

// experts: [n_tokens][n_layers][max_used]; batch_us and depths: [n_batches], written.
edgemoe_replay_result Replay(const std::vector<ReplayLayerTuple>& tuples, const ReplayBatches& batch_of_token,
                             const ReplayIds& experts, const edgemoe_replay_options& options,
                             const ReplayTimes& batch_us, const ReplayDepths& depths) {
  std::vector<edgemoe_replay_layer> layers;
  for (const auto& [n_experts, n_used, slice_bytes] : tuples) {
    edgemoe_replay_layer layer = {n_experts, n_used, static_cast<int32_t>(slice_bytes.size()), 0, {}};
    for (size_t i = 0; i < slice_bytes.size() && i < 4; ++i) layer.slice_bytes[i] = slice_bytes[i];
    layers.push_back(layer);
  }
  const size_t n_tokens = batch_of_token.shape(0);
  const size_t n_batches = n_tokens == 0 ? 0 : static_cast<size_t>(batch_of_token.data()[n_tokens - 1]) + 1;
  if (experts.shape(0) != n_tokens || experts.shape(1) != layers.size() || batch_us.shape(0) != n_batches ||
      depths.shape(0) != n_batches) {
    throw CoreError{EDGEMOE_INVALID_ARGUMENT, "replay: arrays of lengths that do not belong to one trace"};
  }
  const edgemoe_replay_trace trace = {static_cast<int32_t>(layers.size()),
                                      static_cast<int32_t>(experts.shape(2)),
                                      static_cast<int64_t>(n_tokens),
                                      layers.data(),
                                      batch_of_token.data(),
                                      experts.data()};
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
  void ForeseeTokens(const FloatRows& embeddings) {
    edgemoe_runtime_foresee_tokens(get(), embeddings.data(), static_cast<int64_t>(embeddings.shape(0)),
                                   static_cast<int64_t>(embeddings.shape(1)));
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

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Order = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Chooses experts with an advantage for those that are resident.
class ReuseBias {
 public:
  ReuseBias(int method, int n_layers, int n_experts, int top_j, double strength, double max_mass_moved, double max_kl) {
    const edgemoe_reuse_options options = {
        sizeof(edgemoe_reuse_options), method, n_layers, n_experts, top_j, 0, strength, max_mass_moved, max_kl};
    edgemoe_error error = {};
    Check(edgemoe_reuse_open(&options, &reuse_, &error), error);
  }
  ~ReuseBias() { edgemoe_reuse_close(reuse_); }
  ReuseBias(const ReuseBias&) = delete;
  ReuseBias& operator=(const ReuseBias&) = delete;

  // order: experts by falling score; written, the n_used chosen first.
  void Select(int layer, int n_used, const Floats& scores, const Floats& masses, const Bytes& resident,
              const Order& order, bool are_probabilities, bool are_logits) {
    const size_t n_experts = scores.shape(0);
    if (masses.shape(0) != n_experts || resident.shape(0) != n_experts || order.shape(0) != n_experts) {
      throw CoreError{EDGEMOE_INVALID_ARGUMENT, "selection: arrays of different lengths"};
    }
    const edgemoe_selection selection = {layer,           static_cast<int32_t>(n_experts),
                                         n_used,          are_probabilities,
                                         are_logits,      0,
                                         scores.data(),   masses.data(),
                                         resident.data(), order.data()};
    edgemoe_error error = {};
    Check(edgemoe_reuse_select(reuse_, &selection, &error), error);
  }
  edgemoe_reuse_stats Stats() const {
    edgemoe_reuse_stats stats;
    edgemoe_reuse_read_stats(reuse_, &stats);
    return stats;
  }
  void ResetStats() { edgemoe_reuse_reset_stats(reuse_); }
  edgemoe_reuse* get() const { return reuse_; }

 private:
  edgemoe_reuse* reuse_ = nullptr;
};

// The loaded ggml plug-in. It stays loaded: ggml keeps pointers into it for the life of the process.
class GgmlPlugin {
 public:
  explicit GgmlPlugin(const std::string& path) {
    handle_ = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr)
      throw CoreError{EDGEMOE_INTERNAL, std::string("cannot load the ggml plug-in: ") + ::dlerror()};
    Find("edgemoe_ggml_begin_load", &begin_load_);
    Find("edgemoe_ggml_end_load", &end_load_);
    Find("edgemoe_ggml_populate", &populate_);
    Find("edgemoe_ggml_set_lone_rows", &set_lone_rows_);
    Find("edgemoe_ggml_set_profiled", &set_profiled_);
    Find("edgemoe_ggml_set_reuse", &set_reuse_);
    Find("edgemoe_ggml_built_against", &built_against_);
    Find("edgemoe_ggml_llama_cpp_python", &llama_cpp_python_);
    Find("edgemoe_ggml_loaded", &loaded_);
    Find("edgemoe_ggml_instance_id", &instance_id_);
  }

  bool BeginLoad(Runtime& runtime) { return begin_load_(runtime.get()) != 0; }
  int EndLoad() { return end_load_(); }
  void SetLoneRows(int64_t n_tokens) { set_lone_rows_(n_tokens); }
  void SetProfiled(Runtime* runtime, int n_experts) {
    set_profiled_(runtime == nullptr ? nullptr : runtime->get(), n_experts);
  }
  void SetReuse(Runtime* runtime, ReuseBias* reuse, int n_experts) {
    if (runtime == nullptr || reuse == nullptr) {
      set_reuse_(nullptr, nullptr, 0);
    } else {
      set_reuse_(runtime->get(), reuse->get(), n_experts);
    }
  }
  // ranges: (file offset, length, address)
  void Populate(const std::string& path, const std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>& ranges,
                int n_threads) {
    std::vector<edgemoe_range> native;
    for (const auto& [offset, length, address] : ranges)
      native.push_back({offset, length, reinterpret_cast<void*>(address)});
    edgemoe_error error = {};
    int32_t code;
    {
      nb::gil_scoped_release release;
      code = populate_(path.c_str(), native.data(), static_cast<int32_t>(native.size()), n_threads, &error);
    }
    Check(code, error);
  }
  std::string BuiltAgainst() const { return built_against_(); }
  std::string LlamaCppPython() const { return llama_cpp_python_(); }
  std::string Loaded() const { return loaded_(); }
  bool SharesLibrary() const { return instance_id_() == edgemoe_instance_id(); }

 private:
  template <typename Function>
  void Find(const char* name, Function* function) {
    void* const symbol = ::dlsym(handle_, name);
    if (symbol == nullptr) throw CoreError{EDGEMOE_INTERNAL, std::string("the ggml plug-in lacks ") + name};
    std::memcpy(function, &symbol, sizeof(symbol));
  }

  void* handle_ = nullptr;
  decltype(&edgemoe_ggml_begin_load) begin_load_ = nullptr;
  decltype(&edgemoe_ggml_end_load) end_load_ = nullptr;
  decltype(&edgemoe_ggml_populate) populate_ = nullptr;
  decltype(&edgemoe_ggml_set_lone_rows) set_lone_rows_ = nullptr;
  decltype(&edgemoe_ggml_set_profiled) set_profiled_ = nullptr;
  decltype(&edgemoe_ggml_set_reuse) set_reuse_ = nullptr;
  decltype(&edgemoe_ggml_built_against) built_against_ = nullptr;
  decltype(&edgemoe_ggml_llama_cpp_python) llama_cpp_python_ = nullptr;
  decltype(&edgemoe_ggml_loaded) loaded_ = nullptr;
  decltype(&edgemoe_ggml_instance_id) instance_id_ = nullptr;
};

// The ONNX Runtime plug-in, loaded; it stays so, as ONNX Runtime keeps it too.
class OrtPlugin {
 public:
  explicit OrtPlugin(const std::string& path) {
    void* const handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
      throw CoreError{EDGEMOE_INTERNAL, std::string("cannot load the ONNX Runtime plug-in: ") + ::dlerror()};
    void* const take = ::dlsym(handle, "edgemoe_ort_take_loaded");
    void* const id = ::dlsym(handle, "edgemoe_ort_instance_id");
    if (take == nullptr || id == nullptr)
      throw CoreError{EDGEMOE_INTERNAL, "the ONNX Runtime plug-in lacks its functions; reinstall edgemoe"};
    std::memcpy(&take_loaded_, &take, sizeof(take));
    std::memcpy(&instance_id_, &id, sizeof(id));
  }

  // (runtime or None, workspace_bytes, kept_bytes, n_layers, n_refused, refusal)
  nb::tuple TakeLoaded() {
    edgemoe_ort_loaded loaded;
    take_loaded_(&loaded);
    const nb::object runtime =
        loaded.runtime == nullptr ? nb::none() : nb::cast(new Runtime(loaded.runtime), nb::rv_policy::take_ownership);
    return nb::make_tuple(runtime, loaded.workspace_bytes, loaded.kept_bytes, loaded.n_layers, loaded.n_refused,
                          std::string(loaded.refusal));
  }
  bool SharesLibrary() const { return instance_id_() == edgemoe_instance_id(); }

 private:
  decltype(&edgemoe_ort_take_loaded) take_loaded_ = nullptr;
  decltype(&edgemoe_ort_instance_id) instance_id_ = nullptr;
};

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "libedgemoe for Python; use edgemoe._native.";
  nb::object core_error = nb::steal(PyErr_NewException("edgemoe._core.CoreError", PyExc_RuntimeError, nullptr));
  m.attr("CoreError") = core_error;
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void* type) {
        try {
          std::rethrow_exception(p);
        } catch (const CoreError& e) {
          PyErr_SetObject(static_cast<PyObject*>(type), nb::make_tuple(e.code(), e.what()).ptr());
        }
      },
      core_error.ptr());

  m.def("version", [] { return std::string(edgemoe_version()); });
  m.def("abi_version", &edgemoe_abi_version);
  m.def("isas", &Isas);
  m.def("active_isa", &ActiveIsa);
  m.def("find_format", &edgemoe_format_find, nb::arg("ggml_name"));
  m.def("prefetch_bytes", &PrefetchBytes, nb::arg("shapes"), nb::arg("max_depth"));
  m.def("measure", &Measure, nb::arg("tensors"), nb::arg("slots_bytes"));

  nb::class_<edgemoe_sizes>(m, "Sizes")
      .def_ro("bank_slot_bytes", &edgemoe_sizes::bank_slot_bytes)
      .def_ro("cycle_slot_bytes", &edgemoe_sizes::cycle_slot_bytes)
      .def_ro("slots_bytes", &edgemoe_sizes::slots_bytes)
      .def_ro("n_slots", &edgemoe_sizes::n_slots)
      .def_ro("n_slices", &edgemoe_sizes::n_slices);

  nb::class_<edgemoe_stats>(m, "RuntimeStats")
      .def_ro("hits", &edgemoe_stats::hits)
      .def_ro("misses", &edgemoe_stats::misses)
      .def_ro("late_hits", &edgemoe_stats::late_hits)
      .def_ro("bytes_read", &edgemoe_stats::bytes_read)
      .def_ro("reads", &edgemoe_stats::reads)
      .def_ro("stall_ns", &edgemoe_stats::stall_ns)
      .def_ro("evictions", &edgemoe_stats::evictions)
      .def_ro("n_slots", &edgemoe_stats::n_slots)
      .def_ro("slots_bytes", &edgemoe_stats::slots_bytes)
      .def_ro("pack_ns", &edgemoe_stats::pack_ns)
      .def_ro("direct_io", &edgemoe_stats::direct_io)
      .def_ro("n_own_tensors", &edgemoe_stats::n_own_tensors);

  nb::class_<edgemoe_prefetch_stats>(m, "PrefetchStats")
      .def_ro("used_bytes", &edgemoe_prefetch_stats::used_bytes)
      .def_ro("late_bytes", &edgemoe_prefetch_stats::late_bytes)
      .def_ro("wasted_bytes", &edgemoe_prefetch_stats::wasted_bytes)
      .def_ro("predicted", &edgemoe_prefetch_stats::predicted)
      .def_ro("predicted_right", &edgemoe_prefetch_stats::predicted_right)
      .def_ro("chosen", &edgemoe_prefetch_stats::chosen)
      .def_ro("depth", &edgemoe_prefetch_stats::depth);

  nb::class_<edgemoe_preload_stats>(m, "PreloadStats")
      .def_ro("read_bytes", &edgemoe_preload_stats::read_bytes)
      .def_ro("used_bytes", &edgemoe_preload_stats::used_bytes)
      .def_ro("n_slices", &edgemoe_preload_stats::n_slices)
      .def_ro("n_left", &edgemoe_preload_stats::n_left);
  nb::class_<edgemoe_replay_options>(m, "ReplayOptions")
      .def("__init__",
           [](edgemoe_replay_options* options) {
             *options = {};
             options->struct_size = sizeof(edgemoe_replay_options);
           })
      .def_rw("policy", &edgemoe_replay_options::policy)
      .def_rw("slots_bytes", &edgemoe_replay_options::slots_bytes)
      .def_rw("disk_bytes_per_s", &edgemoe_replay_options::disk_bytes_per_s)
      .def_rw("latency_us", &edgemoe_replay_options::latency_us)
      .def_rw("jitter", &edgemoe_replay_options::jitter)
      .def_rw("change_token", &edgemoe_replay_options::change_token)
      .def_rw("change_factor", &edgemoe_replay_options::change_factor)
      .def_rw("dense_us", &edgemoe_replay_options::dense_us)
      .def_rw("expert_us", &edgemoe_replay_options::expert_us)
      .def_rw("row_share", &edgemoe_replay_options::row_share)
      .def_rw("recall", &edgemoe_replay_options::recall)
      .def_rw("seed", &edgemoe_replay_options::seed)
      .def_rw("n_readers", &edgemoe_replay_options::n_readers)
      .def_rw("prefetch_depth", &edgemoe_replay_options::prefetch_depth)
      .def_rw("adaptive", &edgemoe_replay_options::adaptive);

  nb::class_<edgemoe_replay_phase>(m, "ReplayPhase")
      .def_ro("n_tokens", &edgemoe_replay_phase::n_tokens)
      .def_ro("hits", &edgemoe_replay_phase::hits)
      .def_ro("misses", &edgemoe_replay_phase::misses)
      .def_ro("late_hits", &edgemoe_replay_phase::late_hits)
      .def_ro("slices", &edgemoe_replay_phase::slices)
      .def_ro("reads", &edgemoe_replay_phase::reads)
      .def_ro("bytes_read", &edgemoe_replay_phase::bytes_read)
      .def_ro("stall_us", &edgemoe_replay_phase::stall_us)
      .def_ro("total_us", &edgemoe_replay_phase::total_us);

  nb::class_<edgemoe_replay_result>(m, "ReplayResult")
      .def_ro("all", &edgemoe_replay_result::all)
      .def_ro("decode", &edgemoe_replay_result::decode)
      .def_ro("evictions", &edgemoe_replay_result::evictions)
      .def_ro("prefetch", &edgemoe_replay_result::prefetch)
      .def_ro("bound_reads", &edgemoe_replay_result::bound_reads)
      .def_ro("bound_bytes", &edgemoe_replay_result::bound_bytes)
      .def_ro("slots_bytes", &edgemoe_replay_result::slots_bytes)
      .def_ro("n_slots", &edgemoe_replay_result::n_slots);

  m.def("replay", &Replay, nb::arg("layers"), nb::arg("batch_of_token"), nb::arg("experts"), nb::arg("options"),
        nb::arg("batch_us").noconvert(), nb::arg("depths").noconvert());

  nb::class_<Runtime>(m, "Runtime")
      .def(nb::init<const std::vector<std::string>&, const std::vector<TensorTuple>&, uint64_t, int, int, int>(),
           nb::arg("files"), nb::arg("tensors"), nb::arg("slots_bytes"), nb::arg("n_io_threads"), nb::arg("eviction"),
           nb::arg("arithmetic"))
      .def("is_own", &Runtime::IsOwn, nb::arg("name"))
      .def("close", &Runtime::Close)
      .def("set_slots_bytes", &Runtime::SetSlotsBytes, nb::arg("slots_bytes"))
      .def("stats", &Runtime::Stats)
      .def("set_prefetch", &Runtime::SetPrefetch, nb::arg("routers"), nb::arg("max_depth"), nb::arg("adaptive"))
      .def("foresee_tokens", &Runtime::ForeseeTokens, nb::arg("embeddings"))
      .def("prefetch_stats", &Runtime::PrefetchStats)
      .def("start_trace", &Runtime::StartTrace, nb::arg("path"), nb::arg("header"))
      .def("check_trace", &Runtime::CheckTrace)
      .def("stop_trace", &Runtime::StopTrace)
      .def("start_clock", &Runtime::StartClock, nb::arg("phase"))
      .def("enter_phase", &Runtime::EnterPhase, nb::arg("phase"))
      .def("stop_clock", &Runtime::StopClock)
      .def("hot_slices", &Runtime::HotSlices)
      .def("slice_uses", &Runtime::SliceUses)
      .def("preload", &Runtime::Preload, nb::arg("slices"))
      .def("preload_stats", &Runtime::PreloadStats)
      .def("reset_stats", &Runtime::ResetStats)
      .def("take_error", &Runtime::TakeError);

  nb::class_<edgemoe_reuse_stats>(m, "ReuseStats")
      .def_ro("n_selections", &edgemoe_reuse_stats::n_selections)
      .def_ro("n_chosen", &edgemoe_reuse_stats::n_chosen)
      .def_ro("n_changed", &edgemoe_reuse_stats::n_changed)
      .def_ro("mass_moved", &edgemoe_reuse_stats::mass_moved)
      .def_ro("kl", &edgemoe_reuse_stats::kl)
      .def_ro("mean_strength", &edgemoe_reuse_stats::mean_strength);

  nb::class_<ReuseBias>(m, "ReuseBias")
      .def(nb::init<int, int, int, int, double, double, double>(), nb::arg("method"), nb::arg("n_layers"),
           nb::arg("n_experts"), nb::arg("top_j"), nb::arg("strength"), nb::arg("max_mass_moved"), nb::arg("max_kl"))
      .def("select", &ReuseBias::Select, nb::arg("layer"), nb::arg("n_used"), nb::arg("scores"), nb::arg("masses"),
           nb::arg("resident"), nb::arg("order").noconvert(), nb::arg("are_probabilities") = false,
           nb::arg("are_logits") = false)
      .def("stats", &ReuseBias::Stats)
      .def("reset_stats", &ReuseBias::ResetStats);

  nb::class_<GgmlPlugin>(m, "GgmlPlugin")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def("begin_load", &GgmlPlugin::BeginLoad, nb::arg("runtime"))
      .def("end_load", &GgmlPlugin::EndLoad)
      .def("set_lone_rows", &GgmlPlugin::SetLoneRows, nb::arg("n_tokens"))
      .def("set_profiled", &GgmlPlugin::SetProfiled, nb::arg("runtime").none(), nb::arg("n_experts"))
      .def("set_reuse", &GgmlPlugin::SetReuse, nb::arg("runtime").none(), nb::arg("reuse").none(), nb::arg("n_experts"))
      .def("populate", &GgmlPlugin::Populate, nb::arg("path"), nb::arg("ranges"), nb::arg("n_threads"))
      .def("built_against", &GgmlPlugin::BuiltAgainst)
      .def("llama_cpp_python", &GgmlPlugin::LlamaCppPython)
      .def("loaded", &GgmlPlugin::Loaded)
      .def("shares_library", &GgmlPlugin::SharesLibrary);

  nb::class_<OrtPlugin>(m, "OrtPlugin")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def("take_loaded", &OrtPlugin::TakeLoaded)
      .def("shares_library", &OrtPlugin::SharesLibrary);
}
