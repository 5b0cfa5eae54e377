// SPDX-License-Identifier: MIT
// moe_products.cc: the products of a layer in progress: which tasks can run, and the threads that run them.
#include <algorithm>
#include <chrono>

#include "core/moe_layer.h"
#include "edgemoe/selection.h"

namespace edgemoe {
namespace {

// Matrix rows of one unit of work. Decode: 128 rows of a 2048-column Q4_K matrix are 144 KiB, 5-10 us of work;
// smaller units cost more in counting than they gain in balance. Prefill: a unit is a whole call of the engine's
// product (5-8 us of its own), so units are as large as leaves each thread 16 of them, in steps of its 256-row tile.
constexpr int kDecodeRows = 128;
constexpr int kPrefillRows = 256;
constexpr int64_t kPrefillUnitsPerThread = 16;
constexpr int kPrefillPairs = 4;
// With runs of 8 chunks two threads read 0.90 to 0.98 of what memory gives, with single chunks 0.72 to 0.87 (AVX-512).
constexpr int kLongestRun = 8;
constexpr int kRunsPerThread = 4;
// Rows of activations above which quantizing them is worth a second start of the threads.
constexpr int64_t kParallelQuantizeRows = 32;
// Polls of the ready list before a thread sleeps: about 10 us, the cost of waking it.
constexpr int kSpins = 400;

inline void Relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

Status MoeLayer::Multiply(const edgemoe_matmul* matmuls, int n_matmuls) {
  if (Status s = SetProducts(matmuls, n_matmuls); !s.ok()) return s;
  QuantizeInputs();
  for (int i = 0; i < n_matmuls; ++i) ZeroResultsOfNoExpert(matmuls[i]);
  return RunTasks();
}

// After inputs were read, which results may overlap.
void MoeLayer::ZeroResultsOfNoExpert(const edgemoe_matmul& m) {
  if (n_pairs_ == last_n_tokens_ * n_used_) return;
  for (int64_t token = 0; token < last_n_tokens_; ++token) {
    for (int64_t used = 0; used < n_used_; ++used) {
      if (expert_of_[static_cast<size_t>(token * n_used_ + used)] != EDGEMOE_NO_EXPERT) continue;
      std::fill_n(ResultsOf(m, token, used), m.n_rows, 0.0f);
    }
  }
}

Status MoeLayer::SetProducts(const edgemoe_matmul* matmuls, int n_matmuls) {
  if (!active_) return Status(EDGEMOE_INVALID_ARGUMENT, "multiply outside of a layer");
  for (int i = 0; i < n_matmuls; ++i) {
    const edgemoe_matmul& m = matmuls[i];
    if (std::find(tensor_idxs_.begin(), tensor_idxs_.end(), m.tensor_idx) == tensor_idxs_.end()) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    Format("product with tensor %d, expected one of those that the layer began with", m.tensor_idx));
    }
    const ExpertTensor& t = Tensor(m);
    if (t.own && (m.n_cols != t.n_cols || m.n_rows != t.n_rows ||
                  m.row_bytes * static_cast<uint64_t>(m.n_rows) != t.expert_bytes)) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    Format("product with %s of %lld columns and %lld rows, expected %lld and %lld", t.name.c_str(),
                           static_cast<long long>(m.n_cols), static_cast<long long>(m.n_rows),
                           static_cast<long long>(t.n_cols), static_cast<long long>(t.n_rows)));
    }
  }
  matmuls_.assign(matmuls, matmuls + n_matmuls);
  n_matmuls_ = n_matmuls;
  if (makes_room_for_copies_) AddProductsWithCopies();
  return Status();
}

void MoeLayer::AddProductsWithCopies() {
  for (int i = 0; i < n_matmuls_; ++i) {
    edgemoe_matmul m = matmuls_[static_cast<size_t>(i)];
    m.tensor_idx = Tensor(m).copy;
    const ExpertTensor& copy = Tensor(m);
    m.type = -1 - copy.format;  // none of the plug-in's
    m.row_bytes = copy.expert_bytes / static_cast<uint64_t>(m.n_rows);
    matmuls_.push_back(m);
  }
}

Status MoeLayer::RunTasks() {
  {
    const PhaseScope phase(clock_, EDGEMOE_PHASE_SELECT);
    PrepareTasks();
    // After the reads have been asked for, so that none waits for what is foreseen.
    Foresee();
  }
  arithmetic_.Parallel(
      n_threads_, [](void* self, int32_t thread_idx, int32_t) { static_cast<MoeLayer*>(self)->Work(thread_idx); },
      this);
  if (!failed_.load(std::memory_order_relaxed)) return Status();
  // Reads still under way end by themselves; their slices are unpinned now and become evictable then.
  std::lock_guard<std::mutex> lock(cache_->mutex());
  for (int32_t t : loading_) cache_->Release(tasks_[static_cast<size_t>(t)].slice);
  loading_.clear();
  for (int i = 0; i < n_ready_.load(std::memory_order_relaxed); ++i) {
    const Task& task = tasks_[static_cast<size_t>(ready_[static_cast<size_t>(i)].load(std::memory_order_relaxed))];
    if (task.n_done.load(std::memory_order_relaxed) < task.n_chunks) cache_->Release(task.slice);
  }
  return failure_;
}

// What the layers after this one may need, from the input of its first products.
void MoeLayer::Foresee() {
  if (foreseen_) return;
  foreseen_ = true;
  const auto m =
      std::find_if(matmuls_.begin(), matmuls_.end(), [](const edgemoe_matmul& p) { return p.x_n_used == 1; });
  const bool is_known = m != matmuls_.end() && m->n_cols == prefetch_->predictor.n_cols();
  const char* const x = is_known ? reinterpret_cast<const char*>(m->x) : nullptr;
  const uint64_t x_token_bytes = is_known ? m->x_token_bytes : 0;
  if (last_n_tokens_ <= kMostDecodeTokens) {
    prefetch_->Foresee(layer_, is_known ? prefetch_depth_ : 0, x, x_token_bytes, last_n_tokens_,
                       {expert_of_.data(), n_used_}, choosers_, &foresight_);
  } else {
    prefetch_->ForeseePrompt(layer_, chosen_.size(), static_cast<size_t>(n_experts_), x, x_token_bytes, last_n_tokens_,
                             &foresight_);
  }
  std::lock_guard<std::mutex> lock(cache_->mutex());
  prefetch_->SetHints(cache_, foresight_, last_n_tokens_ <= kMostDecodeTokens);
}

// Each distinct input is brought into its activation format once, however many products and experts use it.
void MoeLayer::QuantizeInputs() {
  inputs_.clear();
  uint64_t total = 0;
  const int64_t n_tokens = last_n_tokens_;
  const size_t n_products = matmuls_.size();
  for (size_t i = 0; i < n_products; ++i) {
    const edgemoe_matmul& m = matmuls_[i];
    size_t same = i;
    for (size_t j = 0; j < i && same == i; ++j) {
      const edgemoe_matmul& o = matmuls_[j];
      if (o.x == m.x && o.type == m.type && Tensor(o).own == Tensor(m).own && o.n_cols == m.n_cols &&
          o.x_used_bytes == m.x_used_bytes && o.x_token_bytes == m.x_token_bytes && o.x_n_used == m.x_n_used) {
        same = j;
      }
    }
    if (same < i) {
      inputs_.push_back(InputRows(inputs_[same]));
      continue;
    }
    const uint64_t row_bytes = RoundUp(arithmetic_.RowBytes(Tensor(m), m), 64);
    inputs_.push_back({total, row_bytes, m.x_n_used});
    total += row_bytes * static_cast<uint64_t>(n_tokens * m.x_n_used);
  }
  if (activations_.size() < total + 64) activations_.resize(total + 64);
  char* const base = activations_.data() + (64 - reinterpret_cast<uint64_t>(activations_.data()) % 64) % 64;

  struct Shared {
    MoeLayer* self;
    const edgemoe_matmul* m;
    char* rows;
    uint64_t row_bytes;
    int64_t n_rows;
    std::atomic<int64_t> next{0};
  };
  for (size_t i = 0; i < n_products; ++i) {
    const InputRows& in = inputs_[i];
    bool done = false;
    for (size_t j = 0; j < i; ++j) done |= inputs_[j].offset == in.offset;
    if (done || (i >= static_cast<size_t>(n_matmuls_) && !has_chosen_copies_)) continue;
    Shared shared{this, &matmuls_[i], base + in.offset, in.row_bytes, n_tokens * in.n_used, {}};
    const auto quantize = [](void* arg, int32_t, int32_t) {
      Shared* s = static_cast<Shared*>(arg);
      const edgemoe_matmul& m = *s->m;
      for (int64_t r; (r = s->next.fetch_add(1, std::memory_order_relaxed)) < s->n_rows;) {
        const char* x = reinterpret_cast<const char*>(m.x) + static_cast<uint64_t>(r / m.x_n_used) * m.x_token_bytes +
                        static_cast<uint64_t>(r % m.x_n_used) * m.x_used_bytes;
        s->self->arithmetic_.Quantize(s->self->Tensor(m), m, reinterpret_cast<const float*>(x),
                                      s->rows + static_cast<uint64_t>(r) * s->row_bytes);
      }
    };
    if (shared.n_rows >= kParallelQuantizeRows) {
      arithmetic_.Parallel(n_threads_, quantize, &shared);
    } else {
      quantize(&shared, 0, 1);
    }
  }
  const size_t n_pairs = static_cast<size_t>(n_pairs_);
  if (x_rows_.size() < n_pairs * n_products) x_rows_.resize(n_pairs * n_products);
  for (size_t i = 0; i < n_products; ++i) {
    const InputRows& in = inputs_[i];
    for (size_t p = 0; p < n_pairs; ++p) {
      const int64_t row = pairs_[p].token * in.n_used + pairs_[p].used % in.n_used;
      x_rows_[i * n_pairs + p] = base + in.offset + static_cast<uint64_t>(row) * in.row_bytes;
    }
  }
}

void MoeLayer::PrepareTasks() {
  uint64_t row_bytes = 0;
  for (const InputRows& in : inputs_) row_bytes = std::max(row_bytes, in.row_bytes);
  uint64_t weight_row_bytes = 0;
  for (const edgemoe_matmul& m : matmuls_) {
    if (Tensor(m).own) weight_row_bytes = std::max(weight_row_bytes, m.row_bytes);
  }
  arithmetic_.Prepare(n_threads_, max_pairs_, row_bytes, weight_row_bytes);
  const size_t y_rows = static_cast<size_t>(n_threads_) * static_cast<size_t>(max_pairs_);
  if (y_rows_.size() < y_rows) y_rows_.resize(y_rows);
  n_tasks_ = n_matmuls_ * static_cast<int>(chosen_.size());
  if (tasks_capacity_ < static_cast<size_t>(n_tasks_)) {
    tasks_capacity_ = static_cast<size_t>(n_tasks_);
    tasks_ = std::make_unique<Task[]>(tasks_capacity_);
    ready_ = std::make_unique<std::atomic<int32_t>[]>(tasks_capacity_);
  }
  int n = 0;
  for (size_t c = 0; c < chosen_.size(); ++c) {
    for (int i = 0; i < n_matmuls_; ++i) {
      Task& task = tasks_[static_cast<size_t>(n++)];
      const edgemoe_matmul& m = matmuls_[static_cast<size_t>(i)];
      task.slice = Slice(m.tensor_idx, chosen_[c].id);
      task.matmul = IsCopy(chosen_[c].id) ? n_matmuls_ + i : i;
      task.chosen = static_cast<int32_t>(c);
      const auto tensor = std::find(tensor_idxs_.begin(), tensor_idxs_.end(), m.tensor_idx) - tensor_idxs_.begin();
      task.stays = is_pinned_[static_cast<size_t>(tensor) * chosen_.size() + c] != 0;
      task.rows_per_chunk = kDecodeRows;
      if (chosen_[c].n_pairs >= kPrefillPairs) {
        const int64_t units = std::clamp<int64_t>(n_threads_ * kPrefillUnitsPerThread / n_tasks_, 1, m.n_rows);
        task.rows_per_chunk = static_cast<int32_t>(RoundUp(static_cast<uint64_t>(m.n_rows / units), kPrefillRows));
      }
      task.n_chunks = static_cast<int32_t>((m.n_rows + task.rows_per_chunk - 1) / task.rows_per_chunk);
      task.next_chunk.store(0, std::memory_order_relaxed);
      task.n_done.store(0, std::memory_order_relaxed);
    }
  }
  pending_.clear();
  next_pending_ = 0;
  loading_.clear();
  n_ready_.store(0, std::memory_order_relaxed);
  cursor_.store(0, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  // Reading ahead begins behind the products at hand.
  const auto at_hand = [&](int64_t slice) {
    const int32_t tensor_idx = cache_->file().TensorOf(slice);
    return std::any_of(matmuls_.begin(), matmuls_.end(),
                       [&](const edgemoe_matmul& m) { return m.tensor_idx == tensor_idx; });
  };
  while (next_ahead_ < ahead_.size() && at_hand(ahead_[next_ahead_])) ++next_ahead_;
  // Resident slices first: they are computed while the rest loads.
  std::lock_guard<std::mutex> lock(cache_->mutex());
  for (int i = 0; i < n_tasks_; ++i) {
    const int64_t slice = tasks_[static_cast<size_t>(i)].slice;
    if (!cache_->Resident(slice)) {
      pending_.push_back(i);
      continue;
    }
    (void)cache_->Acquire(slice);
    PushReady(i);
  }
  CollectAndIssue();
  if (!foreseen_) prefetch_->SeeResidents(cache_, layer_, prefetch_depth_, choosers_, &foresight_);
}

void MoeLayer::PushReady(int32_t task) {
  Task& t = tasks_[static_cast<size_t>(task)];
  t.weights = cache_->Data(t.slice);
  t.packed = cache_->Packed(t.slice);
  const int n = n_ready_.load(std::memory_order_relaxed);
  ready_[static_cast<size_t>(n)].store(task, std::memory_order_relaxed);
  n_ready_.store(n + 1, std::memory_order_release);
}

// With the cache's lock: move tasks whose slices have arrived to the ready list, then start reads for as many
// more as there are slots, and last for later products of this layer.
void MoeLayer::CollectAndIssue() {
  for (size_t i = 0; i < loading_.size();) {
    const Task& task = tasks_[static_cast<size_t>(loading_[i])];
    const int64_t slice = task.slice;
    if (cache_->Absent(slice)) {
      if (!task.joined) {
        failure_ = cache_->read_error();
        failed_.store(true, std::memory_order_release);
        return;
      }
      // The read that failed was asked for earlier, by a layer that failed or ahead of time: ask again.
      cache_->Release(slice);
      pending_[--next_pending_] = loading_[i];
      loading_.erase(loading_.begin() + static_cast<std::ptrdiff_t>(i));
    } else if (cache_->Resident(slice)) {
      PushReady(loading_[i]);
      loading_.erase(loading_.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
  for (; next_pending_ < pending_.size(); ++next_pending_) {
    const int32_t task = pending_[next_pending_];
    const Acquired acquired = cache_->Acquire(tasks_[static_cast<size_t>(task)].slice);
    if (acquired == Acquired::kNoRoom) return;
    tasks_[static_cast<size_t>(task)].joined = acquired == Acquired::kJoined;
    if (acquired == Acquired::kResident) {
      PushReady(task);
    } else {
      loading_.push_back(task);
    }
  }
  while (next_ahead_ < ahead_.size() && cache_->ReadAhead(ahead_[next_ahead_])) ++next_ahead_;
}

void MoeLayer::Work(int thread_idx) {
  while (!failed_.load(std::memory_order_acquire)) {
    int i = cursor_.load(std::memory_order_acquire);
    if (i >= n_ready_.load(std::memory_order_acquire)) {
      if (i >= n_tasks_) return;
      WaitForReady(thread_idx, i);
      continue;
    }
    Task& task = tasks_[static_cast<size_t>(ready_[static_cast<size_t>(i)].load(std::memory_order_relaxed))];
    const int run = RunLength(task, n_tasks_ - i);
    const int chunk = task.next_chunk.fetch_add(run, std::memory_order_relaxed);
    if (chunk >= task.n_chunks) {
      cursor_.compare_exchange_strong(i, i + 1, std::memory_order_acq_rel);
      continue;
    }
    const int n = std::min(run, task.n_chunks - chunk);
    RunChunks(thread_idx, task, chunk, n);
    if (task.n_done.fetch_add(n, std::memory_order_acq_rel) + n == task.n_chunks) {
      {
        std::lock_guard<std::mutex> lock(cache_->mutex());
        cache_->Release(task.slice);
        cache_->Pass(task.slice);
        if (next_pending_ < pending_.size()) CollectAndIssue();
      }
      if (ffn_ != nullptr) EndTaskOfFfn(thread_idx, task.chosen);
    }
  }
}

// None but the first n_ready_seen tasks were ready: watch for a read to end, first awake and then asleep.
void MoeLayer::WaitForReady(int thread_idx, int n_ready_seen) {
  const PhaseScope phase(clock_, EDGEMOE_PHASE_WAIT);
  const auto begin = std::chrono::steady_clock::now();
  const uint64_t event = cache_->events().load(std::memory_order_acquire);
  for (int spin = 0; spin < kSpins; ++spin) {
    if (cache_->events().load(std::memory_order_acquire) != event) break;
    Relax();
  }
  std::unique_lock<std::mutex> lock(cache_->mutex());
  for (;;) {
    CollectAndIssue();
    if (failed_.load(std::memory_order_relaxed) || n_ready_.load(std::memory_order_relaxed) > n_ready_seen) break;
    cache_->WaitForEvent(&lock);
  }
  lock.unlock();
  if (thread_idx == 0) {
    const auto waited = std::chrono::steady_clock::now() - begin;
    trace_.AddWait(waited);
    cache_->counters().stall_ns.fetch_add(
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count()),
        std::memory_order_relaxed);
  }
}

// Chunks that a thread takes at once. Decode: many while there is much to do, as a stream that goes on is prefetched
// and a new one is not, and one at a time at the end, so that the threads end together.
int MoeLayer::RunLength(const Task& task, int n_tasks_left) const {
  if (chosen_[static_cast<size_t>(task.chosen)].n_pairs >= kPrefillPairs) return 1;
  return std::clamp(n_tasks_left * task.n_chunks / (kRunsPerThread * n_threads_), 1, kLongestRun);
}

void MoeLayer::RunChunks(int thread_idx, const Task& task, int chunk, int n_chunks) {
  const edgemoe_matmul& m = matmuls_[static_cast<size_t>(task.matmul)];
  const ChosenExpert& chosen = chosen_[static_cast<size_t>(task.chosen)];
  const size_t n_pairs = static_cast<size_t>(n_pairs_);
  const int64_t first_row = static_cast<int64_t>(chunk) * task.rows_per_chunk;
  float** y = y_rows_.data() + static_cast<int64_t>(thread_idx) * max_pairs_;
  for (int p = 0; p < chosen.n_pairs; ++p) {
    const Pair& pair = pairs_[static_cast<size_t>(chosen.first_pair + p)];
    y[p] = ResultsOf(m, pair.token, pair.used) + first_row;
  }
  edgemoe_product product;
  product.type = m.type;
  product.n_x = chosen.n_pairs;
  product.n_cols = m.n_cols;
  product.n_rows = std::min<int64_t>(static_cast<int64_t>(n_chunks) * task.rows_per_chunk, m.n_rows - first_row);
  product.weights = task.weights + static_cast<uint64_t>(first_row) * m.row_bytes;
  product.row_bytes = m.row_bytes;
  product.stays = task.stays ? 1 : 0;
  product.x = x_rows_.data() + static_cast<size_t>(task.matmul) * n_pairs + chosen.first_pair;
  product.y = y;
  // Products that share an input share its rows: gate and up of one expert, or of one copy.
  product.x_key = inputs_[static_cast<size_t>(task.matmul)].offset * 65536 + static_cast<uint64_t>(chosen.id) + 1;
  arithmetic_.Multiply(thread_idx, Tensor(m), task.packed, product);
}

}  // namespace edgemoe
