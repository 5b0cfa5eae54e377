// SPDX-License-Identifier: MIT
// moe_layer.h: one session computes MoE layers, one at a time: which experts a batch chose, the order in which
// they are acquired, and the division of the products among threads. Experts already resident are computed
// while the others load; when the slots cannot hold all that a layer needs, they are filled in waves, and
// still every slice is used once and read at most once per layer and batch.
// Results do not depend on residency, order or threads: each output element is one call of the provider's
// arithmetic on the same operands. Thread promise: one calling thread; several sessions may share a cache.
#ifndef EDGEMOE_CORE_MOE_LAYER_H_
#define EDGEMOE_CORE_MOE_LAYER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/arithmetic.h"
#include "core/expert_cache.h"
#include "core/phase_clock.h"
#include "core/prefetch.h"
#include "core/status.h"
#include "core/trace.h"
#include "edgemoe/edgemoe.h"

namespace edgemoe {

class MoeLayer {
 public:
  MoeLayer(ExpertCache* cache, const edgemoe_kernels& engine, Prefetch* prefetch, TraceRecorder* recorder,
           PhaseClock* clock)
      : cache_(cache), prefetch_(prefetch), clock_(clock), arithmetic_(cache->kernels(), engine), trace_(recorder) {}
  ~MoeLayer() { End(); }
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  void set_threads(int n_threads) { n_threads_ = n_threads > 0 ? n_threads : 1; }
  // As edgemoe_session_set_choosers.
  void set_choosers(const edgemoe_choosers& choosers) { next_choosers_ = choosers; }
  Status Begin(const int32_t* ids, int64_t n_tokens, int64_t n_used, uint64_t ids_token_bytes,
               const int32_t* tensor_idxs, int n_tensors);
  Status Multiply(const edgemoe_matmul* matmuls, int n_matmuls);
  Status Ffn(const edgemoe_ffn& ffn);
  void End();

 private:
  // The tokens that chose one expert: pairs [first_pair, first_pair + n_pairs) of pairs_.
  struct ChosenExpert {
    int32_t id = 0;  // as Begin was given it: of an expert, or of its low-bit copy
    int32_t n_pairs = 0;
    int64_t first_pair = 0;
    double last_time = 0.0;
  };
  struct Pair {
    int32_t token;
    int32_t used;
  };
  // One expert matrix times the rows of the tokens that chose it, in chunks of matrix rows.
  struct Task {
    int64_t slice = 0;
    const char* weights = nullptr;
    int32_t matmul = 0;
    int32_t chosen = 0;
    int32_t n_chunks = 0;
    int32_t rows_per_chunk = 0;
    bool packed = false;
    bool stays = false;   // where it is until the layer ends
    bool joined = false;  // waits for a read that it did not start
    std::atomic<int32_t> next_chunk{0};
    std::atomic<int32_t> n_done{0};
  };

  Status Choose(const int32_t* ids, int64_t n_tokens, int64_t n_used, uint64_t ids_token_bytes);
  void CountAndPin();
  void Foresee();
  void Promise();
  Status SetProducts(const edgemoe_matmul* matmuls, int n_matmuls);
  void AddProductsWithCopies();
  void QuantizeInputs();
  void ZeroResultsOfNoExpert(const edgemoe_matmul& m);
  Status RunTasks();
  void PrepareTasks();
  void PushReady(int32_t task);
  void CollectAndIssue();
  void Work(int thread_idx);
  void WaitForReady(int thread_idx, int n_ready_seen);
  int RunLength(const Task& task, int n_tasks_left) const;
  void RunChunks(int thread_idx, const Task& task, int chunk, int n_chunks);
  Status CheckFfn(const edgemoe_ffn& ffn) const;
  void PrepareFfn(const edgemoe_ffn& ffn);
  void EndTaskOfFfn(int thread_idx, int chosen);
  void Activate(int thread_idx, const ChosenExpert& chosen);
  void Combine(const edgemoe_ffn& ffn, int thread_idx, int64_t token);
  void CombineAll(const edgemoe_ffn& ffn);
  // Where the results of one token and used expert go.
  static float* ResultsOf(const edgemoe_matmul& m, int64_t token, int64_t used) {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(m.y) + static_cast<uint64_t>(token) * m.y_token_bytes +
                                    static_cast<uint64_t>(used) * m.y_used_bytes);
  }
  const ExpertTensor& Tensor(int tensor_idx) const { return cache_->file().tensors()[static_cast<size_t>(tensor_idx)]; }
  const ExpertTensor& Tensor(const edgemoe_matmul& m) const { return Tensor(m.tensor_idx); }
  bool IsCopy(int32_t id) const { return id >= n_experts_; }
  int32_t ExpertOf(int32_t id) const { return IsCopy(id) ? id - n_experts_ : id; }
  int64_t Slice(int tensor_idx, int32_t id) const {
    const ExpertTensor& t = Tensor(tensor_idx);
    return IsCopy(id) ? Tensor(t.copy).first_slice + id - n_experts_ : t.first_slice + id;
  }

  ExpertCache* const cache_;
  Prefetch* const prefetch_;
  PhaseClock* const clock_;
  Arithmetic arithmetic_;
  LayerTrace trace_;
  int n_threads_ = 1;

  // The layer in progress.
  bool active_ = false;
  int last_layer_ = -1;
  int64_t last_n_tokens_ = 0;
  double batch_time_ = 0.0;  // time of the batch's first token
  std::vector<int32_t> tensor_idxs_;
  std::vector<ChosenExpert> chosen_;    // in the order in which they are acquired
  int32_t n_experts_ = 0;               // of the layer; ids of copies begin there
  bool makes_room_for_copies_ = false;  // in all buffers, so that decoding never allocates
  bool has_chosen_copies_ = false;
  std::vector<int32_t> chosen_of_id_;
  std::vector<Pair> pairs_;
  int64_t n_pairs_ = 0;
  int64_t n_used_ = 0;
  std::vector<int64_t> pinned_;
  std::vector<char> is_pinned_;  // [tensor][chosen]
  struct ClassShare {
    int64_t n_needed = 0;    // slices of the layer in this class
    int64_t n_promised = 0;  // slots promised to this session and not yet pinned
    int64_t n_held = 0;      // slots promised to this session
    bool fits = false;       // all of them
  };
  std::vector<ClassShare> shares_;  // [class]
  std::vector<int64_t> ahead_;      // slices of later products, in order of use
  size_t next_ahead_ = 0;

  // What the next layers may choose.
  int layer_ = 0;                                        // in progress
  int prefetch_depth_ = 0;                               // of this batch; 0 as well where there is nothing to read
  bool foreseen_ = true;                                 // what follows from the layer in progress
  edgemoe_choosers next_choosers_ = {}, choosers_ = {};  // of the layer that begins next; of that in progress
  Foresight foresight_;

  // The products in progress: n_matmuls_ with the experts, then as many with their low-bit copies, if some may be
  // chosen.
  std::vector<edgemoe_matmul> matmuls_;
  int n_matmuls_ = 0;
  std::unique_ptr<Task[]> tasks_;
  size_t tasks_capacity_ = 0;
  int n_tasks_ = 0;
  std::vector<int32_t> pending_;  // tasks not yet acquired, from next_pending_ on
  size_t next_pending_ = 0;
  std::vector<int32_t> loading_;                   // tasks acquired, not yet resident
  std::unique_ptr<std::atomic<int32_t>[]> ready_;  // tasks in the order in which they may run
  std::atomic<int> n_ready_{0};
  std::atomic<int> cursor_{0};
  std::atomic<bool> failed_{false};
  Status failure_;
  std::vector<char> activations_;
  struct InputRows {
    uint64_t offset;
    uint64_t row_bytes;
    int64_t n_used;
  };
  std::vector<InputRows> inputs_;    // of each product
  std::vector<const void*> x_rows_;  // [product][pair]
  std::vector<float*> y_rows_;       // [thread][pair]
  int64_t max_pairs_ = 0;

  // The feed-forward block in progress, while its first products run.
  const edgemoe_ffn* ffn_ = nullptr;
  std::unique_ptr<std::atomic<int32_t>[]> n_tasks_left_;  // [chosen] before its activation can be computed
  size_t n_tasks_left_capacity_ = 0;
  std::vector<char> hidden_;  // [pair] what act gave, as down's activation rows
  InputRows hidden_rows_ = {};
  std::vector<float> act_;          // [thread][n_ff]
  std::vector<int32_t> expert_of_;  // [token][used], whichever copy of it, or EDGEMOE_NO_EXPERT
  struct CombineRows {
    std::vector<const float*> rows, biases;
    std::vector<float> weights;
  };
  std::vector<CombineRows> combine_;  // [thread]
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_MOE_LAYER_H_
