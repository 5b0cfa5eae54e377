// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "core/io.h"

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

namespace edgemoe {
namespace {

class PosixFile final : public File {
 public:
  PosixFile(std::string path, int fd, uint64_t size_bytes, bool direct)
      : path_(std::move(path)), fd_(fd), size_bytes_(size_bytes), direct_(direct) {}
  ~PosixFile() override { ::close(fd_); }
  PosixFile(const PosixFile&) = delete;
  PosixFile& operator=(const PosixFile&) = delete;

  uint64_t size_bytes() const override { return size_bytes_; }
  const std::string& path() const override { return path_; }
  bool direct() const override { return direct_.load(std::memory_order_relaxed); }

  Status ReadAt(uint64_t offset, uint64_t length, uint64_t needed, void* to) override {
    uint64_t done = 0;
    while (done < needed) {
      const bool was_direct = direct();
      const ssize_t n = ::pread(fd_, static_cast<char*>(to) + done, length - done, static_cast<off_t>(offset + done));
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno == EINVAL && was_direct) {
          // Some file systems accept O_DIRECT at open and refuse it at the first read.
          if (::fcntl(fd_, F_SETFL, ::fcntl(fd_, F_GETFL) & ~O_DIRECT) == 0) {
            direct_.store(false, std::memory_order_relaxed);
            continue;
          }
        }
        return Status(EDGEMOE_IO, Format("read failed: %s at offset %llu, expected %llu bytes (%s); check the disk",
                                         std::strerror(errno), static_cast<unsigned long long>(offset + done),
                                         static_cast<unsigned long long>(needed - done), path_.c_str()));
      }
      if (n == 0) break;
      done += static_cast<uint64_t>(n);
      // With O_DIRECT a read that stopped inside a page has met the end of the file.
      if (direct() && done % kIoAlignment != 0) break;
    }
    if (!direct()) ::posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(length), POSIX_FADV_DONTNEED);
    if (done >= needed) return Status();
    return Status(EDGEMOE_IO,
                  Format("read failed: %llu bytes at offset %llu, expected %llu (%s); the file shrank since "
                         "it was opened: restore it and load the model again",
                         static_cast<unsigned long long>(done), static_cast<unsigned long long>(offset),
                         static_cast<unsigned long long>(needed), path_.c_str()));
  }

 private:
  const std::string path_;
  const int fd_;
  const uint64_t size_bytes_;
  std::atomic<bool> direct_;
};

}  // namespace

Status OpenPosixFile(const std::string& path, std::unique_ptr<File>* file) {
  bool direct = O_DIRECT != 0;
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (fd < 0 && errno == EINVAL) {
    direct = false;
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  }
  if (fd < 0) {
    return Status(EDGEMOE_IO, Format("open failed: %s (%s); check the path and its permissions", std::strerror(errno),
                                     path.c_str()));
  }
  struct stat info;
  if (::fstat(fd, &info) != 0) {
    const int code = errno;
    ::close(fd);
    return Status(EDGEMOE_IO, Format("stat failed: %s (%s)", std::strerror(code), path.c_str()));
  }
  // Expert reads are scattered: read-ahead would fetch bytes that nobody asked for.
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
  *file = std::make_unique<PosixFile>(path, fd, static_cast<uint64_t>(info.st_size), direct);
  return Status();
}

}  // namespace edgemoe
