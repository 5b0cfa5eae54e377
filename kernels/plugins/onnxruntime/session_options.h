// SPDX-License-Identifier: MIT
// session_options.h: the options of a session for us, and what the session that this thread makes has loaded.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_SESSION_OPTIONS_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_SESSION_OPTIONS_H_

#include <string>

#include "plugins/onnxruntime/edgemoe_ort.h"
#include "plugins/onnxruntime/ort_api.h"
#include "plugins/onnxruntime/qmoe_model.h"

namespace edgemoe_ort {

struct SessionOptions {
  ModelOptions model;
  std::string model_path;  // of custom operators; empty: not given
  bool is_strict = false;
  bool publishes = false;
};

// The options that edgemoe_ort.h names, as text. Throws Error: a value makes no sense; the message names the option.
SessionOptions ReadOptions(const Ort& ort, const OrtSessionOptions* session_options);

// What edgemoe_ort_take_loaded gives to this thread.
void DropLoaded();
// n_routers: of its nodes that have one, which predicts and is biased.
void PublishLoaded(const QmoeModel& model, int n_routers);
void PublishRefusal(const std::string& refusal);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_SESSION_OPTIONS_H_
