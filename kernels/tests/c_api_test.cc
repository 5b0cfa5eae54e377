// SPDX-License-Identifier: MIT
// The C ABI with a real file: what a plug-in built against another version, or with bad arguments, gets to see.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "edgemoe/edgemoe.h"
#include "tests/fakes.h"

namespace edgemoe::test {
namespace {

class CApiTest : public testing::Test {
 protected:
  edgemoe_options Options(uint64_t slots_bytes) {
    edgemoe_options options = model_.Options(slots_bytes);
    options.file_paths = &path_pointer_;
    return options;
  }

  ToyModel model_{ToyShape()};
  TempDir dir_;
  std::string path_ = dir_.Write("toy.gguf", model_.storage().bytes);
  const char* path_pointer_ = path_.c_str();
  edgemoe_error error_ = {};
};

// Guards against: a stale plug-in that reads the fields of another layout.
TEST_F(CApiTest, StructsOfAnotherSizeAreRefused) {
  edgemoe_options options = Options(model_.SlotsBytes(10));
  for (uint32_t size : {0u, static_cast<uint32_t>(sizeof(options)) - 8, static_cast<uint32_t>(sizeof(options)) + 8}) {
    options.struct_size = size;
    edgemoe_runtime* runtime = nullptr;
    edgemoe_sizes sizes;
    EXPECT_EQ(edgemoe_runtime_open(&options, &runtime, &error_), EDGEMOE_INVALID_ARGUMENT);
    EXPECT_EQ(error_.code, EDGEMOE_INVALID_ARGUMENT);
    EXPECT_NE(std::string(error_.message).find("edgemoe_options"), std::string::npos) << error_.message;
    EXPECT_EQ(runtime, nullptr);
    EXPECT_EQ(edgemoe_measure(&options, &sizes, &error_), EDGEMOE_INVALID_ARGUMENT);
  }
  options = Options(model_.SlotsBytes(10));
  edgemoe_runtime* runtime = nullptr;
  ASSERT_EQ(edgemoe_runtime_open(&options, &runtime, &error_), EDGEMOE_OK) << error_.message;
  edgemoe_kernels kernels = ToyKernels();
  kernels.struct_size -= 8;
  edgemoe_session* session = nullptr;
  EXPECT_EQ(edgemoe_session_create(runtime, &kernels, &session, &error_), EDGEMOE_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error_.message).find("edgemoe_kernels"), std::string::npos) << error_.message;
  EXPECT_EQ(session, nullptr);
  edgemoe_runtime_release(runtime);
}

// Guards against: a code without a sentence, or a crash where the caller wants no sentence.
TEST_F(CApiTest, EveryFailureHasACodeAndAMessageAndMessagesAreOptional) {
  edgemoe_runtime* runtime = nullptr;
  const auto expect = [&](const edgemoe_options& options, int32_t code, const char* part) {
    error_ = {};
    EXPECT_EQ(edgemoe_runtime_open(&options, &runtime, &error_), code);
    EXPECT_EQ(error_.code, code);
    EXPECT_NE(std::string(error_.message).find(part), std::string::npos) << error_.message;
    EXPECT_EQ(edgemoe_runtime_open(&options, &runtime, nullptr), code);
    EXPECT_EQ(runtime, nullptr);
  };
  edgemoe_options options = Options(model_.SlotsBytes(10));
  options.eviction = 7;
  expect(options, EDGEMOE_INVALID_ARGUMENT, "eviction rule 7");
  options = Options(model_.SlotsBytes(10));
  options.n_io_threads = 0;
  expect(options, EDGEMOE_INVALID_ARGUMENT, "0 reader threads");
  options = Options(model_.SlotsBytes(10));
  options.n_tensors = 0;
  expect(options, EDGEMOE_INVALID_ARGUMENT, "0 tensors");
  expect(Options(model_.SlotsBytes(1)), EDGEMOE_BUDGET, "at least 2");
  options = Options(model_.SlotsBytes(10));
  const std::string long_path = "/nowhere/" + std::string(2000, 'x');
  const char* const long_pointer = long_path.c_str();
  options.file_paths = &long_pointer;
  expect(options, EDGEMOE_IO, "open failed");
  ASSERT_EQ(::truncate(path_pointer_, 1000), 0);
  expect(Options(model_.SlotsBytes(10)), EDGEMOE_BAD_FILE, "truncated");
}

// Guards against: a stale message left behind by a call that succeeded.
TEST_F(CApiTest, SuccessClearsTheError) {
  std::memset(&error_, 'x', sizeof(error_));
  edgemoe_sizes sizes;
  const edgemoe_options options = Options(model_.SlotsBytes(10));
  ASSERT_EQ(edgemoe_measure(&options, &sizes, &error_), EDGEMOE_OK);
  EXPECT_EQ(error_.code, EDGEMOE_OK);
  EXPECT_STREQ(error_.message, "");
}

// Guards against: a plan that promises other sizes than the runtime takes.
TEST_F(CApiTest, MeasureTellsWhatOpenTakesWithoutAFile) {
  for (int64_t n : {2, 10, 77, 144, 1000}) {
    edgemoe_options options = Options(model_.SlotsBytes(n) + 1234);
    edgemoe_sizes sizes;
    options.file_paths = nullptr;
    ASSERT_EQ(edgemoe_measure(&options, &sizes, &error_), EDGEMOE_OK);
    EXPECT_EQ(sizes.n_slices, 144);
    EXPECT_EQ(sizes.bank_slot_bytes, model_.SlotsBytes(144));
    EXPECT_EQ(sizes.cycle_slot_bytes, model_.SlotsBytes(36));
    EXPECT_EQ(sizes.n_slots, std::min<int64_t>(n, 144));
    edgemoe_runtime* runtime = nullptr;
    options = Options(model_.SlotsBytes(n) + 1234);
    ASSERT_EQ(edgemoe_runtime_open(&options, &runtime, &error_), EDGEMOE_OK) << error_.message;
    edgemoe_stats stats;
    edgemoe_runtime_stats(runtime, &stats);
    EXPECT_EQ(stats.n_slots, sizes.n_slots);
    EXPECT_EQ(stats.slots_bytes, sizes.slots_bytes);
    edgemoe_runtime_release(runtime);
  }
}

// Guards against: a runtime freed under a session, or never freed (AddressSanitizer watches).
TEST_F(CApiTest, RuntimeLivesAsLongAsItsLastHolder) {
  edgemoe_runtime* runtime = nullptr;
  const edgemoe_options options = Options(model_.SlotsBytes(10));
  ASSERT_EQ(edgemoe_runtime_open(&options, &runtime, &error_), EDGEMOE_OK) << error_.message;
  edgemoe_runtime_retain(runtime);
  edgemoe_runtime_release(runtime);
  {
    ToySession session(runtime, &model_, 2);
    edgemoe_runtime_release(runtime);  // the session holds it now
    std::mt19937 rng(1);
    const std::vector<float> x = RandomRows(&rng, 1, 16);
    const std::vector<int32_t> ids = {3, 8, 1, 15};
    ASSERT_EQ(session.RunLayer(1, ids, 1, x), EDGEMOE_OK);
    const std::vector<float> expected = model_.Reference(1, ids, 1, x);
    EXPECT_EQ(std::memcmp(session.y().data(), expected.data(), expected.size() * sizeof(float)), 0)
        << "through real reads";
    ASSERT_EQ(session.Begin(1, ids, 1), EDGEMOE_OK);  // destroyed in the middle of a layer
  }
}

// Guards against: a session that forgets to end its layer and keeps its pins for good.
TEST_F(CApiTest, DestroyedSessionLeavesNoPins) {
  Watchdog watchdog("DestroyedSessionLeavesNoPins");
  edgemoe_runtime* runtime = nullptr;
  const edgemoe_options options = Options(model_.SlotsBytes(40));
  ASSERT_EQ(edgemoe_runtime_open(&options, &runtime, &error_), EDGEMOE_OK) << error_.message;
  std::mt19937 rng(1);
  for (int i = 0; i < 10; ++i) {
    ToySession session(runtime, &model_);
    ASSERT_EQ(session.RunLayer(0, {i, i + 1}, 1, RandomRows(&rng, 1, 16)), EDGEMOE_OK);
    ASSERT_EQ(session.Begin(0, {i, i + 1}, 1), EDGEMOE_OK);
  }
  EXPECT_EQ(edgemoe_runtime_set_slots_bytes(runtime, model_.SlotsBytes(2), &error_), EDGEMOE_OK);
  edgemoe_runtime_release(runtime);
}

// Guards against: a layer over tensors that do not exist or disagree read out of bounds.
TEST_F(CApiTest, LayerOfImpossibleTensorsIsRefused) {
  RuntimePtr runtime(model_.Open(model_.SlotsBytes(10)));
  const edgemoe_kernels kernels = ToyKernels();
  edgemoe_session* session = nullptr;
  ASSERT_EQ(edgemoe_session_create(runtime.get(), &kernels, &session, &error_), EDGEMOE_OK);
  const int32_t ids[] = {0, 1};
  for (int32_t bad : {-1, 9, INT32_MAX}) {
    const int32_t tensor_idxs[] = {0, bad};
    EXPECT_EQ(edgemoe_session_begin_layer(session, ids, 1, 2, 8, tensor_idxs, 2, &error_), EDGEMOE_INVALID_ARGUMENT)
        << bad;
  }
  EXPECT_EQ(edgemoe_session_begin_layer(session, ids, 1, 2, 8, nullptr, 0, &error_), EDGEMOE_INVALID_ARGUMENT);
  const edgemoe_matmul matmul = {};
  EXPECT_EQ(edgemoe_session_matmul(session, &matmul, 1, &error_), EDGEMOE_INVALID_ARGUMENT) << "no layer was begun";
  EXPECT_NE(error_.message[0], '\0');
  edgemoe_session_destroy(session);
}

// Guards against: a plug-in and a Python module that loaded two copies of the library and do not notice.
TEST_F(CApiTest, VersionAndInstanceAreTold) {
  EXPECT_EQ(edgemoe_abi_version(), EDGEMOE_ABI_VERSION);
  EXPECT_STRNE(edgemoe_version(), "");
  EXPECT_EQ(edgemoe_instance_id(), edgemoe_instance_id());
  EXPECT_NE(edgemoe_instance_id(), nullptr);
}

// Guards against: tensors looked up by a name that a plug-in spells differently.
TEST_F(CApiTest, TensorsAreFoundByName) {
  RuntimePtr runtime(model_.Open(model_.SlotsBytes(10)));
  EXPECT_EQ(edgemoe_runtime_find_tensor(runtime.get(), "blk.2.down"), 8);
  EXPECT_EQ(edgemoe_runtime_find_tensor(runtime.get(), "blk.3.down"), -1);
}

}  // namespace
}  // namespace edgemoe::test
