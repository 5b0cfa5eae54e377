// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/session_options.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace edgemoe_ort {
namespace {

// As ONNX Runtime names a session's options for a provider; those of our custom operators are called the same.
constexpr char kOptionPrefix[] = "ep.edgemoeexecutionprovider.";

thread_local edgemoe_ort_loaded t_loaded = {};

int64_t Number(const char* key, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 0) {
    throw Error(std::string("option ") + key + " of " EDGEMOE_ORT_PROVIDER ": '" + text +
                "', expected a number from 0 on");
  }
  return value;
}

}  // namespace

SessionOptions ReadOptions(const Ort& ort, const OrtSessionOptions* session_options) {
  const auto text = [&](const char* key, const std::string& fallback) {
    return ort.Option(session_options, std::string(kOptionPrefix) + key, fallback);
  };
  const auto number = [&](const char* key, int64_t fallback) {
    return Number(key, text(key, std::to_string(fallback)));
  };
  SessionOptions options;
  const std::string slots = text("slots_bytes", "");
  options.model.has_slots_bytes = !slots.empty();
  options.model.slots_bytes = static_cast<uint64_t>(Number("slots_bytes", slots.empty() ? "0" : slots));
  options.model.n_threads = static_cast<int>(number("n_threads", std::max(1u, std::thread::hardware_concurrency())));
  options.model.n_io_threads = static_cast<int>(number("n_io_threads", 4));
  options.model.eviction = static_cast<int>(number("eviction", EDGEMOE_EVICT_AUTO));
  options.model_path = text("model_path", "");
  options.is_strict = number("strict", slots.empty() ? 0 : 1) != 0;
  options.publishes = number("publish", 0) != 0;
  return options;
}

void DropLoaded() {
  if (t_loaded.runtime != nullptr) edgemoe_runtime_release(t_loaded.runtime);
  t_loaded = {};
}

void PublishLoaded(const QmoeModel& model) {
  edgemoe_runtime_retain(model.runtime());
  t_loaded.runtime = model.runtime();
  t_loaded.workspace_bytes = model.workspace_bytes();
  t_loaded.kept_bytes = model.kept_bytes();
  t_loaded.n_layers = static_cast<int32_t>(model.n_nodes());
}

void PublishRefusal(const std::string& refusal) {
  if (t_loaded.n_refused++ == 0) std::snprintf(t_loaded.refusal, sizeof(t_loaded.refusal), "%s", refusal.c_str());
}

}  // namespace edgemoe_ort

extern "C" {

void edgemoe_ort_take_loaded(edgemoe_ort_loaded* loaded) {
  *loaded = edgemoe_ort::t_loaded;
  edgemoe_ort::t_loaded = {};
}

const void* edgemoe_ort_instance_id(void) { return edgemoe_instance_id(); }

}  // extern "C"
