// SPDX-License-Identifier: MIT
#include "tests/fakes.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "edgemoe/selection.h"

namespace edgemoe::test {
namespace {

class FakeFile final : public File {
 public:
  FakeFile(std::string path, FakeStorage* storage) : path_(std::move(path)), storage_(storage) {}
  uint64_t size_bytes() const override { return storage_->bytes.size(); }
  const std::string& path() const override { return path_; }
  bool direct() const override { return true; }
  Status ReadAt(uint64_t offset, uint64_t length, uint64_t needed, void* to) override {
    const int64_t read_no = storage_->n_reads.fetch_add(1);
    storage_->reads_of_page[offset / kIoAlignment].fetch_add(1);
    if (storage_->on_read) {
      if (Status s = storage_->on_read(read_no, offset); !s.ok()) return s;
    }
    const uint64_t available = storage_->bytes.size() - std::min<uint64_t>(offset, storage_->bytes.size());
    if (available < needed) return Status(EDGEMOE_IO, "short read");
    std::memcpy(to, storage_->bytes.data() + offset, std::min(available, length));
    return Status();
  }

 private:
  const std::string path_;
  FakeStorage* const storage_;
};

void RunThreads(void*, int32_t n_threads, void (*fn)(void*, int32_t, int32_t), void* arg) {
  std::vector<std::thread> threads;
  for (int32_t i = 1; i < n_threads; ++i) threads.emplace_back(fn, arg, i, n_threads);
  fn(arg, 0, n_threads);
  for (std::thread& t : threads) t.join();
}

void RunSerial(void*, int32_t, void (*fn)(void*, int32_t, int32_t), void* arg) { fn(arg, 0, 1); }

void MultiplyProduct(void*, int32_t, const edgemoe_product* p) {
  for (int32_t i = 0; i < p->n_x; ++i) {
    for (int64_t r = 0; r < p->n_rows; ++r) {
      p->y[i][r] = ToyDot(p->type, static_cast<const char*>(p->weights) + static_cast<uint64_t>(r) * p->row_bytes,
                          static_cast<const float*>(p->x[i]), p->n_cols);
    }
  }
}

}  // namespace

FileOpener FakeStorage::Opener() {
  return [this](const std::string& path, std::unique_ptr<File>* file) {
    *file = std::make_unique<FakeFile>(path, this);
    return Status();
  };
}

float ToyDot(int32_t type, const void* weights, const float* x, int64_t n) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    float w;
    if (type == kF32) {
      std::memcpy(&w, static_cast<const char*>(weights) + i * 4, sizeof(w));
    } else {
      w = static_cast<float>(static_cast<const int8_t*>(weights)[i]) / 16.0f;
    }
    sum += w * x[i];
  }
  return sum;
}

edgemoe_kernels ToyKernels() {
  edgemoe_kernels kernels = {};
  kernels.struct_size = sizeof(kernels);
  kernels.parallel = RunThreads;
  kernels.activation_row_bytes = [](void*, int32_t, int64_t n_cols) {
    return static_cast<uint64_t>(n_cols) * sizeof(float);
  };
  kernels.quantize_row = [](void*, int32_t, const float* x, void* y, int64_t n_cols) {
    std::memcpy(y, x, static_cast<size_t>(n_cols) * sizeof(float));
  };
  kernels.multiply = MultiplyProduct;
  return kernels;
}

edgemoe_kernels SerialToyKernels() {
  edgemoe_kernels kernels = ToyKernels();
  kernels.parallel = RunSerial;
  return kernels;
}

ToyModel::ToyModel(const ToyShape& shape) : shape_(shape) {
  uint64_t end = shape.first_offset;
  static const char* const kProjections[] = {"gate", "up", "down"};
  for (int layer = 0; layer < shape.n_layers; ++layer) {
    for (const char* projection : kProjections) {
      names_.push_back("blk." + std::to_string(layer) + "." + projection);
    }
  }
  for (int32_t i = 0; i < shape.n_layers * 3; ++i) {
    edgemoe_tensor t = {};
    t.name = names_[static_cast<size_t>(i)].c_str();
    t.layer = i / 3;
    t.n_experts = shape.n_experts;
    t.n_experts_used = shape.n_used;
    t.offset = end;
    t.expert_bytes = RowBytes(i) * static_cast<uint64_t>(Rows(i));
    end += t.expert_bytes * static_cast<uint64_t>(shape.n_experts);
    tensors_.push_back(t);
  }
  std::vector<char> bytes(end);
  std::mt19937 rng(static_cast<uint32_t>(shape.seed));
  for (const edgemoe_tensor& t : tensors_) {
    const int32_t idx = static_cast<int32_t>(&t - tensors_.data());
    const uint64_t n_bytes = t.expert_bytes * static_cast<uint64_t>(t.n_experts);
    for (uint64_t b = 0; b < n_bytes; b += Type(idx) == kF32 ? 4 : 1) {
      if (Type(idx) == kF32) {
        const float w = static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 1024.0f;
        std::memcpy(&bytes[t.offset + b], &w, sizeof(w));
      } else {
        bytes[t.offset + b] = static_cast<char>(rng() % 256);
      }
    }
  }
  storage_ = std::make_unique<FakeStorage>(std::move(bytes));
}

int32_t ToyModel::Type(int32_t tensor_idx) const {
  return shape_.mixed && tensor_idx % 3 == 2 && tensor_idx / 3 % 2 == 0 ? kInt8 : kF32;
}

uint64_t ToyModel::RowBytes(int32_t tensor_idx) const {
  return static_cast<uint64_t>(Cols(tensor_idx)) * (Type(tensor_idx) == kF32 ? 4 : 1);
}

int32_t ToyModel::ReadsOf(int32_t tensor_idx, int expert) const {
  const edgemoe_tensor& t = tensors_[static_cast<size_t>(tensor_idx)];
  return storage_->reads_of_page[(t.offset + static_cast<uint64_t>(expert) * t.expert_bytes) / kIoAlignment].load();
}

edgemoe_options ToyModel::Options(uint64_t slots_bytes, int n_io_threads, edgemoe_eviction rule) {
  edgemoe_options options = {};
  options.struct_size = sizeof(options);
  options.n_files = 1;
  options.file_paths = &path_pointer_;
  options.n_tensors = static_cast<int32_t>(tensors_.size());
  options.n_io_threads = n_io_threads;
  options.tensors = tensors_.data();
  options.slots_bytes = slots_bytes;
  options.eviction = rule;
  return options;
}

uint64_t ToyModel::SlotsBytes(int64_t n) {
  std::vector<ExpertTensor> tensors;
  (void)ExpertFile::Describe(Options(0), &tensors).ok();
  std::vector<int> class_of_tensor;
  const std::vector<SlotClass> classes = SlotPool::Classes(tensors, &class_of_tensor);
  int64_t fewest_slices = INT64_MAX;
  for (const SlotClass& c : classes) fewest_slices = std::min(fewest_slices, c.n_slices);
  uint64_t bytes = 0;
  for (const SlotClass& c : classes) {
    bytes += c.slot_bytes * static_cast<uint64_t>((n * c.n_slices + fewest_slices - 1) / fewest_slices);
  }
  return bytes;
}

edgemoe_runtime* ToyModel::Open(uint64_t slots_bytes, int n_io_threads, edgemoe_eviction rule) {
  edgemoe_runtime* runtime = nullptr;
  if (Status s = OpenRuntime(Options(slots_bytes, n_io_threads, rule), storage_->Opener(), &runtime); !s.ok()) {
    std::fprintf(stderr, "cannot open the toy model: %s\n", s.message().c_str());
    std::abort();
  }
  return runtime;
}

std::vector<float> ToyModel::Reference(int layer, const std::vector<int32_t>& ids, int n_tokens,
                                       const std::vector<float>& x) const {
  const int n_used = static_cast<int>(ids.size()) / n_tokens;
  std::vector<float> y, hidden(static_cast<size_t>(shape_.n_ff));
  const auto row = [&](int32_t tensor_idx, int32_t expert, int64_t r) {
    const edgemoe_tensor& t = tensors_[static_cast<size_t>(tensor_idx)];
    return storage_->bytes.data() + t.offset + static_cast<uint64_t>(expert) * t.expert_bytes +
           static_cast<uint64_t>(r) * RowBytes(tensor_idx);
  };
  for (int token = 0; token < n_tokens; ++token) {
    const float* const x_row = x.data() + static_cast<ptrdiff_t>(token) * shape_.n_embd;
    for (int used = 0; used < n_used; ++used) {
      const int32_t expert = ids[static_cast<size_t>(token * n_used + used)];
      if (expert == EDGEMOE_NO_EXPERT) {
        y.resize(y.size() + static_cast<size_t>(shape_.n_embd));
        continue;
      }
      for (int r = 0; r < shape_.n_ff; ++r) {
        hidden[static_cast<size_t>(r)] = ToyDot(Type(Gate(layer)), row(Gate(layer), expert, r), x_row, shape_.n_embd) *
                                         ToyDot(Type(Up(layer)), row(Up(layer), expert, r), x_row, shape_.n_embd);
      }
      for (int r = 0; r < shape_.n_embd; ++r) {
        y.push_back(ToyDot(Type(Down(layer)), row(Down(layer), expert, r), hidden.data(), shape_.n_ff));
      }
    }
  }
  return y;
}

ToySession::ToySession(edgemoe_runtime* runtime, ToyModel* model, int n_threads, const edgemoe_kernels& kernels)
    : model_(model) {
  if (edgemoe_session_create(runtime, &kernels, &session_, &error_) != EDGEMOE_OK) std::abort();
  edgemoe_session_set_threads(session_, n_threads);
}

ToySession::~ToySession() { edgemoe_session_destroy(session_); }

int32_t ToySession::Begin(int layer, const std::vector<int32_t>& ids, int n_tokens) {
  layer_ = layer;
  n_tokens_ = n_tokens;
  const size_t n_pairs = ids.size();
  const size_t n_ff = static_cast<size_t>(model_->shape().n_ff), n_embd = static_cast<size_t>(model_->shape().n_embd);
  gate_.assign(n_pairs * n_ff, -1.0f);
  up_.assign(n_pairs * n_ff, -1.0f);
  hidden_.assign(n_pairs * n_ff, -1.0f);
  y_.assign(n_pairs * n_embd, -1.0f);
  const int32_t tensor_idxs[] = {model_->Gate(layer), model_->Up(layer), model_->Down(layer)};
  const int64_t n_used = static_cast<int64_t>(ids.size()) / n_tokens;
  return edgemoe_session_begin_layer(session_, ids.data(), n_tokens, n_used,
                                     static_cast<uint64_t>(n_used) * sizeof(int32_t), tensor_idxs, 3, &error_);
}

int32_t ToySession::MultiplyGateUp(const std::vector<float>& x) {
  const uint64_t n_used = gate_.size() / static_cast<uint64_t>(model_->shape().n_ff) / static_cast<uint64_t>(n_tokens_);
  edgemoe_matmul m[2] = {};
  for (int i = 0; i < 2; ++i) {
    m[i].tensor_idx = i == 0 ? model_->Gate(layer_) : model_->Up(layer_);
    m[i].type = model_->Type(m[i].tensor_idx);
    m[i].n_cols = model_->Cols(m[i].tensor_idx);
    m[i].n_rows = model_->Rows(m[i].tensor_idx);
    m[i].row_bytes = model_->RowBytes(m[i].tensor_idx);
    m[i].x = x.data();
    m[i].x_n_used = 1;
    m[i].x_used_bytes = m[i].x_token_bytes = static_cast<uint64_t>(m[i].n_cols) * sizeof(float);
    m[i].y = i == 0 ? gate_.data() : up_.data();
    m[i].y_used_bytes = static_cast<uint64_t>(m[i].n_rows) * sizeof(float);
    m[i].y_token_bytes = n_used * m[i].y_used_bytes;
  }
  return edgemoe_session_matmul(session_, m, 2, &error_);
}

int32_t ToySession::MultiplyDown() {
  for (size_t i = 0; i < hidden_.size(); ++i) hidden_[i] = gate_[i] * up_[i];
  const uint64_t n_used = gate_.size() / static_cast<uint64_t>(model_->shape().n_ff) / static_cast<uint64_t>(n_tokens_);
  edgemoe_matmul m = {};
  m.tensor_idx = model_->Down(layer_);
  m.type = model_->Type(m.tensor_idx);
  m.n_cols = model_->Cols(m.tensor_idx);
  m.n_rows = model_->Rows(m.tensor_idx);
  m.row_bytes = model_->RowBytes(m.tensor_idx);
  m.x = hidden_.data();
  m.x_n_used = static_cast<int64_t>(n_used);
  m.x_used_bytes = static_cast<uint64_t>(m.n_cols) * sizeof(float);
  m.x_token_bytes = n_used * m.x_used_bytes;
  m.y = y_.data();
  m.y_used_bytes = static_cast<uint64_t>(m.n_rows) * sizeof(float);
  m.y_token_bytes = n_used * m.y_used_bytes;
  return edgemoe_session_matmul(session_, &m, 1, &error_);
}

void ToySession::End() { edgemoe_session_end_layer(session_); }

int32_t ToySession::RunLayer(int layer, const std::vector<int32_t>& ids, int n_tokens, const std::vector<float>& x) {
  int32_t code = Begin(layer, ids, n_tokens);
  if (code == EDGEMOE_OK) code = MultiplyGateUp(x);
  if (code == EDGEMOE_OK) code = MultiplyDown();
  End();
  return code;
}

std::vector<int32_t> RandomIds(std::mt19937* rng, int n_tokens, int n_used, int n_experts) {
  std::vector<int32_t> ids, all(static_cast<size_t>(n_experts));
  for (int e = 0; e < n_experts; ++e) all[static_cast<size_t>(e)] = e;
  for (int token = 0; token < n_tokens; ++token) {
    for (int i = 0; i < n_used; ++i) {
      std::swap(all[static_cast<size_t>(i)],
                all[static_cast<size_t>(i) + (*rng)() % static_cast<uint32_t>(n_experts - i)]);
    }
    ids.insert(ids.end(), all.begin(), all.begin() + n_used);
  }
  return ids;
}

std::vector<float> RandomRows(std::mt19937* rng, int n_tokens, int n_cols) {
  std::vector<float> x(static_cast<size_t>(n_tokens) * static_cast<size_t>(n_cols));
  for (float& v : x) v = static_cast<float>(static_cast<int>((*rng)() % 2001) - 1000) / 512.0f;
  return x;
}

void ReadGate::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  ++n_arrived_;
  cv_.notify_all();
  cv_.wait(lock, [this] { return open_; });
}

void ReadGate::AwaitArrivals(int n) {
  std::unique_lock<std::mutex> lock(mutex_);
  cv_.wait(lock, [&] { return n_arrived_ >= n; });
}

void ReadGate::Open() {
  std::lock_guard<std::mutex> lock(mutex_);
  open_ = true;
  cv_.notify_all();
}

Watchdog::Watchdog(const char* what, int seconds) {
  // The system clock, because older ThreadSanitizers do not know the wait on a steady one.
  const auto deadline = std::chrono::system_clock::now() + std::chrono::seconds(seconds);
  thread_ = std::thread([this, what, deadline] {
    std::unique_lock<std::mutex> lock(mutex_);
    if (cv_.wait_until(lock, deadline, [this] { return done_; })) return;
    std::fprintf(stderr, "watchdog: %s did not end in time; a deadlock\n", what);
    std::abort();
  });
}

Watchdog::~Watchdog() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
  }
  cv_.notify_all();
  thread_.join();
}

TempDir::TempDir() {
  const char* const root = std::getenv("TMPDIR");
  path_ = std::string(root != nullptr ? root : "/tmp") + "/edgemoe_test_XXXXXX";
  if (::mkdtemp(path_.data()) == nullptr) std::abort();
}

TempDir::~TempDir() {
  for (const std::string& file : files_) ::unlink(file.c_str());
  ::rmdir(path_.c_str());
}

std::string TempDir::Write(const std::string& name, const std::vector<char>& bytes) {
  files_.push_back(Path(name));
  std::ofstream(files_.back(), std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return files_.back();
}

}  // namespace edgemoe::test
