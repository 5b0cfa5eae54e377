// SPDX-License-Identifier: MIT
// fakes.h: what the native tests share. A file in memory that can fail, wait or be slow; a toy MoE model in it, with
// arithmetic simple enough for results to be compared byte by byte; a gate for reads and a watchdog for deadlocks.
#ifndef EDGEMOE_TESTS_FAKES_H_
#define EDGEMOE_TESTS_FAKES_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/io.h"
#include "core/runtime.h"
#include "edgemoe/edgemoe.h"

namespace edgemoe::test {

// A file in memory. Set on_read only while no read is under way.
struct FakeStorage {
  explicit FakeStorage(std::vector<char> bytes_in)
      : bytes(std::move(bytes_in)), reads_of_page(bytes.size() / kIoAlignment + 2) {}
  std::vector<char> bytes;
  std::atomic<int64_t> n_reads{0};
  std::vector<std::atomic<int32_t>> reads_of_page;  // reads that began at that page
  // Called with the number of the read, from 0, and its offset; may sleep, block or fail.
  std::function<Status(int64_t read_no, uint64_t offset)> on_read;

  FileOpener Opener();
};

enum ToyType : int32_t { kF32 = 0, kInt8 = 1 };

// Three projections per layer: gate and up [n_ff x n_embd] and down [n_embd x n_ff]. Gate and up are f32; the down
// projections of even layers are int8 when `mixed`, which makes a second slot class.
struct ToyShape {
  int n_layers = 3;
  int n_experts = 16;
  int n_used = 4;
  int n_embd = 16;
  int n_ff = 300;  // three decode chunks
  bool mixed = false;
  uint64_t first_offset = 4096 + 96;  // so that slices do not begin on a page
  uint64_t seed = 1;
};

class ToyModel {
 public:
  explicit ToyModel(const ToyShape& shape);
  ToyModel(const ToyModel&) = delete;
  ToyModel& operator=(const ToyModel&) = delete;

  const ToyShape& shape() const { return shape_; }
  FakeStorage& storage() { return *storage_; }
  const std::vector<edgemoe_tensor>& tensors() const { return tensors_; }
  edgemoe_options Options(uint64_t slots_bytes, int n_io_threads = 2, edgemoe_eviction rule = EDGEMOE_EVICT_LRU);
  // Bytes for `n` slots of the class with the fewest slices and the same share of every other class.
  uint64_t SlotsBytes(int64_t n);
  edgemoe_runtime* Open(uint64_t slots_bytes, int n_io_threads = 2, edgemoe_eviction rule = EDGEMOE_EVICT_LRU);

  int32_t Gate(int layer) const { return layer * 3; }
  int32_t Up(int layer) const { return layer * 3 + 1; }
  int32_t Down(int layer) const { return layer * 3 + 2; }
  int32_t Type(int32_t tensor_idx) const;
  int64_t Rows(int32_t tensor_idx) const { return tensor_idx % 3 == 2 ? shape_.n_embd : shape_.n_ff; }
  int64_t Cols(int32_t tensor_idx) const { return tensor_idx % 3 == 2 ? shape_.n_ff : shape_.n_embd; }
  uint64_t RowBytes(int32_t tensor_idx) const;
  // Reads so far of one expert's slice of a tensor.
  int32_t ReadsOf(int32_t tensor_idx, int expert) const;

  // down(gate(x) * up(x)) for every token and used expert, straight from the file: [n_tokens][n_used][n_embd].
  std::vector<float> Reference(int layer, const std::vector<int32_t>& ids, int n_tokens,
                               const std::vector<float>& x) const;

 private:
  const ToyShape shape_;
  std::vector<std::string> names_;
  std::vector<edgemoe_tensor> tensors_;
  std::unique_ptr<FakeStorage> storage_;
  std::string path_ = "toy.gguf";
  const char* path_pointer_ = path_.c_str();
};

edgemoe_kernels ToyKernels();
// As ToyKernels, but all work is done by the calling thread, which allocates nothing.
edgemoe_kernels SerialToyKernels();
float ToyDot(int32_t type, const void* weights, const float* x, int64_t n);

// A session and the buffers of one layer of a batch.
class ToySession {
 public:
  ToySession(edgemoe_runtime* runtime, ToyModel* model, int n_threads = 1,
             const edgemoe_kernels& kernels = ToyKernels());
  ~ToySession();
  ToySession(const ToySession&) = delete;
  ToySession& operator=(const ToySession&) = delete;

  int32_t Begin(int layer, const std::vector<int32_t>& ids, int n_tokens);
  int32_t MultiplyGateUp(const std::vector<float>& x);  // x: [n_tokens][n_embd]
  int32_t MultiplyDown();
  void End();
  // All of the above; stops at the first failure, and ends the layer even then.
  int32_t RunLayer(int layer, const std::vector<int32_t>& ids, int n_tokens, const std::vector<float>& x);

  const std::vector<float>& y() const { return y_; }
  const edgemoe_error& error() const { return error_; }

 private:
  ToyModel* const model_;
  edgemoe_session* session_ = nullptr;
  edgemoe_error error_ = {};
  int layer_ = 0;
  int n_tokens_ = 0;
  std::vector<float> gate_, up_, hidden_, y_;
};

// n_used distinct experts for each of n_tokens tokens.
std::vector<int32_t> RandomIds(std::mt19937* rng, int n_tokens, int n_used, int n_experts);
std::vector<float> RandomRows(std::mt19937* rng, int n_tokens, int n_cols);

// Where reads wait until the test lets them go.
class ReadGate {
 public:
  void Wait();                // called by the read
  void AwaitArrivals(int n);  // until n reads wait or have passed
  void Open();

 private:
  std::mutex mutex_;
  std::condition_variable cv_;
  int n_arrived_ = 0;
  bool open_ = false;
};

// Aborts the process, naming the test, when it lives for longer than the given time: a deadlock cannot fail otherwise.
class Watchdog {
 public:
  explicit Watchdog(const char* what, int seconds = 60);
  ~Watchdog();

 private:
  std::mutex mutex_;
  std::condition_variable cv_;
  bool done_ = false;
  std::thread thread_;
};

struct RuntimeRelease {
  void operator()(edgemoe_runtime* runtime) const { edgemoe_runtime_release(runtime); }
};
using RuntimePtr = std::unique_ptr<edgemoe_runtime, RuntimeRelease>;

// A directory that is removed with its files.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  std::string Write(const std::string& name, const std::vector<char>& bytes);
  std::string Path(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
  std::vector<std::string> files_;
};

}  // namespace edgemoe::test
#endif  // EDGEMOE_TESTS_FAKES_H_
