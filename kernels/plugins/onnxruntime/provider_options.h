// SPDX-License-Identifier: MIT
// provider_options.h: the options that a session gives our execution provider (edgemoe_ort.h names them), as text.
// A value that makes no sense is an error that names the option. Thread promise: one thread.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_PROVIDER_OPTIONS_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_PROVIDER_OPTIONS_H_

#include "plugins/onnxruntime/qmoe_model.h"

namespace edgemoe_ort {

struct ProviderOptions {
  ModelOptions model;
  bool is_strict = false;
  bool publishes = false;
};

ProviderOptions ReadOptions(const Ort& ort, const OrtSessionOptions* session_options);

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_PROVIDER_OPTIONS_H_
