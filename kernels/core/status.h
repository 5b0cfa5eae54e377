// SPDX-License-Identifier: MIT
// status.h: how the core reports failure. A Status is a code and one sentence,
// `what failed: found, expected (where); what to do`. The core throws nothing and prints nothing.
#ifndef EDGEMOE_CORE_STATUS_H_
#define EDGEMOE_CORE_STATUS_H_

#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>

#include "edgemoe/edgemoe.h"

namespace edgemoe {

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(edgemoe_code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == EDGEMOE_OK; }
  edgemoe_code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  edgemoe_code code_ = EDGEMOE_OK;
  std::string message_;
};

// printf into a std::string; messages are at most 500 characters, as edgemoe_error carries no more.
__attribute__((format(printf, 1, 2))) inline std::string Format(const char* format, ...) {
  char text[500];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  return text;
}

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_STATUS_H_
