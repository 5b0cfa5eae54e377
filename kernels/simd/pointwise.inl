// SPDX-License-Identifier: MIT
// pointwise.inl: quantization of activations, the functions between the two halves of an expert, and the sum of
// experts, for a traits class V (formats.inl). Included after formats.inl, in the same anonymous namespace.

// ---- Quantization. m is the largest |x| as bits, so that NaN and Inf, which are larger than any number, are seen.

template <class V>
static inline __attribute__((always_inline)) typename V::I AbsBits(const float* x) {
  return V::And(V::AsInt(V::LoadF(x)), V::Set(0x7fffffff));
}

template <class V, int kBlock>
static void Quantize(const float* x, void* panel, int64_t n_cols) {
  using I = typename V::I;
  int8_t* q = static_cast<int8_t*>(panel);
  float* d = reinterpret_cast<float*>(q + n_cols);
  int32_t* sums = reinterpret_cast<int32_t*>(d + n_cols / kBlock);
  for (int64_t col = 0; col < n_cols; col += kBlock, ++d) {
    I max_bits = AbsBits<V>(x + col);
    for (int i = V::kLanes; i < kBlock; i += V::kLanes) max_bits = V::MaxI(max_bits, AbsBits<V>(x + col + i));
    const int32_t bits = V::ReduceMax(max_bits);
    float m;
    memcpy(&m, &bits, sizeof(m));
    // A block of NaN, or of nothing worth a scale, is q = 0: then x * 0 is 0 for every finite x.
    const bool is_finite = bits < 0x7f800000, is_zero = !(m >= 0x1p-100f);
    const typename V::F inverse = V::SetF(is_finite && !is_zero ? 127.0f / m : 0.0f);
    *d = is_zero ? 0.0f : m / 127.0f;
    if (!is_finite) {
      const uint32_t nan = 0x7fc00000;
      memcpy(d, &nan, sizeof(nan));
    }
    for (int i = 0; i < kBlock; i += 16, ++sums) {
      I sum = V::Zero();
      for (int k = i; k < i + 16; k += V::kLanes) {
        const I v = is_finite ? V::ToInt(V::MulF(V::LoadF(x + col + k), inverse)) : V::Zero();
        V::StoreI8(q + col + k, v);
        sum = V::Add(sum, v);
      }
      *sums = V::ReduceAdd(sum);
    }
  }
}

static void CopyFloats(const float* x, void* panel, int64_t n_cols) {
  memcpy(panel, x, static_cast<size_t>(n_cols) * sizeof(float));
}

// ---- Vectors of which only n < kLanes floats exist.

template <class V>
static typename V::F LoadSome(const float* p, int64_t n) {
  float v[V::kLanes] = {};
  memcpy(v, p, static_cast<size_t>(n) * sizeof(float));
  return V::LoadF(v);
}

template <class V>
static void StoreSome(float* p, typename V::F value, int64_t n) {
  float v[V::kLanes];
  V::StoreF(v, value);
  memcpy(p, v, static_cast<size_t>(n) * sizeof(float));
}

// ---- Activation functions. NaN goes through all of them.

// exp: x = n ln 2 + r with ln 2 in two parts, a polynomial in r, n in the exponent. Bounds keep n + 127 in 1 .. 254.
template <class V>
static inline __attribute__((always_inline)) typename V::F Exp(typename V::F x) {
  using F = typename V::F;
  x = V::MinF(V::SetF(88.0f), V::MaxF(V::SetF(-87.0f), x));
  const F n = V::RoundF(V::MulF(x, V::SetF(0x1.715476p+0f)));
  F r = V::FmaF(n, V::SetF(-0x1.62e400p-1f), x);
  r = V::FmaF(n, V::SetF(-0x1.7f7d1cp-20f), r);
  F p = V::SetF(1.0f / 720);
  p = V::FmaF(p, r, V::SetF(1.0f / 120));
  p = V::FmaF(p, r, V::SetF(1.0f / 24));
  p = V::FmaF(p, r, V::SetF(1.0f / 6));
  p = V::FmaF(p, r, V::SetF(0.5f));
  p = V::FmaF(p, r, V::SetF(1.0f));
  p = V::FmaF(p, r, V::SetF(1.0f));
  return V::MulF(p, V::AsFloat(V::template Shl<23>(V::Add(V::ToInt(n), V::Set(127)))));
}

template <class V>
static inline __attribute__((always_inline)) typename V::F Negated(typename V::F x) {
  return V::AsFloat(V::Xor(V::AsInt(x), V::Set(INT32_MIN)));
}

// g / (1 + exp(minus_x)): g times the logistic function of x.
template <class V>
static inline __attribute__((always_inline)) typename V::F Gated(typename V::F g, typename V::F minus_x) {
  return V::DivF(g, V::AddF(V::SetF(1.0f), Exp<V>(minus_x)));
}

template <class V>
static inline __attribute__((always_inline)) typename V::F Gelu(typename V::F g) {
  using F = typename V::F;
  F t = V::MulF(V::SetF(0.044715f), g);
  t = V::FmaF(t, g, V::SetF(1.0f));
  t = V::MulF(t, g);
  t = V::MulF(t, V::SetF(1.5957691216057308f));  // 2 sqrt(2 / pi): tanh in terms of the logistic function
  return Gated<V>(g, Negated<V>(t));
}

// max(g, 0). The sum turns the -0 that a maximum may be into 0.
template <class V>
static inline __attribute__((always_inline)) typename V::F Relu(typename V::F g) {
  return V::AddF(V::MaxF(V::ZeroF(), g), V::ZeroF());
}

static constexpr bool HasUp(GluKind kind) { return kind != kSilu && kind != kGelu && kind != kReluSquared; }

template <class V, GluKind kKind>
static inline __attribute__((always_inline)) typename V::F Act(const GluParams& params, typename V::F g,
                                                               typename V::F u) {
  using F = typename V::F;
  if constexpr (kKind == kSwiGluOai || kKind == kSwiGluClamp) {
    const F limit = V::SetF(params.limit), minus_limit = V::SetF(-params.limit);
    g = V::MinF(limit, g);
    u = V::MaxF(minus_limit, V::MinF(limit, u));
    if constexpr (kKind == kSwiGluClamp) return V::MulF(Gated<V>(g, Negated<V>(g)), u);
    return V::MulF(Gated<V>(g, V::MulF(V::SetF(params.alpha), Negated<V>(g))), V::AddF(u, V::SetF(params.beta)));
  } else if constexpr (kKind == kSwiGlu) {
    return V::MulF(Gated<V>(g, Negated<V>(g)), u);
  } else if constexpr (kKind == kGeGlu) {
    return V::MulF(Gelu<V>(g), u);
  } else if constexpr (kKind == kReGlu) {
    return V::MulF(Relu<V>(g), u);
  } else if constexpr (kKind == kSilu) {
    return Gated<V>(g, Negated<V>(g));
  } else if constexpr (kKind == kGelu) {
    return Gelu<V>(g);
  } else {
    return V::MulF(Relu<V>(g), Relu<V>(g));
  }
}

template <class V, GluKind kKind>
static void GluOf(const GluParams& params, const float* gate, const float* gate_bias, const float* up,
                  const float* up_bias, float* out, int64_t n) {
  using F = typename V::F;
  const auto vector = [&](int64_t i, auto load) __attribute__((always_inline)) {
    F g = load(gate + i), u = V::ZeroF();
    if (gate_bias != nullptr) g = V::AddF(g, load(gate_bias + i));
    if constexpr (HasUp(kKind)) {
      u = load(up + i);
      if (up_bias != nullptr) u = V::AddF(u, load(up_bias + i));
    }
    return Act<V, kKind>(params, g, u);
  };
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::StoreF(out + i, vector(i, [](const float* p) { return V::LoadF(p); }));
  if (i < n) StoreSome<V>(out + i, vector(i, [&](const float* p) { return LoadSome<V>(p, n - i); }), n - i);
}

template <class V>
static void Glu(const GluParams& params, const float* gate, const float* gate_bias, const float* up,
                const float* up_bias, float* out, int64_t n) {
  using Function = void (*)(const GluParams&, const float*, const float*, const float*, const float*, float*, int64_t);
  static constexpr Function kByKind[kGluKindCount] = {GluOf<V, kSwiGlu>, GluOf<V, kSwiGluOai>,  GluOf<V, kSwiGluClamp>,
                                                      GluOf<V, kGeGlu>,  GluOf<V, kReGlu>,      GluOf<V, kSilu>,
                                                      GluOf<V, kGelu>,   GluOf<V, kReluSquared>};
  kByKind[params.kind](params, gate, gate_bias, up, up_bias, out, n);
}

// ---- The sum of experts.

template <class V>
static void Combine(const float* const* rows, const float* const* biases, const float* weights, int n_rows, float* out,
                    int64_t n) {
  using F = typename V::F;
  const auto vector = [&](int64_t i, auto load) __attribute__((always_inline)) {
    F sum = V::ZeroF();
    for (int u = 0; u < n_rows; ++u) {
      F v = load(rows[u] + i);
      if (biases != nullptr) v = V::AddF(v, load(biases[u] + i));
      const F w = V::SetF(weights[u]);
      sum = u == 0 ? V::MulF(w, v) : V::FmaF(w, v, sum);
    }
    return sum;
  };
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::StoreF(out + i, vector(i, [](const float* p) { return V::LoadF(p); }));
  if (i < n) StoreSome<V>(out + i, vector(i, [&](const float* p) { return LoadSome<V>(p, n - i); }), n - i);
}
