// SPDX-License-Identifier: MIT
// runtime.h: what the C ABI calls a runtime and a session. A runtime owns the cache of one model; it lives as
// long as anyone holds a reference: the Python object, the plug-in's buffers, every session. Thread-safe.
#ifndef EDGEMOE_CORE_RUNTIME_H_
#define EDGEMOE_CORE_RUNTIME_H_

#include <memory>

#include "core/expert_cache.h"
#include "core/moe_layer.h"
#include "core/phase_clock.h"
#include "core/prefetch.h"
#include "core/trace.h"

struct edgemoe_runtime {
  edgemoe_runtime(std::unique_ptr<edgemoe::ExpertFile> file, edgemoe_eviction rule,
                  const edgemoe::simd::KernelTable* kernels)
      : cache(std::move(file), rule, kernels) {}
  edgemoe::Prefetch prefetch;
  edgemoe::TraceRecorder trace;
  edgemoe::PhaseClock clock;
  edgemoe::ExpertCache cache;
  std::atomic<int> n_references{1};
};

struct edgemoe_session {
  edgemoe_session(edgemoe_runtime* runtime_in, const edgemoe_kernels& kernels)
      : runtime(runtime_in),
        layer(&runtime_in->cache, kernels, &runtime_in->prefetch, &runtime_in->trace, &runtime_in->clock) {}
  edgemoe_runtime* const runtime;
  edgemoe::MoeLayer layer;
};

namespace edgemoe {

Status OpenRuntime(const edgemoe_options& options, const FileOpener& opener, edgemoe_runtime** runtime);
Status Measure(const edgemoe_options& options, edgemoe_sizes* sizes);

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_RUNTIME_H_
