// SPDX-License-Identifier: MIT
// moe_ffn.cc: a whole feed-forward block of experts. The threads start twice: for gate and up, where the thread that
// ends an expert's last product also computes its activation and quantizes it for down; and for down. The sum over a
// token's experts is in the order in which the router gave them, so it does not depend on which was ready first.
#include <algorithm>
#include <cstring>

#include "core/moe_layer.h"
#include "edgemoe/selection.h"

namespace edgemoe {
namespace {

// Elements of the weighted sum from which starting the threads pays: 131072 multiply-adds are about 10 us on one.
constexpr int64_t kParallelCombineElements = 131072;

int64_t NFf(const edgemoe_ffn& ffn) { return ffn.merged ? ffn.up.n_rows / 2 : ffn.up.n_rows; }

bool HasGate(const edgemoe_ffn& ffn) { return ffn.gate.n_rows > 0; }

template <typename T>
T* At(T* base, uint64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + bytes);
}

const float* BiasOf(const float* bias, uint64_t expert_bytes, int expert) {
  return bias == nullptr ? nullptr : At(bias, expert_bytes * static_cast<uint64_t>(expert));
}

}  // namespace

Status MoeLayer::Ffn(const edgemoe_ffn& ffn) {
  if (Status s = CheckFfn(ffn); !s.ok()) return s;
  const edgemoe_matmul in[2] = {HasGate(ffn) ? ffn.gate : ffn.up, ffn.up};
  if (Status s = SetProducts(in, HasGate(ffn) ? 2 : 1); !s.ok()) return s;
  PrepareFfn(ffn);
  QuantizeInputs();
  ffn_ = &ffn;
  Status status = RunTasks();
  ffn_ = nullptr;
  if (!status.ok()) return status;

  if (status = SetProducts(&ffn.down, 1); !status.ok()) return status;
  inputs_.assign(matmuls_.size(), hidden_rows_);
  const size_t n_pairs = static_cast<size_t>(n_pairs_);
  if (x_rows_.size() < n_pairs * matmuls_.size()) x_rows_.resize(n_pairs * matmuls_.size());
  for (size_t i = 0; i < n_pairs * matmuls_.size(); ++i) {
    x_rows_[i] = hidden_.data() + hidden_rows_.offset + i % n_pairs * hidden_rows_.row_bytes;
  }
  if (ffn.out == nullptr) ZeroResultsOfNoExpert(ffn.down);
  if (status = RunTasks(); !status.ok()) return status;
  if (ffn.out != nullptr) CombineAll(ffn);
  trace_.SetWeights(ffn);
  return status;
}

Status MoeLayer::CheckFfn(const edgemoe_ffn& ffn) const {
  const bool alone = ffn.glu == EDGEMOE_SILU || ffn.glu == EDGEMOE_GELU || ffn.glu == EDGEMOE_RELU_SQUARED;
  if (ffn.glu < 0 || ffn.glu > EDGEMOE_RELU_SQUARED || alone == (HasGate(ffn) || ffn.merged != 0) ||
      (HasGate(ffn) && ffn.merged != 0)) {
    return Status(
        EDGEMOE_INVALID_ARGUMENT,
        Format("activation %d with gate rows %lld, merged %d: expected a gate (or merged) for kinds 0..4 only", ffn.glu,
               static_cast<long long>(ffn.gate.n_rows), ffn.merged));
  }
  if (ffn.down.n_cols != NFf(ffn) || (HasGate(ffn) && ffn.gate.n_rows != ffn.up.n_rows)) {
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("down has %lld columns, expected %lld, the rows of gate and up",
                         static_cast<long long>(ffn.down.n_cols), static_cast<long long>(NFf(ffn))));
  }
  for (const edgemoe_matmul* m : {&ffn.gate, &ffn.up, &ffn.down}) {
    if (m->n_rows == 0) continue;
    const auto& tensors = cache_->file().tensors();
    if (m->tensor_idx < 0 || static_cast<size_t>(m->tensor_idx) >= tensors.size() || !Tensor(*m).own) {
      return Status(EDGEMOE_INVALID_ARGUMENT, Format("tensor %d is not multiplied by own kernels", m->tensor_idx));
    }
  }
  return Status();
}

void MoeLayer::PrepareFfn(const edgemoe_ffn& ffn) {
  const size_t n_threads = static_cast<size_t>(n_threads_);
  const ExpertTensor& down = Tensor(ffn.down);
  uint64_t row_bytes = arithmetic_.RowBytes(down, ffn.down);
  if (makes_room_for_copies_) row_bytes = std::max(row_bytes, arithmetic_.RowBytes(Tensor(down.copy), ffn.down));
  row_bytes = RoundUp(row_bytes, 64);
  const uint64_t hidden_bytes = row_bytes * static_cast<uint64_t>(n_pairs_) + 64;
  if (hidden_.size() < hidden_bytes) hidden_.resize(hidden_bytes);
  hidden_rows_ = {(64 - reinterpret_cast<uint64_t>(hidden_.data()) % 64) % 64, row_bytes, n_used_};
  if (act_.size() < n_threads * static_cast<size_t>(NFf(ffn))) act_.resize(n_threads * static_cast<size_t>(NFf(ffn)));
  if (combine_.size() < n_threads) combine_.resize(n_threads);
  for (CombineRows& c : combine_) {
    c.rows.resize(static_cast<size_t>(n_used_));
    c.biases.resize(static_cast<size_t>(n_used_));
    c.weights.resize(static_cast<size_t>(n_used_));
  }
  if (n_tasks_left_capacity_ < chosen_.size()) {
    n_tasks_left_capacity_ = chosen_.size();
    n_tasks_left_ = std::make_unique<std::atomic<int32_t>[]>(n_tasks_left_capacity_);
  }
  for (size_t c = 0; c < chosen_.size(); ++c) n_tasks_left_[c].store(n_matmuls_, std::memory_order_relaxed);
}

void MoeLayer::EndTaskOfFfn(int thread_idx, int chosen) {
  // acq_rel: the thread that computes the activation sees what the others have written.
  if (n_tasks_left_[static_cast<size_t>(chosen)].fetch_sub(1, std::memory_order_acq_rel) == 1) {
    Activate(thread_idx, chosen_[static_cast<size_t>(chosen)]);
  }
}

void MoeLayer::Activate(int thread_idx, const ChosenExpert& chosen) {
  const edgemoe_ffn& ffn = *ffn_;
  const int64_t n_ff = NFf(ffn);
  const simd::GluParams params = {static_cast<simd::GluKind>(ffn.glu), ffn.alpha, ffn.limit};
  const int32_t expert = ExpertOf(chosen.id);
  const ExpertTensor& down = IsCopy(chosen.id) ? Tensor(Tensor(ffn.down).copy) : Tensor(ffn.down);
  const float* gate_bias = BiasOf(ffn.gate_bias, ffn.gate_bias_expert_bytes, expert);
  const float* up_bias = BiasOf(ffn.up_bias, ffn.up_bias_expert_bytes, expert);
  if (ffn.merged && up_bias != nullptr) {
    gate_bias = up_bias;
    up_bias += n_ff;
  }
  float* const act = act_.data() + static_cast<int64_t>(thread_idx) * n_ff;
  for (int64_t p = chosen.first_pair; p < chosen.first_pair + chosen.n_pairs; ++p) {
    const Pair& pair = pairs_[static_cast<size_t>(p)];
    const float* up = ResultsOf(ffn.up, pair.token, pair.used);
    const float* gate = up;
    if (HasGate(ffn)) {
      gate = ResultsOf(ffn.gate, pair.token, pair.used);
    } else if (ffn.merged) {
      up += n_ff;
    } else {
      up = nullptr;
    }
    const bool alone = up == nullptr;
    arithmetic_.table().glu(params, gate, alone ? up_bias : gate_bias, up, alone ? nullptr : up_bias, act, n_ff);
    arithmetic_.Quantize(down, ffn.down, act,
                         hidden_.data() + hidden_rows_.offset + static_cast<uint64_t>(p) * hidden_rows_.row_bytes);
  }
}

void MoeLayer::CombineAll(const edgemoe_ffn& ffn) {
  struct Shared {
    MoeLayer* self;
    const edgemoe_ffn* ffn;
    int64_t n_tokens;
    std::atomic<int64_t> next{0};
  };
  Shared shared{this, &ffn, last_n_tokens_, {}};
  const auto combine = [](void* arg, int32_t thread_idx, int32_t) {
    Shared* s = static_cast<Shared*>(arg);
    for (int64_t t; (t = s->next.fetch_add(1, std::memory_order_relaxed)) < s->n_tokens;) {
      s->self->Combine(*s->ffn, thread_idx, t);
    }
  };
  if (n_pairs_ * ffn.down.n_rows >= kParallelCombineElements) {
    arithmetic_.Parallel(n_threads_, combine, &shared);
  } else {
    combine(&shared, 0, 1);
  }
}

void MoeLayer::Combine(const edgemoe_ffn& ffn, int thread_idx, int64_t token) {
  CombineRows& c = combine_[static_cast<size_t>(thread_idx)];
  float* const out = At(ffn.out, static_cast<uint64_t>(token) * ffn.out_token_bytes);
  size_t n = 0;
  for (int64_t u = 0; u < n_used_; ++u) {
    const int32_t expert = expert_of_[static_cast<size_t>(token * n_used_ + u)];
    if (expert == EDGEMOE_NO_EXPERT) continue;
    const size_t i = n++;
    c.rows[i] = ResultsOf(ffn.down, token, u);
    c.biases[i] = BiasOf(ffn.down_bias, ffn.down_bias_expert_bytes, expert);
    c.weights[i] = *At(ffn.weights, static_cast<uint64_t>(token) * ffn.weights_token_bytes +
                                        static_cast<uint64_t>(u) * ffn.weights_used_bytes);
  }
  if (n == 0) {
    std::fill_n(out, ffn.down.n_rows, 0.0f);
    return;
  }
  arithmetic_.table().combine(c.rows.data(), ffn.down_bias != nullptr ? c.biases.data() : nullptr, c.weights.data(),
                              static_cast<int>(n), out, ffn.down.n_rows);
}

}  // namespace edgemoe
