// SPDX-License-Identifier: MIT
#include "core/arithmetic.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/io.h"
#include "simd/panels.h"

namespace edgemoe {
namespace {

using simd::KernelTable;

const char* IsaAskedFor() {
  const char* isa = std::getenv("EDGEMOE_ISA");
  return isa != nullptr && *isa != '\0' ? isa : nullptr;
}

// What several activation rows interleave at a time of weights that are not packed, and at least a group: rows of 2048
// columns are 256 of 4 bits or 132 of 8, and are multiplied out of L2.
constexpr uint64_t kInterleavedBytes = 288 * 1024;
constexpr uint64_t kLineBytes = 64;
constexpr uint64_t kHugePageBytes = uint64_t{2} << 20;

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

// Panels of 64 rows in huge pages are multiplied 1.08 to 1.14 times as fast as in pages of 4 KiB (AVX-512 on Zen 5).
void Arithmetic::Scratch::Reserve(uint64_t n_bytes) {
  if (n_bytes <= capacity) return;
  capacity = 0;
  bytes.reset(static_cast<char*>(std::aligned_alloc(kHugePageBytes, RoundUp(n_bytes, kHugePageBytes))));
  if (bytes == nullptr) throw std::bad_alloc();
  capacity = RoundUp(n_bytes, kHugePageBytes);
#if defined(MADV_HUGEPAGE)
  ::madvise(bytes.get(), capacity, MADV_HUGEPAGE);
#endif
}

void Arithmetic::Prepare(int n_threads, int64_t n_x, uint64_t row_bytes, uint64_t weight_row_bytes) {
  if (scratch_.size() < static_cast<size_t>(n_threads)) scratch_.resize(static_cast<size_t>(n_threads));
  for (Scratch& s : scratch_) s.panels_key = 0;
  if (n_x == 1 || weight_row_bytes == 0) return;
  groups_bytes_ = std::max(weight_row_bytes * static_cast<uint64_t>(table_->rows_per_group), kInterleavedBytes);
  groups_bytes_ = RoundUp(groups_bytes_, kLineBytes);
  for (Scratch& s : scratch_) s.Reserve(groups_bytes_ + static_cast<uint64_t>(n_x) * row_bytes);
}

void Arithmetic::Multiply(int thread_idx, const ExpertTensor& tensor, bool packed, const edgemoe_product& product) {
  if (tensor.own) {
    MultiplyOwn(&scratch_[static_cast<size_t>(thread_idx)], FormatOf(tensor), packed, product);
  } else {
    engine_.multiply(engine_.context, thread_idx, &product);
  }
}

void Arithmetic::MultiplyOwn(Scratch* scratch, simd::Format format, bool packed, const edgemoe_product& p) const {
  const void* x = p.x[0];
  if (p.n_x > 1) {
    char* const panels = scratch->bytes.get() + groups_bytes_;
    if (scratch->panels_key != p.x_key) {
      simd::PackPanels(simd::Info(format).activation, p.n_cols, p.n_x, p.x, panels);
      scratch->panels_key = p.x_key;
    }
    x = panels;
  }
  const auto* const rows = static_cast<const uint8_t*>(p.weights);
  const auto multiply = [&](const KernelTable& table, const uint8_t* weights, int64_t first_row, int64_t n_rows) {
    simd::MultiplyPanels(table, format, {weights, n_rows, p.n_cols, x, p.n_x, p.y, first_row});
  };
  const int64_t n_tail = p.n_rows % table_->rows_per_group, n_whole = p.n_rows - n_tail;
  if (packed) {
    multiply(*table_, rows, 0, n_whole);
  } else if (p.n_x == 1) {
    table_->multiply_rows[format]({rows, n_whole / table_->rows_per_group, p.n_cols, x, p.y});
  } else {
    auto* const groups = reinterpret_cast<uint8_t*>(scratch->bytes.get());
    const uint64_t group_bytes = p.row_bytes * static_cast<uint64_t>(table_->rows_per_group);
    const int64_t n_step = static_cast<int64_t>(groups_bytes_ / group_bytes) * table_->rows_per_group;
    for (int64_t row = 0; row < n_whole; row += n_step) {
      const int64_t n = std::min(n_step, n_whole - row);
      table_->interleave[format](rows + static_cast<uint64_t>(row) * p.row_bytes, n / table_->rows_per_group, p.n_cols,
                                 groups);
      multiply(*table_, groups, row, n);
    }
  }
  // Rows beyond the last whole group lie as in the file, and the portable table takes them so.
  if (n_tail > 0) multiply(simd::Portable(), rows + static_cast<uint64_t>(n_whole) * p.row_bytes, n_whole, n_tail);
}

}  // namespace edgemoe
