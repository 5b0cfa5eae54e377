// SPDX-License-Identifier: MIT
// cpu_phases.h: tells the clock of a profiled runtime what llama.cpp's CPU backend computes: the dense part, the
// routers, or the choice of experts. A graph is computed in pieces for that, node by node in the same order, so the
// bits are the same; each piece costs one start of the threads. Per thread, as lone_rows.h.
#ifndef EDGEMOE_PLUGINS_GGML_CPU_PHASES_H_
#define EDGEMOE_PLUGINS_GGML_CPU_PHASES_H_

#include "edgemoe/edgemoe.h"
#include "edgemoe/scheduler.h"
#include "plugins/ggml/ggml_abi.h"
#include "plugins/ggml/nodes.h"

namespace edgemoe_ggml {

// Whether this thread is profiled.
bool IsProfiled();

// `compute` applied to the graph, as a whole if this thread is not profiled.
ggml_status ComputeInPhases(GraphCompute compute, ggml_backend_t cpu, ggml_cgraph* graph);

// A phase of this thread's profiled runtime as long as it lives; nothing if there is none.
class ProfiledPhase {
 public:
  explicit ProfiledPhase(edgemoe_phase phase);
  ~ProfiledPhase();
  ProfiledPhase(const ProfiledPhase&) = delete;
  ProfiledPhase& operator=(const ProfiledPhase&) = delete;

 private:
  edgemoe_runtime* const runtime_;
  const int32_t before_;
};

}  // namespace edgemoe_ggml
#endif  // EDGEMOE_PLUGINS_GGML_CPU_PHASES_H_
