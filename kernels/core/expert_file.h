// SPDX-License-Identifier: MIT
// expert_file.h: where the bytes of every expert lie. Owns the files and the list of slices; a slice is one
// projection of one expert, the unit that is read, kept and evicted.
// Invariant: after Open every slice lies wholly inside its file. Immutable once reading begins, so thread-safe.
#ifndef EDGEMOE_CORE_EXPERT_FILE_H_
#define EDGEMOE_CORE_EXPERT_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/io.h"
#include "core/status.h"
#include "edgemoe/edgemoe.h"

namespace edgemoe {

struct ExpertTensor {
  std::string name;
  int file_idx = 0;
  int layer = 0;
  int n_experts = 0;
  int n_experts_used = 0;
  int64_t first_slice = 0;  // slice of expert e: first_slice + e
  uint64_t offset = 0;
  uint64_t expert_bytes = 0;
  int64_t n_cols = 0;  // of one expert's matrix
  int64_t n_rows = 0;
  int32_t format = 0;  // edgemoe_format
  bool own = false;    // multiplied by our kernels; see arithmetic.h
  int copy = -1;       // the tensor that holds the low-bit copies of these experts
  int copy_of = -1;    // the tensor whose experts these are low-bit copies of
};

// The aligned range that holds a slice, and where the slice begins in it.
struct SliceExtent {
  uint64_t offset;        // multiple of kIoAlignment
  uint64_t length;        // multiple of kIoAlignment
  uint64_t head_bytes;    // slice begins here in the range
  uint64_t needed_bytes;  // head + slice
};

class ExpertFile {
 public:
  // Check the description (overflow, counts); no file is touched.
  static Status Describe(const edgemoe_options& options, std::vector<ExpertTensor>* tensors);
  static Status Open(const edgemoe_options& options, const FileOpener& opener, std::unique_ptr<ExpertFile>* file);

  const std::vector<ExpertTensor>& tensors() const { return tensors_; }
  // To be called before anything is read.
  void SetOwn(size_t tensor_idx, bool own) { tensors_[tensor_idx].own = own; }
  int64_t n_slices() const { return n_slices_; }
  int FindTensor(const std::string& name) const;
  int TensorOf(int64_t slice) const { return slice_tensor_[static_cast<size_t>(slice)]; }
  SliceExtent Extent(int64_t slice) const;
  // Read a slice's aligned range to `to`; a failure names file, tensor, expert and offset.
  Status ReadSlice(int64_t slice, void* to) const;
  bool direct() const;

 private:
  ExpertFile() = default;

  std::vector<std::unique_ptr<File>> files_;
  std::vector<ExpertTensor> tensors_;
  std::vector<int32_t> slice_tensor_;
  std::unordered_map<std::string, int> index_of_name_;
  int64_t n_slices_ = 0;
};

// Bytes of a slot that can hold any slice of the tensor: the longest of its aligned ranges.
uint64_t SlotBytes(const ExpertTensor& tensor);

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_EXPERT_FILE_H_
