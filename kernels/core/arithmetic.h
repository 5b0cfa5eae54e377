// SPDX-License-Identifier: MIT
// arithmetic.h: who multiplies what. A tensor is libedgemoe's *own* when the table of kernels in use (simd/) has its
// format; own slices are interleaved when they arrive. All other tensors are multiplied by the plug-in's functions.
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
  // Room for the panels of up to n_x activation rows on each thread; forgets the panels of earlier products.
  void Prepare(int n_threads, int64_t n_x, uint64_t row_bytes);
  void Multiply(int thread_idx, const ExpertTensor& tensor, const edgemoe_product& product);
  void Parallel(int n_threads, void (*fn)(void*, int32_t, int32_t), void* arg) const {
    engine_.parallel(engine_.context, n_threads, fn, arg);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Panels {
    void Reserve(uint64_t n_bytes);

    std::unique_ptr<char, Free> bytes;
    uint64_t capacity = 0;
    uint64_t key = 0;  // of the activation rows in them; 0: none
  };
  void MultiplyOwn(Panels* panels, simd::Format format, const edgemoe_product& product) const;

  const simd::KernelTable* const table_;
  const edgemoe_kernels engine_;
  std::vector<Panels> panels_;  // [thread]
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_ARITHMETIC_H_
