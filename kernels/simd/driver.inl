// SPDX-License-Identifier: MIT
// driver.inl: loops over groups and blocks, quantization of activations, and the KernelTable of a traits class V.
// Included after formats.inl and pointwise.inl, in the same anonymous namespace.
#include "simd/interleave.inl"
#include "simd/products.inl"
#include "simd/qmoe.inl"

// A panel's sums are prepared for this many columns at a time: what a kernel keeps on its stack is bounded, 4 KiB, for
// any n_cols. Between strips the sums of a row wait in y, where they lose nothing.
constexpr int kStripCols = 4096;

// sums: int32 [n_cols / 16][T] and d: [n_cols / 32][T] of a panel -> out, as kind says. |sum| of 32 q is at most 4064.
template <SumsKind kind, int kBias, int T>
static void PrepareSums(const int32_t* sums, const float* d, int64_t n_cols, int32_t* out) {
  if constexpr (kind == kPairs32) {
    for (int64_t i = 0; i < n_cols / 64; ++i, sums += 4 * T) {
      for (int t = 0; t < T; ++t) {
        const uint32_t a = static_cast<uint32_t>(sums[t] + sums[T + t]);
        const uint32_t b = static_cast<uint32_t>(sums[2 * T + t] + sums[3 * T + t]);
        out[i * T + t] = static_cast<int32_t>((a & 0xffff) | b << 16);
      }
    }
  } else if constexpr (kind != kNoSums) {
    for (int64_t i = 0; i < n_cols / 32; ++i, sums += 2 * T) {
      for (int t = 0; t < T; ++t) {
        const int32_t a = sums[t], b = sums[T + t];
        if constexpr (kind == kBiasSums) {
          out[i * T + t] = (a + b) * -kBias;
        } else if constexpr (kind == kFloatSums) {
          const float f = d[i * T + t] * static_cast<float>(a + b);
          memcpy(out + i * T + t, &f, sizeof(f));
        } else {
          const uint32_t pair = (static_cast<uint32_t>(a) & 0xffff) | static_cast<uint32_t>(b) << 16;
          out[i * T + t] = static_cast<int32_t>(pair);
        }
      }
    }
  }
}

template <class Product, int T>
static inline __attribute__((always_inline)) void ToNextBlock(BlockActs& acts) {
  constexpr int kSumCols = Product::kSums == kPairs32 ? 64 : 32;
  acts.q += Product::kCols * T;
  acts.d += T;
  if constexpr (Product::kSums != kNoSums) acts.sums += Product::kCols / kSumCols * T;
}

// n_blocks blocks of G groups, of which the first has its rows at y0 of the T results; acts: of the first block.
// n_groups is G, or 1: then it takes the place of the others too, at G times the time, which spares as many functions
// again for what a number of groups not divisible by G leaves over.
template <class V, class Product, int G, int T>
static inline __attribute__((always_inline)) void MultiplyStrip(const uint8_t* weights, int64_t group_bytes,
                                                                int64_t n_groups, int64_t n_blocks, BlockActs acts,
                                                                bool is_first, float* const* y, int64_t y0,
                                                                Ahead& ahead) {
  constexpr int kBlock = Product::kBlockBytes * V::kLanes;
  typename V::F acc[G][T];
  const uint8_t* w[G];
  int64_t row[G];
  For<G>([&](auto g) __attribute__((always_inline)) {
    w[g] = weights + (g < n_groups ? g * group_bytes : 0);
    row[g] = y0 + (g < n_groups ? g * V::kLanes : 0);
    For<T>([&](auto t) __attribute__((always_inline)) {
      // The results of a panel lie in as many pages, and none of them is in a cache: fetched now, the stores at the end
      // need not wait for each of them.
      if constexpr (T > 1 && V::kPrefetchBytes > 0) V::Prefetch(y[t] + row[g]);
      acc[g][t] = is_first ? V::ZeroF() : V::LoadF(y[t] + row[g]);
    });
  });
  for (int64_t b = 0; b < n_blocks; ++b) {
    const uint8_t* soon[G];
    for (int g = 0; g < G; ++g) soon[g] = w[g] + V::kPrefetchBytes;
    Product::template Multiply<G, T>(w, soon, acts, acc, ahead);
    For<G>([&](auto g) __attribute__((always_inline)) { w[g] += kBlock; });
    ToNextBlock<Product, T>(acts);
  }
  For<G>([&](auto g) __attribute__((always_inline)) {
    For<T>([&](auto t) __attribute__((always_inline)) { V::StoreF(y[t] + row[g], acc[g][t]); });
  });
}

// f(first block, number of blocks, activations of the first) for each strip of the columns.
template <class Product, int T, class Function>
static inline __attribute__((always_inline)) void ForStrips(const GroupProduct& p, const Function& f) {
  const int8_t* const q = static_cast<const int8_t*>(p.panel);
  const float* const d = reinterpret_cast<const float*>(q + p.n_cols * T);
  const int32_t* const sums = reinterpret_cast<const int32_t*>(d + p.n_cols / Product::kCols * T);
  for (int64_t col = 0; col < p.n_cols; col += kStripCols) {
    const int64_t n_cols = p.n_cols - col < kStripCols ? p.n_cols - col : kStripCols;
    const int64_t block = col / Product::kCols;
    alignas(64) int32_t prepared[Product::kSums == kNoSums ? 1 : kStripCols / 32 * T];
    PrepareSums<Product::kSums, Product::kBias, T>(sums + col / 16 * T, d + block * T, n_cols, prepared);
    f(block, n_cols / Product::kCols, BlockActs{q + col * T, d + block * T, prepared});
  }
}

template <class V, class Product, int T>
static void MultiplyIntegers(const GroupProduct& p) {
  constexpr int G = V::template kTileGroups<T>;
  constexpr int kBlock = Product::kBlockBytes * V::kLanes;
  const int64_t group_bytes = p.n_cols / Product::kCols * kBlock;
  const int64_t n_turns = (p.n_groups + G - 1) / G * (p.n_cols / Product::kCols) * Product::template kTurns<T>;
  Ahead ahead = {p.next, p.next + p.n_next_bytes, (p.n_next_bytes + 64 * n_turns - 1) / (64 * n_turns) * 64};
  ForStrips<Product, T>(p, [&](int64_t block, int64_t n_blocks, const BlockActs& acts) __attribute__((always_inline)) {
    const uint8_t* const w = p.weights + block * kBlock;
    for (int64_t g = 0; g < p.n_groups;) {
      const int64_t n_groups = g + G <= p.n_groups ? G : 1;
      MultiplyStrip<V, Product, G, T>(w + g * group_bytes, group_bytes, n_groups, n_blocks, acts, block == 0, p.y,
                                      g * V::kLanes, ahead);
      g += n_groups;
    }
  });
}

// Groups whose rows lie as in a file, times one row of activations: block by block they are interleaved into a buffer
// that stays in the first-level cache.
template <class V, class Product, Format format>
static void MultiplyRows(const GroupProduct& p) {
  constexpr int kBlock = Product::kBlockBytes * V::kLanes;
  const int64_t stride = p.n_cols / Product::kCols * Product::kBlockBytes;
  Ahead ahead = {};
  ForStrips<Product, 1>(p, [&](int64_t first, int64_t n_blocks, const BlockActs& strip) __attribute__((always_inline)) {
    for (int64_t g = 0; g < p.n_groups; ++g) {
      const uint8_t* const rows = p.weights + g * V::kLanes * stride;
      const uint8_t* const next = rows + V::kLanes * stride;
      BlockActs acts = strip;
      float* const y = p.y[0] + g * V::kLanes;
      typename V::F acc[1][1] = {{first == 0 ? V::ZeroF() : V::LoadF(y)}};
      for (int64_t b = first; b < first + n_blocks; ++b) {
        alignas(64) uint8_t block[kBlock];
        Interleave<V, format>::Block(rows + b * Product::kBlockBytes, stride, nullptr, block);
        const uint8_t* const w[1] = {block};
        const uint8_t* const soon[1] = {next + b * kBlock};
        Product::template Multiply<1, 1>(w, soon, acts, acc, ahead);
        ToNextBlock<Product, 1>(acts);
      }
      V::StoreF(y, acc[0][0]);
    }
  });
}

template <class V, template <class> class Format, int T>
static void MultiplyFloatFormat(const GroupProduct& p) {
  constexpr int kTokens = T < V::kFloatTokens ? T : V::kFloatTokens;
  constexpr int G = T == 1 ? 1 : V::kFloatGroups;
  const int64_t group_bytes = p.n_cols * 2 * V::kLanes;
  for (int64_t g = 0; g < p.n_groups;) {
    const int64_t n_groups = g + G <= p.n_groups ? G : 1;
    const uint8_t* w[G];
    for (int i = 0; i < G; ++i) w[i] = p.weights + (i < n_groups ? g + i : g) * group_bytes;
    for (int t0 = 0; t0 < T; t0 += kTokens) {
      FloatSums<V, G, kTokens> sums;
      AddFloats<V, Format, T>(w, w[0] + V::kPrefetchBytes, p.n_cols, static_cast<const float*>(p.panel), t0, &sums);
      For<G>([&](auto i) __attribute__((always_inline)) {
        if (i >= n_groups) return;
        For<kTokens>([&](auto t) __attribute__((always_inline)) {
          V::StoreF(p.y[t0 + t] + (g + i) * V::kLanes, sums.Total(i, t));
        });
      });
    }
    g += n_groups;
  }
}

template <class V, template <class> class Format>
static void MultiplyFloatRows(const GroupProduct& p) {
  const int64_t stride = p.n_cols * 2;
  for (int64_t g = 0; g < p.n_groups; ++g) {
    const uint8_t* const rows = p.weights + g * V::kLanes * stride;
    const uint8_t* const next = rows + V::kLanes * stride;
    FloatSums<V, 1, 1> sums;
    for (int64_t col = 0; col < p.n_cols; col += kLineCols) {
      alignas(64) uint8_t line[kLineCols * 2 * V::kLanes];
      InterleaveLine<V>(rows + col * 2, stride, line);
      const uint8_t* const w[1] = {line};
      AddFloats<V, Format, 1>(w, next + col * 2 * V::kLanes, kLineCols, static_cast<const float*>(p.panel) + col, 0,
                              &sums);
    }
    V::StoreF(p.y[0] + g * V::kLanes, sums.Total(Int<0>{}, Int<0>{}));
  }
}

template <class V, Format format, class Product, class ProductOfOne = Product, class ProductOfMost = Product>
static constexpr void SetIntegers(KernelTable* table) {
  table->interleave[format] = Interleave<V, format>::Groups;
  table->multiply_rows[format] = MultiplyRows<V, ProductOfOne, format>;
  MultiplyFunction(&f)[kTileCount] = table->multiply[format];
  f[0] = MultiplyIntegers<V, ProductOfOne, 1>;
  f[1] = MultiplyIntegers<V, Product, 2>;
  f[2] = MultiplyIntegers<V, Product, 4>;
  f[3] = MultiplyIntegers<V, ProductOfMost, 8>;
  static_assert(kTileCount == 4, "a function for each tile");
}

template <class V, Format format, template <class> class FloatFormat>
static constexpr void SetFloats(KernelTable* table) {
  table->interleave[format] = InterleaveHalves<V>;
  table->multiply_rows[format] = MultiplyFloatRows<V, FloatFormat>;
  MultiplyFunction(&f)[kTileCount] = table->multiply[format];
  f[0] = MultiplyFloatFormat<V, FloatFormat, 1>;
  f[1] = MultiplyFloatFormat<V, FloatFormat, 2>;
  f[2] = MultiplyFloatFormat<V, FloatFormat, 4>;
  f[3] = MultiplyFloatFormat<V, FloatFormat, 8>;
}

template <class V>
static constexpr KernelTable MakeTable(const char* isa) {
  KernelTable table = {};
  table.isa = isa;
  table.rows_per_group = V::kLanes;
  table.quantize[kFloat] = CopyFloats;
  table.quantize[kInt8x32] = Quantize<V, 32>;
  table.quantize[kInt8x256] = Quantize<V, 256>;
  SetFloats<V, kF16, FormatF16>(&table);
  SetFloats<V, kBF16, FormatBF16>(&table);
  SetIntegers<V, kQ4_0, Product32<V, FormatQ4_0>>(&table);
  SetIntegers<V, kQ4_1, Product32<V, FormatQ4_1>>(&table);
  SetIntegers<V, kQ8_0, Product32<V, FormatQ8_0>>(&table);
  SetIntegers<V, kIQ4_NL, Product32<V, FormatIQ4_NL>>(&table);
  using ProductMXFP4 = Product32<V, FormatMXFP4>;
  if constexpr (V::kHasScaleF) {
    SetIntegers<V, kMXFP4, ProductMXFP4, ProductMXFP4, Product32<V, FormatMXFP4ByExponent>>(&table);
  } else {
    SetIntegers<V, kMXFP4, ProductMXFP4>(&table);
  }
  SetIntegers<V, kQ2_K, Product256<V, FormatQ2_K>>(&table);
  SetIntegers<V, kQ3_K, Product256<V, FormatQ3_K>>(&table);
  SetIntegers<V, kQ4_K, Product256<V, FormatQ4_K>>(&table);
  SetIntegers<V, kQ5_K, Product256<V, FormatQ5_K>, Product256<V, FormatQ5_KLooped>>(&table);
  SetIntegers<V, kQ6_K, Product256<V, FormatQ6_K>>(&table);
  SetIntegers<V, kIQ4_XS, Product256<V, FormatIQ4_XS>>(&table);
  table.glu = Glu<V>;
  table.combine = Combine<V>;
  table.qmoe = Qmoe<V>;
  return table;
}
