// SPDX-License-Identifier: MIT
// vector_neon_i8mm.inl: traits (formats.inl) of Advanced SIMD with the products of bytes of ARMv8.6: the dot product of
// unsigned with signed ones. Not the matrix product: it wants 8 columns of a row next to each other, and zipping two
// steps of 4 takes as many instructions as it saves.

struct NeonI8mm : NeonDotprod {
  template <int kMax, int t>
  static I Dot(I partial, I codes, Element<t> acts) {
    if constexpr (kMax == kSigned) {
      return NeonDotprod::Dot<kMax>(partial, codes, acts);
    } else {
      return vusdotq_laneq_s32(partial, vreinterpretq_u8_s32(codes), vreinterpretq_s8_s32(acts.v), t);
    }
  }
};
