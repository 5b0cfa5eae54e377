// SPDX-License-Identifier: MIT
// vector_neon.inl: traits (formats.inl) of Advanced SIMD as every AArch64 CPU has it. 4 rows per group.
//
// There is no instruction that multiplies bytes and adds neighbours. Products of bytes are int16; codes of at most 63
// leave room to add up those of several steps, at two instructions per step, before neighbours are added. int8 codes
// leave none, and each Dot is widened.
//
// No prefetching: a stream of rows is what the prefetchers of these CPUs are made for.

struct Neon {
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kMaxCode = 127;  // signed times signed: what is called unsigned just is not negative
  static constexpr bool kLooksUpAgain = false;
  static constexpr bool kPrefersSigned = false;
  template <int T>
  static constexpr int kTileTokens = T < 4 ? T : 4;
  template <int T>
  static constexpr int kTileGroups = T < 4 ? 2 : 1;
  template <int T>
  static constexpr int kTileSubs = 1;
  static constexpr int kFloatTokens = 4, kFloatGroups = 1;
  static constexpr int kPrefetchBytes = 0;
  static constexpr bool kHasScaleF = false;
  // 127 * kMax * kSteps < 2^15
  template <int kMax>
  static constexpr int kSteps = kMax <= 31 ? 8 : 4;
  template <int kMax>
  static constexpr bool kIsWide = kMax == kSigned;

  // Rows 0 and 1, and rows 2 and 3: four int16 each, which add up to the row's.
  struct Products {
    int16x8_t low, high;
    Products() = default;
    Products(I zero) : low(vreinterpretq_s16_s32(zero)), high(low) {}
  };

  static uint8x8_t LoadHalf(const void* p) { return vld1_u8(static_cast<const uint8_t*>(p)); }
  // 4 bytes, and 0 above them.
  static uint64_t LoadWord(const void* p) {
    uint32_t word;
    memcpy(&word, p, sizeof(word));
    return word;
  }
  static I Load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static void Store(void* p, I v) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(v)); }
  static I LoadU16(const void* p) { return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(LoadHalf(p)))); }
  static I LoadU8(const void* p) {
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(LoadWord(p))))));
  }
  static I LoadS8(const void* p) { return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(LoadWord(p))))); }
  static F LoadF16(const void* p) { return vcvt_f32_f16(vreinterpret_f16_u8(LoadHalf(p))); }
  static F LoadBF16(const void* p) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(LoadHalf(p)), 16)); }

  // Four tokens per register.
  template <int TT>
  struct Acts {
    I v[TT < 4 ? 1 : TT / 4];
  };
  template <int TT>
  static Acts<TT> LoadActs(const void* p) {
    Acts<TT> a;
    if constexpr (TT == 1) {
      a.v[0] = vreinterpretq_s32_u8(vcombine_u8(vcreate_u8(LoadWord(p)), vcreate_u8(0)));
    } else if constexpr (TT == 2) {
      a.v[0] = vreinterpretq_s32_u8(vcombine_u8(LoadHalf(p), vcreate_u8(0)));
    } else {
      for (int i = 0; i < TT / 4; ++i) a.v[i] = Load(static_cast<const char*>(p) + 16 * i);
    }
    return a;
  }
  // Element t of v.
  template <int t>
  struct Element {
    I v;
  };
  template <int TT, int t>
  static Element<t % 4> Get(const Acts<TT>& a, Int<t>) {
    return {a.v[t / 4]};
  }
  static I Splat(const void* p) { return vdupq_n_s32(static_cast<int32_t>(LoadWord(p))); }
  static F SplatF(const float* p) { return vdupq_n_f32(*p); }
  static I Set(int32_t i) { return vdupq_n_s32(i); }
  static F SetF(float f) { return vdupq_n_f32(f); }
  static I Zero() { return vdupq_n_s32(0); }
  static F ZeroF() { return vdupq_n_f32(0.0f); }

  static I And(I a, I b) { return vandq_s32(a, b); }
  static I Or(I a, I b) { return vorrq_s32(a, b); }
  static I Xor(I a, I b) { return veorq_s32(a, b); }
  static I Add(I a, I b) { return vaddq_s32(a, b); }
  static I Sub(I a, I b) { return vsubq_s32(a, b); }
  static I Mul(I a, I b) { return vmulq_s32(a, b); }
  template <int kMax>
  static I Held(I codes) {
    return codes;
  }
  static I MaxI(I a, I b) { return vmaxq_s32(a, b); }
  template <int N>
  static I Shr(I v) {
    if constexpr (N == 0) {
      return v;
    } else {
      return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), N));
    }
  }
  template <int N>
  static I Shl(I v) {
    return vshlq_n_s32(v, N);
  }
  static I Low(I v) { return And(v, Set(0x0f0f0f0f)); }
  static I OrAnd(I a, I b, I c) { return Or(a, And(b, c)); }
  static I Pair(I a, I b) { return vsliq_n_s32(a, b, 16); }
  static uint8x16_t Table(const uint8_t* p) { return vld1q_u8(p); }
  static I Lookup(uint8x16_t table, I v) { return vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(v))); }

  static void Transpose(const uint8_t* rows, int64_t stride, I (&words)[4]) {
    I v[4];
    for (int j = 0; j < 4; ++j) v[j] = Load(rows + j * stride);
    const int64x2_t even01 = vreinterpretq_s64_s32(vtrn1q_s32(v[0], v[1]));
    const int64x2_t odd01 = vreinterpretq_s64_s32(vtrn2q_s32(v[0], v[1]));
    const int64x2_t even23 = vreinterpretq_s64_s32(vtrn1q_s32(v[2], v[3]));
    const int64x2_t odd23 = vreinterpretq_s64_s32(vtrn2q_s32(v[2], v[3]));
    words[0] = vreinterpretq_s32_s64(vtrn1q_s64(even01, even23));
    words[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd01, odd23));
    words[2] = vreinterpretq_s32_s64(vtrn2q_s64(even01, even23));
    words[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd01, odd23));
  }
  template <int kUnitBytes>
  static I Split(I words) {
    if constexpr (kUnitBytes == 4) {
      return words;
    } else {
      static constexpr uint8_t kHalves[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
      static constexpr uint8_t kBytes[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
      return Lookup(vreinterpretq_u8_s32(words), vreinterpretq_s32_u8(vld1q_u8(kUnitBytes == 2 ? kHalves : kBytes)));
    }
  }

  template <int kMax, class Partial, int t>
  static auto Dot(Partial partial, I codes, Element<t> acts) {
    const int8x16_t w = vreinterpretq_s8_s32(codes), x = vreinterpretq_s8_s32(vdupq_laneq_s32(acts.v, t));
    if constexpr (kIsWide<kMax>) {
      const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
      return vpadalq_s16(partial, vpaddq_s16(low, high));  // two products of -128 and -127 fit
    } else {
      Products p = partial;
      p.low = vmlal_s8(p.low, vget_low_s8(w), vget_low_s8(x));
      p.high = vmlal_high_s8(p.high, w, x);
      return p;
    }
  }
  static I Widen(I partial) { return partial; }
  static I Widen(Products p) { return vpaddq_s32(vpaddlq_s16(p.low), vpaddlq_s16(p.high)); }
  template <int kMax>
  static I Scale(I scale) {
    return scale;
  }
  template <int kMax, class Partial>
  static I FoldScaled(I sum, Partial partial, I scale) {
    return vmlaq_s32(sum, Widen(partial), scale);
  }
  template <int kMax, class Partial>
  static I Fold(I sum, Partial partial) {
    return Add(sum, Widen(partial));
  }
  template <int t>
  static I DotPairs(I sum, I pairs, Element<t> acts) {
    const int16x8_t x = vreinterpretq_s16_s32(acts.v);
    sum = vmlal_laneq_s16(sum, vmovn_s32(pairs), x, 2 * t);
    return vmlal_laneq_s16(sum, vshrn_n_s32(pairs, 16), x, 2 * t + 1);
  }

  static F AddF(F a, F b) { return vaddq_f32(a, b); }
  static F SubF(F a, F b) { return vsubq_f32(a, b); }
  static F MulF(F a, F b) { return vmulq_f32(a, b); }
  static F DivF(F a, F b) { return vdivq_f32(a, b); }
  static F FmaF(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F MaxF(F a, F b) { return vmaxq_f32(a, b); }
  static F MinF(F a, F b) { return vminq_f32(a, b); }
  static F RoundF(F v) { return vrndnq_f32(v); }
  static F ToFloat(I v) { return vcvtq_f32_s32(v); }
  static I ToInt(F v) { return vcvtnq_s32_f32(v); }
  static F AsFloat(I v) { return vreinterpretq_f32_s32(v); }
  static I AsInt(F v) { return vreinterpretq_s32_f32(v); }
  static F LoadF(const float* p) { return vld1q_f32(p); }
  static void StoreF(float* p, F v) { vst1q_f32(p, v); }
  static void StoreI8(int8_t* p, I v) {
    const int16x4_t halves = vmovn_s32(v);
    const int32_t word = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
    memcpy(p, &word, sizeof(word));
  }
  static int32_t ReduceAdd(I v) { return vaddvq_s32(v); }
  static int32_t ReduceMax(I v) { return vmaxvq_s32(v); }

  // ---- For qmoe.inl.
  static constexpr bool kLooksUpFloats = false;
  static constexpr bool kDotsSigned = true;
  template <int T>
  static constexpr int kQmoeRows = T == 1 ? 4 : 1;
  struct Spread {
    int shift;
  };
  static I LaneNumbers() {
    static constexpr int32_t kLaneNumbers[4] = {0, 1, 2, 3};
    return vld1q_s32(kLaneNumbers);
  }
  static Spread MakeSpread(int shift) { return {shift}; }
  static F LoadSpread(const uint8_t* p, const Spread& s) {
    if (s.shift == 0) return vreinterpretq_f32_u8(vld1q_u8(p));
    if (s.shift == 1) {
      const float32x2_t two = vreinterpret_f32_u8(vld1_u8(p));
      return vcombine_f32(vdup_lane_f32(two, 0), vdup_lane_f32(two, 1));
    }
    return vreinterpretq_f32_s32(vdupq_n_s32(static_cast<int32_t>(LoadWord(p))));
  }
  template <int N>
  static I Sar(I v) {
    return N == 0 ? v : vshrq_n_s32(v, N == 0 ? 1 : N);
  }
  static I ShrEach(I v, I counts) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), vnegq_s32(counts)));
  }
  template <int kBits>
  static I DotWords(I sum, I codes, I x) {
    const int8x16_t w = vreinterpretq_s8_s32(codes), v = vreinterpretq_s8_s32(x);
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(v)), high = vmull_high_s8(w, v);
    return vpadalq_s16(sum, vpaddq_s16(low, high));  // two products of -128 and -127 fit
  }
  static float ReduceAddF(F v) {
    const float32x2_t s = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
  }
};
