// SPDX-License-Identifier: MIT
// plugins_ext.h: what Python calls besides the runtime: the biased choice of experts, and the plug-ins for llama.cpp
// and ONNX Runtime, whose functions are looked up after llama_cpp or onnxruntime has been imported.
#ifndef EDGEMOE_PLUGINS_PYTHON_PLUGINS_EXT_H_
#define EDGEMOE_PLUGINS_PYTHON_PLUGINS_EXT_H_

#include <dlfcn.h>

#include <cstring>
#include <string>

#include "plugins/ggml/edgemoe_ggml.h"
#include "plugins/onnxruntime/edgemoe_ort.h"
#include "plugins/python/runtime_ext.h"

namespace edgemoe_python {

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
                                         resident.data(), order.data(),
                                         nullptr};
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

// Chooses how many experts a token gets.
class ExpertCount {
 public:
  // n_of_layer: empty where the rule is another one.
  ExpertCount(int rule, int n_layers, int n_experts, const std::vector<int32_t>& n_of_layer, double top_p, int n_min,
              int n_max) {
    if (!n_of_layer.empty() && n_of_layer.size() != static_cast<size_t>(n_layers)) {
      throw CoreError{EDGEMOE_INVALID_ARGUMENT, "number of experts: expected one for each layer"};
    }
    const edgemoe_count_options options = {sizeof(edgemoe_count_options),
                                           rule,
                                           n_layers,
                                           n_experts,
                                           n_of_layer.empty() ? nullptr : n_of_layer.data(),
                                           top_p,
                                           n_min,
                                           n_max};
    edgemoe_error error = {};
    Check(edgemoe_count_open(&options, &count_, &error), error);
  }
  ~ExpertCount() { edgemoe_count_close(count_); }
  ExpertCount(const ExpertCount&) = delete;
  ExpertCount& operator=(const ExpertCount&) = delete;

  // order: experts by falling score.
  int Select(int layer, int n_used, const Floats& scores, const Floats& masses, const Order& order, bool are_logits,
             const std::optional<Floats>& logits) {
    const size_t n_experts = scores.shape(0);
    if (masses.shape(0) != n_experts || order.shape(0) != n_experts ||
        (logits.has_value() && logits->shape(0) != n_experts)) {
      throw CoreError{EDGEMOE_INVALID_ARGUMENT, "selection: arrays of different lengths"};
    }
    const edgemoe_selection selection = {layer,
                                         static_cast<int32_t>(n_experts),
                                         n_used,
                                         0,
                                         are_logits,
                                         0,
                                         scores.data(),
                                         masses.data(),
                                         nullptr,
                                         order.data(),
                                         logits.has_value() ? logits->data() : nullptr};
    edgemoe_error error = {};
    int32_t n = 0;
    Check(edgemoe_count_select(count_, &selection, &n, &error), error);
    return n;
  }
  edgemoe_count_stats Stats() const {
    edgemoe_count_stats stats;
    edgemoe_count_read_stats(count_, &stats);
    return stats;
  }
  void ResetStats() { edgemoe_count_reset_stats(count_); }
  edgemoe_count* get() const { return count_; }

 private:
  edgemoe_count* count_ = nullptr;
};

// Decides what becomes of experts that would have to be read.
class OnMiss {
 public:
  OnMiss(bool has_copies, int n_layers, int n_experts, double wait_mass, double copy_mass) {
    const edgemoe_miss_options options = {
        sizeof(edgemoe_miss_options), has_copies, n_layers, n_experts, wait_mass, copy_mass};
    edgemoe_error error = {};
    Check(edgemoe_miss_open(&options, &miss_, &error), error);
  }
  ~OnMiss() { edgemoe_miss_close(miss_); }
  OnMiss(const OnMiss&) = delete;
  OnMiss& operator=(const OnMiss&) = delete;

  // order: experts, the n_used chosen first; ids: written, as many as are chosen.
  void Select(int layer, const Floats& masses, const Bytes& resident, const Order& order, const Order& ids,
              bool are_logits) {
    const size_t n_experts = masses.shape(0), n_used = ids.shape(0);
    if (resident.shape(0) != n_experts || order.shape(0) != n_experts || n_used > n_experts) {
      throw CoreError{EDGEMOE_INVALID_ARGUMENT, "selection: arrays of different lengths"};
    }
    const edgemoe_selection selection = {layer,
                                         static_cast<int32_t>(n_experts),
                                         static_cast<int32_t>(n_used),
                                         0,
                                         are_logits,
                                         0,
                                         masses.data(),
                                         masses.data(),
                                         resident.data(),
                                         order.data()};
    edgemoe_error error = {};
    Check(edgemoe_miss_select(miss_, &selection, ids.data(), &error), error);
  }
  edgemoe_miss_stats Stats() const {
    edgemoe_miss_stats stats;
    edgemoe_miss_read_stats(miss_, &stats);
    return stats;
  }
  void ResetStats() { edgemoe_miss_reset_stats(miss_); }
  edgemoe_miss* get() const { return miss_; }

 private:
  edgemoe_miss* miss_ = nullptr;
};

inline edgemoe_choosers ChoosersOf(ExpertCount* count, ReuseBias* reuse, OnMiss* miss) {
  return {count == nullptr ? nullptr : count->get(), reuse == nullptr ? nullptr : reuse->get(),
          miss == nullptr ? nullptr : miss->get()};
}

inline void ForeseeTokens(Runtime& runtime, const FloatRows& embeddings, ExpertCount* count, ReuseBias* reuse,
                          OnMiss* miss) {
  const edgemoe_choosers choosers = ChoosersOf(count, reuse, miss);
  edgemoe_runtime_foresee_tokens(runtime.get(), embeddings.data(), static_cast<int64_t>(embeddings.shape(0)),
                                 static_cast<int64_t>(embeddings.shape(1)), &choosers);
}

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
    Find("edgemoe_ggml_set_choosers", &set_choosers_);
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
  uint64_t SetChoosers(Runtime* runtime, ExpertCount* count, ReuseBias* reuse, OnMiss* miss, int n_experts) {
    const edgemoe_choosers choosers = ChoosersOf(count, reuse, miss);
    return set_choosers_(runtime == nullptr ? nullptr : runtime->get(), &choosers, n_experts);
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
  decltype(&edgemoe_ggml_set_choosers) set_choosers_ = nullptr;
  decltype(&edgemoe_ggml_built_against) built_against_ = nullptr;
  decltype(&edgemoe_ggml_llama_cpp_python) llama_cpp_python_ = nullptr;
  decltype(&edgemoe_ggml_loaded) loaded_ = nullptr;
  decltype(&edgemoe_ggml_instance_id) instance_id_ = nullptr;
};

// What counts in a session of ONNX Runtime; it outlives the session.
class OrtCounting {
 public:
  OrtCounting(edgemoe_ort_counting* counting, decltype(&edgemoe_ort_read_counters) read,
              decltype(&edgemoe_ort_reset_counters) reset, decltype(&edgemoe_ort_release_counting) release)
      : counting_(counting), read_(read), reset_(reset), release_(release) {}
  ~OrtCounting() { release_(counting_); }
  OrtCounting(const OrtCounting&) = delete;
  OrtCounting& operator=(const OrtCounting&) = delete;

  edgemoe_ort_counters Read() const {
    edgemoe_ort_counters counters;
    read_(counting_, &counters);
    return counters;
  }
  void Reset() { reset_(counting_); }

 private:
  edgemoe_ort_counting* const counting_;
  decltype(&edgemoe_ort_read_counters) const read_;
  decltype(&edgemoe_ort_reset_counters) const reset_;
  decltype(&edgemoe_ort_release_counting) const release_;
};

// The ONNX Runtime plug-in, loaded; it stays so, as ONNX Runtime keeps it too.
class OrtPlugin {
 public:
  explicit OrtPlugin(const std::string& path) {
    handle_ = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr)
      throw CoreError{EDGEMOE_INTERNAL, std::string("cannot load the ONNX Runtime plug-in: ") + ::dlerror()};
    Find("edgemoe_ort_take_loaded", &take_loaded_);
    Find("edgemoe_ort_loaded_tensors", &loaded_tensors_);
    Find("edgemoe_ort_read_counters", &read_counters_);
    Find("edgemoe_ort_reset_counters", &reset_counters_);
    Find("edgemoe_ort_release_counting", &release_counting_);
    Find("edgemoe_ort_instance_id", &instance_id_);
  }

  // (runtime or None, workspace_bytes, kept_bytes, n_layers, n_routers, n_refused, refusal, counting or None, tensors)
  nb::tuple TakeLoaded() {
    std::vector<edgemoe_ort_tensor> tensors(static_cast<size_t>(loaded_tensors_(nullptr, 0)));
    loaded_tensors_(tensors.data(), static_cast<int32_t>(tensors.size()));
    edgemoe_ort_loaded loaded;
    take_loaded_(&loaded);
    const nb::object runtime =
        loaded.runtime == nullptr ? nb::none() : nb::cast(new Runtime(loaded.runtime), nb::rv_policy::take_ownership);
    const nb::object counting =
        loaded.counting == nullptr
            ? nb::none()
            : nb::cast(new OrtCounting(loaded.counting, read_counters_, reset_counters_, release_counting_),
                       nb::rv_policy::take_ownership);
    std::vector<std::tuple<int, int, int, int, uint64_t>> tuples;
    for (const edgemoe_ort_tensor& t : tensors) {
      tuples.emplace_back(t.layer, t.n_experts, t.n_used, t.stage, t.expert_bytes);
    }
    return nb::make_tuple(runtime, loaded.workspace_bytes, loaded.kept_bytes, loaded.n_layers, loaded.n_routers,
                          loaded.n_refused, std::string(loaded.refusal), counting, tuples);
  }
  bool SharesLibrary() const { return instance_id_() == edgemoe_instance_id(); }

 private:
  template <typename Function>
  void Find(const char* name, Function* function) {
    void* const symbol = ::dlsym(handle_, name);
    if (symbol == nullptr)
      throw CoreError{EDGEMOE_INTERNAL, std::string("the ONNX Runtime plug-in lacks ") + name + "; reinstall edgemoe"};
    std::memcpy(function, &symbol, sizeof(symbol));
  }

  void* handle_ = nullptr;
  decltype(&edgemoe_ort_take_loaded) take_loaded_ = nullptr;
  decltype(&edgemoe_ort_loaded_tensors) loaded_tensors_ = nullptr;
  decltype(&edgemoe_ort_read_counters) read_counters_ = nullptr;
  decltype(&edgemoe_ort_reset_counters) reset_counters_ = nullptr;
  decltype(&edgemoe_ort_release_counting) release_counting_ = nullptr;
  decltype(&edgemoe_ort_instance_id) instance_id_ = nullptr;
};

}  // namespace edgemoe_python
#endif  // EDGEMOE_PLUGINS_PYTHON_PLUGINS_EXT_H_
