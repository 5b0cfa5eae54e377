// SPDX-License-Identifier: MIT
#include "core/expert_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

edgemoe_tensor Tensor(const char* name, uint64_t offset, uint64_t expert_bytes, int n_experts = 4, int n_used = 2) {
  edgemoe_tensor t = {};
  t.name = name;
  t.n_experts = n_experts;
  t.n_experts_used = n_used;
  t.offset = offset;
  t.expert_bytes = expert_bytes;
  return t;
}

class ExpertFileTest : public testing::Test {
 protected:
  Status Open(const FileOpener& opener) {
    edgemoe_options options = {};
    options.struct_size = sizeof(options);
    options.n_files = 1;
    options.file_paths = &path_;
    options.n_tensors = static_cast<int32_t>(tensors_.size());
    options.tensors = tensors_.data();
    return ExpertFile::Open(options, opener, &file_);
  }
  Status OpenFake(uint64_t file_bytes) {
    storage_ = std::make_unique<FakeStorage>(std::vector<char>(file_bytes));
    return Open(storage_->Opener());
  }

  const char* path_ = "toy.gguf";
  std::vector<edgemoe_tensor> tensors_;
  std::unique_ptr<FakeStorage> storage_;
  std::unique_ptr<ExpertFile> file_;
};

// Guards against: a truncated download that is found out only by a read failing in the middle of an answer.
TEST_F(ExpertFileTest, TensorPastTheEndOfItsFileIsRefused) {
  tensors_ = {Tensor("blk.0.gate", 4096, 1000)};
  EXPECT_TRUE(OpenFake(8096).ok());
  const Status s = OpenFake(8095);
  EXPECT_EQ(s.code(), EDGEMOE_BAD_FILE);
  EXPECT_NE(s.message().find("blk.0.gate"), std::string::npos) << s.message();
  EXPECT_NE(s.message().find("8096"), std::string::npos) << s.message();
  EXPECT_NE(s.message().find("8095"), std::string::npos) << s.message();
  EXPECT_NE(s.message().find("toy.gguf"), std::string::npos) << s.message();
}

// Guards against: sizes of a corrupt header that wrap around and pass the check against the file's end.
TEST_F(ExpertFileTest, SizesThatOverflowAreRefused) {
  for (const edgemoe_tensor& t :
       {Tensor("a", 0, UINT64_MAX), Tensor("b", 0, UINT64_MAX / 4 + 1), Tensor("c", UINT64_MAX - 10, 8, 1, 1),
        Tensor("d", UINT64_MAX / 2, UINT64_MAX / 2, 1, 1), Tensor("e", 0, (UINT64_C(1) << 62) + 1, 4, 1)}) {
    tensors_ = {t};
    EXPECT_EQ(OpenFake(1 << 16).code(), EDGEMOE_BAD_FILE) << t.name;
  }
}

// Guards against: a tensor of a split model read from a file that is not there.
TEST_F(ExpertFileTest, FileIndexOutsideTheFilesIsRefused) {
  for (int32_t file_idx : {-1, 1, 1000}) {
    tensors_ = {Tensor("blk.0.gate", 0, 8)};
    tensors_[0].file_idx = file_idx;
    const Status s = OpenFake(1 << 16);
    EXPECT_EQ(s.code(), EDGEMOE_INVALID_ARGUMENT);
    EXPECT_NE(s.message().find("blk.0.gate"), std::string::npos) << s.message();
  }
}

// Guards against: two tensors of one name, of which lookups would find only one.
TEST_F(ExpertFileTest, NameUsedTwiceIsRefused) {
  tensors_ = {Tensor("blk.0.gate", 0, 8), Tensor("blk.0.gate", 4096, 8)};
  const Status s = OpenFake(1 << 16);
  EXPECT_EQ(s.code(), EDGEMOE_BAD_FILE);
  EXPECT_NE(s.message().find("named twice"), std::string::npos) << s.message();
}

// Guards against: counts of a corrupt header that later divide by zero or select experts that do not exist.
TEST_F(ExpertFileTest, CountsThatMakeNoSenseAreRefused) {
  for (const edgemoe_tensor& t :
       {Tensor("used > experts", 0, 8, 4, 5), Tensor("no experts", 0, 8, 0, 0), Tensor("negative", 0, 8, -1, -1),
        Tensor("none used", 0, 8, 4, 0), Tensor("empty", 0, 0)}) {
    tensors_ = {t};
    EXPECT_EQ(OpenFake(1 << 16).code(), EDGEMOE_BAD_FILE) << t.name;
  }
}

// Guards against: direct reads refused by the kernel for a misaligned range, or slices that are cut short.
TEST_F(ExpertFileTest, ExtentsAreAlignedSupersetsOfTheirSlices) {
  tensors_ = {Tensor("aligned", 8192, 4096), Tensor("unaligned", 40000, 5000), Tensor("tiny", 100, 7, 300, 1),
              Tensor("page and a byte", 131072 - 1, 4097)};
  ASSERT_TRUE(OpenFake(1 << 18).ok());
  ASSERT_EQ(file_->n_slices(), 4 + 4 + 300 + 4);
  for (int64_t slice = 0; slice < file_->n_slices(); ++slice) {
    const ExpertTensor& t = file_->tensors()[static_cast<size_t>(file_->TensorOf(slice))];
    const SliceExtent e = file_->Extent(slice);
    const uint64_t begin = t.offset + static_cast<uint64_t>(slice - t.first_slice) * t.expert_bytes;
    EXPECT_EQ(e.offset % kIoAlignment, 0u);
    EXPECT_EQ(e.length % kIoAlignment, 0u);
    EXPECT_EQ(e.offset + e.head_bytes, begin);
    EXPECT_LT(e.head_bytes, kIoAlignment);
    EXPECT_EQ(e.needed_bytes, e.head_bytes + t.expert_bytes);
    EXPECT_LE(e.needed_bytes, e.length);
    EXPECT_LT(e.length - e.needed_bytes, kIoAlignment) << "reads a page too many";
    EXPECT_LE(e.length, SlotBytes(t)) << "does not fit its slot";
  }
  EXPECT_EQ(SlotBytes(file_->tensors()[0]), 4096u) << "an aligned slice needs no page for a head";
}

// Guards against: a plug-in that asks for a tensor the runtime lacks and gets another.
TEST_F(ExpertFileTest, TensorsAreFoundByNameAlone) {
  tensors_ = {Tensor("a", 0, 8), Tensor("ab", 4096, 8)};
  ASSERT_TRUE(OpenFake(1 << 16).ok());
  EXPECT_EQ(file_->FindTensor("a"), 0);
  EXPECT_EQ(file_->FindTensor("ab"), 1);
  EXPECT_EQ(file_->FindTensor("abc"), -1);
  EXPECT_EQ(file_->FindTensor(""), -1);
}

// Guards against: "input/output error" that leaves the user guessing which file and which part of it is broken.
TEST_F(ExpertFileTest, FailedReadNamesFileTensorExpertAndOffset) {
  TempDir dir;
  const std::string path = dir.Write("short.gguf", std::vector<char>(40000, 'x'));
  path_ = path.c_str();
  tensors_ = {Tensor("blk.7.up", 4096 * 2 + 8, 5000)};
  ASSERT_TRUE(Open(OpenPosixFile).ok());
  ASSERT_EQ(::truncate(path_, 4096 * 4), 0);
  void* to = nullptr;
  ASSERT_EQ(::posix_memalign(&to, kIoAlignment, 4 * kIoAlignment), 0);
  EXPECT_TRUE(file_->ReadSlice(0, to).ok());
  const Status s = file_->ReadSlice(2, to);
  EXPECT_EQ(s.code(), EDGEMOE_IO);
  for (const char* part : {"short.gguf", "blk.7.up", "expert 2", "16384", "shrank"}) {
    EXPECT_NE(s.message().find(part), std::string::npos) << part << " is missing in: " << s.message();
  }
  std::free(to);
}

// Guards against: experts of a split model read from the first file whatever their index says.
TEST_F(ExpertFileTest, SlicesAreReadFromTheirOwnFile) {
  TempDir dir;
  const std::string a = dir.Write("a.gguf", std::vector<char>(8192, 'a')),
                    b = dir.Write("b.gguf", std::vector<char>(5000, 'b'));
  const char* const paths[] = {a.c_str(), b.c_str()};
  tensors_ = {Tensor("in a", 0, 1000), Tensor("in b", 1000, 1000)};
  tensors_[1].file_idx = 1;
  edgemoe_options options = {};
  options.struct_size = sizeof(options);
  options.n_files = 2;
  options.file_paths = paths;
  options.n_tensors = 2;
  options.tensors = tensors_.data();
  ASSERT_TRUE(ExpertFile::Open(options, OpenPosixFile, &file_).ok());
  alignas(4096) static char to[8192];
  for (int64_t slice = 0; slice < 8; ++slice) {
    std::memset(to, 0, sizeof(to));
    ASSERT_TRUE(file_->ReadSlice(slice, to).ok()) << "slice " << slice << ": the last one ends with its file";
    EXPECT_EQ(std::string(to + file_->Extent(slice).head_bytes, 1000), std::string(1000, slice < 4 ? 'a' : 'b'));
  }
}

}  // namespace
}  // namespace edgemoe::test
