// SPDX-License-Identifier: MIT
// trace.h: records of what every layer of every batch chose, waited for and read, in a file of docs/trace-format.md.
// Invariant: recording never slows or breaks a layer. Records go to a ring in memory, which one thread of the recorder
// empties into the file; when the ring is full or the file fails, the recording ends, and Check and Stop say why.
// Thread promise: a TraceRecorder is thread-safe, and its mutex is never held over I/O; a LayerTrace belongs to a
// session, but for AddWait, which the threads of a layer take turns to call.
#ifndef EDGEMOE_CORE_TRACE_H_
#define EDGEMOE_CORE_TRACE_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/expert_cache.h"
#include "core/file_writer.h"
#include "core/status.h"
#include "edgemoe/edgemoe.h"

namespace edgemoe {

// Ids are 16 bits in the file, where the highest means none, and signed where Python keeps them.
inline constexpr int kMostTracedExperts = 32767;

// The fixed part of a record as it lies in the file, little-endian. Behind it: ids [n_tokens][n_used] uint16, resident
// experts as bits [(n_experts + 7) / 8], experts that were foreseen from one and from two layers ahead (a number and as
// many ids, uint16, for each), mixing weights [n_tokens][n_used] float32; the last three where flags say so.
struct TraceRecord {
  uint32_t record_bytes = 0;  // with what is behind it
  uint32_t batch = 0;
  uint32_t n_tokens = 0;
  uint16_t layer = 0;
  uint16_t n_used = 0;
  uint16_t n_experts = 0;
  uint16_t flags = 0;
  float wait_us = 0.0f;
  int64_t read_bytes = 0;
  double begin_us = 0.0;
};
static_assert(sizeof(TraceRecord) == 40, "the format has no padding");
inline constexpr uint16_t kTraceHasWeights = 1;
inline constexpr uint16_t kTraceHasResident = 2;
inline constexpr uint16_t kTraceHasForeseen = 4;
inline constexpr int kTracedDistances = 2;

// As zlib's: CRC-32 of ISO 3309, of `crc` bytes before and these.
uint32_t Crc32(uint32_t crc, const void* bytes, uint64_t n_bytes);

class TraceRecorder {
 public:
  TraceRecorder() = default;
  ~TraceRecorder();
  TraceRecorder(const TraceRecorder&) = delete;
  TraceRecorder& operator=(const TraceRecorder&) = delete;

  // header: the JSON text of the file's first block. cache: what the layers to be recorded use.
  Status Start(const FileCreator& create, const std::string& path, const std::string& header, ExpertCache* cache);
  // What has ended the recording early.
  Status Check();
  // Write what is left, and give the file its name; on failure there is no file.
  Status Stop();

  // --- used by LayerTrace ---
  // Another number for each recording; 0: none is under way.
  uint64_t recording() const { return recording_.load(std::memory_order_acquire); }
  uint32_t NewBatch() { return n_batches_.fetch_add(1, std::memory_order_relaxed); }
  double MicrosecondsSinceStart() const;
  // record: a TraceRecord of `recording` and what is behind it. bytes_read: the cache's counter now; what has been
  // read since the record before is filled in.
  void Append(uint64_t recording, char* record, uint32_t record_bytes, uint64_t bytes_read);

 private:
  Status CheckLocked() const;
  void WriterLoop();
  Status WriteBlock(const char* tag, const char* first, uint64_t n_first, const char* second, uint64_t n_second);

  std::mutex control_mutex_;  // one Start or Stop at a time
  std::string path_;
  std::unique_ptr<FileWriter> file_;
  std::thread writer_;
  uint64_t n_recordings_ = 0;

  std::atomic<uint64_t> recording_{0};
  std::atomic<uint32_t> n_batches_{0};
  std::atomic<int64_t> start_ns_{0};

  std::mutex mutex_;
  std::condition_variable writer_cv_;
  std::vector<char> ring_;
  uint64_t head_ = 0, tail_ = 0;  // bytes appended and bytes written since the start
  uint64_t n_records_ = 0;
  uint64_t bytes_read_ = 0;
  bool stopping_ = false;
  bool overflowed_ = false;
  Status failure_;
};

// The record of the layer that a session has in progress.
class LayerTrace {
 public:
  explicit LayerTrace(TraceRecorder* recorder) : recorder_(recorder) {}

  // With the cache's lock, before the layer acquires anything. ids: [n_tokens][n_used]. foreseen: [kTracedDistances]
  // what was foreseen of the layer, or null.
  void Begin(const ExpertCache& cache, const std::vector<int32_t>& tensor_idxs, const int32_t* ids, int64_t n_tokens,
             int64_t n_used, const std::vector<int32_t>* foreseen) {
    wait_ns_ = 0;
    recording_ = recorder_->recording();
    if (recording_ != 0) Fill(cache, tensor_idxs, ids, n_tokens, n_used, foreseen);
  }
  void AddWait(std::chrono::steady_clock::duration waited) {
    wait_ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count();
  }
  void SetWeights(const edgemoe_ffn& ffn) {
    if (recording_ != 0 && ffn.out != nullptr && (record_.flags & kTraceHasWeights) == 0) CopyWeights(ffn);
  }
  void End(const CacheCounters& counters) {
    if (recording_ != 0) Append(counters.bytes_read.load(std::memory_order_relaxed));
    recording_ = 0;
  }

 private:
  void Fill(const ExpertCache& cache, const std::vector<int32_t>& tensor_idxs, const int32_t* ids, int64_t n_tokens,
            int64_t n_used, const std::vector<int32_t>* foreseen);
  void CopyWeights(const edgemoe_ffn& ffn);
  void Append(uint64_t bytes_read);

  TraceRecorder* const recorder_;
  uint64_t recording_ = 0;  // that the layer in progress belongs to
  int64_t wait_ns_ = 0;
  TraceRecord record_;
  std::vector<char> bytes_;  // the record as it will be written
  // The batch in progress.
  uint64_t batch_recording_ = 0;
  uint32_t batch_tokens_ = 0;
};

}  // namespace edgemoe
#endif  // EDGEMOE_CORE_TRACE_H_
