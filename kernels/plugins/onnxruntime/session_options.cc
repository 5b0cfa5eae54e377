// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/session_options.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <thread>
#include <vector>

struct edgemoe_ort_counting {
  std::shared_ptr<edgemoe_ort::Choosers> choosers;
};

namespace edgemoe_ort {
namespace {

// As ONNX Runtime names a session's options for a provider; those of our custom operators are called the same.
constexpr char kPrefix[] = "ep.edgemoeexecutionprovider.";

thread_local edgemoe_ort_loaded t_loaded = {};
thread_local std::vector<edgemoe_ort_tensor> t_tensors;

struct Name {
  const char* text;
  int value;
};

bool IsShare(const std::string& text, double* share) {
  char* end = nullptr;
  *share = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == '\0' && *share >= 0.0 && *share <= 1.0;
}

class Reader {
 public:
  Reader(const Ort& ort, const OrtSessionOptions* options) : ort_(ort), options_(options) {}

  std::string Text(const char* key, const std::string& fallback) const {
    return ort_.Option(options_, std::string(kPrefix) + key, fallback);
  }
  int64_t Number(const char* key, int64_t fallback) const {
    const std::string text = Text(key, std::to_string(fallback));
    char* end = nullptr;
    const long long value = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || value < 0) Refuse(key, text, "a number from 0 on");
    return value;
  }
  double Share(const char* key, const std::string& text) const {
    double value = 0.0;
    if (!IsShare(text, &value)) Refuse(key, text, "a number from 0 to 1");
    return value;
  }
  int Choice(const char* key, const char* fallback, std::initializer_list<Name> names) const {
    const std::string text = Text(key, fallback);
    std::string known;
    for (const Name& n : names) {
      if (text == n.text) return n.value;
      known += std::string(known.empty() ? "" : ", ") + n.text;
    }
    Refuse(key, text, "one of " + known);
  }
  [[noreturn]] static void Refuse(const char* key, const std::string& found, const std::string& expected) {
    throw Error(std::string("option ") + key + " of " EDGEMOE_ORT_PROVIDER ": '" + found + "', expected " + expected);
  }

 private:
  const Ort& ort_;
  const OrtSessionOptions* const options_;
};

// "off", "4", "top-p:0.8", "map", "map:2-6"
void ReadCount(const Reader& reader, ChooserOptions* o) {
  static constexpr char kKey[] = "expert_top_k";
  static constexpr char kForms[] = "off, a number from 1 on, top-p:P, map or map:MIN-MAX";
  const std::string text = reader.Text(kKey, "off");
  if (text == "off") return;
  o->has_count = true;
  const auto whole = [&](const std::string& part) {
    char* end = nullptr;
    const long value = std::strtol(part.c_str(), &end, 10);
    if (part.empty() || *end != '\0' || value < 1 || value > INT32_MAX) Reader::Refuse(kKey, text, kForms);
    return static_cast<int>(value);
  };
  if (text.rfind("top-p:", 0) == 0) {
    o->count_rule = EDGEMOE_COUNT_TOP_P;
    if (!IsShare(text.substr(6), &o->top_p)) Reader::Refuse(kKey, text, kForms);
  } else if (text == "map") {
    o->count_rule = EDGEMOE_COUNT_MAP;
  } else if (text.rfind("map:", 0) == 0) {
    const size_t dash = text.find('-');
    if (dash == std::string::npos) Reader::Refuse(kKey, text, kForms);
    o->count_rule = EDGEMOE_COUNT_MAP;
    o->n_min = whole(text.substr(4, dash - 4));
    o->n_max = whole(text.substr(dash + 1));
  } else {
    o->count_rule = EDGEMOE_COUNT_OF_LAYER;
    o->n_of_layer = whole(text);
  }
}

ChooserOptions ReadChoosers(const Reader& reader) {
  ChooserOptions o;
  const std::string bias = reader.Text("reuse_bias", "off");
  o.has_reuse = bias != "off";
  if (o.has_reuse) o.reuse_bias = reader.Share("reuse_bias", bias);
  o.reuse_method = reader.Choice("reuse_method", "cache-prior",
                                 {{"cache-prior", EDGEMOE_REUSE_CACHE_PRIOR},
                                  {"max-rank", EDGEMOE_REUSE_MAX_RANK},
                                  {"cumulative", EDGEMOE_REUSE_CUMULATIVE}});
  o.top_j = static_cast<int>(reader.Number("top_j", 0));
  ReadCount(reader, &o);
  o.skips = reader.Choice("on_miss", "wait", {{"wait", 0}, {"skip", 1}}) != 0;
  o.on_miss_mass = reader.Share("on_miss_mass", reader.Text("on_miss_mass", "0.6"));
  return o;
}

}  // namespace

SessionOptions ReadOptions(const Ort& ort, const OrtSessionOptions* session_options) {
  const Reader reader(ort, session_options);
  SessionOptions o;
  o.model.has_slots_bytes = !reader.Text("slots_bytes", "").empty();
  if (o.model.has_slots_bytes) o.model.slots_bytes = static_cast<uint64_t>(reader.Number("slots_bytes", 0));
  const int64_t n_cpus = std::max(1u, std::thread::hardware_concurrency());
  o.model.n_threads = static_cast<int>(reader.Number("n_threads", n_cpus));
  o.model.n_io_threads = static_cast<int>(reader.Number("n_io_threads", 4));
  const std::string eviction = reader.Text("eviction", "auto");
  const bool is_number = !eviction.empty() && eviction.find_first_not_of("0123456789") == std::string::npos;
  o.model.eviction = is_number ? static_cast<int>(reader.Number("eviction", 0))
                               : reader.Choice("eviction", "auto",
                                               {{"auto", EDGEMOE_EVICT_AUTO},
                                                {"lru", EDGEMOE_EVICT_LRU},
                                                {"lfu", EDGEMOE_EVICT_LFU_DECAY},
                                                {"least-stale", EDGEMOE_EVICT_LEAST_STALE},
                                                {"utility", EDGEMOE_EVICT_UTILITY}});
  o.model.prefetch_depth = reader.Choice("prefetch", "auto", {{"auto", 2}, {"off", 0}, {"1", 1}, {"2", 2}});
  o.model.is_prefetch_adaptive = reader.Text("prefetch", "auto") == "auto";
  o.model.choosers = ReadChoosers(reader);
  o.model_path = reader.Text("model_path", "");
  o.is_strict = reader.Number("strict", o.model.has_slots_bytes ? 1 : 0) != 0;
  o.publishes = reader.Number("publish", 0) != 0;
  return o;
}

void DropLoaded() {
  if (t_loaded.runtime != nullptr) edgemoe_runtime_release(t_loaded.runtime);
  delete t_loaded.counting;
  t_loaded = {};
  t_tensors.clear();
}

void PublishLoaded(const QmoeModel& model, int n_routers) {
  edgemoe_runtime_retain(model.runtime());
  t_loaded.runtime = model.runtime();
  t_loaded.workspace_bytes = model.workspace_bytes();
  t_loaded.kept_bytes = model.kept_bytes();
  t_loaded.n_layers = static_cast<int32_t>(model.n_nodes());
  t_loaded.n_routers = n_routers;
  t_loaded.counting = new edgemoe_ort_counting{model.choosers()};
  t_tensors = model.Tensors();
}

void PublishRefusal(const std::string& refusal) {
  if (t_loaded.n_refused++ == 0) std::snprintf(t_loaded.refusal, sizeof(t_loaded.refusal), "%s", refusal.c_str());
}

}  // namespace edgemoe_ort

extern "C" {

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
