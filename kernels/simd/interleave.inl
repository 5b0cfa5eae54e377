// SPDX-License-Identifier: MIT
// interleave.inl: rows of a file into packed groups (pack.h). Included by driver.inl, in the same anonymous namespace.
//
// *Idea.* 16 bytes of each row, four words, are transposed in registers: four vectors with one word of every row each.
// A word of codes is a unit and is stored as it is; a word of two 2-byte units, or of four bytes, is split into them on
// the way. Only what does not fill a word, a single scale of a block, is moved row by row.
//
// Rows of a group follow each other in memory, so while a group is in work the next one is prefetched, line by line.

// A format that comes in blocks.
template <class V, Format format>
struct Interleave {
  static constexpr FormatInfo kInfo = kInfos[format];
  // A block is a scale of kOdd bytes and kWords words, in this order or in the other one.
  static constexpr int kOdd = kInfo.block_bytes % 4;
  static constexpr int kWords = kInfo.block_bytes / 4;
  static constexpr bool kOddFirst = kInfo.fields[0].unit_bytes * kInfo.fields[0].n_units == kOdd;
  static constexpr int kFirstWord = kOddFirst ? kOdd : 0;
  static constexpr int kOddAt = kOddFirst ? 0 : kWords * 4;
  static_assert(kWords >= 4, "the last four words of a block are read at once");

  static constexpr int UnitBytes(int at) {
    int f = 0;
    for (int end = 0; (end += kInfo.fields[f].unit_bytes * kInfo.fields[f].n_units) <= at;) ++f;
    return kInfo.fields[f].unit_bytes;
  }

  static constexpr int kWindows = (kWords + 3) / 4;

  // ahead: kInfo.block_bytes * V::kLanes bytes to prefetch meanwhile, or null.
  static inline __attribute__((always_inline)) void Block(const uint8_t* rows, int64_t stride, const uint8_t* ahead,
                                                          uint8_t* out) {
    if constexpr (kOdd > 0) {
      for (int r = 0; r < V::kLanes; ++r) memcpy(out + kOddAt * V::kLanes + r * kOdd, rows + r * stride + kOddAt, kOdd);
    }
    For<kWindows>([&](auto i) __attribute__((always_inline)) {
      // The last four words may include some that the four before them have had.
      constexpr int word = 4 * i + 4 <= kWords ? 4 * i : kWords - 4;
      constexpr int at = kFirstWord + 4 * word;
      if constexpr (V::kPrefetchBytes > 0) {
        constexpr int kLines = (kInfo.block_bytes * V::kLanes + 63) / 64;
        if (ahead != nullptr) {
          for (int line = i * kLines / kWindows; line < (i + 1) * kLines / kWindows; ++line)
            V::Prefetch(ahead + line * 64);
        }
      }
      typename V::I words[4];
      V::Transpose(rows + at, stride, words);
      For<4>([&](auto k) __attribute__((always_inline)) {
        constexpr int unit_bytes = UnitBytes(at + 4 * k);
        if constexpr (word + k >= 4 * i) {
          V::Store(out + (at + 4 * k) * V::kLanes, V::template Split<unit_bytes>(words[k]));
        }
      });
    });
  }

  static void Groups(const uint8_t* rows, int64_t n_groups, int64_t n_cols, uint8_t* out) {
    constexpr int kBlock = kInfo.block_bytes * V::kLanes;
    const int64_t n_blocks = n_cols / kInfo.block_cols, stride = n_blocks * kInfo.block_bytes;
    for (int64_t g = 0; g < n_groups; ++g, rows += V::kLanes * stride) {
      const uint8_t* const next = rows + V::kLanes * stride;
      for (int64_t b = 0; b < n_blocks; ++b, out += kBlock) {
        Block(rows + b * kInfo.block_bytes, stride, next + b * kBlock, out);
      }
    }
  }
};

// F16 and BF16, kLineCols columns: 64 bytes of each row. Rows are often whole pages, so that equal columns of all rows
// fall into one set of the first-level cache: they are copied out of it first.
constexpr int kLineCols = 32;
template <class V>
static inline __attribute__((always_inline)) void InterleaveLine(const uint8_t* rows, int64_t stride, uint8_t* out) {
  constexpr int kStride = 64 + 16, kVector = 4 * V::kLanes;
  alignas(64) uint8_t lines[V::kLanes * kStride];
  for (int r = 0; r < V::kLanes; ++r) {
    for (int i = 0; i < 64; i += kVector) V::Store(lines + r * kStride + i, V::Load(rows + r * stride + i));
  }
  for (int i = 0; i < 64; i += 16) {
    typename V::I words[4];
    V::Transpose(lines + i, kStride, words);
    for (int k = 0; k < 4; ++k, out += kVector) V::Store(out, V::template Split<2>(words[k]));
  }
}

template <class V>
static void InterleaveHalves(const uint8_t* rows, int64_t n_groups, int64_t n_cols, uint8_t* out) {
  constexpr int kBytes = kLineCols * 2;
  const int64_t stride = n_cols * 2;
  for (int64_t g = 0; g < n_groups; ++g, rows += V::kLanes * stride) {
    const uint8_t* const next = rows + V::kLanes * stride;
    for (int64_t at = 0; at < stride; at += kBytes, out += kBytes * V::kLanes) {
      if constexpr (V::kPrefetchBytes > 0) {
        for (int r = 0; r < V::kLanes; ++r) V::Prefetch(next + at * V::kLanes + r * 64);
      }
      InterleaveLine<V>(rows + at, stride, out);
    }
  }
}
