// SPDX-License-Identifier: MIT
// arithmetic.h: who multiplies what. A tensor is libedgemoe's *own* when the table of kernels in use (simd/) has its
// format; all others are multiplied by the plug-in's functions. Slices of own tensors are either packed, their rows
// interleaved when they arrived, or lie as in the file and are interleaved piece by piece on their way to the kernels.
// Thread promise: Multiply may run on several threads at once with distinct thread indices; the rest on one thread.
#ifndef EDGEMOE_CORE_ARITHMETIC_H_
#define EDGEMOE_CORE_ARITHMETIC_H_

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/expert_file.h"
#include "core/status.h"
#include "edgemoe/edgemoe.h"
#include "simd/kernel_table.h"
#include "simd/pack.h"

namespace edgemoe {

// The kernels of this machine, or those that the environment's EDGEMOE_ISA names.
Status ActiveKernels(const simd::KernelTable** table);
// The kernels to use for a model: none when the plug-in's arithmetic is asked for, or when this CPU could only run the
// portable ones and nobody asked for them by name.
Status KernelsFor(int32_t arithmetic, const simd::KernelTable** table);
// Whether the table multiplies this tensor, whose rows must have the format's size.
bool IsOwn(const simd::KernelTable* table, const ExpertTensor& tensor);

// Interleaves a slice of an own tensor in place, from `head_bytes` after `slot` to its very beginning. `scratch` has
// PackScratchBytes.
uint64_t PackScratchBytes(const simd::KernelTable& table, const ExpertTensor& tensor);
void PackSlice(const simd::KernelTable& table, const ExpertTensor& tensor, char* slot, uint64_t head_bytes,
               char* scratch);

class Arithmetic {
 public:
  Arithmetic(const simd::KernelTable* table, const edgemoe_kernels& engine) : table_(table), engine_(engine) {}

  const simd::KernelTable& table() const { return *table_; }
  uint64_t RowBytes(const ExpertTensor& tensor, const edgemoe_matmul& m) const;
  void Quantize(const ExpertTensor& tensor, const edgemoe_matmul& m, const float* x, void* row) const;
  // Room on each thread for the panels of up to n_x activation rows, and to interleave rows of up to weight_row_bytes
  // (0: none); forgets the panels of earlier products.
  void Prepare(int n_threads, int64_t n_x, uint64_t row_bytes, uint64_t weight_row_bytes);
  // packed: whether the rows of an own tensor are.
  void Multiply(int thread_idx, const ExpertTensor& tensor, bool packed, const edgemoe_product& product);
  void Parallel(int n_threads, void (*fn)(void*, int32_t, int32_t), void* arg) const {
    engine_.parallel(engine_.context, n_threads, fn, arg);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  // Of one thread: packed groups of weights, groups_bytes_ of them, and then panels.
  struct Scratch {
    void Reserve(uint64_t n_bytes);

    std::unique_ptr<char, Free> bytes;
    uint64_t capacity = 0;
    uint64_t panels_key = 0;  // of the activation rows in them; 0: none
  };
  void MultiplyOwn(Scratch* scratch, simd::Format format, bool packed, const edgemoe_product& product) const;

  const simd::KernelTable* const table_;
  const edgemoe_kernels engine_;
  std::vector<Scratch> scratch_;  // [thread]
  uint64_t groups_bytes_ = 0;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_ARITHMETIC_H_
