// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/onnx_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace edgemoe_ort {
namespace {

// Headers of a large model are some 100 bytes a tensor; what is inside of the file lies between them.
constexpr size_t kWindowBytes = 64 << 10;

enum Wire { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

std::string At(uint64_t at) { return " at byte " + std::to_string(at); }

}  // namespace

class FileReader {
 public:
  explicit FileReader(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) throw Error("cannot open the model: " + std::string(std::strerror(errno)) + " (" + path + ")");
    const off_t end = ::lseek(fd_, 0, SEEK_END);
    n_bytes_ = end < 0 ? 0 : static_cast<uint64_t>(end);
  }
  ~FileReader() { ::close(fd_); }
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  uint64_t n_bytes() const { return n_bytes_; }

  [[noreturn]] void Fail(const std::string& what) const {
    throw Error("cannot read the model: " + what + " (" + path_ + "); download or export it again");
  }

  void Read(uint64_t at, uint64_t n, void* to) const {
    auto* bytes = static_cast<uint8_t*>(to);
    while (n > 0) {
      const ssize_t got = ::pread(fd_, bytes, n, static_cast<off_t>(at));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) {
        const std::string why = got < 0 ? std::string(std::strerror(errno)) : "the file ends";
        Fail(why + At(at));
      }
      bytes += got;
      at += static_cast<uint64_t>(got);
      n -= static_cast<uint64_t>(got);
    }
  }

  uint8_t Byte(uint64_t at) {
    if (at < window_at_ || at >= window_at_ + window_.size()) {
      window_.resize(static_cast<size_t>(std::min<uint64_t>(kWindowBytes, n_bytes_ - at)));
      window_at_ = at;
      Read(at, window_.size(), window_.data());
    }
    return window_[static_cast<size_t>(at - window_at_)];
  }

  // A number of 7 bits a byte; moves `at` past it.
  uint64_t Varint(uint64_t* at, uint64_t end) {
    const uint64_t begin = *at;
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (*at >= end) break;
      const uint8_t byte = Byte((*at)++);
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    Fail("a number has no end" + At(begin));
  }

  struct Field {
    uint64_t number, wire, value;  // value: of a number
    uint64_t begin, end;           // its bytes
  };

  // Calls fn with each field of the message [begin, end).
  template <typename Fn>
  void Fields(uint64_t begin, uint64_t end, Fn fn) {
    for (uint64_t at = begin; at < end;) {
      const uint64_t key_at = at, key = Varint(&at, end);
      Field f = {key >> 3, key & 7, 0, at, at};
      if (f.wire == kVarint) {
        f.value = Varint(&at, end);
      } else if (f.wire == kBytes) {
        const uint64_t n = Varint(&at, end);
        f.begin = at;
        if (n > end - at) Fail("a field of " + std::to_string(n) + " bytes passes the end of its message" + At(key_at));
        at += n;
      } else if (f.wire == kFixed32 || f.wire == kFixed64) {
        const uint64_t n = f.wire == kFixed32 ? 4 : 8;
        if (n > end - at) Fail("a number passes the end of its message" + At(key_at));
        for (uint64_t i = 0; i < n; ++i) f.value |= static_cast<uint64_t>(Byte(at + i)) << (8 * i);
        at += n;
      } else {
        Fail("wire type " + std::to_string(f.wire) + At(key_at));
      }
      if (f.number == 0) Fail("field number 0" + At(key_at));
      f.end = at;
      fn(f);
    }
  }

  std::string Text(const Field& f) const {
    if (f.wire != kBytes) Fail("a number where a text was expected" + At(f.begin));
    std::string text(static_cast<size_t>(f.end - f.begin), '\0');
    Read(f.begin, text.size(), text.data());
    return text;
  }

 private:
  const std::string path_;
  const int fd_;
  uint64_t n_bytes_ = 0;
  uint64_t window_at_ = 0;
  std::vector<uint8_t> window_;
};

OnnxFile::OnnxFile(const std::string& path) : path_(path), reader_(std::make_unique<FileReader>(path)) {
  int n_graphs = 0;
  reader_->Fields(0, reader_->n_bytes(), [&](const FileReader::Field& f) {
    if (f.number != 7) return;
    if (f.wire != kBytes) reader_->Fail("a number where the graph was expected" + At(f.begin));
    ++n_graphs;
    ReadGraph(f.begin, f.end);
  });
  if (n_graphs != 1) reader_->Fail(std::to_string(n_graphs) + " graphs, expected one: is it an .onnx file?");
}

OnnxFile::~OnnxFile() = default;

std::string OnnxFile::folder() const { return FolderOf(path_); }

void OnnxFile::ReadGraph(uint64_t begin, uint64_t end) {
  reader_->Fields(begin, end, [&](const FileReader::Field& f) {
    if (f.number != 1 && f.number != 5) return;
    if (f.wire != kBytes) reader_->Fail("a number where a node or tensor was expected" + At(f.begin));
    f.number == 1 ? ReadNode(f.begin, f.end) : ReadTensor(f.begin, f.end);
  });
}

void OnnxFile::ReadNode(uint64_t begin, uint64_t end) {
  Node node;
  std::string type, domain;
  std::vector<FileReader::Field> attributes;
  reader_->Fields(begin, end, [&](const FileReader::Field& f) {
    if (f.number == 1) node.inputs.push_back(reader_->Text(f));
    if (f.number == 2) node.outputs.push_back(reader_->Text(f));
    if (f.number == 3) node.name = reader_->Text(f);
    if (f.number == 4) type = reader_->Text(f);
    if (f.number == 7) domain = reader_->Text(f);
    if (f.number == 5 && f.wire == kBytes) attributes.push_back(f);
  });
  node.type = domain + "::" + type;
  if (!IsMoe(node.type)) return;
  for (const FileReader::Field& a : attributes) {
    std::string name;
    Attribute attribute;
    reader_->Fields(a.begin, a.end, [&](const FileReader::Field& f) {
      if (f.number == 1) name = reader_->Text(f);
      if (f.number == 2 && f.wire == kFixed32) {
        const auto bits = static_cast<uint32_t>(f.value);
        std::memcpy(&attribute.f, &bits, sizeof(bits));
        attribute.type = kOrtAttrFloat;
      }
      if (f.number == 3 && f.wire == kVarint) {
        attribute.i = static_cast<int64_t>(f.value);
        attribute.type = kOrtAttrInt;
      }
      if (f.number == 4) {
        attribute.s = reader_->Text(f);
        attribute.type = kOrtAttrString;
      }
    });
    node.attributes[name] = attribute;
  }
  nodes_.push_back(node);
}

void OnnxFile::ReadTensor(uint64_t begin, uint64_t end) {
  std::string name;
  FileTensor tensor;
  std::map<std::string, std::string> entries;
  bool is_external = false;
  reader_->Fields(begin, end, [&](const FileReader::Field& f) {
    if (f.number == 1 && f.wire == kVarint) tensor.dims.push_back(static_cast<int64_t>(f.value));
    if (f.number == 1 && f.wire == kBytes) {
      for (uint64_t at = f.begin; at < f.end;) {
        tensor.dims.push_back(static_cast<int64_t>(reader_->Varint(&at, f.end)));
      }
    }
    if (f.number == 2 && f.wire == kVarint) tensor.element_type = static_cast<int32_t>(f.value);
    // float_data is packed in the bytes of floats, as raw_data.
    if ((f.number == 4 || f.number == 9) && f.wire == kBytes) {
      tensor.extent = {"", f.begin, f.end - f.begin};
      tensor.is_raw = true;
    }
    if (f.number == 8) name = reader_->Text(f);
    if (f.number == 13 && f.wire == kBytes) {
      std::string key, value;
      reader_->Fields(f.begin, f.end, [&](const FileReader::Field& e) {
        if (e.number == 1) key = reader_->Text(e);
        if (e.number == 2) value = reader_->Text(e);
      });
      entries[key] = value;
    }
    if (f.number == 14) is_external = f.value == 1;
  });
  if (is_external) {
    const auto number = [&](const char* key, uint64_t fallback) {
      const auto found = entries.find(key);
      if (found == entries.end()) return fallback;
      uint64_t value = 0;
      for (const char c : found->second) {
        if (c < '0' || c > '9' || __builtin_mul_overflow(value, uint64_t{10}, &value) ||
            __builtin_add_overflow(value, static_cast<uint64_t>(c - '0'), &value)) {
          reader_->Fail("tensor " + name + ": " + key + " '" + found->second +
                        "' of its external data is not a number");
        }
      }
      return value;
    };
    if (entries["location"].empty()) reader_->Fail("tensor " + name + ": external data without a location");
    uint64_t n_bytes = BytesOfType(tensor.element_type);
    for (const int64_t d : tensor.dims) {
      if (d < 0 || __builtin_mul_overflow(n_bytes, static_cast<uint64_t>(d), &n_bytes)) n_bytes = 0;
    }
    tensor.extent = {entries["location"], number("offset", 0), number("length", n_bytes)};
    tensor.is_raw = true;
  }
  tensors_[name] = tensor;
}

const FileTensor* OnnxFile::Find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

std::vector<uint8_t> OnnxFile::Bytes(const std::string& name, uint64_t n_bytes) const {
  const FileTensor& tensor = tensors_.at(name);
  if (!tensor.is_raw) reader_->Fail("tensor " + name + " is stored as single numbers, expected raw data");
  if (tensor.extent.length != n_bytes) {
    reader_->Fail("tensor " + name + ": " + std::to_string(tensor.extent.length) + " bytes of raw data, expected " +
                  std::to_string(n_bytes));
  }
  return FirstBytes(name, n_bytes);
}

std::vector<uint8_t> OnnxFile::FirstBytes(const std::string& name, uint64_t n_bytes) const {
  const FileTensor& tensor = tensors_.at(name);
  std::vector<uint8_t> bytes(n_bytes);
  if (tensor.extent.path.empty()) {
    reader_->Read(tensor.extent.offset, n_bytes, bytes.data());
  } else {
    FileReader(JoinPath(folder(), tensor.extent.path)).Read(tensor.extent.offset, n_bytes, bytes.data());
  }
  return bytes;
}

FileNode::FileNode(const OnnxFile& file, const OnnxFile::Node& node) : file_(file) {
  name = node.name;
  type = node.type;
  is_in_file = true;
  attributes = node.attributes;
  for (const std::string& input : node.inputs) {
    inputs.emplace_back();
    ValueInfo& value = inputs.back();
    value.is_given = !input.empty();
    value.name = input;
    const FileTensor* const tensor = file.Find(input);
    if (tensor == nullptr) continue;
    value.is_constant = true;
    value.element_type = tensor->element_type;
    value.dims = tensor->dims;
  }
}

FileExtent FileNode::Extent(const ValueInfo& constant) const {
  const FileExtent extent = file_.Find(constant.name)->extent;
  return extent.path.empty() ? FileExtent() : extent;
}

std::vector<uint8_t> FileNode::Bytes(const ValueInfo& constant, uint64_t n_bytes) const {
  return file_.Bytes(constant.name, n_bytes);
}

}  // namespace edgemoe_ort
