// SPDX-License-Identifier: MIT
// c_api.cc: edgemoe.h in terms of the core. Nothing is decided here; exceptions (out of memory) end here.
#include <strings.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "core/arithmetic.h"
#include "core/expert_count.h"
#include "core/on_miss.h"
#include "core/replay.h"
#include "core/reuse_bias.h"
#include "core/runtime.h"
#include "edgemoe/edgemoe.h"
#include "edgemoe/scheduler.h"

namespace {

using edgemoe::Status;

int32_t Report(const Status& status, edgemoe_error* error) {
  if (error != nullptr) {
    error->code = status.code();
    const size_t n = std::min(status.message().size(), sizeof(error->message) - 1);
    std::memcpy(error->message, status.message().data(), n);
    error->message[n] = '\0';
  }
  return status.code();
}

template <typename Function>
int32_t Guard(edgemoe_error* error, Function function) {
  try {
    return Report(function(), error);
  } catch (const std::bad_alloc&) {
    return Report(Status(EDGEMOE_NO_MEMORY, "out of memory"), error);
  } catch (const std::exception& e) {
    return Report(Status(EDGEMOE_INTERNAL, e.what()), error);
  }
}

// As Guard, and remembered for edgemoe_runtime_take_error: between a session's caller and the one who reports
// there is an engine that passes on no more than failure.
template <typename Function>
int32_t GuardSession(edgemoe_session* session, edgemoe_error* error, Function function) {
  edgemoe_error own = {};
  const int32_t code = Guard(&own, function);
  if (code != EDGEMOE_OK) session->runtime->cache.NoteError(Status(static_cast<edgemoe_code>(code), own.message));
  if (error != nullptr) *error = own;
  return code;
}

const char kInstance = 0;

}  // namespace

int32_t edgemoe_abi_version(void) { return EDGEMOE_ABI_VERSION; }
const char* edgemoe_version(void) { return EDGEMOE_VERSION; }
const void* edgemoe_instance_id(void) { return &kInstance; }

const char* edgemoe_isa_name(int32_t idx) {
  const auto* const* table = edgemoe::simd::Compiled();
  for (int32_t i = 0; table[0] != nullptr; ++i, ++table) {
    if (i == idx) return table[0]->isa;
  }
  return nullptr;
}

int32_t edgemoe_isa_is_supported(int32_t idx) {
  return edgemoe_isa_name(idx) != nullptr && edgemoe::simd::Supported(*edgemoe::simd::Compiled()[idx]) ? 1 : 0;
}

int32_t edgemoe_isa_active(const char** name, edgemoe_error* error) {
  return Guard(error, [&] {
    const edgemoe::simd::KernelTable* table = nullptr;
    Status s = edgemoe::ActiveKernels(&table);
    if (s.ok()) *name = table->isa;
    return s;
  });
}

int32_t edgemoe_format_find(const char* ggml_name) {
  for (int32_t f = 1; f < edgemoe::simd::kFormatCount; ++f) {
    if (strcasecmp(edgemoe::simd::Info(static_cast<edgemoe::simd::Format>(f)).name, ggml_name) == 0) return f;
  }
  return EDGEMOE_FORMAT_OTHER;
}

int32_t edgemoe_measure(const edgemoe_options* options, edgemoe_sizes* sizes, edgemoe_error* error) {
  return Guard(error, [&] { return edgemoe::Measure(*options, sizes); });
}

int32_t edgemoe_runtime_open(const edgemoe_options* options, edgemoe_runtime** runtime, edgemoe_error* error) {
  return Guard(error, [&] { return edgemoe::OpenRuntime(*options, edgemoe::OpenPosixFile, runtime); });
}

void edgemoe_runtime_retain(edgemoe_runtime* runtime) { runtime->n_references.fetch_add(1, std::memory_order_relaxed); }

void edgemoe_runtime_release(edgemoe_runtime* runtime) {
  if (runtime->n_references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete runtime;
}

int32_t edgemoe_runtime_find_tensor(const edgemoe_runtime* runtime, const char* name) {
  return runtime->cache.file().FindTensor(name);
}

int32_t edgemoe_runtime_is_own(const edgemoe_runtime* runtime, int32_t tensor_idx) {
  const auto& tensors = runtime->cache.file().tensors();
  return tensor_idx >= 0 && static_cast<size_t>(tensor_idx) < tensors.size() &&
         tensors[static_cast<size_t>(tensor_idx)].own;
}

int32_t edgemoe_runtime_set_slots_bytes(edgemoe_runtime* runtime, uint64_t slots_bytes, edgemoe_error* error) {
  return Guard(error, [&] { return runtime->cache.SetSlotsBytes(slots_bytes); });
}

void edgemoe_runtime_stats(edgemoe_runtime* runtime, edgemoe_stats* stats) {
  const edgemoe::CacheCounters& c = runtime->cache.counters();
  *stats = {};
  stats->hits = c.hits.load();
  stats->misses = c.misses.load();
  stats->late_hits = c.late_hits.load();
  stats->bytes_read = c.bytes_read.load();
  stats->reads = c.reads.load();
  stats->stall_ns = c.stall_ns.load();
  stats->pack_ns = c.pack_ns.load();
  stats->evictions = c.evictions.load();
  runtime->cache.SlotTotals(&stats->n_slots, &stats->slots_bytes);
  stats->direct_io = runtime->cache.file().direct() ? 1 : 0;
  const auto& tensors = runtime->cache.file().tensors();
  stats->n_own_tensors =
      static_cast<int32_t>(std::count_if(tensors.begin(), tensors.end(), [](const auto& t) { return t.own; }));
}

void edgemoe_runtime_reset_stats(edgemoe_runtime* runtime) {
  edgemoe::CacheCounters& c = runtime->cache.counters();
  for (auto* counter :
       {&c.hits, &c.misses, &c.late_hits, &c.bytes_read, &c.reads, &c.stall_ns, &c.pack_ns, &c.evictions,
        &c.hint_used_bytes, &c.hint_late_bytes, &c.hint_wasted_bytes, &c.preload_bytes, &c.preload_used_bytes,
        &runtime->prefetch.predicted, &runtime->prefetch.predicted_right, &runtime->prefetch.chosen}) {
    counter->store(0);
  }
}

int32_t edgemoe_runtime_set_prefetch(edgemoe_runtime* runtime, const edgemoe_router* routers, int32_t n_routers,
                                     int32_t max_depth, int32_t adaptive, edgemoe_error* error) {
  return Guard(error, [&] {
    return runtime->prefetch.Start(runtime->cache.file(), routers, n_routers, max_depth, adaptive != 0);
  });
}

void edgemoe_runtime_foresee_tokens(edgemoe_runtime* runtime, const float* embeddings, int64_t n_tokens, int64_t n_cols,
                                    const edgemoe_choosers* choosers) {
  if (n_cols != runtime->prefetch.predictor.n_cols()) return;
  if (n_tokens < 1 || n_tokens > edgemoe::kMostDecodeTokens) return;
  const edgemoe::PhaseScope phase(&runtime->clock, EDGEMOE_PHASE_SELECT);
  (void)Guard(nullptr, [&] {
    runtime->prefetch.ForeseeTokens(&runtime->cache, embeddings, n_tokens,
                                    choosers != nullptr ? *choosers : edgemoe_choosers{});
    return Status();
  });
}

uint64_t edgemoe_prefetch_bytes(const edgemoe_router* routers, int32_t n_routers, int32_t max_depth) {
  return edgemoe::Predictor::Bytes(routers, n_routers, max_depth) +
         edgemoe::Corrections::Bytes(routers, n_routers, max_depth);
}

void edgemoe_runtime_prefetch_stats(edgemoe_runtime* runtime, edgemoe_prefetch_stats* stats) {
  const edgemoe::CacheCounters& c = runtime->cache.counters();
  const edgemoe::Prefetch& p = runtime->prefetch;
  *stats = {};
  stats->used_bytes = c.hint_used_bytes.load();
  stats->late_bytes = c.hint_late_bytes.load();
  stats->wasted_bytes = c.hint_wasted_bytes.load();
  stats->predicted = p.predicted.load();
  stats->predicted_right = p.predicted_right.load();
  stats->chosen = p.chosen.load();
  std::lock_guard<std::mutex> lock(runtime->cache.mutex());
  stats->depth = p.controller.depth();
}

int64_t edgemoe_runtime_hot_slices(edgemoe_runtime* runtime, int64_t* slices, int64_t capacity, edgemoe_error* error) {
  int64_t n = -1;
  Guard(error, [&] {
    const std::vector<int64_t> hot = runtime->cache.HotSlices();
    n = std::min(capacity, static_cast<int64_t>(hot.size()));
    std::copy(hot.begin(), hot.begin() + n, slices);
    return Status();
  });
  return n;
}

int64_t edgemoe_runtime_slice_uses(edgemoe_runtime* runtime, uint64_t* n_uses, int64_t capacity, edgemoe_error* error) {
  int64_t n = -1;
  Guard(error, [&] {
    const std::vector<uint64_t> uses = runtime->cache.Uses();
    n = std::min(capacity, static_cast<int64_t>(uses.size()));
    std::copy(uses.begin(), uses.begin() + n, n_uses);
    return Status();
  });
  return n;
}

int32_t edgemoe_runtime_preload(edgemoe_runtime* runtime, const int64_t* slices, int64_t n_slices,
                                edgemoe_error* error) {
  return Guard(error, [&] { return runtime->cache.Preload(slices, n_slices); });
}

void edgemoe_runtime_preload_stats(edgemoe_runtime* runtime, edgemoe_preload_stats* stats) {
  const edgemoe::CacheCounters& c = runtime->cache.counters();
  *stats = {};
  stats->n_left = runtime->cache.n_preloads_left();  // before what its reads are counted in: 0 means that all are
  stats->read_bytes = c.preload_bytes.load();
  stats->used_bytes = c.preload_used_bytes.load();
  stats->n_slices = runtime->cache.file().n_slices();
}

int32_t edgemoe_replay(const edgemoe_replay_trace* trace, const edgemoe_replay_options* options,
                       edgemoe_replay_result* result, double* batch_us, int32_t* depths, edgemoe_error* error) {
  return Guard(error, [&] { return edgemoe::Replay(*trace, *options, result, batch_us, depths); });
}

void edgemoe_runtime_take_error(edgemoe_runtime* runtime, edgemoe_error* error) {
  Report(runtime->cache.TakeError(), error);
}

int32_t edgemoe_read_ranges(const char* path, const edgemoe_range* ranges, int32_t n_ranges, int32_t n_threads,
                            edgemoe_error* error) {
  return Guard(error, [&] {
    std::unique_ptr<edgemoe::File> file;
    if (Status s = edgemoe::OpenPosixFile(path, &file); !s.ok()) return s;
    return edgemoe::ReadRanges(file.get(), ranges, n_ranges, n_threads);
  });
}

int32_t edgemoe_session_create(edgemoe_runtime* runtime, const edgemoe_kernels* kernels, edgemoe_session** session,
                               edgemoe_error* error) {
  return Guard(error, [&] {
    if (kernels->struct_size != sizeof(edgemoe_kernels)) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    edgemoe::Format("edgemoe_kernels has %u bytes, expected %zu; rebuild the plug-in",
                                    kernels->struct_size, sizeof(edgemoe_kernels)));
    }
    *session = new edgemoe_session(runtime, *kernels);
    edgemoe_runtime_retain(runtime);
    return Status();
  });
}

void edgemoe_session_destroy(edgemoe_session* session) {
  edgemoe_runtime* const runtime = session->runtime;
  delete session;
  edgemoe_runtime_release(runtime);
}

void edgemoe_session_set_threads(edgemoe_session* session, int32_t n_threads) { session->layer.set_threads(n_threads); }

int32_t edgemoe_session_begin_layer(edgemoe_session* session, const int32_t* ids, int64_t n_tokens, int64_t n_used,
                                    uint64_t ids_token_bytes, const int32_t* tensor_idxs, int32_t n_tensors,
                                    edgemoe_error* error) {
  return Guard(error,
               [&] { return session->layer.Begin(ids, n_tokens, n_used, ids_token_bytes, tensor_idxs, n_tensors); });
}

int32_t edgemoe_session_matmul(edgemoe_session* session, const edgemoe_matmul* matmuls, int32_t n_matmuls,
                               edgemoe_error* error) {
  return GuardSession(session, error, [&] { return session->layer.Multiply(matmuls, n_matmuls); });
}

int32_t edgemoe_session_ffn(edgemoe_session* session, const edgemoe_ffn* ffn, edgemoe_error* error) {
  return GuardSession(session, error, [&] { return session->layer.Ffn(*ffn); });
}

void edgemoe_session_end_layer(edgemoe_session* session) { session->layer.End(); }

int32_t edgemoe_runtime_start_trace(edgemoe_runtime* runtime, const char* path, const char* header,
                                    edgemoe_error* error) {
  return Guard(error, [&] { return runtime->trace.Start(edgemoe::CreatePosixFile, path, header, &runtime->cache); });
}

int32_t edgemoe_runtime_check_trace(edgemoe_runtime* runtime, edgemoe_error* error) {
  return Guard(error, [&] { return runtime->trace.Check(); });
}

int32_t edgemoe_runtime_stop_trace(edgemoe_runtime* runtime, edgemoe_error* error) {
  return Guard(error, [&] { return runtime->trace.Stop(); });
}

int32_t edgemoe_runtime_start_clock(edgemoe_runtime* runtime, int32_t phase, edgemoe_error* error) {
  return Guard(error, [&] {
    if (phase < 0 || phase >= EDGEMOE_N_PHASES) {
      return Status(EDGEMOE_INVALID_ARGUMENT, edgemoe::Format("phase %d, expected 0..%d", phase, EDGEMOE_N_PHASES - 1));
    }
    const bool started = runtime->clock.Start(static_cast<edgemoe_phase>(phase));
    return started ? Status() : Status(EDGEMOE_INVALID_ARGUMENT, "the clock of this model runs already");
  });
}

int32_t edgemoe_runtime_enter_phase(edgemoe_runtime* runtime, int32_t phase) {
  if (phase < 0 || phase >= EDGEMOE_N_PHASES || !runtime->clock.IsMine()) return -1;
  return runtime->clock.Enter(static_cast<edgemoe_phase>(phase));
}

void edgemoe_runtime_stop_clock(edgemoe_runtime* runtime, uint64_t* ns) { runtime->clock.Stop(ns); }

int32_t edgemoe_reuse_open(const edgemoe_reuse_options* options, edgemoe_reuse** reuse, edgemoe_error* error) {
  return Guard(error, [&] {
    if (Status s = edgemoe::ReuseBias::Check(*options); !s.ok()) return s;
    *reuse = new edgemoe_reuse{edgemoe::ReuseBias(*options)};
    return Status();
  });
}

void edgemoe_reuse_close(edgemoe_reuse* reuse) { delete reuse; }

int32_t edgemoe_reuse_select(edgemoe_reuse* reuse, const edgemoe_selection* selection, edgemoe_error* error) {
  return Guard(error, [&] { return reuse->bias.Select(*selection); });
}

void edgemoe_reuse_read_stats(const edgemoe_reuse* reuse, edgemoe_reuse_stats* stats) { *stats = reuse->bias.Stats(); }
void edgemoe_reuse_reset_stats(edgemoe_reuse* reuse) { reuse->bias.ResetStats(); }

int32_t edgemoe_count_open(const edgemoe_count_options* options, edgemoe_count** count, edgemoe_error* error) {
  return Guard(error, [&] {
    if (Status s = edgemoe::ExpertCount::Check(*options); !s.ok()) return s;
    *count = new edgemoe_count{edgemoe::ExpertCount(*options)};
    return Status();
  });
}

void edgemoe_count_close(edgemoe_count* count) { delete count; }

int32_t edgemoe_count_needs_logits(const edgemoe_count* count) { return count->count.NeedsLogits() ? 1 : 0; }

int32_t edgemoe_count_select(edgemoe_count* count, const edgemoe_selection* selection, int32_t* n_used,
                             edgemoe_error* error) {
  return Guard(error, [&] { return count->count.Select(*selection, n_used); });
}

void edgemoe_count_read_stats(const edgemoe_count* count, edgemoe_count_stats* stats) { *stats = count->count.stats(); }
void edgemoe_count_reset_stats(edgemoe_count* count) { count->count.ResetStats(); }

int32_t edgemoe_miss_open(const edgemoe_miss_options* options, edgemoe_miss** miss, edgemoe_error* error) {
  return Guard(error, [&] {
    if (Status s = edgemoe::OnMiss::Check(*options); !s.ok()) return s;
    *miss = new edgemoe_miss{edgemoe::OnMiss(*options)};
    return Status();
  });
}

void edgemoe_miss_close(edgemoe_miss* miss) { delete miss; }

int32_t edgemoe_miss_select(edgemoe_miss* miss, const edgemoe_selection* selection, int32_t* ids,
                            edgemoe_error* error) {
  return Guard(error, [&] { return miss->rule.Select(*selection, ids); });
}

void edgemoe_miss_read_stats(const edgemoe_miss* miss, edgemoe_miss_stats* stats) { *stats = miss->rule.stats(); }
void edgemoe_miss_reset_stats(edgemoe_miss* miss) { miss->rule.ResetStats(); }

void edgemoe_session_set_choosers(edgemoe_session* session, const edgemoe_choosers* choosers) {
  session->layer.set_choosers(choosers != nullptr ? *choosers : edgemoe_choosers{});
}

int32_t edgemoe_runtime_residents(edgemoe_runtime* runtime, int32_t layer, uint8_t* resident, int32_t n_experts) {
  return runtime->cache.Residents(layer, resident, n_experts);
}
