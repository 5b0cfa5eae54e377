// SPDX-License-Identifier: MIT
// vector_neon_dotprod.inl: traits (formats.inl) of Advanced SIMD with the dot products of bytes of ARMv8.2. They take
// signed bytes, so no code needs a bias, and the activations of
// four tokens from one register. Eight partial sums, as many totals and what they are made of fit into 32 registers.

struct NeonDotprod : Neon {
  static constexpr bool kPrefersSigned = true;
  template <int T>
  static constexpr int kTileTokens = T;
  template <int kMax>
  static constexpr int kSteps = 8;
  template <int kMax>
  static constexpr bool kIsWide = true;

  template <int kMax, int t>
  static I Dot(I partial, I codes, Element<t> acts) {
    return vdotq_laneq_s32(partial, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(acts.v), t);
  }

  template <int kBits>
  static I DotWords(I sum, I codes, I x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x));
  }
};
