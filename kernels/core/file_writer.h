// SPDX-License-Identifier: MIT
// file_writer.h: a file that appears whole or not at all. Bytes go to a temporary name beside it; Commit makes them
// durable and gives them their name, and what is destroyed before leaves nothing behind.
// Thread promise: one thread at a time.
#ifndef EDGEMOE_CORE_FILE_WRITER_H_
#define EDGEMOE_CORE_FILE_WRITER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/status.h"

namespace edgemoe {

class FileWriter {
 public:
  virtual ~FileWriter() = default;
  virtual Status Write(const void* bytes, uint64_t n_bytes) = 0;
  // The last call.
  virtual Status Commit() = 0;
};

using FileCreator = std::function<Status(const std::string& path, std::unique_ptr<FileWriter>* writer)>;

Status CreatePosixFile(const std::string& path, std::unique_ptr<FileWriter>* writer);

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_FILE_WRITER_H_
