// SPDX-License-Identifier: MIT
// qmoe.inl: products with the weights of QMoE (qmoe.h) for a traits class V. Included after formats.inl, in the same
// anonymous namespace.
//
// Rows lie as in the file, so lanes are words of one row and not rows: a load is 16, 32 or 64 bytes of it. What a row's
// sum needs across lanes is one reduction at its end. A tile is R rows times T activation rows, whose sums stay in
// registers: a code is unpacked for T products, and a panel is loaded for R.
//
// Traits besides those of formats.inl, beginning with Load, Mul:
//   kQmoeRows<T>        R
//   kLooksUpFloats      LookupF(table, v): of 16 floats those that the low 4 bits of lanes name. Others shift the code
//   to
//                       the top of a lane, and back as a signed number
//   kDotsSigned         DotWords<8> takes codes - 128
//   DotWords<kBits>(sum, codes, x)  sum + 4 codes * 4 activation bytes in each lane
//   LoadSpread(p, MakeSpread(shift))  lane l: float l >> shift of those at p, and none past the last is read
//   LaneNumbers(), Sar<N> (copies of the sign come in), ShrEach(v, counts), ReduceAddF(F): in the order of qmoe.h

constexpr int kQmoeTokens = 4;
// Rows whose codes, in the second-level cache, are multiplied by all tiles of activation rows in turn.
constexpr int64_t kQmoeRowBlock = 64;

template <class V, QmoeArithmetic kArithmetic, int kBits, bool kHasZeroPoints>
struct QmoeKernel {
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int kVectors = kQmoeLineWords / V::kLanes;
  static constexpr int kCenter = 1 << (kBits - 1);
  static constexpr int kCodesInByte = 8 / kBits, kCodesInWord = 32 / kBits;
  static constexpr bool kIsInt8 = kArithmetic == kQmoeInt8;
  static constexpr bool kIsSigned = kIsInt8 && kBits == 8 && V::kDotsSigned;
  static constexpr int64_t kPanelLineBytes =
      (kIsInt8 ? kCodesInByte + 2 : kCodesInWord + (kHasZeroPoints ? 1 : 0)) * kQmoeLineBytes;
  // Codes whose highest bit is flipped are signed: code - kCenter.
  static constexpr uint32_t kFlips = kBits == 8 ? 0x80808080u : kBits == 4 ? 0x88888888u : 0xaaaaaaaau;
  static constexpr uint32_t kMask = kBits == 8 ? 0xffffffffu : kBits == 4 ? 0x0f0f0f0fu : 0x03030303u;

  // What all lines share.
  struct Lines {
    int shift;  // log2 of a block's words
    typename V::Spread spread;
    I zero_point_bits[kVectors];  // of each lane, from the line's first block on
    F floats;                     // of codes
  };
  // A line of one row.
  struct Line {
    const uint8_t* codes;
    const uint8_t* scales;
    uint32_t zero_points;
  };

  static inline __attribute__((always_inline)) Lines MakeLines(const QmoeShape& shape) {
    Lines lines = {};
    lines.shift = QmoeBlockShift(kBits, shape.n_cols, shape.block);
    lines.spread = V::MakeSpread(lines.shift);
    for (int h = 0; h < kVectors; ++h) {
      int32_t bits[V::kLanes];
      for (int l = 0; l < V::kLanes; ++l) bits[l] = kBits * ((h * V::kLanes + l) >> lines.shift);
      lines.zero_point_bits[h] = V::Load(bits);
    }
    float floats[16];
    for (int i = 0; i < 16; ++i) floats[i] = static_cast<float>((i & ((1 << kBits) - 1)) - kCenter);
    lines.floats = V::LoadF(floats);
    return lines;
  }

  static inline __attribute__((always_inline)) I Flipped(I v) {
    return V::Xor(v, V::Set(static_cast<int32_t>(kFlips)));
  }

  // Column j of each word, less kCenter.
  template <int j>
  static inline __attribute__((always_inline)) F Code(const Lines& lines, I v) {
    if constexpr (V::kLooksUpFloats && kBits <= 4) {
      return V::LookupF(lines.floats, V::template Shr<kBits * j>(v));
    } else {
      return V::ToFloat(V::template Sar<32 - kBits>(V::template Shl<32 - kBits*(j + 1)>(v)));
    }
  }

  // sums += lines of R rows times lines of T panels.
  template <int R, int T>
  static inline __attribute__((always_inline)) void AddLine(const Lines& lines, const Line (&line)[R],
                                                            const uint8_t* const (&x)[T], F (&sums)[R][T][kVectors]) {
    For<kVectors>([&](auto h) __attribute__((always_inline)) {
      constexpr int kAt = h * V::kLanes * 4;
      I v[R], zero[R];
      F scale[R];
      For<R>([&](auto r) __attribute__((always_inline)) {
        v[r] = V::Load(line[r].codes + kAt);
        // One activation row is bound by memory: 0.65 to 0.73 of one core's bandwidth without, 0.94 with (Sapphire
        // Rapids, 4 bits, kQmoeInt8); a line of 64 bytes is fetched once.
        if constexpr (T == 1 && h == 0 && V::kPrefetchBytes > 0) V::Prefetch(line[r].codes + V::kPrefetchBytes);
        scale[r] = V::LoadSpread(line[r].scales + 4 * ((h * V::kLanes) >> lines.shift), lines.spread);
        if constexpr (kHasZeroPoints) {
          const I bits = V::ShrEach(V::Set(static_cast<int32_t>(line[r].zero_points)), lines.zero_point_bits[h]);
          zero[r] = V::And(bits, V::Set((1 << kBits) - 1));
        }
      });
      if constexpr (kIsInt8) {
        I p[R][T];
        For<T>([&](auto t) __attribute__((always_inline)) {
          const I below_zero = V::Load(x[t] + (kCodesInByte + 1) * kQmoeLineBytes + kAt);
          For<R>([&](auto r) __attribute__((always_inline)) {
            if constexpr (kHasZeroPoints) {
              p[r][t] = V::Mul(kIsSigned ? V::Sub(zero[r], V::Set(kCenter)) : zero[r], below_zero);
            } else {
              p[r][t] = kIsSigned ? V::Zero() : below_zero;
            }
          });
        });
        For<kCodesInByte>([&](auto j) __attribute__((always_inline)) {
          I codes[R];
          For<R>([&](auto r) __attribute__((always_inline)) {
            codes[r] = V::template Shr<kBits * j>(v[r]);
            if constexpr (kBits < 8) codes[r] = V::And(codes[r], V::Set(static_cast<int32_t>(kMask)));
            if constexpr (kIsSigned) codes[r] = Flipped(codes[r]);
          });
          For<T>([&](auto t) __attribute__((always_inline)) {
            const I q = V::Load(x[t] + j * kQmoeLineBytes + kAt);
            For<R>([&](auto r)
                       __attribute__((always_inline)) { p[r][t] = V::template DotWords<kBits>(p[r][t], codes[r], q); });
          });
        });
        For<T>([&](auto t) __attribute__((always_inline)) {
          const F d = V::LoadF(reinterpret_cast<const float*>(x[t] + kCodesInByte * kQmoeLineBytes + kAt));
          For<R>([&](auto r) __attribute__((always_inline)) {
            sums[r][t][h] = V::FmaF(V::ToFloat(p[r][t]), V::MulF(scale[r], d), sums[r][t][h]);
          });
        });
      } else {
        F p[R][T];
        if constexpr (!(V::kLooksUpFloats && kBits <= 4)) {
          For<R>([&](auto r) __attribute__((always_inline)) { v[r] = Flipped(v[r]); });
        }
        if constexpr (kHasZeroPoints) {
          For<T>([&](auto t) __attribute__((always_inline)) {
            const F sum = V::LoadF(reinterpret_cast<const float*>(x[t] + kCodesInWord * kQmoeLineBytes + kAt));
            For<R>([&](auto r) __attribute__((always_inline)) {
              p[r][t] = V::MulF(V::ToFloat(V::Sub(V::Set(kCenter), zero[r])), sum);
            });
          });
        }
        For<kCodesInWord>([&](auto j) __attribute__((always_inline)) {
          F w[R];
          For<R>([&](auto r) __attribute__((always_inline)) { w[r] = Code<j>(lines, v[r]); });
          For<T>([&](auto t) __attribute__((always_inline)) {
            const F column = V::LoadF(reinterpret_cast<const float*>(x[t] + j * kQmoeLineBytes + kAt));
            For<R>([&](auto r) __attribute__((always_inline)) {
              p[r][t] = j == 0 && !kHasZeroPoints ? V::MulF(w[r], column) : V::FmaF(w[r], column, p[r][t]);
            });
          });
        });
        For<R>([&](auto r) __attribute__((always_inline)) {
          For<T>([&](auto t)
                     __attribute__((always_inline)) { sums[r][t][h] = V::FmaF(p[r][t], scale[r], sums[r][t][h]); });
        });
      }
    });
  }

  // Up to 4 bytes from that of `bit` on, n_bits of them, so that `bit` comes first.
  static inline __attribute__((always_inline)) uint32_t LoadBits(const uint8_t* p, int64_t bit, int64_t n_bits) {
    p += bit >> 3;
    uint32_t word = p[0];
    if (n_bits > 8) {
      word |= static_cast<uint32_t>(p[1]) << 8;
      if (n_bits > 16) word |= static_cast<uint32_t>(p[2]) << 16;
      if (n_bits > 24) word |= static_cast<uint32_t>(p[3]) << 24;
    }
    return word >> (bit & 7);
  }

  // n_rows (at most R: the last takes the place of those that lack) from `row` on, times n_x (at most T) panels from
  // `first_x` on.
  template <int R, int T>
  static void MultiplyTile(const QmoeProduct& product, const Lines& lines, int64_t row, int n_rows, int first_x,
                           int n_x) {
    const int64_t n_cols = product.shape.n_cols, row_bytes = n_cols * kBits / 8;
    const int64_t n_blocks = n_cols / product.shape.block, n_lines = row_bytes / kQmoeLineBytes;
    Line line[R];
    const uint8_t* scales[R];
    int64_t zero_bit[R];
    const uint8_t* x[T];
    F sums[R][T][kVectors];
    For<R>([&](auto r) __attribute__((always_inline)) {
      const int64_t at = row + (r < n_rows ? r : n_rows - 1);
      line[r].codes = product.weights + at * row_bytes;
      scales[r] = product.scales + at * n_blocks * 4;
      zero_bit[r] = product.zero_points_bit + at * product.zero_point_row_bits;
    });
    For<T>([&](auto t) __attribute__((always_inline)) {
      x[t] = static_cast<const uint8_t*>(product.x[first_x + (t < n_x ? t : n_x - 1)]);
      For<R>([&](auto r) __attribute__((always_inline)) {
        For<kVectors>([&](auto h) __attribute__((always_inline)) { sums[r][t][h] = V::ZeroF(); });
      });
    });
    const auto to_line = [&](int64_t i) __attribute__((always_inline)) {
      const int64_t block = (i * kQmoeLineWords) >> lines.shift;
      For<R>([&](auto r) __attribute__((always_inline)) {
        line[r].scales = scales[r] + block * 4;
        if constexpr (kHasZeroPoints) {
          int64_t n = kQmoeLineWords >> lines.shift;
          if (n < 1) n = 1;
          if (n > n_blocks - block) n = n_blocks - block;
          line[r].zero_points = LoadBits(product.zero_points, zero_bit[r] + block * kBits, n * kBits);
        }
      });
    };
    for (int64_t i = 0; i < n_lines; ++i) {
      to_line(i);
      AddLine<R, T>(lines, line, x, sums);
      For<R>([&](auto r) __attribute__((always_inline)) { line[r].codes += kQmoeLineBytes; });
      For<T>([&](auto t) __attribute__((always_inline)) { x[t] += kPanelLineBytes; });
    }
    if (const int64_t n_tail = row_bytes - n_lines * kQmoeLineBytes; n_tail > 0) {
      // Filled up with zeros, of which nothing comes.
      alignas(64) uint8_t codes[R][kQmoeLineBytes] = {};
      alignas(64) float last_scales[R][kQmoeLineWords] = {};
      to_line(n_lines);
      const int64_t n = n_blocks - ((n_lines * kQmoeLineWords) >> lines.shift);
      for (int r = 0; r < R; ++r) {
        memcpy(codes[r], line[r].codes, static_cast<size_t>(n_tail));
        memcpy(last_scales[r], line[r].scales, static_cast<size_t>(n) * sizeof(float));
        line[r].codes = codes[r];
        line[r].scales = reinterpret_cast<const uint8_t*>(last_scales[r]);
      }
      AddLine<R, T>(lines, line, x, sums);
    }
    For<R>([&](auto r) __attribute__((always_inline)) {
      if (r >= n_rows) return;
      const float bias = product.bias != nullptr ? product.bias[row + r] : 0.0f;
      For<T>([&](auto t) __attribute__((always_inline)) {
        if (t >= n_x) return;
        F sum = sums[r][t][0];
        if constexpr (kVectors == 2) sum = V::AddF(sum, sums[r][t][1]);
        if constexpr (kVectors == 4) {
          sum = V::AddF(V::AddF(sum, sums[r][t][2]), V::AddF(sums[r][t][1], sums[r][t][3]));
        }
        const float y = V::ReduceAddF(sum);
        product.y[first_x + t][row + r] = product.bias != nullptr ? y + bias : y;
      });
    });
  }

  template <int T>
  static void MultiplyRows(const QmoeProduct& product, const Lines& lines, int64_t row, int64_t end, int first_x,
                           int n_x) {
    constexpr int R = V::template kQmoeRows<T>;
    for (; row < end; row += R) {
      MultiplyTile<R, T>(product, lines, row, static_cast<int>(end - row < R ? end - row : R), first_x, n_x);
    }
  }

  static void Multiply(const QmoeProduct& product) {
    const Lines lines = MakeLines(product.shape);
    for (int64_t row = 0; row < product.n_rows; row += kQmoeRowBlock) {
      const int64_t end = row + kQmoeRowBlock < product.n_rows ? row + kQmoeRowBlock : product.n_rows;
      for (int32_t i = 0; i < product.n_x;) {
        const int n_x = product.n_x - i < kQmoeTokens ? product.n_x - i : kQmoeTokens;
        if (n_x == 1) {
          MultiplyRows<1>(product, lines, row, end, i, 1);
        } else {
          MultiplyRows<kQmoeTokens>(product, lines, row, end, i, n_x);
        }
        i += n_x;
      }
    }
  }
};

template <class V, QmoeArithmetic kArithmetic, int kBits>
static void QmoeOfBits(const QmoeProduct& product) {
  if (product.shape.has_zero_points) {
    QmoeKernel<V, kArithmetic, kBits, true>::Multiply(product);
  } else {
    QmoeKernel<V, kArithmetic, kBits, false>::Multiply(product);
  }
}

template <class V>
static void Qmoe(const QmoeProduct& product) {
  const bool is_int8 = product.shape.arithmetic == kQmoeInt8;
  switch (product.shape.bits) {
    case 2:
      return is_int8 ? QmoeOfBits<V, kQmoeInt8, 2>(product) : QmoeOfBits<V, kQmoeFloat, 2>(product);
    case 4:
      return is_int8 ? QmoeOfBits<V, kQmoeInt8, 4>(product) : QmoeOfBits<V, kQmoeFloat, 4>(product);
    default:
      return is_int8 ? QmoeOfBits<V, kQmoeInt8, 8>(product) : QmoeOfBits<V, kQmoeFloat, 8>(product);
  }
}
