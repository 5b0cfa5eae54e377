// SPDX-License-Identifier: MIT
// replay_trace.h: a trace checked and brought into the form that replay walks through: for every batch and layer the
// distinct experts, in the order of MoeLayer's Choose, and when each is used next. And Belady's bound on it.
// Immutable once built, so thread-safe.
#ifndef EDGEMOE_CORE_REPLAY_TRACE_H_
#define EDGEMOE_CORE_REPLAY_TRACE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "core/expert_file.h"
#include "core/status.h"
#include "edgemoe/scheduler.h"

namespace edgemoe {

// An expert that a batch chose in a layer.
struct ReplayUse {
  int32_t expert = 0;
  int32_t n_rows = 0;      // tokens that chose it
  int32_t last_token = 0;  // the last of them, of those in the layer
  int64_t next_use = 0;    // step of its next use, or n_steps(): never
};

class ReplayTrace {
 public:
  // Keeps pointers into `trace`.
  Status Set(const edgemoe_replay_trace& trace);

  int n_layers() const { return trace_.n_layers; }
  int64_t n_batches() const { return static_cast<int64_t>(first_token_.size()) - 1; }
  int64_t first_token(int64_t batch) const { return first_token_[static_cast<size_t>(batch)]; }
  int64_t n_tokens(int64_t batch) const { return first_token(batch + 1) - first_token(batch); }
  // Of them, the last so many go through the layer: a prompt's last layer is computed where logits are wanted only.
  int64_t n_tokens(int64_t batch, int layer) const {
    return n_tokens_of_step_[static_cast<size_t>(Step(batch, layer))];
  }
  const edgemoe_replay_layer& layer(int layer) const { return trace_.layers[layer]; }
  // A step is one layer of one batch, in the order of time.
  int64_t n_steps() const { return n_batches() * n_layers(); }
  int64_t Step(int64_t batch, int layer) const { return batch * n_layers() + layer; }
  const ReplayUse* begin(int64_t step) const { return uses_.data() + first_use_[static_cast<size_t>(step)]; }
  const ReplayUse* end(int64_t step) const { return uses_.data() + first_use_[static_cast<size_t>(step) + 1]; }
  // The experts of a token: [max_used], -1 from where there are no more.
  const int16_t* Experts(int64_t token, int layer) const {
    return trace_.experts + (token * trace_.n_layers + layer) * trace_.max_used;
  }
  int max_used() const { return trace_.max_used; }
  // What was foreseen of a layer from `distance` layers ahead: [n_foreseen], -1 from where there are no more.
  int n_foreseen() const { return trace_.foreseen == nullptr ? 0 : trace_.max_foreseen; }
  const int16_t* Foreseen(int64_t batch, int layer, int distance) const {
    return trace_.foreseen + (Step(batch, layer) * 2 + distance - 1) * trace_.max_foreseen;
  }

  // A file of which nothing can be read, with a tensor for each projection: layer after layer, in the order of use.
  Status OpenFile(std::unique_ptr<ExpertFile>* file) const;
  int first_tensor(int layer) const { return first_tensor_[static_cast<size_t>(layer)]; }

  // The fewest reads with which so many bytes of slots serve the trace, whatever is evicted, kept or read early. A read
  // is saved by keeping a slice from one use to the next; between two steps a class keeps no more slices than it has
  // slots. To give up the slice whose next use is farthest saves most (Belady 1966; for requests of several at once and
  // with the choice not to keep what was just used, by the same exchange of intervals).
  void Bound(const ExpertFile& file, uint64_t slots_bytes, uint64_t* n_reads, uint64_t* n_bytes) const;

 private:
  Status CheckLayers() const;
  Status SetBatches();
  Status SetUses();
  Status CheckForeseen() const;

  edgemoe_replay_trace trace_ = {};
  std::vector<int64_t> first_token_;  // [n_batches + 1]
  std::vector<int64_t> n_tokens_of_step_;
  std::vector<ReplayUse> uses_;
  std::vector<size_t> first_use_;  // [n_steps + 1]
  std::vector<int> first_tensor_;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_REPLAY_TRACE_H_
