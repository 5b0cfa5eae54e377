// SPDX-License-Identifier: MIT
#include "core/file_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>

namespace edgemoe {
namespace {

class PosixFileWriter final : public FileWriter {
 public:
  PosixFileWriter(std::string path, std::string folder, std::string partial, int fd)
      : path_(std::move(path)), folder_(std::move(folder)), partial_(std::move(partial)), fd_(fd) {}
  ~PosixFileWriter() override {
    if (fd_ >= 0) ::close(fd_);
    if (!partial_.empty()) ::unlink(partial_.c_str());
  }
  PosixFileWriter(const PosixFileWriter&) = delete;
  PosixFileWriter& operator=(const PosixFileWriter&) = delete;

  Status Write(const void* bytes, uint64_t n_bytes) override {
    for (uint64_t done = 0; done < n_bytes;) {
      const ssize_t n = ::write(fd_, static_cast<const char*>(bytes) + done, n_bytes - done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return Failed("write", n < 0 ? errno : EIO);
      done += static_cast<uint64_t>(n);
      n_written_ += static_cast<uint64_t>(n);
    }
    return Status();
  }

  Status Commit() override {
    if (::fsync(fd_) != 0) return Failed("fsync", errno);
    const int fd = fd_;
    fd_ = -1;
    if (::close(fd) != 0) return Failed("close", errno);
    if (::rename(partial_.c_str(), path_.c_str()) != 0) return Failed("rename", errno);
    partial_.clear();
    // The name is durable as well where the file system lets a folder be synced; where it does not, the bytes are.
    const int folder_fd = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_fd >= 0) {
      (void)::fsync(folder_fd);
      ::close(folder_fd);
    }
    return Status();
  }

 private:
  Status Failed(const char* what, int code) const {
    return Status(EDGEMOE_IO,
                  Format("%s failed: %s after %llu bytes (%s); free space there or name another folder", what,
                         std::strerror(code), static_cast<unsigned long long>(n_written_), path_.c_str()));
  }

  const std::string path_, folder_;
  std::string partial_;  // empty: it has got its name
  int fd_;
  uint64_t n_written_ = 0;
};

}  // namespace

Status CreatePosixFile(const std::string& path, std::unique_ptr<FileWriter>* writer) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  // A name that no other process or recording has.
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  const std::string partial = folder + (slash == std::string::npos ? "/." : ".") + name + "." +
                              std::to_string(::getpid()) + "-" + std::to_string(now) + ".partial";
  const int fd = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) {
    return Status(EDGEMOE_IO, Format("create failed: %s (%s); check the folder and its permissions",
                                     std::strerror(errno), path.c_str()));
  }
  *writer = std::make_unique<PosixFileWriter>(path, folder, partial, fd);
  return Status();
}

}  // namespace edgemoe
