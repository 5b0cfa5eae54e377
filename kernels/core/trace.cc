// SPDX-License-Identifier: MIT
#include "core/trace.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <system_error>

namespace edgemoe {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are written as they lie in memory");

constexpr char kMagic[8] = {'E', 'M', 'T', 'R', 'A', 'C', 'E', '\0'};
constexpr uint32_t kVersion = 2;
// A decode token of 48 layers with 8 of 128 experts makes 5 KiB, so this is the time of 800 tokens that the disk may be
// behind; a micro-batch of 512 such tokens makes 1.2 MiB.
constexpr uint64_t kRingBytes = 4 << 20;
// Waking the writer takes a system call, so it is not done for every record.
constexpr uint64_t kBlockBytes = 256 << 10;

constexpr std::array<uint32_t, 256> CrcTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0u);
    table[i] = crc;
  }
  return table;
}

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

uint32_t Crc32(uint32_t crc, const void* bytes, uint64_t n_bytes) {
  static constexpr std::array<uint32_t, 256> kTable = CrcTable();
  const auto* const p = static_cast<const uint8_t*>(bytes);
  crc = ~crc;
  for (uint64_t i = 0; i < n_bytes; ++i) crc = crc >> 8 ^ kTable[(crc ^ p[i]) & 0xFF];
  return ~crc;
}

TraceRecorder::~TraceRecorder() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  writer_cv_.notify_one();
  if (writer_.joinable()) writer_.join();
}

Status TraceRecorder::Start(const FileCreator& create, const std::string& path, const std::string& header,
                            ExpertCache* cache) {
  for (const ExpertTensor& t : cache->file().tensors()) {
    if (t.n_experts <= kMostTracedExperts && t.layer >= 0 && t.layer <= UINT16_MAX) continue;
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("cannot record a trace: %s has %d experts in layer %d, expected at most %d in one of 0..%d",
                         t.name.c_str(), t.n_experts, t.layer, kMostTracedExperts, UINT16_MAX));
  }
  std::lock_guard<std::mutex> control(control_mutex_);
  if (file_ != nullptr) {
    return Status(EDGEMOE_INVALID_ARGUMENT,
                  Format("cannot record a trace: one is being recorded (%s); stop that first", path_.c_str()));
  }
  std::unique_ptr<FileWriter> file;
  if (Status s = create(path, &file); !s.ok()) return s;
  if (Status s = file->Write(kMagic, sizeof(kMagic)); !s.ok()) return s;
  if (Status s = file->Write(&kVersion, sizeof(kVersion)); !s.ok()) return s;
  file_ = std::move(file);
  path_ = path;
  Status s = WriteBlock("HEAD", header.data(), header.size(), nullptr, 0);
  if (s.ok()) {
    std::lock_guard<std::mutex> lock(mutex_);
    ring_.assign(kRingBytes, 0);
    head_ = tail_ = n_records_ = 0;
    bytes_read_ = cache->counters().bytes_read.load();
    stopping_ = overflowed_ = false;
    failure_ = Status();
    n_batches_.store(0, std::memory_order_relaxed);
    start_ns_.store(NowNs(), std::memory_order_relaxed);
    try {
      writer_ = std::thread([this] { WriterLoop(); });
      recording_.store(++n_recordings_, std::memory_order_release);
    } catch (const std::system_error& e) {
      s = Status(EDGEMOE_NO_MEMORY, Format("cannot start the thread that writes a trace: %s", e.what()));
    }
  }
  if (!s.ok()) file_.reset();
  return s;
}

Status TraceRecorder::CheckLocked() const {
  if (!overflowed_) return failure_;
  return Status(EDGEMOE_IO, Format("recording ended early: storage takes records slower than layers make them, and "
                                   "%llu bytes of them wait (%s); record to a faster disk, or fewer tokens at a time",
                                   static_cast<unsigned long long>(kRingBytes), path_.c_str()));
}

Status TraceRecorder::Check() {
  std::lock_guard<std::mutex> control(control_mutex_);
  if (file_ == nullptr) return Status(EDGEMOE_INVALID_ARGUMENT, "no trace is being recorded");
  std::lock_guard<std::mutex> lock(mutex_);
  return CheckLocked();
}

Status TraceRecorder::Stop() {
  std::lock_guard<std::mutex> control(control_mutex_);
  if (file_ == nullptr) return Status(EDGEMOE_INVALID_ARGUMENT, "no trace is being recorded");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    recording_.store(0, std::memory_order_release);
    stopping_ = true;
  }
  writer_cv_.notify_one();
  writer_.join();
  Status s;
  uint64_t n_records;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    s = CheckLocked();
    n_records = n_records_;
    std::vector<char>().swap(ring_);
  }
  if (s.ok()) s = WriteBlock("DONE", reinterpret_cast<const char*>(&n_records), sizeof(n_records), nullptr, 0);
  if (s.ok()) s = file_->Commit();
  file_.reset();
  return s;
}

double TraceRecorder::MicrosecondsSinceStart() const {
  return static_cast<double>(NowNs() - start_ns_.load(std::memory_order_relaxed)) / 1e3;
}

void TraceRecorder::Append(uint64_t recording, char* record, uint32_t record_bytes, uint64_t bytes_read) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (recording_.load(std::memory_order_relaxed) != recording) return;
  if (record_bytes > kRingBytes - (head_ - tail_)) {
    overflowed_ = true;
    recording_.store(0, std::memory_order_release);
    return;
  }
  // The counter starts again at zero when statistics are reset.
  const int64_t read_bytes = static_cast<int64_t>(bytes_read >= bytes_read_ ? bytes_read - bytes_read_ : bytes_read);
  bytes_read_ = bytes_read;
  std::memcpy(record + offsetof(TraceRecord, read_bytes), &read_bytes, sizeof(read_bytes));
  const uint64_t at = head_ % kRingBytes;
  const uint64_t n_first = std::min<uint64_t>(record_bytes, kRingBytes - at);
  std::memcpy(ring_.data() + at, record, n_first);
  std::memcpy(ring_.data(), record + n_first, record_bytes - n_first);
  const bool was_enough = head_ - tail_ >= kBlockBytes;
  head_ += record_bytes;
  ++n_records_;
  if (!was_enough && head_ - tail_ >= kBlockBytes) writer_cv_.notify_one();
}

// A block is all that the ring holds at one time, so it ends with a record.
void TraceRecorder::WriterLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    writer_cv_.wait(lock, [&] { return stopping_ || head_ - tail_ >= kBlockBytes; });
    const uint64_t n = head_ - tail_;
    if (n == 0 || overflowed_) return;  // stopping, or in vain
    const uint64_t at = tail_ % kRingBytes;
    const uint64_t n_first = std::min(n, kRingBytes - at);
    lock.unlock();
    Status s = WriteBlock("RECS", ring_.data() + at, n_first, ring_.data(), n - n_first);
    lock.lock();
    tail_ += n;
    if (!s.ok()) {
      failure_ = std::move(s);
      recording_.store(0, std::memory_order_release);
      return;
    }
  }
}

Status TraceRecorder::WriteBlock(const char* tag, const char* first, uint64_t n_first, const char* second,
                                 uint64_t n_second) {
  struct {
    char tag[4];
    uint32_t n_bytes;
    uint32_t crc;
  } head;
  std::memcpy(head.tag, tag, sizeof(head.tag));
  head.n_bytes = static_cast<uint32_t>(n_first + n_second);
  head.crc = Crc32(Crc32(Crc32(0, &head, 8), first, n_first), second, n_second);
  Status s = file_->Write(&head, sizeof(head));
  if (s.ok() && n_first > 0) s = file_->Write(first, n_first);
  if (s.ok() && n_second > 0) s = file_->Write(second, n_second);
  return s;
}

void LayerTrace::Fill(const ExpertCache& cache, const std::vector<int32_t>& tensor_idxs, const int32_t* ids,
                      int64_t n_tokens, int64_t n_used, const std::vector<int32_t>* foreseen) {
  const ExpertTensor& first = cache.file().tensors()[static_cast<size_t>(tensor_idxs[0])];
  if (n_tokens == 0) {
    recording_ = 0;
    return;
  }
  // A batch goes through the layers in order; the last one may see fewer of its tokens, those whose logits are wanted.
  if (batch_recording_ != recording_ || first.layer <= record_.layer || n_tokens > batch_tokens_) {
    record_.batch = recorder_->NewBatch();
    batch_recording_ = recording_;
    batch_tokens_ = static_cast<uint32_t>(n_tokens);
  }
  const size_t n_ids = static_cast<size_t>(n_tokens * n_used);
  const size_t n_resident_bytes = (static_cast<size_t>(first.n_experts) + 7) / 8;
  record_.record_bytes = static_cast<uint32_t>(sizeof(TraceRecord) + n_ids * sizeof(uint16_t) + n_resident_bytes);
  size_t n_foreseen = 0;
  for (int i = 0; foreseen != nullptr && i < kTracedDistances; ++i) n_foreseen += foreseen[i].size();
  const bool has_foreseen = n_foreseen > 0;
  if (has_foreseen) {
    record_.record_bytes += static_cast<uint32_t>((kTracedDistances + n_foreseen) * sizeof(uint16_t));
  }
  record_.n_tokens = static_cast<uint32_t>(n_tokens);
  record_.layer = static_cast<uint16_t>(first.layer);
  record_.n_used = static_cast<uint16_t>(n_used);
  record_.n_experts = static_cast<uint16_t>(first.n_experts);
  record_.flags = static_cast<uint16_t>(kTraceHasResident | (has_foreseen ? kTraceHasForeseen : 0));
  record_.begin_us = recorder_->MicrosecondsSinceStart();
  // With room for the weights, which may come.
  const size_t most_bytes = record_.record_bytes + n_ids * sizeof(float);
  if (bytes_.size() < most_bytes) bytes_.resize(most_bytes);
  char* to = bytes_.data() + sizeof(TraceRecord);
  const auto put = [&to](size_t value) {
    const uint16_t as_written = static_cast<uint16_t>(value);
    std::memcpy(to, &as_written, sizeof(as_written));
    to += sizeof(as_written);
  };
  for (size_t i = 0; i < n_ids; ++i) put(static_cast<size_t>(ids[i]));
  std::memset(to, 0, n_resident_bytes);
  for (int32_t e = 0; e < first.n_experts; ++e) {
    const bool resident = std::all_of(tensor_idxs.begin(), tensor_idxs.end(), [&](int32_t t) {
      return cache.Resident(cache.file().tensors()[static_cast<size_t>(t)].first_slice + e);
    });
    if (resident) to[e / 8] = static_cast<char>(to[e / 8] | 1 << e % 8);
  }
  if (!has_foreseen) return;
  to += n_resident_bytes;
  for (int i = 0; i < kTracedDistances; ++i) {
    put(foreseen[i].size());
    for (int32_t e : foreseen[i]) put(static_cast<size_t>(e));
  }
}

void LayerTrace::CopyWeights(const edgemoe_ffn& ffn) {
  char* to = bytes_.data() + record_.record_bytes;
  for (uint64_t t = 0; t < record_.n_tokens; ++t) {
    for (uint64_t u = 0; u < record_.n_used; ++u, to += sizeof(float)) {
      std::memcpy(to,
                  reinterpret_cast<const char*>(ffn.weights) + t * ffn.weights_token_bytes + u * ffn.weights_used_bytes,
                  sizeof(float));
    }
  }
  record_.record_bytes += static_cast<uint32_t>(record_.n_tokens * uint64_t{record_.n_used} * sizeof(float));
  record_.flags |= kTraceHasWeights;
}

void LayerTrace::Append(uint64_t bytes_read) {
  record_.wait_us = static_cast<float>(static_cast<double>(wait_ns_) / 1e3);
  std::memcpy(bytes_.data(), &record_, sizeof(record_));
  recorder_->Append(recording_, bytes_.data(), record_.record_bytes, bytes_read);
}

}  // namespace edgemoe
