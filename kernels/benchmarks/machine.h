// SPDX-License-Identifier: MIT
// machine.h: what this machine can do at most, measured: bytes read from memory, and multiply-adds in registers.
// Call from one thread; n_threads of OpenMP's pool work, which ggml uses as well.
#ifndef EDGEMOE_BENCHMARKS_MACHINE_H_
#define EDGEMOE_BENCHMARKS_MACHINE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace edgemoe::bench {

double NowSeconds();

struct FreeDeleter {
  void operator()(uint8_t* p) const;
};
using Buffer = std::unique_ptr<uint8_t[], FreeDeleter>;
// 2 MiB aligned, huge pages asked for, not yet touched.
Buffer AllocateHuge(size_t n_bytes);
void AdviseHuge(void* begin, size_t n_bytes);

// Bytes per second with the widest loads of this CPU: the better of one and of four streams per thread.
double MeasureReadBytesPerSecond(const uint8_t* buffer, size_t n_bytes, int n_threads);

// Multiply-adds per second, from registers. Integer: 8-bit products into 32-bit sums by the instruction that a table of
// that name is made of; on AVX2 into 16-bit sums, which is more than an exact kernel can reach. Float: fused. 0 for a
// name without such an instruction (scalar).
double MeasureIntegerPeak(const std::string& isa, int n_threads);
double MeasureFloatPeak(const std::string& isa, int n_threads);

}  // namespace edgemoe::bench
#endif  // EDGEMOE_BENCHMARKS_MACHINE_H_
