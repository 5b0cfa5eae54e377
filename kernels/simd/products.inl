// SPDX-License-Identifier: MIT
// products.inl: a block, or a row of floats, of G groups times T tokens, for a format and the traits V (formats.inl).
// Included by driver.inl, in the same anonymous namespace.

// A partial sum: I, unless the traits' Dot gives something else, which an I of zeros must turn into.
template <class V, int kMax>
using PartialOf =
    decltype(V::template Dot<kMax>(V::Zero(), V::Zero(), V::Get(typename V::template Acts<1>{}, Int<0>{})));

// The activations of a block, tokens t0 and up of a panel of T.
struct BlockActs {
  const int8_t* q;
  const float* d;
  const int32_t* sums;  // as the format's SumsKind
};

// What panels of kMaxTile rows fetch for later calls: turn_bytes of it at each turn, of which a block has kTurns<T>, so
// that requests are spread over all of a call. Smaller ones fetch as much as they read, at `soon`.
struct Ahead {
  const uint8_t* next;
  const uint8_t* end;
  int64_t turn_bytes;
};
template <class V, int T>
static inline __attribute__((always_inline)) void PrefetchTurn(Ahead& ahead) {
  if constexpr (T == kMaxTile && V::kPrefetchBytes > 0) {
    if (ahead.next >= ahead.end) return;
    const uint8_t* const stop = ahead.next + ahead.turn_bytes;
    for (; ahead.next < stop; ahead.next += 64) V::Prefetch(ahead.next);
  }
}

// acc = fma(isum, wd * xd, acc), and for Q4_1 acc = fma(wm, xd * sum, acc).
template <class V, template <class> class Format>
struct Product32 {
  using F_ = Format<V>;
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int kCols = 32;
  static constexpr int kBlockBytes = sizeof(typename F_::Block);
  static constexpr SumsKind kSums = F_::kSums;
  static constexpr int kBias = F_::kBias;
  template <int T>
  static constexpr int kTurns = 1;

  template <int G, int T>
  static inline __attribute__((always_inline)) void Multiply(const uint8_t* const (&w)[G],
                                                             const uint8_t* const (&soon)[G], const BlockActs& x,
                                                             F (&acc)[G][T], Ahead& ahead) {
    constexpr int kTokens = V::template kTileTokens<T>;
    PrefetchTurn<V, T>(ahead);
    if constexpr (T < kMaxTile && V::kPrefetchBytes > 0) {
      for (int g = 0; g < G; ++g) {
        for (int i = 0; i < kBlockBytes * V::kLanes; i += 64) V::Prefetch(soon[g] + i);
      }
    }
    F scale[G];
    For<G>([&](auto g) __attribute__((always_inline)) { scale[g] = F_::Scale(w[g]); });
    For<T / kTokens>([&](auto pass) __attribute__((always_inline)) {
      constexpr int t0 = pass * kTokens;
      I sum[G][kTokens];
      // Other passes use the same bytes. A compiler that sees it keeps all codes on the stack, which pays only where
      // they come out of a table. (volatile, or it takes two of these for the same.)
      const uint8_t* v[G];
      for (int g = 0; g < G; ++g) v[g] = w[g];
      if constexpr (kTokens < T && (!F_::kHasTable || V::kLooksUpAgain)) {
        for (int g = 0; g < G; ++g) __asm__ volatile("" : "+r"(v[g]));
      }
      Dots<G, T, kTokens>(v, x.q + 4 * t0, x.sums + t0, sum);
      For<kTokens>([&](auto t) __attribute__((always_inline)) {
        const F d = V::SplatF(x.d + t0 + t);
        For<G>([&](auto g) __attribute__((always_inline)) {
          F& a = acc[g][t0 + t];
          a = V::FmaF(V::ToFloat(sum[g][t]), F_::Times(scale[g], d), a);
          if constexpr (kSums == kFloatSums) {
            a = V::FmaF(F_::Min(w[g]), V::AsFloat(V::Splat(x.sums + t0 + t)), a);
          }
        });
      });
    });
  }

 private:
  template <int G, int T, int kTokens>
  static inline __attribute__((always_inline)) void Dots(const uint8_t* const (&w)[G], const int8_t* q,
                                                         const int32_t* sums, I (&sum)[G][kTokens]) {
    constexpr int kMax = F_::kMax;
    constexpr bool kIsWide = V::template kIsWide<kMax>;
    constexpr int kSteps = kIsWide ? 8 : V::template kSteps<kMax>;
    PartialOf<V, kMax> partial[G][kTokens];
    For<8>([&](auto k) __attribute__((always_inline)) {
      constexpr int s = k % 2 * 4 + k / 2;  // nibbles of steps s and s + 4 are in the same bytes
      I codes[G];
      for (int g = 0; g < G; ++g) codes[g] = V::template Held<kMax>(F_::template Codes<s>(w[g]));
      const auto acts = V::template LoadActs<kTokens>(q + s * 4 * T);
      For<kTokens>([&](auto t) __attribute__((always_inline)) {
        const auto a = V::Get(acts, t);
        // What the sum begins with, where it does: at the first Dot or, if that is not into int32, at the first Fold.
        constexpr bool begins = k == (kIsWide ? 0 : kSteps - 1);
        I start = V::Zero();
        if constexpr (begins && kSums == kBiasSums) start = V::Splat(sums + t);
        for (int g = 0; g < G; ++g) {
          if constexpr (kIsWide) {
            sum[g][t] = V::template Dot<kMax>(begins ? start : sum[g][t], codes[g], a);
          } else {
            PartialOf<V, kMax>& p = partial[g][t];
            p = V::template Dot<kMax>(k % kSteps == 0 ? V::Zero() : p, codes[g], a);
            if constexpr ((k + 1) % kSteps == 0) sum[g][t] = V::template Fold<kMax>(begins ? start : sum[g][t], p);
          }
        }
      });
    });
  }
};

// S = sum of scale * isum, M = sum of pairs * sums; acc = fma(S - (M << kBiasBits), wd * xd, acc), or with mins
// acc = fma(S, wd * xd, acc), acc = fma(M, -(wdmin * xd), acc). S and M are exact.
template <class V, template <class> class Format>
struct Product256 {
  using F_ = Format<V>;
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int kCols = 256;
  static constexpr int kBlockBytes = sizeof(typename F_::Block);
  static constexpr SumsKind kSums = F_::kSums;
  static constexpr int kBias = 0;
  static constexpr bool kHasMins = F_::kPairs > 0 && F_::kBiasBits < 0;

  template <int T>
  static constexpr int kSubsAtOnce = V::template kTileSubs<T> < F_::kInner ? V::template kTileSubs<T> : F_::kInner;
  template <int T>
  static constexpr int kTurns = F_::kSubs / kSubsAtOnce<T> * (T / V::template kTileTokens<T>);

  template <int G, int T>
  static inline __attribute__((always_inline)) void Multiply(const uint8_t* const (&w)[G],
                                                             const uint8_t* const (&soon)[G], const BlockActs& x,
                                                             F (&acc)[G][T], Ahead& ahead) {
    constexpr int kTokens = V::template kTileTokens<T>;
    I scale[G][F_::kSubs], pair[G][F_::kPairs > 0 ? F_::kPairs : 1];
    F d[G], dmin[G];
    For<G>([&](auto g) __attribute__((always_inline)) {
      F_::Scales(w[g], scale[g], pair[g]);
      for (I& s : scale[g]) s = V::template Scale<F_::kMax>(s);
      d[g] = V::LoadF16(w[g] + offsetof(typename F_::Block, d) * V::kLanes);
      if constexpr (kHasMins) {
        dmin[g] = V::SubF(V::SetF(-0.0f), V::LoadF16(w[g] + offsetof(typename F_::Block, dmin) * V::kLanes));
      }
    });
    for (int t0 = 0; t0 < T; t0 += kTokens) {
      I sum[G][kTokens], lack[G][kTokens];
      Dots<G, T, kTokens>(w, soon, scale, x.q + 4 * t0, sum, ahead);
      Pairs<G, T, kTokens>(pair, x.sums + t0, lack);
      For<kTokens>([&](auto t) __attribute__((always_inline)) {
        const F xd = V::SplatF(x.d + t0 + t);
        For<G>([&](auto g) __attribute__((always_inline)) {
          F& a = acc[g][t0 + t];
          I s = sum[g][t];
          if constexpr (F_::kBiasBits >= 0) s = V::Sub(s, V::template Shl<(F_::kBiasBits)>(lack[g][t]));
          a = V::FmaF(V::ToFloat(s), V::MulF(d[g], xd), a);
          if constexpr (kHasMins) a = V::FmaF(V::ToFloat(lack[g][t]), V::MulF(dmin[g], xd), a);
        });
      });
    }
  }

 private:
  template <int G, int T, int kTokens>
  static inline __attribute__((always_inline)) void Dots(const uint8_t* const (&w)[G], const uint8_t* const (&soon)[G],
                                                         const I (&scale)[G][F_::kSubs], const int8_t* q,
                                                         I (&sum)[G][kTokens], Ahead& ahead) {
    constexpr int kSubSteps = 64 / F_::kSubs, kTileSubs = kSubsAtOnce<T>;
    For<G>([&](auto g) __attribute__((always_inline)) {
      For<kTokens>([&](auto t) __attribute__((always_inline)) { sum[g][t] = V::Zero(); });
    });
    for (size_t c = 0; c < F_::kSubs / F_::kInner; ++c) {
      For<F_::kInner / kTileSubs>([&](auto tile) __attribute__((always_inline)) {
        PrefetchTurn<V, T>(ahead);
        PartialOf<V, F_::kMax> partial[kTileSubs][G][kTokens];
        // Other tiles of sub-blocks and of tokens use the same bytes, which the compiler must not see: it would keep
        // all that it unpacked on the stack.
        const uint8_t* v[G];
        for (int g = 0; g < G; ++g) v[g] = w[g];
        if constexpr (T > 1) {
          for (int g = 0; g < G; ++g) __asm__("" : "+r"(v[g]));
        }
        For<kSubSteps>([&](auto s) __attribute__((always_inline)) {
          For<kTileSubs>([&](auto i) __attribute__((always_inline)) {
            constexpr int h = tile * kTileSubs + i;
            if constexpr (T < kMaxTile) PrefetchSome<(tile * kSubSteps + s) * kTileSubs + i>(soon, c);
            SubStep<kTokens, T, h, s>(v, c, scale, q, partial[i], sum);
          });
        });
      });
    }
  }

  // Step s of sub-block Sub(c, h).
  template <int kTokens, int T, int h, int s, int G>
  static inline __attribute__((always_inline)) void SubStep(const uint8_t* const (&w)[G], size_t c,
                                                            const I (&scale)[G][F_::kSubs], const int8_t* q,
                                                            PartialOf<V, F_::kMax> (&partial)[G][kTokens],
                                                            I (&sum)[G][kTokens]) {
    constexpr int kMax = F_::kMax, kSubSteps = 64 / F_::kSubs;
    constexpr int kSteps = V::template kSteps<kMax> < kSubSteps ? V::template kSteps<kMax> : kSubSteps;
    const size_t j = F_::Sub(c, 0) + (F_::Sub(0, h) - F_::Sub(0, 0));
    I codes[G];
    for (int g = 0; g < G; ++g) codes[g] = F_::template Codes<h>(w[g], c, s);
    const auto acts = V::template LoadActs<kTokens>(q + (j * kSubSteps + s) * 4 * T);
    For<kTokens>([&](auto t) __attribute__((always_inline)) {
      const auto a = V::Get(acts, t);
      for (int g = 0; g < G; ++g) {
        PartialOf<V, F_::kMax>& p = partial[g][t];
        if constexpr (s % kSteps == 0) p = V::Zero();
        p = V::template Dot<kMax>(p, codes[g], a);
        if constexpr ((s + 1) % kSteps == 0) sum[g][t] = V::template FoldScaled<kMax>(sum[g][t], p, scale[g][j]);
      }
    });
  }

  // The lines of a block, a share of them at each step: as many at once as a block has would fill the core's list of
  // outstanding misses, and its loads would wait.
  template <int step, int G>
  static inline __attribute__((always_inline)) void PrefetchSome(const uint8_t* const (&soon)[G], size_t c) {
    if constexpr (V::kPrefetchBytes > 0) {
      constexpr int n_c = F_::kSubs / F_::kInner, kSteps = 64 / n_c;
      constexpr int kLines = (kBlockBytes * V::kLanes + 64 * n_c - 1) / (64 * n_c);  // in one turn of c
      if constexpr (step * kLines / kSteps != (step + 1) * kLines / kSteps) {
        constexpr int kLine = step * kLines / kSteps * 64;
        for (int g = 0; g < G; ++g) V::Prefetch(soon[g] + kLine + c * (kLines * 64));
      }
    }
  }

  template <int G, int T, int kTokens>
  static inline __attribute__((always_inline)) void Pairs(const I (&pair)[G][F_::kPairs > 0 ? F_::kPairs : 1],
                                                          const int32_t* sums, I (&lack)[G][kTokens]) {
    For<G>([&](auto g) __attribute__((always_inline)) {
      For<kTokens>([&](auto t) __attribute__((always_inline)) { lack[g][t] = V::Zero(); });
    });
    For<F_::kPairs>([&](auto i) __attribute__((always_inline)) {
      const auto acts = V::template LoadActs<kTokens>(sums + i * T);
      For<kTokens>([&](auto t) __attribute__((always_inline)) {
        const auto a = V::Get(acts, t);
        For<G>([&](auto g) __attribute__((always_inline)) { lack[g][t] = V::DotPairs(lack[g][t], pair[g][i], a); });
      });
    });
  }
};

// F16 and BF16: four sums, of the columns by their number mod 4, to be added in pairs.
template <class V, int G, int kTokens>
struct FloatSums {
  using F = typename V::F;
  F v[4][G][kTokens];

  inline __attribute__((always_inline)) FloatSums() {
    For<4>([&](auto k) __attribute__((always_inline)) {
      For<G>([&](auto g) __attribute__((always_inline)) {
        For<kTokens>([&](auto t) __attribute__((always_inline)) { v[k][g][t] = V::ZeroF(); });
      });
    });
  }
  template <class Group, class Token>
  inline __attribute__((always_inline)) F Total(Group g, Token t) const {
    return V::AddF(V::AddF(v[0][g][t], v[1][g][t]), V::AddF(v[2][g][t], v[3][g][t]));
  }
};

// Adds n_cols columns of G groups times tokens t0 .. t0 + kTokens of a panel of T, of which x is the first column.
template <class V, template <class> class Format, int T, int G, int kTokens>
static inline __attribute__((always_inline)) void AddFloats(const uint8_t* const (&w)[G], const uint8_t* ahead,
                                                            int64_t n_cols, const float* x, int t0,
                                                            FloatSums<V, G, kTokens>* sums) {
  for (int64_t i = 0; i < n_cols; i += 4) {
    if constexpr (T == 1 && V::kPrefetchBytes > 0) {
      for (int b = 0; b < 8 * V::kLanes; b += 64) V::Prefetch(ahead + i * 2 * V::kLanes + b);
    }
    For<4>([&](auto k) __attribute__((always_inline)) {
      typename V::F codes[G];
      For<G>([&](auto g)
                 __attribute__((always_inline)) { codes[g] = Format<V>::Load(w[g] + (i + k) * 2 * V::kLanes); });
      For<kTokens>([&](auto t) __attribute__((always_inline)) {
        const typename V::F a = V::SplatF(x + (i + k) * T + t0 + t);
        For<G>([&](auto g)
                   __attribute__((always_inline)) { sums->v[k][g][t] = V::FmaF(codes[g], a, sums->v[k][g][t]); });
      });
    });
  }
}
