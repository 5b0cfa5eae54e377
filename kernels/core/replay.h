// SPDX-License-Identifier: MIT
// replay.h: what a trace would have cost: the real ExpertCache, asked in the order in which MoeLayer asks, over a
// simulated disk and with computing that only takes time. One clock, one thread, no bytes: the same trace and options
// give the same result anywhere.
// The model: one product at a time, on all threads. A read waits for its latency, then for the bytes of the reads that
// began before it, then for its own; n_readers of them are under way at most. What reading takes from computing (the
// readers' share of the cores, waking threads, interleaving) is in proportion to the bytes read; the cache itself costs
// nothing. Predictions are the trace's where it has them, for they depend on the text and not on the cache.
#ifndef EDGEMOE_CORE_REPLAY_H_
#define EDGEMOE_CORE_REPLAY_H_

#include "core/status.h"
#include "edgemoe/scheduler.h"

namespace edgemoe {

Status Replay(const edgemoe_replay_trace& trace, const edgemoe_replay_options& options, edgemoe_replay_result* result,
              double* batch_us, int32_t* depths);

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_REPLAY_H_
