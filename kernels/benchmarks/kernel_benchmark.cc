// SPDX-License-Identifier: MIT
// kernel_benchmark: ours and ggml's kernels on the same matrices, beside what the machine can do at most. Prints one
// JSON document of raw readings; benchmarks/kernels.py runs it and reports. Repetitions are interleaved: each reads
// memory (or multiplies in registers), then runs every engine once, so ratios are taken within a repetition.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>

#include "benchmarks/ggml_paths.h"
#include "benchmarks/layer_nmse.h"
#include "benchmarks/own_paths.h"
#include "ggml-cpu.h"

namespace edgemoe::bench {
namespace {

constexpr int64_t kPrefillExperts = 4;  // 4.5 MiB of 4-bit weights: from L3, or L2 once there
constexpr double kMaxNmse = 1e-3;       // both quantize activations to 8 bits: some 1e-4 apart
constexpr int64_t kQuickTokens[] = {1, 3, 16, 64};
constexpr int64_t kTokensPerRun = 64;  // of one expert: a run takes milliseconds
constexpr uint32_t kLayerSeeds = 4;

struct Options {
  std::vector<simd::Format> formats;
  std::vector<const simd::KernelTable*> tables;
  std::vector<int> threads = {1, 2};
  std::vector<int64_t> tokens = {1, 2, 3, 4, 8, 16, 32, 64, 128, 512};  // of one expert; 1 is decode, more are prefill
  int repetitions = 7;
  size_t bank_bytes = size_t{512} << 20;
  bool quick = false;
  bool layer_nmse = false;
};

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "kernel_benchmark: %s\n", message.c_str());
  std::exit(2);
}

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::vector<const simd::KernelTable*> FindTables(const std::string& names) {
  std::vector<const simd::KernelTable*> supported, chosen;
  std::string known;
  for (const simd::KernelTable* const* table = simd::Compiled(); *table != nullptr; ++table) {
    if (!simd::Supported(**table)) continue;
    supported.push_back(*table);
    known += std::string(" ") + (*table)->isa;
  }
  if (names == "all") return supported;
  if (names.empty()) {
    char error[256] = "";
    const simd::KernelTable* best = simd::Choose(std::getenv("EDGEMOE_ISA"), error, sizeof(error));
    if (best == nullptr) Fail(error);
    return {best};
  }
  for (const std::string& name : Split(names)) {
    const auto is_it = [&](const simd::KernelTable* table) { return name == table->isa; };
    const auto found = std::find_if(supported.begin(), supported.end(), is_it);
    if (found == supported.end()) Fail("--isa: found '" + name + "', expected all or some of:" + known);
    chosen.push_back(*found);
  }
  return chosen;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  std::string formats = "F16,BF16,Q4_0,Q4_1,Q8_0,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ4_NL,IQ4_XS,MXFP4", isa;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--quick" || name == "--layer-nmse") {
      (name == "--quick" ? options.quick : options.layer_nmse) = true;
      continue;
    }
    if (i + 1 == argc) Fail("unknown argument, or one without its value: " + name);
    const std::string value = argv[++i];
    if (name == "--formats") {
      formats = value;
    } else if (name == "--isa") {
      isa = value;
    } else if (name == "--repetitions") {
      options.repetitions = std::max(1, std::atoi(value.c_str()));
    } else if (name == "--bank-mib") {
      options.bank_bytes = static_cast<size_t>(std::max(1, std::atoi(value.c_str()))) << 20;
    } else if (name == "--threads") {
      options.threads.clear();
      for (const std::string& n : Split(value)) options.threads.push_back(std::max(1, std::atoi(n.c_str())));
    } else if (name == "--tokens") {
      options.tokens.clear();
      for (const std::string& n : Split(value)) options.tokens.push_back(std::max(1, std::atoi(n.c_str())));
    } else {
      Fail("unknown argument " + name +
           "; expected --formats, --isa, --threads, --tokens, --repetitions, --bank-mib, --quick or --layer-nmse");
    }
  }
  for (const std::string& name : Split(formats)) {
    options.formats.push_back(FindFormat(name));
    if (options.formats.back() == simd::kNoFormat) Fail("--formats: unknown format '" + name + "'");
  }
  if (options.quick) {
    options.repetitions = std::min(options.repetitions, 2);
    options.bank_bytes = std::min(options.bank_bytes, size_t{64} << 20);
    options.tokens.assign(std::begin(kQuickTokens), std::end(kQuickTokens));
  }
  options.tables = FindTables(isa);
  return options;
}

// Readings by name, as a JSON object of arrays.
using Readings = std::map<std::string, std::vector<double>>;
std::string ToJson(const Readings& readings) {
  std::ostringstream out;
  out.precision(6);
  out << '{';
  for (const auto& [name, values] : readings) {
    out << (out.tellp() > 1 ? ", " : "") << '"' << name << "\": [";
    for (size_t i = 0; i < values.size(); ++i) {
      out << (i > 0 ? ", " : "");
      std::isfinite(values[i]) ? out << values[i] : out << "null";
    }
    out << ']';
  }
  out << '}';
  return out.str();
}

void Check(const char* what, const Bank& bank, const simd::KernelTable& table, double nmse) {
  if (nmse < kMaxNmse) return;
  char text[64];
  std::snprintf(text, sizeof(text), "found NMSE %.2g, expected below %.0e", nmse, kMaxNmse);
  Fail(std::string(what) + " of " + simd::Info(bank.format).name + " by " + table.isa +
       " differs from ggml's: " + text);
}

// One format: its bank, and ggml's weights, which serve every table.
class FormatBenchmark {
 public:
  FormatBenchmark(const Options& options, simd::Format format)
      : options_(options),
        random_(static_cast<uint32_t>(format)),
        bank_(MakeBank(format, options.bank_bytes, random_)),
        plain_(bank_, false, kPrefillExperts),
        repacked_(bank_, true, kPrefillExperts),
        order_(static_cast<size_t>(bank_.n_matrices)) {
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random_);
    read_buffer_ = AllocateHuge(options.bank_bytes);
    std::memset(read_buffer_.get(), 1, options.bank_bytes);
  }

  void Run(const simd::KernelTable& table, std::vector<std::string>& results) {
    OwnMatrices own(table, bank_);
    for (int n_threads : options_.threads) {
      for (int64_t n_tokens : options_.tokens) {
        if (n_tokens == 1) {
          Add(results, table, n_threads, Decode(own, table, n_threads), "decode", 0, own.pack_bytes_per_second());
        } else {
          Add(results, table, n_threads, Prefill(own, table, n_tokens, n_threads), "prefill", n_tokens, 0);
        }
      }
    }
  }

 private:
  void Add(std::vector<std::string>& results, const simd::KernelTable& table, int n_threads, const Readings& readings,
           const char* kind, int64_t n_tokens, double pack_bytes_per_second) const {
    std::ostringstream out;
    out << "{\"kind\": \"" << kind << "\", \"format\": \"" << simd::Info(bank_.format).name << "\", \"isa\": \""
        << table.isa << "\", \"threads\": " << n_threads;
    if (n_tokens > 0) out << ", \"n_tokens\": " << n_tokens;
    if (pack_bytes_per_second > 0) out << ", \"pack_gb_per_s\": " << pack_bytes_per_second / 1e9;
    out << ", \"repacked_by\": ";
    repacked_.is_there() ? out << '"' << repacked_.buffer_name() << '"' : out << "null";
    out << ", \"readings\": " << ToJson(readings) << '}';
    results.push_back(out.str());
    std::fprintf(stderr, "%s\n", out.str().c_str());
  }

  // GB/s of weights.
  Readings Decode(OwnMatrices& own, const simd::KernelTable& table, int n_threads) {
    const std::vector<float> x = RandomFloats(kCols, 1.0F, random_);
    std::vector<float> y(order_.size() * kRows), expected(y.size());
    GgmlGraph plain = GgmlGraph::Decode(plain_, order_, x.data());
    std::optional<GgmlGraph> repacked;
    if (repacked_.is_there()) repacked = GgmlGraph::Decode(repacked_, order_, x.data());
    Readings readings;
    const auto record = [&](const char* name, double seconds) {
      readings[name].push_back(static_cast<double>(bank_.TotalBytes()) / seconds / 1e9);
    };
    for (int i = -1; i < options_.repetitions; ++i) {
      if (i == 0) readings.clear();  // the first warms up
      readings["memory"].push_back(MeasureReadBytesPerSecond(read_buffer_.get(), options_.bank_bytes, n_threads) / 1e9);
      record("ours_rows", own.Decode(order_, false, x.data(), y.data(), n_threads));
      record("ours", own.Decode(order_, true, x.data(), y.data(), n_threads));
      record("ggml_vec_dot", VecDotDecode(bank_, order_, x.data(), expected.data(), n_threads));
      record("ggml_mul_mat_id", plain.Run(n_threads));
      if (repacked) record("ggml_mul_mat_id_repacked", repacked->Run(n_threads));
    }
    const double nmse = Nmse(y.data(), expected.data(), y.size());
    Check("decode", bank_, table, nmse);
    readings["nmse_to_ggml"] = {nmse};
    return readings;
  }

  // GMAC/s.
  Readings Prefill(OwnMatrices& own, const simd::KernelTable& table, int64_t n_tokens, int n_threads) {
    const int64_t n_rows = kPrefillExperts * n_tokens;
    const int n_repeats = static_cast<int>(std::max<int64_t>(1, (options_.quick ? 16 : kTokensPerRun) / n_tokens));
    const std::vector<float> x = RandomFloats(n_rows * kCols, 1.0F, random_);
    std::vector<float> y(static_cast<size_t>(n_rows * kRows));
    std::map<std::string, GgmlGraph> graphs;
    for (const bool by_id : {false, true}) {
      const std::string name = by_id ? "ggml_mul_mat_id" : "ggml_mul_mat";
      const auto make = [&](const GgmlWeights& weights) {
        return GgmlGraph::Prefill(weights, by_id, kPrefillExperts, n_tokens, n_repeats, x.data());
      };
      graphs.emplace(name, make(plain_));
      if (repacked_.is_there()) graphs.emplace(name + "_repacked", make(repacked_));
    }
    const simd::Activation activation = simd::Info(bank_.format).activation;
    const auto peak = activation == simd::kFloat ? MeasureFloatPeak : MeasureIntegerPeak;
    Readings readings;
    const auto record = [&](const std::string& name, double seconds) {
      readings[name].push_back(static_cast<double>(n_rows * kRows * kCols * n_repeats) / seconds / 1e9);
    };
    for (int i = -1; i < options_.repetitions; ++i) {
      if (i == 0) readings.clear();
      readings["peak"].push_back(peak(table.isa, n_threads) / 1e9);
      const OwnMatrices::PrefillSeconds seconds =
          own.Prefill(kPrefillExperts, n_tokens, n_repeats, x.data(), y.data(), n_threads);
      record("ours_multiply", seconds.multiply);
      record("ours", seconds.multiply + seconds.pack);
      record("ours_quantize", seconds.multiply + seconds.pack + seconds.quantize);
      for (auto& [name, graph] : graphs) record(name, graph.Run(n_threads));
    }
    const std::vector<float> expected = graphs.at("ggml_mul_mat_id").Results();
    const double nmse = Nmse(y.data(), expected.data(), y.size());
    Check("prefill", bank_, table, nmse);
    readings["nmse_to_ggml"] = {nmse};
    return readings;
  }

  const Options& options_;
  std::mt19937 random_;
  Bank bank_;
  GgmlWeights plain_;
  GgmlWeights repacked_;
  std::vector<int32_t> order_;
  Buffer read_buffer_;
};

void MeasureLayers(const Options& options, std::vector<std::string>& results) {
  for (simd::Format format : options.formats) {
    std::vector<LayerNmse> found;
    for (uint32_t seed = 0; seed < (options.quick ? 1 : kLayerSeeds); ++seed)
      found.push_back(MeasureLayerNmse(options.tables, format, seed));
    for (size_t i = 0; i < options.tables.size(); ++i) {
      Readings readings;
      for (const LayerNmse& nmse : found) {
        readings["nmse_ours"].push_back(nmse.ours[i]);
        readings["nmse_ggml"].push_back(nmse.ggml);
      }
      results.push_back(std::string("{\"kind\": \"layer\", \"format\": \"") + simd::Info(format).name +
                        "\", \"isa\": \"" + options.tables[i]->isa + "\", \"readings\": " + ToJson(readings) + "}");
    }
  }
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  ggml_cpu_init();  // tables that conversions from F16 read
  std::vector<std::string> results;
  if (options.layer_nmse) {
    MeasureLayers(options, results);
  } else {
    for (simd::Format format : options.formats) {
      FormatBenchmark benchmark(options, format);
      for (const simd::KernelTable* table : options.tables) benchmark.Run(*table, results);
    }
  }
  std::printf("{\"repetitions\": %d, \"bank_mib\": %zu, \"matrix\": [%d, %d], \"results\": [\n", options.repetitions,
              options.bank_bytes >> 20, static_cast<int>(kRows), static_cast<int>(kCols));
  for (size_t i = 0; i < results.size(); ++i)
    std::printf("%s%s\n", results[i].c_str(), i + 1 < results.size() ? "," : "");
  std::printf("]}\n");
  return 0;
}

}  // namespace
}  // namespace edgemoe::bench

int main(int argc, char** argv) { return edgemoe::bench::Main(argc, argv); }
