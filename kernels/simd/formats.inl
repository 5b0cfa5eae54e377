// SPDX-License-Identifier: MIT
// formats.inl: codes and scales of each format, written once for all vector instruction sets; what traits those need.
// Then come, in this order, the traits, pointwise.inl, and driver.inl, which includes interleave.inl and products.inl.
// The one file of an instruction set includes them into its anonymous namespace: code for a newer CPU must not be
// linked into code for all CPUs.
//
// *Idea.* A vector has one 32-bit lane per matrix row. A packed group (pack.h) has the same 4-byte unit of all rows
// next to each other, so one load yields, per row, codes of 4 consecutive columns; one Dot with the 4 activation bytes
// of those columns, the same in every lane, advances all rows by 4 columns. There is no sum across lanes. A step is 4
// columns; a tile is G groups times TT tokens, whose accumulators stay in registers: a loaded activation is used for G
// groups and an unpacked code for TT tokens. Codes are biased to be unsigned where Dot wants that, and the panel's sums
// take the bias out again.
//
// *Traits.* V has types I (32-bit integer lanes), F (float lanes), Acts<TT> (bytes of one step of TT tokens), constants
//   kLanes              rows per group: 16 for AVX-512, 8 for AVX2, 4 for NEON
//   kMaxCode            Dot takes unsigned codes up to this
//   kPrefersSigned      formats whose codes come out of a table or a byte use kSigned, not a bias
//   kTileTokens<T>, kTileGroups<T>   TT, and G, for a panel of T; TT divides T
//   kFloatTokens, kFloatGroups       the same for F16 and BF16, whose accumulators are four times as many
//   kLooksUpAgain       codes out of a table are unpacked for each TT tokens anew, not kept
//   kTileSubs<T>        how many sub-blocks, of those of a 256-column format that share bytes, to sum at a time
//   kPrefetchBytes      how far ahead of the loads to prefetch, or 0
//   kHasScaleF          there is a ScaleF, which does not take the place of a Dot
//   kSteps<kMax>        Dots with codes up to kMax (kSigned: of any int8) that a partial sum takes; at least 2
//   kIsWide<kMax>       a partial sum has plain int32 lanes, and kSteps is at least 8
// and static functions (N: a template argument; p: a pointer of any alignment)
//   Load(p) [4 bytes per lane], LoadU16, LoadU8, LoadS8(p) [widened to 32 bits], LoadF16, LoadBF16(p) [widened to F]
//   Store(p, I)         4 bytes per lane
//   Transpose(p, stride, words[4])  words[k] lane r: bytes 4 k .. 4 k + 3 of the 16 at p + r * stride
//   Split<B>(I)         of the B-byte units (1, 2, 4) of each lane: the first of all lanes, then the second, ..
//   LoadActs<TT>(p)     4 bytes of each of TT tokens, next to each other
//   Get(acts, Int<t>)   of one token, as whatever Dot takes; Splat(p): one int32 in all lanes; SplatF(p): one float
//   Set(i), SetF(f), Zero(), ZeroF(); Low(v) = v & 0x0f0f0f0f
//   Pair(a, b)          per lane the low 16 bits of a, above them those of b
//   OrAnd(a, b, c)      a | (b & c)
//   And, Or, Xor, Add, Sub, MaxI(a, b); Shr<N> (zeros come in), Shl<N>; int32 lanes
//   Table(p), Lookup(table, v): bytes of a table of 16 by bytes of v, all < 16
//   Held<kMax>(codes)   the same, in a register
//   Dot<kMax>(partial, codes, get)             partial + codes * 4 activation bytes
//   FoldScaled<kMax>(sum, partial, scale)      sum + scale * partial; scale = Scale<kMax>(int32 lanes of +-128 or less)
//   Fold<kMax>(sum, partial)                   sum + partial
//   DotPairs(sum, pairs, get)                  sum + product of two int16 each
//   ScaleF(x, e)        x * 2^e, rounded once, with kHasScaleF
//   AddF, SubF, MulF, DivF(a, b); FmaF(a, b, c): a * b + c, rounded once; AsFloat(I), AsInt(F): the same bits
//   ToFloat(I); ToInt(F), RoundF(F): to nearest even
//   MaxF, MinF(a, b): a is no NaN, and one in b is kept; LoadF(p), StoreF(p, F), StoreI8(p, I): low bytes
//   ReduceAdd(I), ReduceMax(I): an int32; Prefetch(p)
// For every result a single right answer exists, so nothing else about a trait can be seen.

template <int N>
struct Int {
  constexpr operator int() const { return N; }
};

// f(Int<i>), f(Int<i + 1>), .. f(Int<N - 1>).
template <int i, int N, class Function>
static inline __attribute__((always_inline)) void ForFrom(const Function& f) {
  if constexpr (N - i >= 8) {
    f(Int<i>{}), f(Int<i + 1>{}), f(Int<i + 2>{}), f(Int<i + 3>{});
    f(Int<i + 4>{}), f(Int<i + 5>{}), f(Int<i + 6>{}), f(Int<i + 7>{});
    ForFrom<i + 8, N>(f);
  } else if constexpr (N - i >= 2) {
    f(Int<i>{}), f(Int<i + 1>{});
    ForFrom<i + 2, N>(f);
  } else if constexpr (N - i == 1) {
    f(Int<i>{});
  }
}
// f(Int<0>), .. f(Int<N - 1>). Unlike a loop it leaves nothing for the optimizer to unroll before arrays indexed inside
// can become registers.
template <int N, class Function>
static inline __attribute__((always_inline)) void For(const Function& f) {
  ForFrom<0, N>(f);
}

constexpr int kSigned = -1;  // in place of the largest code: int8

// What a strip of the panel's sums is turned into, once for all groups; see PrepareSums.
enum SumsKind {
  kNoSums,
  kBiasSums,   // per 32 columns: -kBias * sum, where an accumulator starts
  kFloatSums,  // per 32 columns: float d * sum
  kPairs16,    // per 32 columns: int16 sums of the first and the last 16
  kPairs32,    // per 64 columns: int16 sums of the first and the last 32
};

struct ByteTable {
  uint8_t v[16];
};
static constexpr ByteTable Biased(const int8_t (&values)[16], int bias) {
  ByteTable t = {};
  for (int i = 0; i < 16; ++i) t.v[i] = static_cast<uint8_t>(values[i] + bias);
  return t;
}

// Codes of step s of 32 columns in nibbles.
template <class V, int s>
static inline __attribute__((always_inline)) typename V::I Nibbles(const uint8_t* qs) {
  const typename V::I v = V::Load(qs + s % 4 * 4 * V::kLanes);
  if constexpr (s < 4) {
    return V::Low(v);
  } else {
    return V::Low(V::template Shr<4>(v));
  }
}

// Zeros come in; n < 32 need not be a constant.
template <class V>
static inline __attribute__((always_inline)) typename V::I ShrBy(typename V::I v, size_t n) {
  typedef uint32_t Lanes __attribute__((vector_size(V::kLanes * 4)));
  return (typename V::I)((Lanes)v >> static_cast<uint32_t>(n));
}

// ---- Formats of 32 columns: a scale, and codes by step. kMax, kBias: the codes are in 0 .. kMax, and kBias too large.
// kHasTable: they come out of one.

template <class V>
struct FormatQ4_0 {
  using Block = BlockQ4_0;
  static constexpr bool kHasTable = false;
  static constexpr int kMax = 15, kBias = 8;
  static constexpr SumsKind kSums = kBiasSums;
  static typename V::F Scale(const uint8_t* w) { return V::LoadF16(w + offsetof(Block, d) * V::kLanes); }
  static typename V::F Times(typename V::F scale, typename V::F d) { return V::MulF(scale, d); }
  template <int s>
  static typename V::I Codes(const uint8_t* w) {
    return Nibbles<V, s>(w + offsetof(Block, qs) * V::kLanes);
  }
};

template <class V>
struct FormatQ4_1 {
  using Block = BlockQ4_1;
  static constexpr bool kHasTable = false;
  static constexpr int kMax = 15, kBias = 0;
  static constexpr SumsKind kSums = kFloatSums;
  static typename V::F Scale(const uint8_t* w) { return V::LoadF16(w + offsetof(Block, d) * V::kLanes); }
  static typename V::F Min(const uint8_t* w) { return V::LoadF16(w + offsetof(Block, m) * V::kLanes); }
  static typename V::F Times(typename V::F scale, typename V::F d) { return V::MulF(scale, d); }
  template <int s>
  static typename V::I Codes(const uint8_t* w) {
    return Nibbles<V, s>(w + offsetof(Block, qs) * V::kLanes);
  }
};

template <class V>
struct FormatQ8_0 {
  using Block = BlockQ8_0;
  static constexpr bool kHasTable = false;
  static constexpr bool kIsSigned = V::kPrefersSigned || V::kMaxCode < 255;
  static constexpr int kMax = kIsSigned ? kSigned : 255, kBias = kIsSigned ? 0 : 128;
  static constexpr SumsKind kSums = kIsSigned ? kNoSums : kBiasSums;
  static typename V::F Scale(const uint8_t* w) { return V::LoadF16(w + offsetof(Block, d) * V::kLanes); }
  static typename V::F Times(typename V::F scale, typename V::F d) { return V::MulF(scale, d); }
  template <int s>
  static typename V::I Codes(const uint8_t* w) {
    const typename V::I v = V::Load(w + (offsetof(Block, qs) + s * 4) * V::kLanes);
    if constexpr (kIsSigned) {
      return v;
    } else {
      return V::Xor(v, V::Set(-0x7f7f7f80));  // 0x80808080
    }
  }
};

template <class V>
struct FormatIQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr bool kHasTable = true;
  static constexpr bool kIsSigned = V::kPrefersSigned || V::kMaxCode < 255;
  static constexpr int kMax = kIsSigned ? kSigned : 255, kBias = kIsSigned ? 0 : 128;
  static constexpr SumsKind kSums = kIsSigned ? kNoSums : kBiasSums;
  static constexpr ByteTable kTable = Biased(kValuesIQ4NL, kBias);
  static typename V::F Scale(const uint8_t* w) { return V::LoadF16(w + offsetof(Block, d) * V::kLanes); }
  static typename V::F Times(typename V::F scale, typename V::F d) { return V::MulF(scale, d); }
  template <int s>
  static typename V::I Codes(const uint8_t* w) {
    return V::Lookup(V::Table(kTable.v), Nibbles<V, s>(w + offsetof(Block, qs) * V::kLanes));
  }
};

template <class V>
struct FormatMXFP4 {
  using Block = BlockMXFP4;
  static constexpr bool kHasTable = true;
  static constexpr int kMax = V::kPrefersSigned ? kSigned : 24, kBias = V::kPrefersSigned ? 0 : 12;
  static constexpr SumsKind kSums = V::kPrefersSigned ? kNoSums : kBiasSums;
  static constexpr ByteTable kTable = Biased(kValuesMXFP4, kBias);
  // MXFP4ScaleBits: (e - 1) << 23 is the larger one from e = 2 on, (e + 1) << 21 for e = 0 and 1.
  static typename V::F Scale(const uint8_t* w) {
    const typename V::I e = V::LoadU8(w + offsetof(Block, e) * V::kLanes), one = V::Set(1);
    return V::AsFloat(V::MaxI(V::template Shl<23>(V::Sub(e, one)), V::template Shl<21>(V::Add(e, one))));
  }
  static typename V::F Times(typename V::F scale, typename V::F d) { return V::MulF(scale, d); }
  template <int s>
  static typename V::I Codes(const uint8_t* w) {
    return V::Lookup(V::Table(kTable.v), Nibbles<V, s>(w + offsetof(Block, qs) * V::kLanes));
  }
};

// For the largest panels, where there is a ScaleF: Scale is the exponent of the power of two that it stands for, and a
// product with it, rounded once in either case, leaves the multipliers to the dot products: 1.03 to 1.04 times as fast
// at T = 8 (weights in L2), but a quarter slower at T = 4, for reasons unknown.
template <class V>
struct FormatMXFP4ByExponent : FormatMXFP4<V> {
  static typename V::F Scale(const uint8_t* w) {
    return V::ToFloat(V::Sub(V::LoadU8(w + offsetof(BlockMXFP4, e) * V::kLanes), V::Set(128)));
  }
  static typename V::F Times(typename V::F scale, typename V::F d) { return V::ScaleF(d, scale); }
};

// ---- Formats of 256 columns in kSubs sub-blocks. Sub-block Sub(c, h), h < kInner, has scale[Sub(c, h)] and, at step
// s, Codes<h>(w, c, s); c is a loop and h is unrolled. The sums times the pairs are what d's or dmin's part lacks:
// mins, or the scales, from which the bias 1 << kBiasBits is taken out.

// 6-bit scales and mins of Q4_K and Q5_K.
template <class V>
static inline __attribute__((always_inline)) void ScalesAndMins(const uint8_t* w, typename V::I* scale,
                                                                typename V::I* pair) {
  using I = typename V::I;
  const I low6 = V::Set(63), low4 = V::Set(15), high2 = V::Set(0x30);
  I min[8];
  For<4>([&](auto j) __attribute__((always_inline)) {
    const I a = V::LoadU8(w + j * V::kLanes), b = V::LoadU8(w + (4 + j) * V::kLanes);
    const I c = V::LoadU8(w + (8 + j) * V::kLanes);
    scale[j] = V::And(a, low6);
    min[j] = V::And(b, low6);
    scale[4 + j] = V::Or(V::And(c, low4), V::And(V::template Shr<2>(a), high2));
    min[4 + j] = V::Or(V::template Shr<4>(c), V::And(V::template Shr<2>(b), high2));
  });
  For<4>([&](auto i)
             __attribute__((always_inline)) { pair[i] = V::Or(min[2 * i], V::template Shl<16>(min[2 * i + 1])); });
}

template <class V>
struct FormatQ4_K {
  using Block = BlockQ4_K;
  static constexpr int kMax = 15, kSubs = 8, kInner = 2, kPairs = 4, kBiasBits = -1;
  static constexpr SumsKind kSums = kPairs32;
  static constexpr size_t Sub(size_t c, int h) { return 2 * c + h; }
  static void Scales(const uint8_t* w, typename V::I* scale, typename V::I* pair) {
    ScalesAndMins<V>(w + offsetof(Block, scales) * V::kLanes, scale, pair);
  }
  template <int h>
  static typename V::I Codes(const uint8_t* w, size_t c, int s) {
    const typename V::I v = V::Load(w + (offsetof(Block, qs) + c * 32 + s * 4) * V::kLanes);
    return V::Low(V::template Shr<4 * h>(v));
  }
};

template <class V>
struct FormatQ5_K {
  using Block = BlockQ5_K;
  static constexpr int kMax = 31, kSubs = 8, kInner = 8, kPairs = 4, kBiasBits = -1;
  static constexpr SumsKind kSums = kPairs32;
  static constexpr size_t Sub(size_t, int h) { return h; }
  static void Scales(const uint8_t* w, typename V::I* scale, typename V::I* pair) {
    ScalesAndMins<V>(w + offsetof(Block, scales) * V::kLanes, scale, pair);
  }
  template <int h>
  static typename V::I Codes(const uint8_t* w, size_t, int s) {
    using I = typename V::I;
    const I v = V::Load(w + (offsetof(Block, qs) + h / 2 * 32 + s * 4) * V::kLanes);
    const I high = V::Load(w + (offsetof(Block, qh) + s * 4) * V::kLanes);
    const I bit4 = h <= 4 ? V::template Shl<(h <= 4 ? 4 - h : 0)>(high) : V::template Shr<(h > 4 ? h - 4 : 0)>(high);
    return V::OrAnd(V::Low(V::template Shr<h % 2 * 4>(v)), bit4, V::Set(0x10101010));
  }
};

// For T = 1. The code above, all unrolled, is a fifth slower than memory here and there, for reasons unknown; this one
// costs a shift more, which is as much as a fifth where codes are used for several tokens.
template <class V>
struct FormatQ5_KLooped : FormatQ5_K<V> {
  using Block = BlockQ5_K;
  static constexpr int kInner = 2;
  static constexpr size_t Sub(size_t c, int h) { return 2 * c + h; }
  template <int h>
  static typename V::I Codes(const uint8_t* w, size_t c, int s) {
    using I = typename V::I;
    const I v = V::Load(w + (offsetof(Block, qs) + c * 32 + s * 4) * V::kLanes);
    const I high = ShrBy<V>(V::Load(w + (offsetof(Block, qh) + s * 4) * V::kLanes), 2 * c);
    return V::OrAnd(V::Low(V::template Shr<4 * h>(v)), V::template Shl<4 - h>(high), V::Set(0x10101010));
  }
};

template <class V>
struct FormatQ6_K {
  using Block = BlockQ6_K;
  static constexpr int kMax = 63, kSubs = 16, kInner = 4, kPairs = 8, kBiasBits = 5;
  static constexpr SumsKind kSums = kPairs16;
  // c: 2 * half of 128 columns + half of 32; h: which 32 of the 128, in the order 0, 2, 1, 3: two share a byte of ql.
  static constexpr int Which(int h) { return h % 2 * 2 + h / 2; }
  static constexpr size_t Sub(size_t c, int h) { return c / 2 * 8 + Which(h) * 2 + c % 2; }
  static void Scales(const uint8_t* w, typename V::I* scale, typename V::I* pair) {
    For<8>([&](auto i) __attribute__((always_inline)) {
      const uint8_t* s = w + (offsetof(Block, scales) + 2 * i) * V::kLanes;
      scale[2 * i] = V::LoadS8(s);
      scale[2 * i + 1] = V::LoadS8(s + V::kLanes);
      pair[i] = V::Pair(scale[2 * i], scale[2 * i + 1]);
    });
  }
  template <int h>
  static typename V::I Codes(const uint8_t* w, size_t c, int s) {
    using I = typename V::I;
    constexpr size_t kLow = offsetof(Block, ql), kHigh = offsetof(Block, qh);
    constexpr int n = Which(h);
    const I v = V::Load(w + (kLow + c / 2 * 64 + n % 2 * 32 + c % 2 * 16 + s * 4) * V::kLanes);
    const I high = V::Load(w + (kHigh + c * 16 + s * 4) * V::kLanes);
    const I bits45 = n <= 2 ? V::template Shl<(n <= 2 ? 4 - 2 * n : 0)>(high) : V::template Shr<2>(high);
    return V::OrAnd(V::Low(V::template Shr<n / 2 * 4>(v)), bits45, V::Set(0x30303030));
  }
};

template <class V>
struct FormatQ2_K {
  using Block = BlockQ2_K;
  static constexpr int kMax = 3, kSubs = 16, kInner = 4, kPairs = 8, kBiasBits = -1;
  static constexpr SumsKind kSums = kPairs16;
  static constexpr size_t Sub(size_t c, int h) {
    return c / 2 * 8 + h * 2 + c % 2;
  }  // c as in Q6_K; h: which 32 of the 128
  static void Scales(const uint8_t* w, typename V::I* scale, typename V::I* pair) {
    const typename V::I low4 = V::Set(15);
    For<8>([&](auto i) __attribute__((always_inline)) {
      const uint8_t* s = w + (offsetof(Block, scales) + 2 * i) * V::kLanes;
      const typename V::I a = V::LoadU8(s), b = V::LoadU8(s + V::kLanes);
      scale[2 * i] = V::And(a, low4);
      scale[2 * i + 1] = V::And(b, low4);
      pair[i] = V::Or(V::template Shr<4>(a), V::template Shl<16>(V::template Shr<4>(b)));
    });
  }
  template <int h>
  static typename V::I Codes(const uint8_t* w, size_t c, int s) {
    const typename V::I v = V::Load(w + (offsetof(Block, qs) + c * 16 + s * 4) * V::kLanes);
    return V::And(V::template Shr<2 * h>(v), V::Set(0x03030303));
  }
};

template <class V>
struct FormatQ3_K {
  using Block = BlockQ3_K;
  static constexpr int kMax = 7, kSubs = 16, kInner = 4, kPairs = 8, kBiasBits = 2;
  static constexpr SumsKind kSums = kPairs16;
  static constexpr size_t Sub(size_t c, int h) { return c / 2 * 8 + h * 2 + c % 2; }  // as Q2_K
  static void Scales(const uint8_t* w, typename V::I* scale, typename V::I* pair) {
    using I = typename V::I;
    constexpr int kScales = offsetof(Block, scales);
    const I low4 = V::Set(15), high2 = V::Set(0x30), bias = V::Set(32);
    For<16>([&](auto j) __attribute__((always_inline)) {
      const I v = V::LoadU8(w + (kScales + j % 8) * V::kLanes), u = V::LoadU8(w + (kScales + 8 + j % 4) * V::kLanes);
      const I low = j < 8 ? V::And(v, low4) : V::template Shr<4>(v);
      constexpr int kShift = j / 4 * 2;  // where the high bits are; they belong at 4
      const I high = kShift <= 4 ? V::template Shl<(kShift <= 4 ? 4 - kShift : 0)>(u) : V::template Shr<2>(u);
      scale[j] = V::Sub(V::Or(low, V::And(high, high2)), bias);
    });
    For<8>([&](auto i) __attribute__((always_inline)) { pair[i] = V::Pair(scale[2 * i], scale[2 * i + 1]); });
  }
  template <int h>
  static typename V::I Codes(const uint8_t* w, size_t c, int s) {
    using I = typename V::I;
    const I v = V::Load(w + (offsetof(Block, qs) + c * 16 + s * 4) * V::kLanes);
    const I high = ShrBy<V>(V::Load(w + (offsetof(Block, hmask) + c % 2 * 16 + s * 4) * V::kLanes), c / 2 * 4);
    const I bit2 = h <= 2 ? V::template Shl<(h <= 2 ? 2 - h : 0)>(high) : V::template Shr<1>(high);
    return V::OrAnd(V::And(V::template Shr<2 * h>(v), V::Set(0x03030303)), bit2, V::Set(0x04040404));
  }
};

template <class V>
struct FormatIQ4_XS {
  using Block = BlockIQ4_XS;
  static constexpr bool kIsSigned = V::kPrefersSigned || V::kMaxCode < 255;
  static constexpr int kMax = kIsSigned ? kSigned : 255, kSubs = 8, kInner = 1;
  static constexpr int kPairs = kIsSigned ? 0 : 4, kBiasBits = kIsSigned ? -1 : 7;
  static constexpr SumsKind kSums = kIsSigned ? kNoSums : kPairs32;
  static constexpr ByteTable kTable = Biased(kValuesIQ4NL, kIsSigned ? 0 : 128);
  static constexpr size_t Sub(size_t c, int) { return c; }
  static void Scales(const uint8_t* w, typename V::I* scale, typename V::I* pair) {
    using I = typename V::I;
    const I low4 = V::Set(15), low2 = V::Set(0x30), bias = V::Set(32);
    const I high = V::LoadU16(w + offsetof(Block, scales_h) * V::kLanes);
    For<8>([&](auto j) __attribute__((always_inline)) {
      const I v = V::LoadU8(w + (offsetof(Block, scales_l) + j / 2) * V::kLanes);
      const I low = j % 2 == 0 ? V::And(v, low4) : V::template Shr<4>(v);
      const I bits45 =
          j <= 2 ? V::template Shl<(j <= 2 ? 4 - 2 * j : 0)>(high) : V::template Shr<(j > 2 ? 2 * j - 4 : 0)>(high);
      scale[j] = V::Sub(V::Or(low, V::And(bits45, low2)), bias);
    });
    For<kPairs>([&](auto i) __attribute__((always_inline)) { pair[i] = V::Pair(scale[2 * i], scale[2 * i + 1]); });
  }
  template <int h>
  static typename V::I Codes(const uint8_t* w, size_t c, int s) {
    const typename V::I v = V::Load(w + (offsetof(Block, qs) + c * 16 + s % 4 * 4) * V::kLanes);
    return V::Lookup(V::Table(kTable.v), V::Low(s < 4 ? v : V::template Shr<4>(v)));
  }
};

// ---- F16 and BF16: no codes.

template <class V>
struct FormatF16 {
  static typename V::F Load(const uint8_t* p) { return V::LoadF16(p); }
};

template <class V>
struct FormatBF16 {
  static typename V::F Load(const uint8_t* p) { return V::LoadBF16(p); }
};
