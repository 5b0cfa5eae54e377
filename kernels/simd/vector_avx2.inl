// SPDX-License-Identifier: MIT
// vector_avx2.inl: traits (formats.inl) of AVX2 with FMA and F16C. 8 rows per group. AVX-VNNI adds to them
// (avx_vnni.cc).
//
// AVX2 multiplies unsigned by signed bytes into pairs summed in int16, with saturation. Codes of at most 63 leave room
// to add up several of those before they are widened, and widening multiplies by a scale on the way, for nothing. int8
// codes leave none: their sign goes to the activation, and each Dot is widened.

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kMaxCode = 63;
  static constexpr bool kLooksUpAgain = false;
  static constexpr bool kPrefersSigned = false;
  template <int T>
  static constexpr int kTileTokens = T < 4 ? T : 4;
  template <int T>
  static constexpr int kTileGroups = T == 1 ? 1 : 2;
  template <int T>
  static constexpr int kTileSubs = T == 1 ? 4 : 1;
  static constexpr int kFloatTokens = 2, kFloatGroups = 1;
  static constexpr int kPrefetchBytes = 8192;  // as AVX-512
  static constexpr bool kHasScaleF = false;
  // 2 * 127 * kMax * kSteps < 2^15
  template <int kMax>
  static constexpr int kSteps = kMax <= 15   ? 8
                                : kMax <= 31 ? 4
                                             : 2;
  template <int kMax>
  static constexpr bool kIsWide = kMax == kSigned;

  static __m128i LoadHalf(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m128i LoadQuarter(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static I Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void Store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static I LoadU16(const void* p) { return _mm256_cvtepu16_epi32(LoadHalf(p)); }
  static I LoadU8(const void* p) { return _mm256_cvtepu8_epi32(LoadQuarter(p)); }
  static I LoadS8(const void* p) { return _mm256_cvtepi8_epi32(LoadQuarter(p)); }
  static F LoadF16(const void* p) { return _mm256_cvtph_ps(LoadHalf(p)); }
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
    return _mm256_set1_epi32(i);
  }
  static F SplatF(const float* p) { return _mm256_set1_ps(*p); }
  static I Set(int32_t i) { return _mm256_set1_epi32(i); }
  static F SetF(float f) { return _mm256_set1_ps(f); }
  static I Zero() { return _mm256_setzero_si256(); }
  static F ZeroF() { return _mm256_setzero_ps(); }

  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I Or(I a, I b) { return _mm256_or_si256(a, b); }
  static I Xor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I OrAnd(I a, I b, I c) { return Or(a, And(b, c)); }
  static I Add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I Sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I MaxI(I a, I b) { return _mm256_max_epi32(a, b); }
  template <int N>
  static I Shr(I v) {
    return N == 0 ? v : _mm256_srli_epi32(v, N);
  }
  template <int N>
  static I Shl(I v) {
    return N == 0 ? v : _mm256_slli_epi32(v, N);
  }
  static I Low(I v) { return And(v, Set(0x0f0f0f0f)); }
  static I Pair(I a, I b) { return _mm256_blend_epi16(a, Shl<16>(b), 0xaa); }
  static I Table(const uint8_t* p) { return _mm256_broadcastsi128_si256(LoadHalf(p)); }
  static I Lookup(I table, I v) { return _mm256_shuffle_epi8(table, v); }

  // 128-bit lane l is of row 4 l + j; the lanes are transposed side by side.
  static void Transpose(const uint8_t* rows, int64_t stride, I (&words)[4]) {
    I v[4];
    for (int j = 0; j < 4; ++j) {
      const uint8_t* const p = rows + j * stride;
      v[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(LoadHalf(p)), LoadHalf(p + 4 * stride), 1);
    }
    const I low01 = _mm256_unpacklo_epi32(v[0], v[1]), high01 = _mm256_unpackhi_epi32(v[0], v[1]);
    const I low23 = _mm256_unpacklo_epi32(v[2], v[3]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
    words[0] = _mm256_unpacklo_epi64(low01, low23);
    words[1] = _mm256_unpackhi_epi64(low01, low23);
    words[2] = _mm256_unpacklo_epi64(high01, high23);
    words[3] = _mm256_unpackhi_epi64(high01, high23);
  }
  template <int kUnitBytes>
  static I Split(I words) {
    if constexpr (kUnitBytes == 4) {
      return words;
    } else if constexpr (kUnitBytes == 2) {
      const __m128i lanes = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(lanes)), 0xd8);
    } else {
      const __m128i lanes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(lanes)), order);
    }
  }

  // Left alone, GCC adds up products in another order, later, and has to put them on the stack until then.
  static I Fixed(I v) {
    __asm__("" : "+x"(v));
    return v;
  }
  // Signed codes are used twice, and GCC would load them from memory for each use: there are two loads in a cycle.
  template <int kMax>
  static I Held(I codes) {
    return kMax == kSigned ? Fixed(codes) : codes;
  }
  template <int kMax>
  static I Dot(I partial, I codes, I acts) {
    if constexpr (kIsWide<kMax>) {
      const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(acts, codes));
      return Fixed(Add(partial, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
    } else {
      return Fixed(_mm256_add_epi16(partial, _mm256_maddubs_epi16(codes, acts)));
    }
  }
  template <int kMax>
  static I Scale(I scale) {
    return kIsWide<kMax> ? scale : Pair(scale, scale);
  }
  template <int kMax>
  static I FoldScaled(I sum, I partial, I scale) {
    return Fixed(Add(sum, kIsWide<kMax> ? _mm256_mullo_epi32(partial, scale) : _mm256_madd_epi16(partial, scale)));
  }
  template <int kMax>
  static I Fold(I sum, I partial) {
    return Add(sum, kIsWide<kMax> ? partial : _mm256_madd_epi16(partial, _mm256_set1_epi16(1)));
  }
  static I DotPairs(I sum, I pairs, I acts) { return Add(sum, _mm256_madd_epi16(pairs, acts)); }

  static F AddF(F a, F b) { return _mm256_add_ps(a, b); }
  static F SubF(F a, F b) { return _mm256_sub_ps(a, b); }
  static F MulF(F a, F b) { return _mm256_mul_ps(a, b); }
  static F DivF(F a, F b) { return _mm256_div_ps(a, b); }
  static F FmaF(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F MaxF(F a, F b) { return _mm256_max_ps(a, b); }
  static F MinF(F a, F b) { return _mm256_min_ps(a, b); }
  static F RoundF(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F ToFloat(I v) { return _mm256_cvtepi32_ps(v); }
  static I ToInt(F v) { return _mm256_cvtps_epi32(v); }
  static F AsFloat(I v) { return _mm256_castsi256_ps(v); }
  static I AsInt(F v) { return _mm256_castps_si256(v); }
  static F LoadF(const float* p) { return _mm256_loadu_ps(p); }
  static void StoreF(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void StoreI8(int8_t* p, I v) {
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
  }
  static int32_t ReduceAdd(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static int32_t ReduceMax(I v) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  // Assembly, because GCC moves its own prefetches together to the top of a block, and drops calls of a function that
  // does nothing else.
  static void Prefetch(const void* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p))); }

  // ---- For qmoe.inl.
  static constexpr bool kLooksUpFloats = false;
  static constexpr bool kDotsSigned = true;
  template <int T>
  static constexpr int kQmoeRows = T == 1 ? 4 : 1;
  struct Spread {
    I lanes, mask;
  };
  static I LaneNumbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static Spread MakeSpread(int shift) {
    const int n = shift < 3 ? 8 >> shift : 1;
    return {_mm256_srl_epi32(LaneNumbers(), _mm_cvtsi32_si128(shift)), _mm256_cmpgt_epi32(Set(n), LaneNumbers())};
  }
  static F LoadSpread(const uint8_t* p, const Spread& s) {
    const F scales = _mm256_maskload_ps(reinterpret_cast<const float*>(p), s.mask);
    return _mm256_permutevar8x32_ps(scales, s.lanes);
  }
  static I Mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  template <int N>
  static I Sar(I v) {
    return _mm256_srai_epi32(v, N);
  }
  static I ShrEach(I v, I counts) { return _mm256_srlv_epi32(v, counts); }
  // Codes of 8 bits are signed. Neither sum of two products saturates.
  template <int kBits>
  static I DotWords(I sum, I codes, I x) {
    const I pairs = kBits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes))
                               : _mm256_maddubs_epi16(codes, x);
    return Add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static float ReduceAddF(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};
