// SPDX-License-Identifier: MIT
#include "simd/panels.h"

#include <algorithm>

#include "simd/pack.h"

namespace edgemoe::simd {
namespace {

// A block of matrix rows is multiplied with every panel, and the next block fetched from memory meanwhile. 64 rows of
// 2048 columns are 72 KiB of 4 bits and 136 KiB of 8: two of them, and the panels, stay in the 1 MiB of L2 that is
// usual. With 128 rows more is fetched late at the beginning, with 32 a call is too short.
constexpr int64_t kBlockRows = 64;
// More activation rows than these, 344 KiB of panels for 2048 columns, are multiplied one part after the other.
constexpr int32_t kPartRows = 128;
// Of the first block, what nobody has fetched is fetched on the way, except for these groups, which a call begins with.
constexpr int64_t kFirstGroups = 2;

// Weights in the order of memory, of which the first `fetched` bytes are in the caches or on their way.
struct Stream {
  const uint8_t* begin;
  int64_t n_bytes;
  int64_t fetched;
};

// The call should fetch what lies before `target`.
void FetchUntil(int64_t target, Stream& stream, GroupProduct& call) {
  const int64_t end = std::min(target, stream.n_bytes);
  if (end <= stream.fetched) return;
  call.next = stream.begin + stream.fetched;
  call.n_next_bytes = end - stream.fetched;
  stream.fetched = end;
}

void MultiplyPart(const KernelTable& table, Format format, const PanelsProduct& p) {
  const int64_t panel_bytes = PanelBytes(Info(format).activation, p.n_cols, 1);
  const int64_t group_bytes = RowBytes(format, p.n_cols) * table.rows_per_group;
  const int64_t n_groups = p.n_rows / table.rows_per_group;
  // A panel of less than kMaxTile rows fetches its own weights, and alone it takes all groups in one call: in blocks
  // that fetch the next one, 2 rows were 0.85 times as fast.
  const bool is_one_call = p.n_x < kMaxTile && 1 << NextTile(p.n_x) == p.n_x;
  const int64_t n_step = is_one_call ? n_groups : kBlockRows / table.rows_per_group;
  const int64_t step_bytes = n_step * group_bytes;
  Stream stream = {p.weights, n_groups * group_bytes, kFirstGroups * group_bytes};
  for (int64_t g = 0; g < n_groups; g += n_step) {
    for (int32_t i = 0; i < p.n_x;) {
      const int tile = NextTile(p.n_x - i);
      float* y[kMaxTile];
      for (int t = 0; t < 1 << tile; ++t) y[t] = p.y[i + t] + p.first_y + g * table.rows_per_group;
      GroupProduct call = {p.weights + g * group_bytes, std::min(n_step, n_groups - g), p.n_cols,
                           static_cast<const char*>(p.panels) + i * panel_bytes, y};
      i += 1 << tile;
      FetchUntil((g + n_step) * group_bytes + step_bytes * i / p.n_x, stream, call);
      table.multiply[format][tile](call);
    }
  }
}

}  // namespace

void PackPanels(Activation activation, int64_t n_cols, int32_t n_x, const void* const* x, void* out) {
  const int64_t row_bytes = PanelBytes(activation, n_cols, 1);
  for (int32_t i = 0; i < n_x;) {
    const int n_rows = 1 << NextTile(n_x - i);
    PackPanel(activation, n_cols, n_rows, x + i, static_cast<char*>(out) + i * row_bytes);
    i += n_rows;
  }
}

void MultiplyPanels(const KernelTable& table, Format format, const PanelsProduct& product) {
  static_assert(kPartRows % kMaxTile == 0, "parts end where panels do");
  const int64_t panel_bytes = PanelBytes(Info(format).activation, product.n_cols, 1);
  for (int32_t i = 0; i < product.n_x; i += kPartRows) {
    PanelsProduct part = product;
    part.panels = static_cast<const char*>(product.panels) + i * panel_bytes;
    part.n_x = std::min(kPartRows, product.n_x - i);
    part.y = product.y + i;
    MultiplyPart(table, format, part);
  }
}

}  // namespace edgemoe::simd
