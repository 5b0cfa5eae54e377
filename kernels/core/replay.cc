// SPDX-License-Identifier: MIT
#include "core/replay.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "core/expert_cache.h"
#include "core/prefetch.h"
#include "core/replay_trace.h"

namespace edgemoe {
namespace {

constexpr double kMib = 1 << 20;

// Random numbers by name rather than by order: what is predicted does not depend on what else happens. (splitmix64)
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
double ToUnit(uint64_t x) { return static_cast<double>(x >> 11) * 0x1p-53; }

// Reads in the order in which they end.
class SimulatedDisk {
 public:
  explicit SimulatedDisk(const edgemoe_replay_options& options) : options_(options) {}

  void set_factor(double factor) { factor_ = factor; }
  bool full() const { return reads_.size() >= static_cast<size_t>(options_.n_readers); }
  bool idle() const { return reads_.empty(); }
  double next_end_us() const { return reads_.front().end_us; }

  void Begin(double now_us, const CacheRead& read, uint64_t bytes) {
    const double unit = ToUnit(Mix(options_.seed ^ Mix(n_reads_++)));
    const double slowness = (1.0 + options_.jitter * (2.0 * unit - 1.0)) / factor_;
    const double flow_us = static_cast<double>(bytes) / options_.disk_bytes_per_s * 1e6 * slowness;
    free_us_ = std::max(now_us + options_.latency_us * slowness, free_us_) + flow_us;
    reads_.push_back({free_us_, read});  // each ends after those that began before it
  }
  CacheRead TakeFirst() {
    const CacheRead read = reads_.front().read;
    reads_.erase(reads_.begin());
    return read;
  }

 private:
  struct Pending {
    double end_us;
    CacheRead read;
  };
  const edgemoe_replay_options& options_;
  double factor_ = 1.0;
  double free_us_ = 0.0;
  uint64_t n_reads_ = 0;
  std::vector<Pending> reads_;
};

class Replayer {
 public:
  Replayer(const ReplayTrace& trace, const edgemoe_replay_options& options, ExpertCache* cache)
      : trace_(trace), options_(options), cache_(cache), disk_(options), lock_(cache->mutex()) {
    controller_.Start(options.prefetch_depth, options.adaptive != 0);
  }

  Status Run(edgemoe_replay_result* result, double* batch_us, int32_t* depths);

 private:
  struct Task {
    int64_t slice;
    double us;
  };

  Status RunLayer(int64_t batch, int layer);
  void ForeseeTokens(int64_t batch);
  void BeginBatch(int64_t n_tokens, bool is_rest);
  void CountAndPin(int64_t batch, int layer);
  Status RunTasks(int64_t batch, int layer, int first, int n);
  void CollectAndIssue();
  void Predict(int64_t batch, int layer);
  void AddHints(int target);
  bool FindForeseen(int64_t batch, int layer, int distance);
  void PredictLayer(int64_t batch, int layer, int distance);
  void PredictPrompt(int64_t batch, int layer);
  // The clock: what ends until then ends at its time, and free readers go on.
  void AdvanceTo(double us);
  // So much computing, and what has been read meanwhile holds it up.
  void Compute(double us);
  void StartReads();

  int64_t Slice(int layer, int i, int expert) const {
    return cache_->file().tensors()[static_cast<size_t>(trace_.first_tensor(layer) + i)].first_slice + expert;
  }
  double RowsCost(int64_t n_rows) const { return 1.0 + static_cast<double>(n_rows - 1) * options_.row_share; }

  const ReplayTrace& trace_;
  const edgemoe_replay_options& options_;
  ExpertCache* const cache_;
  SimulatedDisk disk_;
  std::unique_lock<std::mutex> lock_;
  double now_us_ = 0.0;
  double stall_us_ = 0.0;
  double held_up_us_ = 0.0;  // not yet computed away
  uint64_t n_slices_ = 0;    // used

  PrefetchController controller_;
  int64_t last_n_tokens_ = 0;  // of the layer before
  int depth_ = 0;
  bool looks_ahead_ = false;  // from the layer in progress
  uint64_t n_predicted_ = 0, n_right_ = 0, n_chosen_ = 0;
  int predicted_layer_ = -1;
  std::vector<int32_t> predicted_, predicted_next_;
  std::vector<int64_t> hints_;

  double batch_time_ = 0.0;
  std::vector<int64_t> pinned_, ahead_;
  size_t next_ahead_ = 0;
  std::vector<Task> tasks_;
  std::vector<size_t> pending_, loading_, ready_;
  size_t next_pending_ = 0;
};

void Replayer::StartReads() {
  CacheRead read;
  while (!disk_.full() && cache_->NextRead(&read)) disk_.Begin(now_us_, read, cache_->file().Extent(read.slice).length);
}

void Replayer::AdvanceTo(double us) {
  while (!disk_.idle() && disk_.next_end_us() <= us) {
    now_us_ = std::max(now_us_, disk_.next_end_us());
    const CacheRead read = disk_.TakeFirst();
    held_up_us_ += static_cast<double>(cache_->file().Extent(read.slice).length) * options_.hold_up_us_per_mib / kMib;
    cache_->FinishRead(read, Status());
    StartReads();
  }
  now_us_ = std::max(now_us_, us);
}

void Replayer::Compute(double us) {
  const double end_us = now_us_ + us + held_up_us_;
  held_up_us_ = 0.0;
  AdvanceTo(end_us);
}

// As Prefetch::ForeseeTokens, where the trace says what it found.
void Replayer::ForeseeTokens(int64_t batch) {
  const int depth = cache_->HoldsEverything() || trace_.n_tokens(batch) > kMostDecodeTokens ? 0 : controller_.depth();
  hints_.clear();
  for (int distance = 1; distance <= std::min(depth, trace_.n_layers()); ++distance) {
    if (!FindForeseen(batch, distance - 1, distance)) break;
    if (distance == 1) {
      predicted_layer_ = 0;
      predicted_ = predicted_next_;
    }
    AddHints(distance - 1);
  }
  if (hints_.empty()) return;
  cache_->SetHints(hints_);
  StartReads();
}

// As MoeLayer::BeginBatch.
void Replayer::BeginBatch(int64_t n_tokens, bool is_rest) {
  batch_time_ = cache_->AdvanceClock(n_tokens);
  controller_.OnBatch(now_us_, cache_->needed_bytes(), n_tokens == 1 && !is_rest);
  const int wanted = n_tokens <= kMostDecodeTokens ? controller_.depth() : std::min(options_.prefetch_depth, 1);
  depth_ = cache_->HoldsEverything() ? 0 : wanted;
  if (depth_ > 0) return;
  predicted_layer_ = -1;
  cache_->SetHints({});
}

// As MoeLayer::CountAndPin, with Promise for one session.
void Replayer::CountAndPin(int64_t batch, int layer) {
  const int64_t step = trace_.Step(batch, layer);
  const int n_slices = trace_.layer(layer).n_slices;
  CacheCounters& counters = cache_->counters();
  for (const ReplayUse* u = trace_.begin(step); u != trace_.end(step); ++u) {
    bool absent = false, loading = false;
    const double time = batch_time_ + u->last_token;
    for (int i = 0; i < n_slices; ++i) {
      const int64_t slice = Slice(layer, i, u->expert);
      absent |= cache_->Absent(slice);
      loading |= !cache_->Resident(slice);
      cache_->TouchSlice(slice, time, u->n_rows);
      if (options_.policy == EDGEMOE_REPLAY_BELADY) cache_->SetKey(slice, -static_cast<double>(u->next_use));
      ++n_slices_;
    }
    (absent ? counters.misses : loading ? counters.late_hits : counters.hits).fetch_add(1, std::memory_order_relaxed);
  }
  std::vector<int64_t> n_needed(static_cast<size_t>(cache_->n_classes()));
  for (int i = 0; i < n_slices; ++i) {
    n_needed[static_cast<size_t>(cache_->ClassIdx(Slice(layer, i, 0)))] += trace_.end(step) - trace_.begin(step);
  }
  bool fits = true;
  for (size_t c = 0; c < n_needed.size(); ++c) fits &= n_needed[c] <= cache_->n_slots(static_cast<int>(c));
  looks_ahead_ = depth_ > 0 && (trace_.n_tokens(batch, layer) <= kMostDecodeTokens || fits);
  std::vector<int64_t> n_promised(n_needed.size());
  for (size_t c = 0; c < n_needed.size(); ++c) {
    const int64_t n_slots = cache_->n_slots(static_cast<int>(c));
    n_promised[c] = fits ? n_needed[c] : std::clamp<int64_t>(n_slots - StreamingSlots(n_slots), 0, n_needed[c]);
  }
  ahead_.clear();
  next_ahead_ = 0;
  for (int i = 0; i < n_slices; ++i) {
    for (const ReplayUse* u = trace_.begin(step); u != trace_.end(step); ++u) {
      const int64_t slice = Slice(layer, i, u->expert);
      int64_t& promised = n_promised[static_cast<size_t>(cache_->ClassIdx(slice))];
      if (cache_->Absent(slice) || (!fits && promised == 0)) {
        ahead_.push_back(slice);
        continue;
      }
      if (!fits) --promised;
      (void)cache_->Acquire(slice);
      pinned_.push_back(slice);
    }
  }
}

// As MoeLayer::CollectAndIssue; no read fails here.
void Replayer::CollectAndIssue() {
  for (size_t i = 0; i < loading_.size();) {
    if (cache_->Resident(tasks_[loading_[i]].slice)) {
      ready_.push_back(loading_[i]);
      loading_.erase(loading_.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
  for (; next_pending_ < pending_.size(); ++next_pending_) {
    const size_t task = pending_[next_pending_];
    const Acquired acquired = cache_->Acquire(tasks_[task].slice);
    if (acquired == Acquired::kNoRoom) return;
    (acquired == Acquired::kResident ? ready_ : loading_).push_back(task);
  }
  while (next_ahead_ < ahead_.size() && cache_->ReadAhead(ahead_[next_ahead_])) ++next_ahead_;
}

// As MoeLayer::RunTasks: projections [first, first + n) of the layer.
Status Replayer::RunTasks(int64_t batch, int layer, int first, int n) {
  const int64_t step = trace_.Step(batch, layer);
  const edgemoe_replay_layer& l = trace_.layer(layer);
  double expert_bytes = 0.0;
  for (int i = 0; i < l.n_slices; ++i) expert_bytes += static_cast<double>(l.slice_bytes[i]);
  tasks_.clear();
  pending_.clear();
  loading_.clear();
  ready_.clear();
  next_pending_ = 0;
  for (const ReplayUse* u = trace_.begin(step); u != trace_.end(step); ++u) {
    for (int i = first; i < first + n; ++i) {
      const double share = static_cast<double>(l.slice_bytes[i]) / expert_bytes;
      tasks_.push_back({Slice(layer, i, u->expert), options_.expert_us * share * RowsCost(u->n_rows)});
    }
  }
  const int first_tensor = trace_.first_tensor(layer) + first;
  const auto at_hand = [&](int64_t slice) {
    const int tensor_idx = cache_->file().TensorOf(slice);
    return tensor_idx >= first_tensor && tensor_idx < first_tensor + n;
  };
  while (next_ahead_ < ahead_.size() && at_hand(ahead_[next_ahead_])) ++next_ahead_;
  for (size_t i = 0; i < tasks_.size(); ++i) {
    if (!cache_->Resident(tasks_[i].slice)) {
      pending_.push_back(i);
      continue;
    }
    (void)cache_->Acquire(tasks_[i].slice);
    ready_.push_back(i);
  }
  CollectAndIssue();
  StartReads();
  if (first == 0) Predict(batch, layer);
  for (size_t cursor = 0; cursor < tasks_.size(); ++cursor) {
    const double begin_us = now_us_;
    while (cursor == ready_.size()) {
      CollectAndIssue();
      StartReads();
      if (cursor < ready_.size()) break;
      if (disk_.idle()) return Status(EDGEMOE_INTERNAL, "replay: a layer waits for a read that nobody makes");
      AdvanceTo(disk_.next_end_us());
    }
    stall_us_ += now_us_ - begin_us;
    const Task& task = tasks_[ready_[cursor]];
    Compute(task.us);
    cache_->Release(task.slice);
    if (options_.policy != EDGEMOE_REPLAY_BELADY) cache_->Pass(task.slice);
    if (next_pending_ < pending_.size()) CollectAndIssue();
    StartReads();
  }
  return Status();
}

// As MoeLayer::Predict and AddHints, by what the trace says that comes.
void Replayer::Predict(int64_t batch, int layer) {
  if (!looks_ahead_) return;
  const bool is_prompt = trace_.n_tokens(batch, layer) > kMostDecodeTokens;
  hints_.clear();
  predicted_layer_ = -1;
  for (int distance = 1; distance <= depth_; ++distance) {
    const int target = layer + distance;
    if (target >= trace_.n_layers()) break;
    if (is_prompt) {
      PredictPrompt(batch, layer);
    } else {
      PredictLayer(batch, target, distance);
    }
    AddHints(target);
    if (distance == 1 && !is_prompt) {
      predicted_layer_ = target;
      predicted_ = predicted_next_;
    }
  }
  cache_->SetHints(hints_);
  StartReads();
}

// As Prefetch::SetHints, for one layer.
void Replayer::AddHints(int target) {
  const int n_slices = trace_.layer(target).n_slices;
  for (int32_t e : predicted_next_) {
    for (int i = 0; i + 1 < n_slices; ++i) hints_.push_back(Slice(target, i, e));
  }
  for (int32_t e : predicted_next_) hints_.push_back(Slice(target, n_slices - 1, e));
}

// As Prefetch::ForeseePrompt, for the layer after this one.
void Replayer::PredictPrompt(int64_t batch, int layer) {
  const int64_t step = trace_.Step(batch, layer);
  const auto n_chosen = static_cast<double>(trace_.end(step) - trace_.begin(step));
  if (n_chosen < kNearlyAll * trace_.layer(layer).n_experts) {
    PredictLayer(batch, layer + 1, 1);
    return;
  }
  predicted_next_.resize(static_cast<size_t>(trace_.layer(layer + 1).n_experts));
  std::iota(predicted_next_.begin(), predicted_next_.end(), 0);
}

// What the trace says was foreseen; false: nothing.
bool Replayer::FindForeseen(int64_t batch, int layer, int distance) {
  predicted_next_.clear();
  for (int i = 0; i < trace_.n_foreseen(); ++i) {
    const int16_t expert = trace_.Foreseen(batch, layer, distance)[i];
    if (expert < 0) break;
    predicted_next_.push_back(expert);
  }
  return !predicted_next_.empty();
}

// What was foreseen; or else each expert of each token with the chance of `recall`, and for the others one that the
// token does not choose. Those that are foreseen wrongly have scored high: a third of them are what the token before
// chose, and a third what the next one will (docs/experiments.md).
void Replayer::PredictLayer(int64_t batch, int layer, int distance) {
  if (FindForeseen(batch, layer, distance)) return;
  const uint64_t n_experts = static_cast<uint64_t>(trace_.layer(layer).n_experts);
  for (int64_t t = trace_.first_token(batch); t < trace_.first_token(batch + 1); ++t) {
    const int16_t* const chosen = trace_.Experts(t, layer);
    const int16_t* const end = chosen + trace_.max_used();
    const auto is_known = [&](int32_t e) {
      return std::find(chosen, end, e) != end ||
             std::find(predicted_next_.begin(), predicted_next_.end(), e) != predicted_next_.end();
    };
    for (const int16_t* e = chosen; e != end; ++e) {
      if (*e < 0) continue;
      const uint64_t name = (static_cast<uint64_t>(t) * 65536 + static_cast<uint64_t>(layer)) * 65536 +
                            static_cast<uint64_t>(distance) * 32768 + static_cast<uint64_t>(e - chosen);
      uint64_t random = Mix(options_.seed ^ Mix(name));
      int32_t predicted = *e;
      if (ToUnit(random) >= options_.recall) {
        random = Mix(random);
        predicted = -1;
        // The token before, the one after, or neither.
        const int64_t near = std::array<int64_t, 3>{t - 1, t + 1, -1}[random % 3];
        random = Mix(random);
        if (near >= 0 && near < trace_.first_token(trace_.n_batches())) {
          const int16_t* const others = trace_.Experts(near, layer);
          const uint64_t n_others = static_cast<uint64_t>(trace_.max_used());
          for (uint64_t i = 0; i < n_others && predicted < 0; ++i) {
            const int16_t other = others[(random + i) % n_others];
            if (other >= 0 && !is_known(other)) predicted = other;
          }
        }
        for (uint64_t i = 0; i < n_experts && predicted < 0; ++i) {
          const int32_t other = static_cast<int32_t>((random + i) % n_experts);
          if (!is_known(other)) predicted = other;
        }
      }
      if (predicted >= 0 &&
          std::find(predicted_next_.begin(), predicted_next_.end(), predicted) == predicted_next_.end())
        predicted_next_.push_back(predicted);
    }
  }
}

Status Replayer::RunLayer(int64_t batch, int layer) {
  if (layer == 0) ForeseeTokens(batch);
  Compute(options_.dense_us * RowsCost(trace_.n_tokens(batch)));
  cache_->BeginLayer(&lock_);
  const int64_t n_tokens = trace_.n_tokens(batch, layer);
  if (layer == 0 || n_tokens != last_n_tokens_) BeginBatch(n_tokens, layer > 0);
  last_n_tokens_ = n_tokens;
  // Belady's keys are distances, which no clock changes.
  const bool is_belady = options_.policy == EDGEMOE_REPLAY_BELADY;
  cache_->EnterLayer(layer, batch_time_, is_belady ? 0 : n_tokens);
  const int64_t step = trace_.Step(batch, layer);
  if (predicted_layer_ == layer) {
    n_predicted_ += predicted_.size();
    n_chosen_ += static_cast<uint64_t>(trace_.end(step) - trace_.begin(step));
    for (const ReplayUse* u = trace_.begin(step); u != trace_.end(step); ++u) {
      n_right_ += std::find(predicted_.begin(), predicted_.end(), u->expert) != predicted_.end() ? 1 : 0;
    }
  }
  CountAndPin(batch, layer);
  const int n_slices = trace_.layer(layer).n_slices;
  Status status = RunTasks(batch, layer, 0, std::max(1, n_slices - 1));
  if (status.ok() && n_slices > 1) status = RunTasks(batch, layer, n_slices - 1, 1);
  for (int64_t slice : pinned_) cache_->Release(slice);
  pinned_.clear();
  cache_->EndLayer(layer);
  return status;
}

Status Replayer::Run(edgemoe_replay_result* result, double* batch_us, int32_t* depths) {
  const CacheCounters& c = cache_->counters();
  const auto snapshot = [&] {
    edgemoe_replay_phase p = {};
    p.hits = c.hits.load();
    p.misses = c.misses.load();
    p.late_hits = c.late_hits.load();
    p.slices = n_slices_;
    p.reads = c.reads.load();
    p.bytes_read = c.bytes_read.load();
    p.stall_us = stall_us_;
    p.total_us = now_us_;
    return p;
  };
  edgemoe_replay_phase& decode = result->decode;
  for (int64_t b = 0; b < trace_.n_batches(); ++b) {
    const edgemoe_replay_phase before = snapshot();
    if (options_.change_token >= 0 && trace_.first_token(b + 1) > options_.change_token)
      disk_.set_factor(options_.change_factor);
    for (int l = 0; l < trace_.n_layers(); ++l) {
      if (Status s = RunLayer(b, l); !s.ok()) return s;
    }
    Compute(options_.batch_us);
    const edgemoe_replay_phase after = snapshot();
    if (batch_us != nullptr) batch_us[b] = after.total_us - before.total_us;
    if (depths != nullptr) depths[b] = depth_;
    if (trace_.n_tokens(b) != 1) continue;
    ++decode.n_tokens;
    decode.hits += after.hits - before.hits;
    decode.misses += after.misses - before.misses;
    decode.late_hits += after.late_hits - before.late_hits;
    decode.slices += after.slices - before.slices;
    decode.reads += after.reads - before.reads;
    decode.bytes_read += after.bytes_read - before.bytes_read;
    decode.stall_us += after.stall_us - before.stall_us;
    decode.total_us += after.total_us - before.total_us;
  }
  result->all = snapshot();
  result->all.n_tokens = trace_.first_token(trace_.n_batches());
  result->evictions = c.evictions.load();
  result->prefetch.used_bytes = c.hint_used_bytes.load();
  result->prefetch.late_bytes = c.hint_late_bytes.load();
  result->prefetch.wasted_bytes = c.hint_wasted_bytes.load();
  result->prefetch.predicted = n_predicted_;
  result->prefetch.predicted_right = n_right_;
  result->prefetch.chosen = n_chosen_;
  result->prefetch.depth = controller_.depth();
  return Status();
}

Status CheckOptions(const edgemoe_replay_options& o) {
  const auto refuse = [](const char* what, double found, const char* expected) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("replay: %s of %g, expected %s", what, found, expected));
  };
  const auto positive = [](double x) { return std::isfinite(x) && x > 0.0; };
  const auto no_less_than_zero = [](double x) { return std::isfinite(x) && x >= 0.0; };
  if (o.struct_size != sizeof(o)) return refuse("options", o.struct_size, "this library's size of them");
  if ((o.policy < EDGEMOE_EVICT_LRU || o.policy > EDGEMOE_EVICT_AUTO) && o.policy != EDGEMOE_REPLAY_BELADY)
    return refuse("policy", o.policy, "0 to 4, or 100 (Belady)");
  if (!positive(o.disk_bytes_per_s)) return refuse("disk_bytes_per_s", o.disk_bytes_per_s, "a positive number");
  if (!no_less_than_zero(o.latency_us)) return refuse("latency_us", o.latency_us, "0 or more");
  if (!(o.jitter >= 0.0 && o.jitter <= 1.0)) return refuse("jitter", o.jitter, "0 to 1");
  if (!positive(o.change_factor)) return refuse("change_factor", o.change_factor, "a positive number");
  if (!no_less_than_zero(o.dense_us)) return refuse("dense_us", o.dense_us, "0 or more");
  if (!no_less_than_zero(o.expert_us)) return refuse("expert_us", o.expert_us, "0 or more");
  if (!no_less_than_zero(o.row_share)) return refuse("row_share", o.row_share, "0 or more");
  if (!no_less_than_zero(o.batch_us)) return refuse("batch_us", o.batch_us, "0 or more");
  if (!no_less_than_zero(o.hold_up_us_per_mib)) return refuse("hold_up_us_per_mib", o.hold_up_us_per_mib, "0 or more");
  if (!(o.recall >= 0.0 && o.recall <= 1.0)) return refuse("recall", o.recall, "0 to 1");
  if (o.n_readers < 1) return refuse("n_readers", o.n_readers, "at least 1");
  if (o.prefetch_depth < 0 || o.prefetch_depth > Predictor::kMaxDepth)
    return refuse("prefetch_depth", o.prefetch_depth, "0 to 2");
  return Status();
}

}  // namespace

Status Replay(const edgemoe_replay_trace& trace, const edgemoe_replay_options& options, edgemoe_replay_result* result,
              double* batch_us, int32_t* depths) {
  *result = {};
  if (Status s = CheckOptions(options); !s.ok()) return s;
  ReplayTrace replay_trace;
  if (Status s = replay_trace.Set(trace); !s.ok()) return s;
  std::unique_ptr<ExpertFile> file;
  if (Status s = replay_trace.OpenFile(&file); !s.ok()) return s;
  replay_trace.Bound(*file, options.slots_bytes, &result->bound_reads, &result->bound_bytes);
  const bool is_belady = options.policy == EDGEMOE_REPLAY_BELADY;
  ExpertCache cache(std::move(file), is_belady ? EDGEMOE_EVICT_LRU : static_cast<edgemoe_eviction>(options.policy));
  if (Status s = cache.Start(options.slots_bytes, 0, options.n_readers); !s.ok()) return s;
  cache.SlotTotals(&result->n_slots, &result->slots_bytes);
  return Replayer(replay_trace, options, &cache).Run(result, batch_us, depths);
}

}  // namespace edgemoe
