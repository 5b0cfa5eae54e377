// SPDX-License-Identifier: MIT
#include "core/replay_trace.h"

#include <algorithm>
#include <queue>
#include <string>

#include "core/expert_cache.h"
#include "core/slot_pool.h"

namespace edgemoe {
namespace {

constexpr int kMaxSlices = 4;

// Claims to hold every slice; slots are reserved but never written.
class UnreadableFile : public File {
 public:
  uint64_t size_bytes() const override { return UINT64_MAX / 2; }
  const std::string& path() const override { return path_; }
  bool direct() const override { return true; }
  Status ReadAt(uint64_t, uint64_t, uint64_t, void*) override {
    return Status(EDGEMOE_INTERNAL, "a replay reads nothing");
  }

 private:
  const std::string path_ = "replay";
};

}  // namespace

Status ReplayTrace::Set(const edgemoe_replay_trace& trace) {
  trace_ = trace;
  if (Status s = CheckLayers(); !s.ok()) return s;
  if (Status s = SetBatches(); !s.ok()) return s;
  if (Status s = CheckForeseen(); !s.ok()) return s;
  return SetUses();
}

Status ReplayTrace::CheckForeseen() const {
  for (int64_t b = 0; b < n_batches(); ++b) {
    for (int l = 0; l < n_layers(); ++l) {
      for (int i = 0; i < 2 * n_foreseen(); ++i) {
        const int expert = Foreseen(b, l, 1)[i];
        if (expert >= -1 && expert < layer(l).n_experts) continue;
        return Status(EDGEMOE_INVALID_ARGUMENT,
                      Format("batch %lld of the trace: expert %d foreseen of layer %d, expected 0..%d",
                             static_cast<long long>(b), expert, l, layer(l).n_experts - 1));
      }
    }
  }
  return Status();
}

Status ReplayTrace::CheckLayers() const {
  if (trace_.n_layers <= 0 || trace_.max_used <= 0 || trace_.n_tokens <= 0) {
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("trace of %lld tokens, %d layers and %d experts per token, expected "
                         "at least one of each",
                         static_cast<long long>(trace_.n_tokens), trace_.n_layers, trace_.max_used));
  }
  for (int i = 0; i < trace_.n_layers; ++i) {
    const edgemoe_replay_layer& l = trace_.layers[i];
    const bool has_bytes = l.n_slices >= 1 && l.n_slices <= kMaxSlices &&
                           std::all_of(l.slice_bytes, l.slice_bytes + l.n_slices,
                                       [](uint64_t bytes) { return bytes > 0 && bytes <= (uint64_t{1} << 40); });
    if (!has_bytes || l.n_experts <= 0 || l.n_used <= 0 || l.n_used > std::min(l.n_experts, trace_.max_used)) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    Format("layer %d of the trace: %d of %d experts used and %d projections, expected counts above 0, "
                           "1 to %d projections of at most 1 TiB and no more used than there are",
                           i, l.n_used, l.n_experts, l.n_slices, kMaxSlices));
    }
  }
  return Status();
}

Status ReplayTrace::SetBatches() {
  first_token_.clear();
  for (int64_t t = 0; t < trace_.n_tokens; ++t) {
    const int64_t n = static_cast<int64_t>(first_token_.size());
    if (trace_.batch_of_token[t] == n) {
      first_token_.push_back(t);
    } else if (trace_.batch_of_token[t] != n - 1) {
      return Status(EDGEMOE_INVALID_ARGUMENT,
                    Format("token %lld of the trace: in batch %d, expected %lld or the one after",
                           static_cast<long long>(t), trace_.batch_of_token[t], static_cast<long long>(n - 1)));
    }
  }
  first_token_.push_back(trace_.n_tokens);
  return Status();
}

Status ReplayTrace::SetUses() {
  uses_.clear();
  first_use_.assign(1, 0);
  n_tokens_of_step_.clear();
  std::vector<int32_t> use_of_expert;
  for (int64_t b = 0; b < n_batches(); ++b) {
    for (int l = 0; l < n_layers(); ++l) {
      use_of_expert.assign(static_cast<size_t>(layer(l).n_experts), -1);
      const size_t first = uses_.size();
      const int64_t end = first_token(b + 1);
      int64_t begin = first_token(b);
      const auto has_experts = [&](int64_t t) {
        return std::any_of(Experts(t, l), Experts(t, l) + trace_.max_used, [](int16_t e) { return e >= 0; });
      };
      while (begin < end && !has_experts(begin)) ++begin;
      if (begin == end) begin = first_token(b);  // a layer that nobody computed
      n_tokens_of_step_.push_back(end - begin);
      for (int64_t t = begin; t < end; ++t) {
        const int16_t* const experts = Experts(t, l);
        for (int k = 0; k < trace_.max_used; ++k) {
          if (experts[k] == -1) continue;
          if (experts[k] < 0 || experts[k] >= layer(l).n_experts) {
            return Status(EDGEMOE_INVALID_ARGUMENT,
                          Format("token %lld selects expert %d in layer %d of the trace, expected 0..%d",
                                 static_cast<long long>(t), experts[k], l, layer(l).n_experts - 1));
          }
          int32_t& use = use_of_expert[static_cast<size_t>(experts[k])];
          if (use < 0) {
            use = static_cast<int32_t>(uses_.size() - first);
            uses_.emplace_back();
            uses_.back().expert = experts[k];
          }
          ReplayUse& u = uses_[first + static_cast<size_t>(use)];
          ++u.n_rows;
          u.last_token = static_cast<int32_t>(t - begin);
        }
      }
      if (end - begin > kMostDecodeTokens) {  // as MoeLayer::Choose
        std::stable_sort(uses_.begin() + static_cast<std::ptrdiff_t>(first), uses_.end(),
                         [](const ReplayUse& x, const ReplayUse& y) { return x.n_rows > y.n_rows; });
      }
      first_use_.push_back(uses_.size());
    }
  }
  std::vector<std::vector<int64_t>> next(static_cast<size_t>(n_layers()));
  for (int l = 0; l < n_layers(); ++l) {
    next[static_cast<size_t>(l)].assign(static_cast<size_t>(layer(l).n_experts), n_steps());
  }
  for (int64_t step = n_steps() - 1; step >= 0; --step) {
    auto& of_layer = next[static_cast<size_t>(step % n_layers())];
    for (size_t i = first_use_[static_cast<size_t>(step)]; i < first_use_[static_cast<size_t>(step) + 1]; ++i) {
      int64_t& of_expert = of_layer[static_cast<size_t>(uses_[i].expert)];
      uses_[i].next_use = of_expert;
      of_expert = step;
    }
  }
  first_tensor_.clear();
  int n_tensors = 0;
  for (int l = 0; l < n_layers(); ++l) {
    first_tensor_.push_back(n_tensors);
    n_tensors += layer(l).n_slices;
  }
  return Status();
}

Status ReplayTrace::OpenFile(std::unique_ptr<ExpertFile>* file) const {
  std::vector<std::string> names;
  std::vector<edgemoe_tensor> tensors;
  uint64_t offset = 0;
  for (int l = 0; l < n_layers(); ++l) {
    for (int i = 0; i < layer(l).n_slices; ++i) names.push_back(Format("layer %d, projection %d", l, i));
  }
  for (int l = 0; l < n_layers(); ++l) {
    for (int i = 0; i < layer(l).n_slices; ++i) {
      edgemoe_tensor t = {};
      t.name = names[tensors.size()].c_str();
      t.layer = l;
      t.n_experts = layer(l).n_experts;
      t.n_experts_used = layer(l).n_used;
      t.offset = offset;
      t.expert_bytes = RoundUp(layer(l).slice_bytes[i], kIoAlignment);
      offset += t.expert_bytes * static_cast<uint64_t>(t.n_experts);
      tensors.push_back(t);
    }
  }
  const char* const path = "replay";
  edgemoe_options options = {};
  options.struct_size = sizeof(options);
  options.n_files = 1;
  options.file_paths = &path;
  options.n_tensors = static_cast<int32_t>(tensors.size());
  options.tensors = tensors.data();
  return ExpertFile::Open(
      options,
      [](const std::string&, std::unique_ptr<File>* opened) {
        *opened = std::make_unique<UnreadableFile>();
        return Status();
      },
      file);
}

void ReplayTrace::Bound(const ExpertFile& file, uint64_t slots_bytes, uint64_t* n_reads, uint64_t* n_bytes) const {
  std::vector<int> class_of_tensor;
  std::vector<SlotClass> slots = SlotPool::Classes(file.tensors(), &class_of_tensor);
  SlotPool::Distribute(slots_bytes, &slots);
  struct Kept {
    int64_t next_use;
    int64_t slice;
    bool operator<(const Kept& other) const { return next_use < other.next_use; }
  };
  struct Class {
    std::priority_queue<Kept> farthest;  // entries whose slice has been used since are void
    int64_t n_kept = 0;
  };
  std::vector<Class> classes(slots.size());
  std::vector<int64_t> next_of_slice(static_cast<size_t>(file.n_slices()), -1);  // -1: not kept
  *n_reads = *n_bytes = 0;
  for (int64_t step = 0; step < n_steps(); ++step) {
    const int l = static_cast<int>(step % n_layers());
    for (int i = 0; i < layer(l).n_slices; ++i) {
      const int tensor_idx = first_tensor(l) + i;
      Class& c = classes[static_cast<size_t>(class_of_tensor[static_cast<size_t>(tensor_idx)])];
      for (const ReplayUse* u = begin(step); u != end(step); ++u) {
        const int64_t slice = file.tensors()[static_cast<size_t>(tensor_idx)].first_slice + u->expert;
        int64_t& next = next_of_slice[static_cast<size_t>(slice)];
        if (next < 0) {
          ++*n_reads;
          *n_bytes += file.Extent(slice).length;
          ++c.n_kept;
        }
        next = u->next_use;
        c.farthest.push({next, slice});
      }
    }
    for (size_t i = 0; i < classes.size(); ++i) {
      Class& c = classes[i];
      while (c.n_kept > slots[i].n_slots) {
        const Kept kept = c.farthest.top();
        c.farthest.pop();
        int64_t& next = next_of_slice[static_cast<size_t>(kept.slice)];
        if (next != kept.next_use) continue;
        next = -1;
        --c.n_kept;
      }
    }
  }
}

}  // namespace edgemoe
