// SPDX-License-Identifier: MIT
// io.h: a file that can be read at an offset. The only door between the core and the operating system's files.
// Invariant: a File never changes size in the core's eyes; a read past what was there at open fails.
// Thread-safe: ReadAt may be called from any number of threads.
#ifndef EDGEMOE_CORE_IO_H_
#define EDGEMOE_CORE_IO_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/status.h"
#include "edgemoe/edgemoe.h"

namespace edgemoe {

// Offsets, lengths and addresses given to ReadAt are multiples of this: the page size that O_DIRECT wants on
// every file system with blocks of up to 4 KiB.
inline constexpr uint64_t kIoAlignment = 4096;

inline constexpr uint64_t RoundUp(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline constexpr uint64_t RoundDown(uint64_t value, uint64_t multiple) { return value / multiple * multiple; }

class File {
 public:
  virtual ~File() = default;
  virtual uint64_t size_bytes() const = 0;
  virtual const std::string& path() const = 0;
  // True while reads bypass the page cache.
  virtual bool direct() const = 0;
  // Read `length` bytes at `offset` into `to`. The file may end inside the range as long as `needed` bytes
  // were read; fewer are an error that names the path and the offset.
  virtual Status ReadAt(uint64_t offset, uint64_t length, uint64_t needed, void* to) = 0;
};

using FileOpener = std::function<Status(const std::string& path, std::unique_ptr<File>* file)>;

// Opens with O_DIRECT; where the file system has none, reads are buffered and dropped from the page cache.
Status OpenPosixFile(const std::string& path, std::unique_ptr<File>* file);

// Read ranges of one file from several threads, in pieces that keep all of them busy. The first failure wins.
Status ReadRanges(File* file, const edgemoe_range* ranges, int n_ranges, int n_threads);

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_IO_H_
