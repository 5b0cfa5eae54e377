// SPDX-License-Identifier: MIT
// prefetch.h: what the layers of one runtime share for reading ahead. Guarded by the cache's mutex, but for the
// predictor, which is immutable.
#ifndef EDGEMOE_CORE_PREFETCH_H_
#define EDGEMOE_CORE_PREFETCH_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "core/predictor.h"
#include "core/prefetch_controller.h"

namespace edgemoe {

// A batch of more tokens is a prompt, whose next layer needs most experts whatever is predicted. Up to here it may be a
// draft to be verified, which is decoding.
inline constexpr int64_t kMostDecodeTokens = 8;

struct Prefetch {
  Predictor predictor;
  PrefetchController controller;
  std::vector<std::vector<int32_t>> tensors_of_layer;  // in the order of use, as layers have been seen to begin
  std::chrono::steady_clock::time_point last_token;    // when the last token of decode began
  bool in_decode = false;                              // the batch before was one token
  std::atomic<uint64_t> predicted{0}, predicted_right{0}, chosen{0};
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_PREFETCH_H_
