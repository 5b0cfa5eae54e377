// SPDX-License-Identifier: MIT
// What a recording holds, and that it never costs a layer more than a copy.
#include "core/trace.h"

#include <dirent.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>

#include "edgemoe/scheduler.h"
#include "tests/fakes.h"
#include "tests/own_model.h"

namespace edgemoe::test {
namespace {

// A file in memory that can fail, wait or be slow.
struct FakeSink {
  std::vector<char> bytes;
  bool committed = false;
  bool discarded = false;
  std::atomic<int> n_writes{0};
  std::atomic<uint64_t> n_written{0};  // bytes
  std::function<Status(int write_no)> on_write;

  FileCreator Creator();
};

class FakeWriter final : public FileWriter {
 public:
  explicit FakeWriter(FakeSink* sink) : sink_(sink) {}
  ~FakeWriter() override { sink_->discarded = !sink_->committed; }
  Status Write(const void* bytes, uint64_t n_bytes) override {
    const int write_no = sink_->n_writes.fetch_add(1);
    if (sink_->on_write) {
      if (Status s = sink_->on_write(write_no); !s.ok()) return s;
    }
    const char* const p = static_cast<const char*>(bytes);
    sink_->bytes.insert(sink_->bytes.end(), p, p + n_bytes);
    sink_->n_written.fetch_add(n_bytes);
    return Status();
  }
  Status Commit() override {
    sink_->committed = true;
    return Status();
  }

 private:
  FakeSink* const sink_;
};

FileCreator FakeSink::Creator() {
  return [this](const std::string&, std::unique_ptr<FileWriter>* writer) {
    *writer = std::make_unique<FakeWriter>(this);
    return Status();
  };
}

struct Record {
  TraceRecord head;
  std::vector<int32_t> ids;
  std::set<int> resident;
  std::vector<float> weights;
};

struct Contents {
  std::string header;
  std::vector<Record> records;
};

Record ParseRecord(const char* p) {
  Record r;
  std::memcpy(&r.head, p, sizeof(r.head));
  p += sizeof(r.head);
  const size_t n_ids = size_t{r.head.n_tokens} * r.head.n_used;
  for (size_t i = 0; i < n_ids; ++i, p += 2) {
    uint16_t id;
    std::memcpy(&id, p, sizeof(id));
    r.ids.push_back(id);
  }
  if (r.head.flags & kTraceHasResident) {
    for (int e = 0; e < r.head.n_experts; ++e) {
      if (p[e / 8] >> e % 8 & 1) r.resident.insert(e);
    }
    p += (r.head.n_experts + 7) / 8;
  }
  if (r.head.flags & kTraceHasWeights) {
    r.weights.resize(n_ids);
    std::memcpy(r.weights.data(), p, n_ids * sizeof(float));
  }
  return r;
}

// Checks what every file has to be: blocks with their checksums from the first byte to the last, whole records.
Contents Parse(const std::vector<char>& bytes) {
  Contents c;
  EXPECT_EQ(std::string(bytes.data(), 7), "EMTRACE");
  EXPECT_EQ(bytes[8], 2);
  bool done = false;
  for (size_t at = 12; at < bytes.size();) {
    EXPECT_FALSE(done) << "bytes behind the last block";
    const std::string tag(&bytes[at], 4);
    uint32_t n_bytes, crc;
    std::memcpy(&n_bytes, &bytes[at + 4], 4);
    std::memcpy(&crc, &bytes[at + 8], 4);
    const char* const payload = bytes.data() + at + 12;
    EXPECT_EQ(crc, Crc32(Crc32(0, &bytes[at], 8), payload, n_bytes));
    at += 12 + n_bytes;
    if (tag == "HEAD") {
      c.header.assign(payload, n_bytes);
    } else if (tag == "RECS") {
      for (const char* p = payload; p < payload + n_bytes; p += c.records.back().head.record_bytes) {
        c.records.push_back(ParseRecord(p));
        if (c.records.back().head.record_bytes < sizeof(TraceRecord)) return c;
      }
    } else {
      EXPECT_EQ(tag, "DONE");
      uint64_t n_records;
      std::memcpy(&n_records, payload, 8);
      EXPECT_EQ(n_records, c.records.size());
      done = true;
    }
  }
  EXPECT_TRUE(done);
  return c;
}

std::vector<char> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::vector<char>(std::istreambuf_iterator<char>(file), {});
}

int FilesIn(const std::string& folder) {
  int n = 0;
  DIR* const dir = ::opendir(folder.c_str());
  while (const dirent* entry = ::readdir(dir)) n += std::strcmp(entry->d_name, ".") && std::strcmp(entry->d_name, "..");
  ::closedir(dir);
  return n;
}

// A record of so many bytes, all of whose ids are `i`.
void AppendLarge(TraceRecorder* recorder, uint32_t record_bytes, int i) {
  std::vector<char> record(record_bytes);
  TraceRecord head;
  head.record_bytes = record_bytes;
  head.batch = static_cast<uint32_t>(i);
  head.n_tokens = (record_bytes - sizeof(head)) / 2;
  head.n_used = 1;
  std::memcpy(record.data(), &head, sizeof(head));
  const std::vector<uint16_t> ids(head.n_tokens, static_cast<uint16_t>(i));
  std::memcpy(record.data() + sizeof(head), ids.data(), ids.size() * sizeof(uint16_t));
  recorder->Append(recorder->recording(), record.data(), record_bytes, 0);
}

// Guards against: a checksum that Python's zlib does not agree with.
TEST(TraceTest, ChecksumIsThatOfZlib) {
  EXPECT_EQ(Crc32(0, "123456789", 9), 0xCBF43926u);  // the check value of CRC-32/ISO-HDLC
  EXPECT_EQ(Crc32(Crc32(0, "1234", 4), "56789", 5), 0xCBF43926u);
}

// Guards against: a record of another batch, layer or token; hits that the statistics count otherwise; bytes lost
// between layers.
TEST(TraceTest, RecordsAreWhatTheLayersWereAskedAndCounted) {
  ToyShape shape;
  ToyModel model(shape);
  RuntimePtr runtime(model.Open(model.SlotsBytes(20)));
  ToySession session(runtime.get(), &model);
  FakeSink sink;
  std::mt19937 rng(5);
  // Before the recording: something is resident when it begins.
  ASSERT_EQ(session.RunLayer(0, RandomIds(&rng, 1, 4, 16), 1, RandomRows(&rng, 1, 16)), EDGEMOE_OK);
  edgemoe_stats before, after;
  edgemoe_runtime_stats(runtime.get(), &before);
  ASSERT_TRUE(runtime->trace.Start(sink.Creator(), "trace", "{}", &runtime->cache).ok());
  std::vector<std::vector<int32_t>> asked;
  std::vector<int> tokens_of, layer_of;
  // The prompt's last layer sees its last token alone, as llama.cpp does it.
  for (const int n_tokens : {5, 1, 1, 1}) {
    for (int layer = 0; layer < 3; ++layer) {
      const int n = layer == 2 ? 1 : n_tokens;
      asked.push_back(RandomIds(&rng, n, 4, 16));
      tokens_of.push_back(n);
      layer_of.push_back(layer);
      ASSERT_EQ(session.RunLayer(layer, asked.back(), n, RandomRows(&rng, n, 16)), EDGEMOE_OK);
    }
  }
  edgemoe_runtime_stats(runtime.get(), &after);
  ASSERT_TRUE(runtime->trace.Stop().ok());
  ASSERT_TRUE(sink.committed);
  const Contents c = Parse(sink.bytes);
  EXPECT_EQ(c.header, "{}");
  ASSERT_EQ(c.records.size(), asked.size());
  uint64_t n_hits = 0, n_asked = 0;
  int64_t read_bytes = 0;
  double wait_us = 0.0, last_begin_us = 0.0;
  for (size_t i = 0; i < asked.size(); ++i) {
    const Record& r = c.records[i];
    EXPECT_EQ(r.ids, asked[i]);
    EXPECT_EQ(r.head.batch, i / 3);
    EXPECT_EQ(r.head.layer, layer_of[i]);
    EXPECT_EQ(r.head.n_tokens, static_cast<uint32_t>(tokens_of[i]));
    EXPECT_EQ(r.head.n_experts, 16);
    EXPECT_TRUE(r.weights.empty()) << "products that are not a whole block have no known weights";
    EXPECT_GE(r.head.begin_us, last_begin_us);
    last_begin_us = r.head.begin_us;
    for (const int e : std::set<int>(asked[i].begin(), asked[i].end())) {
      n_hits += r.resident.count(e);
      ++n_asked;
    }
    read_bytes += r.head.read_bytes;
    wait_us += r.head.wait_us;
  }
  EXPECT_GT(c.records[0].resident.size(), 0u);
  EXPECT_EQ(n_hits, after.hits - before.hits);
  EXPECT_EQ(n_asked - n_hits, after.misses + after.late_hits - before.misses - before.late_hits);
  EXPECT_EQ(static_cast<uint64_t>(read_bytes), after.bytes_read - before.bytes_read);
  EXPECT_NEAR(wait_us, static_cast<double>(after.stall_ns - before.stall_ns) / 1e3, 1.0 + wait_us * 1e-5);
}

// Guards against: weights of another token or expert, and none at all where they are known.
TEST(TraceTest, WholeBlocksHaveTheirMixingWeights) {
  constexpr int kEmbd = 64, kFf = 256, kUsed = 2, kTokens = 3;
  OwnModel model({{simd::kQ4_0, kFf, kEmbd}, {simd::kQ4_K, kEmbd, kFf}, {simd::kQ8_0, kFf, kEmbd}}, 4096 + 96);
  RuntimePtr runtime = model.Open(kOwnExperts);
  if (edgemoe_runtime_is_own(runtime.get(), 0) == 0) GTEST_SKIP() << "this CPU has only the portable kernels";
  const edgemoe_kernels kernels = ToyKernels();
  edgemoe_session* session = nullptr;
  ASSERT_EQ(edgemoe_session_create(runtime.get(), &kernels, &session, nullptr), EDGEMOE_OK);
  FakeSink sink;
  ASSERT_TRUE(runtime->trace.Start(sink.Creator(), "trace", "{}", &runtime->cache).ok());
  std::mt19937 rng(2);
  const std::vector<float> x = RandomRows(&rng, kTokens, kEmbd);
  // Rows of three floats, of which the third is nobody's.
  const std::vector<float> weights = {0.5f, 0.25f, -1.0f, 0.75f, 0.125f, -1.0f, 0.625f, 0.375f, -1.0f};
  const std::vector<int32_t> ids = RandomIds(&rng, kTokens, kUsed, kOwnExperts);
  std::vector<float> gate(kTokens * kUsed * kFf), up(kTokens * kUsed * kFf), down(kTokens * kUsed * kEmbd);
  std::vector<float> out(kTokens * kEmbd);
  edgemoe_ffn ffn = {};
  ffn.up = model.Matmul(0, x.data(), 1, up.data(), kUsed);
  ffn.down = model.Matmul(1, nullptr, kUsed, down.data(), kUsed);
  ffn.gate = model.Matmul(2, x.data(), 1, gate.data(), kUsed);
  ffn.weights = weights.data();
  ffn.weights_used_bytes = sizeof(float);
  ffn.weights_token_bytes = 3 * sizeof(float);
  ffn.out = out.data();
  ffn.out_token_bytes = kEmbd * sizeof(float);
  const int32_t tensor_idxs[] = {0, 1, 2};
  for (const bool summed : {true, false}) {
    if (!summed) ffn.out = nullptr;
    ASSERT_EQ(edgemoe_session_begin_layer(session, ids.data(), kTokens, kUsed, kUsed * sizeof(int32_t), tensor_idxs, 3,
                                          nullptr),
              EDGEMOE_OK);
    ASSERT_EQ(edgemoe_session_ffn(session, &ffn, nullptr), EDGEMOE_OK);
    edgemoe_session_end_layer(session);
  }
  ASSERT_TRUE(runtime->trace.Stop().ok());
  const Contents c = Parse(sink.bytes);
  ASSERT_EQ(c.records.size(), 2u);
  EXPECT_EQ(c.records[0].weights, std::vector<float>({0.5f, 0.25f, 0.75f, 0.125f, 0.625f, 0.375f}));
  EXPECT_TRUE(c.records[1].weights.empty()) << "where the caller mixes, the weights may not be there yet";
  EXPECT_EQ(c.records[1].resident.size(), std::set<int>(ids.begin(), ids.end()).size());
  edgemoe_session_destroy(session);
}

// Guards against: a layer that waits for the disk on which the trace is written, and a trace with holes that looks
// whole.
TEST(TraceTest, LayersGoOnWhenTheFileStandsStillAndTheTraceFails) {
  Watchdog watchdog("a layer that records");
  ToyModel model{ToyShape()};
  RuntimePtr runtime(model.Open(model.SlotsBytes(16)));
  ToySession session(runtime.get(), &model);
  FakeSink sink;
  ReadGate gate;
  sink.on_write = [&](int write_no) {
    if (write_no >= 4) gate.Wait();  // magic, version, the header's two
    return Status();
  };
  ASSERT_TRUE(runtime->trace.Start(sink.Creator(), "slow.trace", "{}", &runtime->cache).ok());
  // All of the ring's 4 MiB, so that the layer's own record is the first without room.
  for (int i = 0; i < 64; ++i) AppendLarge(&runtime->trace, 1 << 16, i);
  EXPECT_TRUE(runtime->trace.Check().ok());
  std::mt19937 rng(5);
  const std::vector<int32_t> ids = RandomIds(&rng, 5, 4, 16);
  const std::vector<float> x = RandomRows(&rng, 5, 16);
  for (int layer = 0; layer < 3; ++layer) {
    ASSERT_EQ(session.RunLayer(layer, ids, 5, x), EDGEMOE_OK);
    EXPECT_EQ(session.y(), model.Reference(layer, ids, 5, x));
    EXPECT_EQ(runtime->trace.Check().code(), EDGEMOE_IO);
  }
  gate.Open();
  const Status s = runtime->trace.Stop();
  EXPECT_EQ(s.code(), EDGEMOE_IO);
  EXPECT_NE(s.message().find("slow.trace"), std::string::npos) << s.message();
  EXPECT_TRUE(sink.discarded);
  // The next recording is not the last one's.
  FakeSink next;
  ASSERT_TRUE(runtime->trace.Start(next.Creator(), "next.trace", "{}", &runtime->cache).ok());
  EXPECT_TRUE(runtime->trace.Check().ok());
  ASSERT_EQ(session.RunLayer(0, ids, 5, x), EDGEMOE_OK);
  ASSERT_TRUE(runtime->trace.Stop().ok());
  EXPECT_EQ(Parse(next.bytes).records.size(), 1u);
}

// Guards against: records that tear or vanish where the ring begins again.
TEST(TraceTest, RecordsSurviveTheRingsEnd) {
  Watchdog watchdog("RecordsSurviveTheRingsEnd");
  ToyModel model{ToyShape()};
  RuntimePtr runtime(model.Open(model.SlotsBytes(16)));
  FakeSink sink;
  ASSERT_TRUE(runtime->trace.Start(sink.Creator(), "trace", "{}", &runtime->cache).ok());
  // A length that does not divide the ring's; more than twice the ring.
  constexpr int kRecords = 140, kBytes = 65538;
  for (int i = 0; i < kRecords; ++i) {
    AppendLarge(&runtime->trace, kBytes, i);
    // As layers that take time would: the writer, which takes a quarter of a MiB or more, gets to run. What it is
    // writing keeps its room until it has noticed that it is written: a MiB of that and a MiB behind it fit into the
    // ring.
    while (sink.n_written.load() + (1 << 20) < static_cast<uint64_t>(i) * kBytes) std::this_thread::yield();
  }
  ASSERT_TRUE(runtime->trace.Stop().ok());
  const Contents c = Parse(sink.bytes);
  ASSERT_EQ(c.records.size(), static_cast<size_t>(kRecords));
  for (int i = 0; i < kRecords; ++i) {
    const Record& r = c.records[static_cast<size_t>(i)];
    ASSERT_EQ(r.head.batch, static_cast<uint32_t>(i));
    ASSERT_EQ(std::count(r.ids.begin(), r.ids.end(), i), static_cast<std::ptrdiff_t>(r.ids.size())) << i;
  }
}

// Guards against: a full disk that is noticed by nobody, or whose half a trace is taken for a whole one.
TEST(TraceTest, FailedWriteFailsTheTraceAndNotTheLayer) {
  ToyModel model{ToyShape()};
  for (const int fails_at : {0, 2, 4, 6}) {
    RuntimePtr runtime(model.Open(model.SlotsBytes(16)));
    ToySession session(runtime.get(), &model);
    FakeSink sink;
    sink.on_write = [&](int write_no) { return write_no >= fails_at ? Status(EDGEMOE_IO, "no space left") : Status(); };
    const Status started = runtime->trace.Start(sink.Creator(), "full.trace", "{}", &runtime->cache);
    EXPECT_EQ(started.ok(), fails_at >= 4);
    std::mt19937 rng(5);
    const std::vector<int32_t> ids = RandomIds(&rng, 1, 4, 16);
    const std::vector<float> x = RandomRows(&rng, 1, 16);
    EXPECT_EQ(session.RunLayer(0, ids, 1, x), EDGEMOE_OK);
    EXPECT_EQ(session.y(), model.Reference(0, ids, 1, x));
    const Status stopped = runtime->trace.Stop();
    EXPECT_EQ(stopped.code(), started.ok() ? EDGEMOE_IO : EDGEMOE_INVALID_ARGUMENT) << fails_at;
    EXPECT_TRUE(sink.discarded);
  }
}

// Guards against: records of a layer that began before the recording or ended after it, and sessions whose records
// mix.
TEST(TraceTest, OnlyLayersWithinTheRecordingAreRecorded) {
  ToyModel model{ToyShape()};
  RuntimePtr runtime(model.Open(model.SlotsBytes(16)));
  ToySession one(runtime.get(), &model), other(runtime.get(), &model);
  std::mt19937 rng(5);
  const std::vector<int32_t> ids = RandomIds(&rng, 1, 4, 16);
  FakeSink sink;
  ASSERT_EQ(one.Begin(0, ids, 1), EDGEMOE_OK);
  ASSERT_TRUE(runtime->trace.Start(sink.Creator(), "trace", "{}", &runtime->cache).ok());
  EXPECT_EQ(runtime->trace.Start(sink.Creator(), "trace", "{}", &runtime->cache).code(), EDGEMOE_INVALID_ARGUMENT);
  one.End();
  for (int layer = 0; layer < 2; ++layer) {
    ASSERT_EQ(one.Begin(layer, ids, 1), EDGEMOE_OK);
    ASSERT_EQ(other.Begin(layer, ids, 1), EDGEMOE_OK);
    one.End();
    other.End();
  }
  ASSERT_EQ(one.Begin(2, ids, 1), EDGEMOE_OK);
  ASSERT_TRUE(runtime->trace.Stop().ok());
  one.End();
  const Contents c = Parse(sink.bytes);
  std::multiset<std::pair<int, int>> found;
  for (const Record& r : c.records) found.insert({static_cast<int>(r.head.batch), r.head.layer});
  EXPECT_EQ(found, (std::multiset<std::pair<int, int>>{{0, 0}, {0, 1}, {1, 0}, {1, 1}}));
}

// Guards against: a file that is there before it is whole, what is left of one that never became whole, and a path that
// cannot be written found out at the end.
TEST(TraceTest, FileAppearsWhenTheRecordingIsStopped) {
  ToyModel model{ToyShape()};
  TempDir dir;
  const std::string path = dir.Write("out.trace", {'o', 'l', 'd'});
  edgemoe_error error = {};
  {
    RuntimePtr runtime(model.Open(model.SlotsBytes(16)));
    ToySession session(runtime.get(), &model);
    EXPECT_EQ(edgemoe_runtime_stop_trace(runtime.get(), &error), EDGEMOE_INVALID_ARGUMENT);
    EXPECT_EQ(edgemoe_runtime_check_trace(runtime.get(), &error), EDGEMOE_INVALID_ARGUMENT);
    EXPECT_EQ(edgemoe_runtime_start_trace(runtime.get(), dir.Path("none/out").c_str(), "{}", &error), EDGEMOE_IO);
    EXPECT_NE(std::string(error.message).find("none/out"), std::string::npos) << error.message;
    ASSERT_EQ(edgemoe_runtime_start_trace(runtime.get(), path.c_str(), "{\"model\":\"toy\"}", &error), EDGEMOE_OK)
        << error.message;
    std::mt19937 rng(5);
    ASSERT_EQ(session.RunLayer(0, RandomIds(&rng, 1, 4, 16), 1, RandomRows(&rng, 1, 16)), EDGEMOE_OK);
    EXPECT_EQ(ReadFile(path), std::vector<char>({'o', 'l', 'd'}));
    EXPECT_EQ(FilesIn(dir.Path("")), 2);
    ASSERT_EQ(edgemoe_runtime_stop_trace(runtime.get(), &error), EDGEMOE_OK) << error.message;
    const Contents c = Parse(ReadFile(path));
    EXPECT_EQ(c.header, "{\"model\":\"toy\"}");
    EXPECT_EQ(c.records.size(), 1u);
    ASSERT_EQ(edgemoe_runtime_start_trace(runtime.get(), path.c_str(), "{}", &error), EDGEMOE_OK) << error.message;
  }
  // The runtime is gone in the middle of a recording.
  EXPECT_EQ(Parse(ReadFile(path)).records.size(), 1u);
  EXPECT_EQ(FilesIn(dir.Path("")), 1);
}

}  // namespace
}  // namespace edgemoe::test
