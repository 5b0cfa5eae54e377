// SPDX-License-Identifier: MIT
// kernel_instructions: every instruction of one call of a kernel, by single-stepping it. Counts what ran, of any
// instruction set, where there are no performance counters and valgrind knows no AVX-512. Prints JSON: addresses
// relative to the program, with how often each ran; benchmarks/instructions.py makes sense of them.
//
// kernel_instructions FORMAT ISA TOKENS [--untraced]   (--untraced: only runs it, for valgrind to count)
#include <link.h>
#include <strings.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "simd/pack.h"
#include "simd/panels.h"

namespace edgemoe::bench {
namespace {

constexpr int64_t kRows = 64;    // a block of rows, as prefill multiplies them
constexpr int64_t kCols = 2048;  // OLMoE's

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "kernel_instructions: %s\n", message.c_str());
  std::exit(2);
}

simd::Format FindFormat(const char* name) {
  for (int i = simd::kNoFormat + 1; i < simd::kFormatCount; ++i) {
    const auto format = static_cast<simd::Format>(i);
    if (strcasecmp(name, simd::Info(format).name) == 0) return format;
  }
  Fail(std::string("unknown format ") + name);
}

// One product, with its operands; random bytes are weights of any format, as no kernel's path depends on them.
class Workload {
 public:
  Workload(const simd::KernelTable& table, simd::Format format, int n_tokens)
      : table_(table),
        format_(format),
        n_tokens_(n_tokens),
        weights_(static_cast<size_t>(simd::RowBytes(format, kCols) * kRows)),
        y_(static_cast<size_t>(n_tokens * kRows)) {
    std::mt19937 random(1);
    std::vector<uint8_t> rows(weights_.size());
    for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random());
    table.interleave[format](rows.data(), kRows / table.rows_per_group, kCols, weights_.data());
    const simd::Activation activation = simd::Info(format).activation;
    const auto row_bytes = static_cast<size_t>(simd::PanelBytes(activation, kCols, 1));
    const std::vector<float> x(kCols, 1.0F);
    std::vector<char> quantized(row_bytes);
    table.quantize[activation](x.data(), quantized.data(), kCols);
    panels_.resize(row_bytes * static_cast<size_t>(n_tokens));
    const std::vector<const void*> x_rows(static_cast<size_t>(n_tokens), quantized.data());
    simd::PackPanels(activation, kCols, n_tokens, x_rows.data(), panels_.data());
    for (int t = 0; t < n_tokens; ++t) rows_y_.push_back(y_.data() + t * kRows);
  }

  void Run() const {
    simd::MultiplyPanels(table_, format_,
                         {weights_.data(), kRows, kCols, panels_.data(), n_tokens_, rows_y_.data(), 0});
  }

 private:
  const simd::KernelTable& table_;
  simd::Format format_;
  int n_tokens_;
  std::vector<uint8_t> weights_;
  std::vector<char> panels_;
  std::vector<float> y_;
  std::vector<float*> rows_y_;
};

// Where the program was loaded: the addresses of its file are relative to this.
uint64_t LoadAddress() {
  uint64_t base = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        *static_cast<uint64_t*>(out) = info->dlpi_addr;  // the first is the program itself
        return 1;
      },
      &base);
  return base;
}

// How often the instruction at each address ran. The child stops itself before and after.
std::map<uint64_t, uint64_t> Trace(const Workload& work) {
  const pid_t child = fork();
  if (child < 0) Fail("cannot fork");
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    raise(SIGSTOP);
    work.Run();
    raise(SIGSTOP);
    _exit(0);
  }
  std::map<uint64_t, uint64_t> counts;
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) Fail("cannot trace: ptrace is not permitted here");
  for (;;) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) Fail("cannot single-step");
    waitpid(child, &status, 0);
    if (!WIFSTOPPED(status)) Fail("the traced process ended early");
    if (WSTOPSIG(status) == SIGSTOP) break;
    if (WSTOPSIG(status) != SIGTRAP) Fail("the traced process got signal " + std::to_string(WSTOPSIG(status)));
    user_regs_struct registers;
    ptrace(PTRACE_GETREGS, child, nullptr, &registers);
    ++counts[registers.rip];
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return counts;
}

int Main(int argc, char** argv) {
  if (argc < 4) Fail("expected FORMAT ISA TOKENS [--untraced]");
  const simd::Format format = FindFormat(argv[1]);
  char error[256] = "";
  const simd::KernelTable* table = simd::Choose(argv[2], error, sizeof(error));
  if (table == nullptr) Fail(error);
  const int n_tokens = std::atoi(argv[3]);
  if (n_tokens < 1) Fail("TOKENS must be at least 1");
  const Workload work(*table, format, n_tokens);
  std::map<uint64_t, uint64_t> counts;
  if (argc > 4 && std::strcmp(argv[4], "--untraced") == 0) {
    work.Run();
  } else {
    counts = Trace(work);
  }
  std::printf("{\"format\": \"%s\", \"isa\": \"%s\", \"n_tokens\": %d, \"n_rows\": %d, \"n_cols\": %d, \"counts\": {",
              simd::Info(format).name, table->isa, n_tokens, static_cast<int>(kRows), static_cast<int>(kCols));
  const uint64_t base = LoadAddress();
  const char* comma = "";
  for (const auto& [address, count] : counts) {
    std::printf("%s\"%llx\": %llu", comma, static_cast<unsigned long long>(address - base),
                static_cast<unsigned long long>(count));
    comma = ", ";
  }
  std::printf("}}\n");
  return 0;
}

}  // namespace
}  // namespace edgemoe::bench

int main(int argc, char** argv) { return edgemoe::bench::Main(argc, argv); }
