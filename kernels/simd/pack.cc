// SPDX-License-Identifier: MIT
#include "simd/pack.h"

#include <string.h>

namespace edgemoe::simd {
namespace {

// A panel's parts, codes by four, scales and sums, are all of 4-byte units, and each part of a panel of T is T times as
// long: so the whole of it is one interleaving.
template <int T>
void InterleaveWords(const void* const* rows, size_t n_words, uint8_t* out) {
  const uint8_t* from[T];
  for (int t = 0; t < T; ++t) from[t] = static_cast<const uint8_t*>(rows[t]);
  for (size_t w = 0; w < n_words; ++w) {
    for (int t = 0; t < T; ++t) memcpy(out + (w * T + t) * 4, from[t] + w * 4, 4);
  }
}

}  // namespace

const FormatInfo& Info(Format format) { return kInfos[format]; }

void PackPanel(Activation activation, int64_t n_cols, int T, const void* const* rows, void* out) {
  const size_t row_bytes = static_cast<size_t>(PanelBytes(activation, n_cols, 1));
  uint8_t* to = static_cast<uint8_t*>(out);
  switch (T) {
    case 1:
      memcpy(to, rows[0], row_bytes);
      break;
    case 2:
      InterleaveWords<2>(rows, row_bytes / 4, to);
      break;
    case 4:
      InterleaveWords<4>(rows, row_bytes / 4, to);
      break;
    case 8:
      InterleaveWords<8>(rows, row_bytes / 4, to);
      break;
    default:  // see kMaxTile
      __builtin_unreachable();
  }
}

}  // namespace edgemoe::simd
