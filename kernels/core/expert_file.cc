// SPDX-License-Identifier: MIT
#include "core/expert_file.h"

#include <algorithm>

namespace edgemoe {
namespace {

SliceExtent ExtentOf(const ExpertTensor& tensor, int64_t expert) {
  const uint64_t begin = tensor.offset + static_cast<uint64_t>(expert) * tensor.expert_bytes;
  const uint64_t offset = RoundDown(begin, kIoAlignment);
  const uint64_t head = begin - offset;
  return {offset, RoundUp(head + tensor.expert_bytes, kIoAlignment), head, head + tensor.expert_bytes};
}

// A low-bit copy has the shape of what it copies, which comes before it and has no other.
Status CheckCopy(const ExpertTensor& copy, const std::vector<ExpertTensor>& before) {
  const ExpertTensor none;
  const bool is_known = static_cast<size_t>(copy.copy_of) < before.size();
  const ExpertTensor& t = is_known ? before[static_cast<size_t>(copy.copy_of)] : none;
  if (is_known && t.copy_of < 0 && t.copy < 0 && t.layer == copy.layer && t.n_experts == copy.n_experts &&
      t.n_cols == copy.n_cols && t.n_rows == copy.n_rows) {
    return Status();
  }
  return Status(EDGEMOE_INVALID_ARGUMENT,
                Format("tensor %s: low-bit copy of tensor %d (%s), expected one before it that has its layer and shape "
                       "and no other copy",
                       copy.name.c_str(), copy.copy_of, is_known ? t.name.c_str() : "unknown"));
}

}  // namespace

uint64_t SlotBytes(const ExpertTensor& tensor) {
  uint64_t bytes = 0;
  for (int e = 0; e < tensor.n_experts; ++e) bytes = std::max(bytes, ExtentOf(tensor, e).length);
  return bytes;
}

Status ExpertFile::Describe(const edgemoe_options& options, std::vector<ExpertTensor>* tensors) {
  if (options.struct_size != sizeof(edgemoe_options)) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("edgemoe_options has %u bytes, expected %zu; rebuild the plug-in",
                                                   options.struct_size, sizeof(edgemoe_options)));
  }
  int64_t first_slice = 0;
  tensors->clear();
  for (int32_t i = 0; i < options.n_tensors; ++i) {
    const edgemoe_tensor& t = options.tensors[i];
    if (t.n_experts <= 0 || t.expert_bytes == 0 || t.n_experts_used <= 0 || t.n_experts_used > t.n_experts) {
      return Status(
          EDGEMOE_BAD_FILE,
          Format("tensor %s: %d experts of %llu bytes with %d used, expected positive counts and used <= experts",
                 t.name, t.n_experts, static_cast<unsigned long long>(t.expert_bytes), t.n_experts_used));
    }
    if (t.expert_bytes > UINT64_MAX / 2 / static_cast<uint64_t>(t.n_experts) || t.offset > UINT64_MAX / 2) {
      return Status(EDGEMOE_BAD_FILE,
                    Format("tensor %s: size overflows 64 bits; the file's header is corrupt", t.name));
    }
    ExpertTensor tensor;
    tensor.name = t.name;
    tensor.file_idx = t.file_idx;
    tensor.layer = t.layer;
    tensor.n_experts = t.n_experts;
    tensor.n_experts_used = t.n_experts_used;
    tensor.first_slice = first_slice;
    tensor.offset = t.offset;
    tensor.expert_bytes = t.expert_bytes;
    tensor.n_cols = t.n_cols;
    tensor.n_rows = t.n_rows;
    tensor.format = t.format;
    tensor.copy_of = t.copy_of - 1;
    if (tensor.copy_of >= 0) {
      if (Status s = CheckCopy(tensor, *tensors); !s.ok()) return s;
      (*tensors)[static_cast<size_t>(tensor.copy_of)].copy = i;
    }
    first_slice += t.n_experts;
    tensors->push_back(std::move(tensor));
  }
  return Status();
}

Status ExpertFile::Open(const edgemoe_options& options, const FileOpener& opener, std::unique_ptr<ExpertFile>* file) {
  std::unique_ptr<ExpertFile> result(new ExpertFile());
  if (Status s = Describe(options, &result->tensors_); !s.ok()) return s;
  for (int32_t i = 0; i < options.n_files; ++i) {
    std::unique_ptr<File> opened;
    if (Status s = opener(options.file_paths[i], &opened); !s.ok()) return s;
    result->files_.push_back(std::move(opened));
  }
  for (size_t i = 0; i < result->tensors_.size(); ++i) {
    const ExpertTensor& t = result->tensors_[i];
    if (t.file_idx < 0 || t.file_idx >= options.n_files) {
      return Status(EDGEMOE_INVALID_ARGUMENT, Format("tensor %s: file index %d, expected 0..%d", t.name.c_str(),
                                                     t.file_idx, options.n_files - 1));
    }
    const File& f = *result->files_[static_cast<size_t>(t.file_idx)];
    const uint64_t end = t.offset + t.expert_bytes * static_cast<uint64_t>(t.n_experts);
    if (end > f.size_bytes()) {
      return Status(
          EDGEMOE_BAD_FILE,
          Format("tensor %s: ends at byte %llu, the file has %llu (%s, offset %llu); the file is truncated: "
                 "download or convert it again",
                 t.name.c_str(), static_cast<unsigned long long>(end), static_cast<unsigned long long>(f.size_bytes()),
                 f.path().c_str(), static_cast<unsigned long long>(t.offset)));
    }
    if (!result->index_of_name_.emplace(t.name, static_cast<int>(i)).second) {
      return Status(EDGEMOE_BAD_FILE, Format("tensor %s: named twice (%s)", t.name.c_str(), f.path().c_str()));
    }
    result->slice_tensor_.insert(result->slice_tensor_.end(), static_cast<size_t>(t.n_experts),
                                 static_cast<int32_t>(i));
  }
  result->n_slices_ = static_cast<int64_t>(result->slice_tensor_.size());
  *file = std::move(result);
  return Status();
}

int ExpertFile::FindTensor(const std::string& name) const {
  const auto it = index_of_name_.find(name);
  return it == index_of_name_.end() ? -1 : it->second;
}

SliceExtent ExpertFile::Extent(int64_t slice) const {
  const ExpertTensor& t = tensors_[static_cast<size_t>(TensorOf(slice))];
  return ExtentOf(t, slice - t.first_slice);
}

Status ExpertFile::ReadSlice(int64_t slice, void* to) const {
  const ExpertTensor& t = tensors_[static_cast<size_t>(TensorOf(slice))];
  const SliceExtent extent = Extent(slice);
  Status status =
      files_[static_cast<size_t>(t.file_idx)]->ReadAt(extent.offset, extent.length, extent.needed_bytes, to);
  if (status.ok()) return status;
  return Status(status.code(), Format("expert %lld of tensor %s: %s", static_cast<long long>(slice - t.first_slice),
                                      t.name.c_str(), status.message().c_str()));
}

bool ExpertFile::direct() const {
  return std::all_of(files_.begin(), files_.end(), [](const auto& f) { return f->direct(); });
}

}  // namespace edgemoe
