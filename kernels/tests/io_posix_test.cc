// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "core/io.h"
#include "edgemoe/edgemoe.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Pages = std::unique_ptr<char, Free>;

Pages AllocatePages(uint64_t bytes, char fill) {
  void* p = nullptr;
  if (::posix_memalign(&p, kIoAlignment, bytes) != 0) std::abort();
  std::memset(p, fill, bytes);
  return Pages(static_cast<char*>(p));
}

std::vector<char> Pattern(uint64_t n) {
  std::vector<char> bytes(n);
  for (uint64_t i = 0; i < n; ++i) bytes[i] = static_cast<char>((i * 2654435761u) >> 13);
  return bytes;
}

// Guards against: a mistyped path reported without the path.
TEST(IoPosixTest, FailedOpenNamesThePath) {
  std::unique_ptr<File> file;
  const Status s = OpenPosixFile("/no/such/file.gguf", &file);
  EXPECT_EQ(s.code(), EDGEMOE_IO);
  EXPECT_NE(s.message().find("/no/such/file.gguf"), std::string::npos) << s.message();
  EXPECT_EQ(file, nullptr);
}

// Guards against: the last expert of a file failing because its last page is not whole.
TEST(IoPosixTest, FileMayEndInsideTheLastPageOfARead) {
  TempDir dir;
  const std::vector<char> bytes = Pattern(2 * kIoAlignment + 123);
  std::unique_ptr<File> file;
  ASSERT_TRUE(OpenPosixFile(dir.Write("f", bytes), &file).ok());
  EXPECT_EQ(file->size_bytes(), bytes.size());
  Pages to = AllocatePages(2 * kIoAlignment, '?');
  ASSERT_TRUE(file->ReadAt(kIoAlignment, 2 * kIoAlignment, kIoAlignment + 123, to.get()).ok());
  EXPECT_EQ(std::memcmp(to.get(), bytes.data() + kIoAlignment, kIoAlignment + 123), 0);
  EXPECT_EQ(file->ReadAt(kIoAlignment, 2 * kIoAlignment, kIoAlignment + 124, to.get()).code(), EDGEMOE_IO);
}

// Guards against: computing with stale bytes of a slot after the file was replaced by a shorter one.
TEST(IoPosixTest, FileThatShrinksAfterOpenFailsTheRead) {
  TempDir dir;
  for (uint64_t left : {uint64_t{0}, kIoAlignment, kIoAlignment + 100}) {
    const std::string path = dir.Write("f" + std::to_string(left), Pattern(4 * kIoAlignment));
    std::unique_ptr<File> file;
    ASSERT_TRUE(OpenPosixFile(path, &file).ok());
    ASSERT_EQ(::truncate(path.c_str(), static_cast<off_t>(left)), 0);
    Pages to = AllocatePages(4 * kIoAlignment, '?');
    const Status s = file->ReadAt(0, 4 * kIoAlignment, 4 * kIoAlignment, to.get());
    EXPECT_EQ(s.code(), EDGEMOE_IO);
    EXPECT_NE(s.message().find("shrank"), std::string::npos) << s.message();
    EXPECT_NE(s.message().find(path), std::string::npos) << s.message();
    EXPECT_EQ(file->size_bytes(), 4 * kIoAlignment) << "a file never changes size in the core's eyes";
  }
}

class ReadRangesTest : public testing::TestWithParam<int> {};

// Guards against: pieces of a large range swapped, lost or read twice over by the reading threads.
TEST_P(ReadRangesTest, EveryByteArrivesWhereItBelongs) {
  TempDir dir;
  const std::vector<char> bytes = Pattern((9u << 20) + 123);
  const std::string path = dir.Write("f", bytes);
  const uint64_t pages = RoundUp(bytes.size(), kIoAlignment) / kIoAlignment;
  Pages to = AllocatePages((pages + 1) * kIoAlignment, '?');
  // Out of order; the first one is longer than a piece and ends with the file.
  const uint64_t split = 3 * kIoAlignment;
  const edgemoe_range ranges[] = {{split, pages * kIoAlignment - split, to.get() + split},
                                  {2 * kIoAlignment, kIoAlignment, to.get() + 2 * kIoAlignment},
                                  {0, 2 * kIoAlignment, to.get()}};
  edgemoe_error error = {};
  ASSERT_EQ(edgemoe_read_ranges(path.c_str(), ranges, 3, GetParam(), &error), EDGEMOE_OK) << error.message;
  EXPECT_EQ(std::memcmp(to.get(), bytes.data(), bytes.size()), 0);
  EXPECT_EQ(to.get()[pages * kIoAlignment], '?') << "wrote past the range";
}

// Guards against: the weights of a truncated file silently replaced by whatever memory held before.
TEST_P(ReadRangesTest, RangePastTheLastPageOfTheFileFails) {
  TempDir dir;
  const std::string path = dir.Write("f", Pattern(2 * kIoAlignment + 1));
  Pages to = AllocatePages(8 * kIoAlignment, '?');
  for (const edgemoe_range& range :
       {edgemoe_range{0, 4 * kIoAlignment, to.get()}, edgemoe_range{3 * kIoAlignment, kIoAlignment, to.get()},
        edgemoe_range{16 * kIoAlignment, kIoAlignment, to.get()}}) {
    edgemoe_error error = {};
    EXPECT_NE(edgemoe_read_ranges(path.c_str(), &range, 1, GetParam(), &error), EDGEMOE_OK)
        << "offset " << range.offset;
    EXPECT_NE(std::string(error.message).find(path), std::string::npos) << error.message;
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, ReadRangesTest, testing::Values(1, 4));

// Guards against: a failed piece overlooked because another thread's pieces succeeded.
TEST(ReadRangesFaultTest, OneFailedPieceFailsTheWhole) {
  FakeStorage storage(Pattern(40u << 20));
  Pages to = AllocatePages(40u << 20, '?');
  const edgemoe_range range = {0, 40u << 20, to.get()};
  for (int64_t bad : {0, 5, 9}) {
    storage.n_reads = 0;
    storage.on_read = [bad](int64_t read_no, uint64_t) {
      return read_no == bad ? Status(EDGEMOE_IO, "injected") : Status();
    };
    std::unique_ptr<File> file;
    ASSERT_TRUE(storage.Opener()("f", &file).ok());
    const Status s = ReadRanges(file.get(), &range, 1, 3);
    EXPECT_EQ(s.code(), EDGEMOE_IO);
    EXPECT_EQ(s.message(), "injected");
  }
}

// Guards against: a missing file reported without its path.
TEST(ReadRangesFaultTest, MissingFileIsNamed) {
  edgemoe_error error = {};
  EXPECT_EQ(edgemoe_read_ranges("/no/such/file.gguf", nullptr, 0, 1, &error), EDGEMOE_IO);
  EXPECT_NE(std::string(error.message).find("/no/such/file.gguf"), std::string::npos) << error.message;
}

}  // namespace
}  // namespace edgemoe::test
