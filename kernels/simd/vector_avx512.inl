// SPDX-License-Identifier: MIT
// vector_avx512.inl: traits (formats.inl) of AVX-512 F, BW, DQ, VL and VNNI. 16 rows per group.
//
// Two groups times four tokens: eight chains of dot products, as many as a latency of four and two per cycle need, and
// six loads for eight of them; one group times eight tokens would take nine, in the time of which there are eight.
// Measured on Zen 5, all in cache, T = 8: Q4_0, Q8_0, MXFP4, Q4_K at 0.74 to 0.80 of VNNI's peak; the multiplications
// they need besides, on the same two ports, allow 0.80 (MXFP4: 0.89). See docs/experiments.md, the profile.

struct Avx512Vnni {
  using I = __m512i;
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMaxCode = 255;
  static constexpr bool kLooksUpAgain = false;
  static constexpr bool kPrefersSigned = false;
  template <int T>
  static constexpr int kTileTokens = T < 4 ? T : 4;
  template <int T>
  static constexpr int kTileGroups = T == 1 ? 1 : 2;
  template <int T>
  static constexpr int kTileSubs = T == 1 ? 4 : 2;
  static constexpr int kFloatTokens = 4, kFloatGroups = 1;
  // Q4_0, Q2_K, Q4_K, Q5_K, Q6_K get 0.90, 0.78, 0.60, 0.41, 0.29 of one core's bandwidth without, 0.91, 0.80, 0.89,
  // 0.84, 0.89 with 2 KiB, 0.97, 0.90, 0.95, 0.90, 0.96 with 4, 0.96 to 1 with 8, less again with 16.
  static constexpr int kPrefetchBytes = 8192;
  static constexpr bool kHasScaleF = true;
  template <int kMax>
  static constexpr int kSteps = 8;
  template <int kMax>
  static constexpr bool kIsWide = true;

  static I Load(const void* p) { return _mm512_loadu_si512(p); }
  static void Store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I LoadU16(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  static I LoadU8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static I LoadS8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static F LoadF16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  static F LoadBF16(const void* p) { return AsFloat(Shl<16>(LoadU16(p))); }

  template <int TT>
  struct Acts {
    const char* p;
  };
  template <int TT>
  static Acts<TT> LoadActs(const void* p) {
    return {static_cast<const char*>(p)};
  }
  template <int TT, int t>
  static I Get(Acts<TT> a, Int<t>) {
    return Splat(a.p + 4 * t);
  }
  static I Splat(const void* p) {
    int32_t i;
    memcpy(&i, p, sizeof(i));
    return _mm512_set1_epi32(i);
  }
  static F SplatF(const float* p) { return _mm512_set1_ps(*p); }
  static I Set(int32_t i) { return _mm512_set1_epi32(i); }
  static F SetF(float f) { return _mm512_set1_ps(f); }
  static I Zero() { return _mm512_setzero_si512(); }
  static F ZeroF() { return _mm512_setzero_ps(); }

  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  static I Or(I a, I b) { return _mm512_or_si512(a, b); }
  static I Xor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I OrAnd(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0xf8); }
  static I Add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I Sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I Mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  template <int kMax>
  static I Held(I codes) {
    return codes;
  }
  static I MaxI(I a, I b) { return _mm512_max_epi32(a, b); }
  template <int N>
  static I Shr(I v) {
    return N == 0 ? v : _mm512_srli_epi32(v, N);
  }
  template <int N>
  static I Shl(I v) {
    return N == 0 ? v : _mm512_slli_epi32(v, N);
  }
  static I Low(I v) { return And(v, Set(0x0f0f0f0f)); }
  static I Pair(I a, I b) { return Or(And(a, Set(0xffff)), Shl<16>(b)); }
  static I Table(const uint8_t* p) { return _mm512_broadcast_i32x4(Load16(p)); }
  static I Lookup(I table, I v) { return _mm512_shuffle_epi8(table, v); }

  static __m128i Load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  // 128-bit lane l is of row 4 l + j; the lanes are transposed side by side.
  static void Transpose(const uint8_t* rows, int64_t stride, I (&words)[4]) {
    I v[4];
    for (int j = 0; j < 4; ++j) {
      const uint8_t* const p = rows + j * stride;
      v[j] = _mm512_castsi128_si512(Load16(p));
      v[j] = _mm512_mask_broadcast_i32x4(v[j], 0x00f0, Load16(p + 4 * stride));
      v[j] = _mm512_mask_broadcast_i32x4(v[j], 0x0f00, Load16(p + 8 * stride));
      v[j] = _mm512_mask_broadcast_i32x4(v[j], 0xf000, Load16(p + 12 * stride));
    }
    const I low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const I low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    words[0] = _mm512_unpacklo_epi64(low01, low23);
    words[1] = _mm512_unpackhi_epi64(low01, low23);
    words[2] = _mm512_unpacklo_epi64(high01, high23);
    words[3] = _mm512_unpackhi_epi64(high01, high23);
  }
  template <int kUnitBytes>
  static I Split(I words) {
    if constexpr (kUnitBytes == 4) {
      return words;
    } else if constexpr (kUnitBytes == 2) {
      const I lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
      const I order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      return _mm512_permutexvar_epi64(order, _mm512_shuffle_epi8(words, lanes));
    } else {
      const I lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
      const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      return _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(words, lanes));
    }
  }

  // Left alone, GCC adds up products in another order, later, and has to put them on the stack until then.
  static I Fixed(I v) {
    __asm__("" : "+v"(v));
    return v;
  }
  template <int kMax>
  static I Dot(I partial, I codes, I acts) {
    return _mm512_dpbusd_epi32(partial, codes, acts);
  }
  template <int kMax>
  static I Scale(I scale) {
    return scale;
  }
  template <int kMax>
  static I FoldScaled(I sum, I partial, I scale) {
    return Fixed(Add(sum, Mul(partial, scale)));
  }
  template <int kMax>
  static I Fold(I sum, I partial) {
    return Add(sum, partial);
  }
  static I DotPairs(I sum, I pairs, I acts) { return _mm512_dpwssd_epi32(sum, pairs, acts); }

  static F AddF(F a, F b) { return _mm512_add_ps(a, b); }
  static F SubF(F a, F b) { return _mm512_sub_ps(a, b); }
  static F MulF(F a, F b) { return _mm512_mul_ps(a, b); }
  static F ScaleF(F x, F e) { return _mm512_scalef_ps(x, e); }
  static F DivF(F a, F b) { return _mm512_div_ps(a, b); }
  static F FmaF(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F MaxF(F a, F b) { return _mm512_max_ps(a, b); }
  static F MinF(F a, F b) { return _mm512_min_ps(a, b); }
  static F RoundF(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
  static F ToFloat(I v) { return _mm512_cvtepi32_ps(v); }
  static I ToInt(F v) { return _mm512_cvtps_epi32(v); }
  static F AsFloat(I v) { return _mm512_castsi512_ps(v); }
  static I AsInt(F v) { return _mm512_castps_si512(v); }
  static F LoadF(const float* p) { return _mm512_loadu_ps(p); }
  static void StoreF(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void StoreI8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static int32_t ReduceAdd(I v) { return _mm512_reduce_add_epi32(v); }
  static int32_t ReduceMax(I v) { return _mm512_reduce_max_epi32(v); }
  // Assembly, because GCC moves its own prefetches together to the top of a block, and drops calls of a function that
  // does nothing else.
  static void Prefetch(const void* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p))); }

  // ---- For qmoe.inl.
  static constexpr bool kLooksUpFloats = true;
  static constexpr bool kDotsSigned = false;
  template <int T>
  static constexpr int kQmoeRows = T == 1 ? 4 : 2;
  struct Spread {
    I lanes;
    __mmask16 mask;
  };
  static I LaneNumbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static Spread MakeSpread(int shift) {
    const int n = shift < 4 ? 16 >> shift : 1;
    return {_mm512_srl_epi32(LaneNumbers(), _mm_cvtsi32_si128(shift)), static_cast<__mmask16>((1 << n) - 1)};
  }
  static F LoadSpread(const uint8_t* p, const Spread& s) {
    return _mm512_permutexvar_ps(s.lanes, _mm512_maskz_loadu_ps(s.mask, p));
  }
  template <int N>
  static I Sar(I v) {
    return _mm512_srai_epi32(v, N);
  }
  static I ShrEach(I v, I counts) { return _mm512_srlv_epi32(v, counts); }
  static F LookupF(F table, I v) { return _mm512_permutexvar_ps(v, table); }
  template <int kBits>
  static I DotWords(I sum, I codes, I x) {
    return _mm512_dpbusd_epi32(sum, codes, x);
  }
  static float ReduceAddF(F v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};
