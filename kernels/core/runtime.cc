// SPDX-License-Identifier: MIT
#include "core/runtime.h"

namespace edgemoe {

Status OpenRuntime(const edgemoe_options& options, const FileOpener& opener, edgemoe_runtime** runtime) {
  if (options.eviction < EDGEMOE_EVICT_LRU || options.eviction > EDGEMOE_EVICT_AUTO) {
    return Status(
        EDGEMOE_INVALID_ARGUMENT,
        Format("eviction rule %d, expected 0 (LRU), 1 (LFU with decay), 2 (least-stale), 3 (utility) or 4 (auto)",
               options.eviction));
  }
  if (options.n_tensors <= 0 || options.n_io_threads <= 0) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("%d tensors and %d reader threads, expected at least one of each",
                                                   options.n_tensors, options.n_io_threads));
  }
  std::unique_ptr<ExpertFile> file;
  if (Status s = ExpertFile::Open(options, opener, &file); !s.ok()) return s;
  const simd::KernelTable* kernels = nullptr;
  if (Status s = KernelsFor(options.arithmetic, &kernels); !s.ok()) return s;
  for (size_t i = 0; i < file->tensors().size(); ++i) file->SetOwn(i, IsOwn(kernels, file->tensors()[i]));
  for (const ExpertTensor& t : file->tensors()) {
    if (t.copy_of < 0 || t.own) continue;
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("low-bit copy %s: libedgemoe's own kernels are to multiply it, and they do not; use them "
                         "(kernels 'auto'), and a companion in a format that they have, such as Q2_K or Q4_0",
                         t.name.c_str()));
  }
  auto result =
      std::make_unique<edgemoe_runtime>(std::move(file), static_cast<edgemoe_eviction>(options.eviction), kernels);
  if (Status s = result->cache.Start(options.slots_bytes, options.n_io_threads); !s.ok()) return s;
  *runtime = result.release();
  return Status();
}

Status Measure(const edgemoe_options& options, edgemoe_sizes* sizes) {
  std::vector<ExpertTensor> tensors;
  if (Status s = ExpertFile::Describe(options, &tensors); !s.ok()) return s;
  std::vector<int> class_of_tensor;
  std::vector<SlotClass> classes = SlotPool::Classes(tensors, &class_of_tensor);
  *sizes = {};
  sizes->slots_bytes = SlotPool::Distribute(options.slots_bytes, &classes);
  for (const SlotClass& c : classes) {
    sizes->bank_slot_bytes += static_cast<uint64_t>(c.n_slices) * c.slot_bytes;
    sizes->cycle_slot_bytes += static_cast<uint64_t>(c.n_floor_slots()) * c.slot_bytes;
    sizes->n_slots += c.n_slots;
    sizes->n_slices += c.n_slices;
  }
  return Status();
}

}  // namespace edgemoe
