// SPDX-License-Identifier: MIT
#include "benchmarks/machine.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace edgemoe::bench {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int64_t kPeakSteps = 1 << 18;  // a few ms
using ReadFunction = uint64_t (*)(const uint8_t*, size_t);

// Reads n_bytes at the start of each of four quarters in turn (Streams 4), or straight on (1). n_bytes % 2048 == 0.
template <int Streams>
uint64_t ReadPortable(const uint8_t* p, size_t n_bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(p);
  const size_t n = n_bytes / sizeof(uint64_t) / Streams;
  uint64_t sums[8] = {};
  for (size_t i = 0; i < n; i += 8) {
    for (int s = 0; s < Streams; ++s)
      for (size_t k = 0; k < 8; ++k) sums[k] += words[static_cast<size_t>(s) * n + i + k];
  }
  return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

// Twelve sums in flight: latency 4 times two ports, and some more. Each is a variable of its own, pinned to a register
// by an empty asm, which also keeps the compiler from computing in advance; sums in an array would all be spilled.
#define EDGEMOE_STEP(STEP, SUM)                                                      \
  {                                                                                  \
    auto& one = SUM;                                                                 \
    asm volatile("" : EDGEMOE_IN_REGISTER(a)); /* or maddubs would leave the loop */ \
    one = STEP;                                                                      \
    asm volatile("" : EDGEMOE_IN_REGISTER(one));                                     \
  }
#define EDGEMOE_PEAK(NAME, TARGET, REGISTER, ZERO, SUM_ZERO, STEP)   \
  __attribute__((target(TARGET))) void NAME() {                      \
    REGISTER a = ZERO, b = ZERO;                                     \
    auto s0 = SUM_ZERO, s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0; \
    auto s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;     \
    asm volatile("" : EDGEMOE_IN_REGISTER(b));                       \
    for (int64_t i = 0; i < kPeakSteps; ++i) {                       \
      EDGEMOE_STEP(STEP, s0);                                        \
      EDGEMOE_STEP(STEP, s1);                                        \
      EDGEMOE_STEP(STEP, s2);                                        \
      EDGEMOE_STEP(STEP, s3);                                        \
      EDGEMOE_STEP(STEP, s4);                                        \
      EDGEMOE_STEP(STEP, s5);                                        \
      EDGEMOE_STEP(STEP, s6);                                        \
      EDGEMOE_STEP(STEP, s7);                                        \
      EDGEMOE_STEP(STEP, s8);                                        \
      EDGEMOE_STEP(STEP, s9);                                        \
      EDGEMOE_STEP(STEP, s10);                                       \
      EDGEMOE_STEP(STEP, s11);                                       \
    }                                                                \
  }
constexpr int kSums = 12;

#if defined(__x86_64__)
#define EDGEMOE_IN_REGISTER(x) "+v"(x)
template <int Streams>
__attribute__((target("avx2"))) uint64_t ReadAvx2(const uint8_t* p, size_t n_bytes) {
  const size_t n = n_bytes / Streams;
  __m256i sums[8] = {};
  for (size_t i = 0; i < n; i += 256) {
#pragma GCC unroll 4
    for (int s = 0; s < Streams; ++s) {
#pragma GCC unroll 8
      for (size_t k = 0; k < 8; ++k) {
        const uint8_t* at = p + static_cast<size_t>(s) * n + i + 32 * k;
        sums[k] = _mm256_add_epi64(sums[k], _mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
      }
    }
  }
  for (int k = 1; k < 8; ++k) sums[0] = _mm256_add_epi64(sums[0], sums[k]);
  return static_cast<uint64_t>(_mm256_extract_epi64(sums[0], 0) + _mm256_extract_epi64(sums[0], 1) +
                               _mm256_extract_epi64(sums[0], 2) + _mm256_extract_epi64(sums[0], 3));
}

template <int Streams>
__attribute__((target("avx512f"))) uint64_t ReadAvx512(const uint8_t* p, size_t n_bytes) {
  const size_t n = n_bytes / Streams;
  __m512i sums[8] = {};
  for (size_t i = 0; i < n; i += 512) {
#pragma GCC unroll 4
    for (int s = 0; s < Streams; ++s) {
#pragma GCC unroll 8
      for (size_t k = 0; k < 8; ++k) {
        const uint8_t* at = p + static_cast<size_t>(s) * n + i + 64 * k;
        sums[k] = _mm512_add_epi64(sums[k], _mm512_load_si512(at));
      }
    }
  }
  for (int k = 1; k < 8; ++k) sums[0] = _mm512_add_epi64(sums[0], sums[k]);
  uint64_t words[8];
  _mm512_storeu_si512(words, sums[0]);
  return words[0] + words[1] + words[2] + words[3] + words[4] + words[5] + words[6] + words[7];
}

EDGEMOE_PEAK(Vnni512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_setzero_si512(),
             _mm512_dpbusd_epi32(one, a, b))
EDGEMOE_PEAK(Vnni256, "avx512f,avx512vl,avx512vnni", __m256i, _mm256_setzero_si256(), _mm256_setzero_si256(),
             _mm256_dpbusd_epi32(one, a, b))
EDGEMOE_PEAK(VnniVex, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), _mm256_setzero_si256(),
             _mm256_dpbusd_avx_epi32(one, a, b))
EDGEMOE_PEAK(Maddubs, "avx2", __m256i, _mm256_setzero_si256(), _mm256_setzero_si256(),
             _mm256_add_epi16(one, _mm256_maddubs_epi16(a, b)))
EDGEMOE_PEAK(Fma512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_fmadd_ps(a, b, one))
EDGEMOE_PEAK(Fma256, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_fmadd_ps(a, b, one))
#elif defined(__aarch64__)
#define EDGEMOE_IN_REGISTER(x) "+w"(x)
EDGEMOE_PEAK(Dot, "arch=armv8.2-a+dotprod", int8x16_t, vdupq_n_s8(0), vdupq_n_s32(0), vdotq_s32(one, a, b))
EDGEMOE_PEAK(Matrix, "arch=armv8.2-a+i8mm", int8x16_t, vdupq_n_s8(0), vdupq_n_s32(0), vmmlaq_s32(one, a, b))
EDGEMOE_PEAK(Widening, "arch=armv8-a", int8x8_t, vdup_n_s8(0), vdupq_n_s16(0), vmlal_s8(one, a, b))
EDGEMOE_PEAK(FmaNeon, "arch=armv8-a", float32x4_t, vdupq_n_f32(0), vdupq_n_f32(0), vfmaq_f32(one, a, b))
#endif

struct Peak {
  void (*run)() = nullptr;
  int products_per_step = 0;  // of one register
};

bool Has(const std::string& isa, const char* part) { return isa.find(part) != std::string::npos; }

Peak IntegerPeakOf(const std::string& isa) {
#if defined(__x86_64__)
  if (Has(isa, "512")) return {Vnni512, 64};
  if (Has(isa, "vnni")) {
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl")) return {Vnni256, 32};
    return {VnniVex, 32};
  }
  if (Has(isa, "avx2")) return {Maddubs, 32};
#elif defined(__aarch64__)
  if (Has(isa, "i8mm")) return {Matrix, 32};
  if (Has(isa, "dot")) return {Dot, 16};
  if (Has(isa, "neon")) return {Widening, 8};
#endif
  (void)isa;
  return {};
}

Peak FloatPeakOf(const std::string& isa) {
#if defined(__x86_64__)
  if (Has(isa, "512")) return {Fma512, 16};
  if (Has(isa, "avx")) return {Fma256, 8};
#elif defined(__aarch64__)
  if (Has(isa, "neon")) return {FmaNeon, 4};
#endif
  (void)isa;
  return {};
}

double MeasurePeak(const Peak& peak, int n_threads) {
  if (peak.run == nullptr) return 0;
  double begin = 0, end = 0;
#pragma omp parallel num_threads(n_threads)
  {
    peak.run();  // out of the power-saving state that wide instructions leave
#pragma omp barrier
#pragma omp master
    begin = NowSeconds();
    peak.run();
#pragma omp barrier
#pragma omp master
    end = NowSeconds();
  }
  return static_cast<double>(n_threads) * kPeakSteps * kSums * peak.products_per_step / (end - begin);
}

double ReadOnce(ReadFunction read, const uint8_t* buffer, size_t part_bytes, int n_threads) {
  uint64_t total = 0;
  double begin = 0, end = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
  {
#pragma omp barrier
#pragma omp master
    begin = NowSeconds();
    total += read(buffer + static_cast<size_t>(omp_get_thread_num()) * part_bytes, part_bytes);
#pragma omp barrier
#pragma omp master
    end = NowSeconds();
  }
  volatile uint64_t sink = total;
  (void)sink;
  return static_cast<double>(part_bytes) * n_threads / (end - begin);
}

}  // namespace

double NowSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void FreeDeleter::operator()(uint8_t* p) const { std::free(p); }

void AdviseHuge(void* begin, size_t n_bytes) {
#if defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + n_bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)n_bytes;
#endif
}

Buffer AllocateHuge(size_t n_bytes) {
  const size_t rounded = (n_bytes + kHugePage - 1) / kHugePage * kHugePage;
  Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, rounded)));
  if (buffer == nullptr) std::abort();
  AdviseHuge(buffer.get(), rounded);
  return buffer;
}

double MeasureReadBytesPerSecond(const uint8_t* buffer, size_t n_bytes, int n_threads) {
  const size_t part_bytes = n_bytes / static_cast<size_t>(n_threads) / 4096 * 4096;
  ReadFunction one = ReadPortable<1>, four = ReadPortable<4>;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    one = ReadAvx512<1>, four = ReadAvx512<4>;
  } else if (__builtin_cpu_supports("avx2")) {
    one = ReadAvx2<1>, four = ReadAvx2<4>;
  }
#endif
  return std::max(ReadOnce(one, buffer, part_bytes, n_threads), ReadOnce(four, buffer, part_bytes, n_threads));
}

double MeasureIntegerPeak(const std::string& isa, int n_threads) { return MeasurePeak(IntegerPeakOf(isa), n_threads); }
double MeasureFloatPeak(const std::string& isa, int n_threads) { return MeasurePeak(FloatPeakOf(isa), n_threads); }

}  // namespace edgemoe::bench
