// SPDX-License-Identifier: MIT
#include "core/arithmetic.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace edgemoe {
namespace {

using simd::KernelTable;

const char* IsaAskedFor() {
  const char* isa = std::getenv("EDGEMOE_ISA");
  return isa != nullptr && *isa != '\0' ? isa : nullptr;
}

// 128 rows of 2048 columns in 4 bits are 144 KiB, of 8 bits 272 KiB: within half of the 1 MiB of L2 that is usual. The
// kernels want several groups in a call: with one, a prompt took twice as long.
constexpr int64_t kPanelRows = 128;
// What is interleaved at a time where the rows do not come packed: for several panels up to this, at least a group.
constexpr uint64_t kInterleavedBytes = 288 * 1024;

simd::Format FormatOf(const ExpertTensor& tensor) { return static_cast<simd::Format>(tensor.format); }

}  // namespace

Status ActiveKernels(const KernelTable** table) {
  char error[400];
  *table = simd::Choose(IsaAskedFor(), error, sizeof(error));
  return *table != nullptr ? Status() : Status(EDGEMOE_INVALID_ARGUMENT, error);
}

Status KernelsFor(int32_t arithmetic, const KernelTable** table) {
  *table = nullptr;
  if (arithmetic != EDGEMOE_ARITHMETIC_AUTO && arithmetic != EDGEMOE_ARITHMETIC_PLUGIN) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("arithmetic %d, expected 0 (auto) or 1 (plug-in)", arithmetic));
  }
  if (Status s = ActiveKernels(table); !s.ok()) return s;
  const bool portable = *table == &simd::Portable() && IsaAskedFor() == nullptr;
  if (arithmetic == EDGEMOE_ARITHMETIC_PLUGIN || portable) *table = nullptr;
  return Status();
}

bool IsOwn(const KernelTable* table, const ExpertTensor& t) {
  if (table == nullptr || t.format <= simd::kNoFormat || t.format >= simd::kFormatCount) return false;
  // 32: the columns of a block of the smallest block formats, and what the kernels of F16 and BF16 step by.
  const int64_t step = std::max(32, simd::Info(FormatOf(t)).block_cols);
  return t.n_cols > 0 && t.n_rows > 0 && t.n_cols % step == 0 &&
         static_cast<uint64_t>(simd::RowBytes(FormatOf(t), t.n_cols) * t.n_rows) == t.expert_bytes;
}

uint64_t PackScratchBytes(const KernelTable& table, const ExpertTensor& t) {
  return static_cast<uint64_t>(simd::RowBytes(FormatOf(t), t.n_cols) * table.rows_per_group);
}

void PackSlice(const KernelTable& table, const ExpertTensor& t, char* slot, uint64_t head_bytes, char* scratch) {
  const uint64_t group_bytes = PackScratchBytes(table, t);
  const int64_t n_groups = &table == &simd::Portable() ? 0 : t.n_rows / table.rows_per_group;
  // Each group ends in the slot before the next begins in what was read, so packing forward overwrites nothing unread.
  for (int64_t g = 0; g < n_groups; ++g) {
    char* const to = slot + static_cast<uint64_t>(g) * group_bytes;
    table.interleave[t.format](reinterpret_cast<const uint8_t*>(to + head_bytes), 1, t.n_cols,
                               reinterpret_cast<uint8_t*>(scratch));
    std::memcpy(to, scratch, group_bytes);
  }
  const uint64_t packed = static_cast<uint64_t>(n_groups) * group_bytes;
  std::memmove(slot + packed, slot + head_bytes + packed, t.expert_bytes - packed);
}

uint64_t Arithmetic::RowBytes(const ExpertTensor& tensor, const edgemoe_matmul& m) const {
  if (!tensor.own) return engine_.activation_row_bytes(engine_.context, m.type, m.n_cols);
  return static_cast<uint64_t>(simd::PanelBytes(simd::Info(FormatOf(tensor)).activation, m.n_cols, 1));
}

void Arithmetic::Quantize(const ExpertTensor& tensor, const edgemoe_matmul& m, const float* x, void* row) const {
  if (tensor.own) {
    table_->quantize[simd::Info(FormatOf(tensor)).activation](x, row, m.n_cols);
  } else {
    engine_.quantize_row(engine_.context, m.type, x, row, m.n_cols);
  }
}

void Arithmetic::Prepare(int n_threads, int64_t n_x, uint64_t row_bytes, uint64_t weight_row_bytes) {
  if (scratch_.size() < static_cast<size_t>(n_threads)) scratch_.resize(static_cast<size_t>(n_threads));
  uint64_t groups_bytes = 0;
  if (weight_row_bytes > 0) {
    groups_bytes = std::max(weight_row_bytes * static_cast<uint64_t>(table_->rows_per_group), kInterleavedBytes);
  }
  for (Scratch& s : scratch_) {
    s.panels_key = 0;
    if (n_x > 1 && s.panels.size() < static_cast<uint64_t>(n_x) * row_bytes) {
      s.panels.resize(static_cast<uint64_t>(n_x) * row_bytes);
    }
    if (s.groups.size() < groups_bytes) s.groups.resize(groups_bytes);
  }
}

void Arithmetic::Multiply(int thread_idx, const ExpertTensor& tensor, bool packed, const edgemoe_product& product) {
  if (tensor.own) {
    MultiplyOwn(&scratch_[static_cast<size_t>(thread_idx)], FormatOf(tensor), packed, product);
  } else {
    engine_.multiply(engine_.context, thread_idx, &product);
  }
}

void Arithmetic::MultiplyOwn(Scratch* scratch, simd::Format format, bool packed, const edgemoe_product& p) const {
  const simd::Activation kind = simd::Info(format).activation;
  const int64_t row_bytes = simd::PanelBytes(kind, p.n_cols, 1);
  const char* x = static_cast<const char*>(p.x[0]);
  if (p.n_x > 1) {
    if (scratch->panels_key != p.x_key) {
      for (int32_t i = 0; i < p.n_x;) {
        const int n_rows = 1 << simd::NextTile(p.n_x - i);
        simd::PackPanel(kind, p.n_cols, n_rows, p.x + i, scratch->panels.data() + i * row_bytes);
        i += n_rows;
      }
      scratch->panels_key = p.x_key;
    }
    x = scratch->panels.data();
  }
  const int rows_per_group = table_->rows_per_group;
  const int64_t n_groups = p.n_rows / rows_per_group;
  const uint64_t group_bytes = p.row_bytes * static_cast<uint64_t>(rows_per_group);
  const bool interleave = !packed && p.n_x > 1;  // one row has a function of its own
  // One panel: all groups in one call. Several: panels times as many rows as L2 keeps for the next panel.
  int64_t n_step = n_groups;
  if (1 << simd::NextTile(p.n_x) != p.n_x) n_step = std::max<int64_t>(1, kPanelRows / rows_per_group);
  if (interleave) {
    n_step = std::clamp<int64_t>(static_cast<int64_t>(kInterleavedBytes / group_bytes), 1,
                                 std::max<int64_t>(1, kPanelRows / rows_per_group));
  }
  const auto multiply = [&](const KernelTable& table, const uint8_t* weights, int64_t first_row, int64_t n) {
    for (int32_t i = 0; i < p.n_x;) {
      const int tile = simd::NextTile(p.n_x - i);
      float* y[simd::kMaxTile];
      for (int t = 0; t < 1 << tile; ++t) y[t] = p.y[i + t] + first_row;
      const simd::MultiplyFunction f = packed || p.n_x > 1 ? table.multiply[format][tile] : table.multiply_rows[format];
      f({weights, n, p.n_cols, x + i * row_bytes, y});
      i += 1 << tile;
    }
  };
  const auto* const rows = static_cast<const uint8_t*>(p.weights);
  for (int64_t g = 0; g < n_groups; g += n_step) {
    const int64_t n = std::min(n_step, n_groups - g);
    const uint8_t* weights = rows + static_cast<uint64_t>(g) * group_bytes;
    if (interleave) {
      auto* const groups = reinterpret_cast<uint8_t*>(scratch->groups.data());
      table_->interleave[format](weights, n, p.n_cols, groups);
      weights = groups;
    }
    multiply(*table_, weights, g * rows_per_group, n);
  }
  // Rows beyond the last whole group lie as in the file, and the portable table takes them so.
  const int64_t n_tail = p.n_rows - n_groups * rows_per_group;
  if (n_tail > 0) {
    multiply(simd::Portable(), rows + static_cast<uint64_t>(n_groups) * group_bytes, n_groups * rows_per_group, n_tail);
  }
}

}  // namespace edgemoe
