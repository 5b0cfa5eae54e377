// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/routers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>

#include "edgemoe/scheduler.h"
#include "plugins/onnxruntime/node_source.h"

namespace edgemoe_ort {
namespace {

constexpr int64_t kColumnStep = 32;  // as core/predictor.h multiplies
// Nodes between a product and QMoE: DeepSeek's groups take five, sigmoid, bias and casts as many again.
constexpr int kMostSteps = 16;

bool IsOneOf(const std::string& type, std::initializer_list<const char*> types) {
  return std::any_of(types.begin(), types.end(), [&](const char* t) { return type == t; });
}

int64_t Count(const std::vector<int64_t>& dims) {
  int64_t n = 1;
  for (const int64_t d : dims) n *= d;
  return n;
}

float FromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const int exponent = half >> 10 & 31;
  const auto fraction = static_cast<float>(half & 0x3ff);
  float value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024.0f, exponent - 25);
  if (exponent == 31) value = fraction == 0.0f ? INFINITY : NAN;
  return sign != 0 ? -value : value;
}

}  // namespace

GraphRouters::GraphRouters(const Ort& ort, const OrtGraph* graph) : ort_(ort), folder_(FolderOf(ort.ModelPath(graph))) {
  for (const OrtNode* node : ort.Nodes(graph)) {
    for (const std::string& name : ort.Outputs(node)) producer_of_[name] = node;
  }
}

Router GraphRouters::Find(const OrtNode* moe, int64_t n_experts, int64_t hidden, bool with_data) const {
  Router router;
  try {
    router.is_known = hidden % kColumnStep == 0 && Walk(moe, n_experts, hidden, with_data, &router);
  } catch (const Error&) {
    // ONNX Runtime takes an error where we are asked for our nodes for "none": that would be worse than no prediction.
    return Router();
  }
  return router.is_known ? router : Router();
}

bool GraphRouters::ProducerOf(const std::string& value, Producer* producer) const {
  const auto found = producer_of_.find(value);
  if (found == producer_of_.end()) return false;
  producer->node = found->second;
  producer->type = ort_.NodeType(found->second);
  producer->inputs = ort_.Inputs(found->second);
  return !producer->inputs.empty();
}

std::string GraphRouters::Origin(std::string value) const {
  Producer p;
  for (int i = 0; i < kMostSteps && ProducerOf(value, &p); ++i) {
    if (!IsOneOf(p.type, {"::Reshape", "::Cast", "::Identity", "::Flatten", "::Squeeze", "::Unsqueeze"})) break;
    value = p.inputs[0].name;
  }
  return value;
}

std::string GraphRouters::SigmoidInput(const Producer& p) const {
  size_t at = 0;
  if (p.type == "::Div" && p.inputs[0].is_constant) {
    at = 1;
  } else if (p.type != "::Reciprocal") {
    return "";
  }
  Producer sum, exponential, negative;
  if (!ProducerOf(p.inputs[at].name, &sum) || sum.type != "::Add") return "";
  const size_t constant = sum.inputs[0].is_constant ? 0 : 1;
  if (Floats(sum.inputs[constant], 1) != std::vector<float>{1.0f}) return "";
  if (at == 1 && Floats(p.inputs[0], 1) != std::vector<float>{1.0f}) return "";
  if (!ProducerOf(sum.inputs[1 - constant].name, &exponential) || exponential.type != "::Exp") return "";
  if (!ProducerOf(exponential.inputs[0].name, &negative) || negative.type != "::Neg") return "";
  return negative.inputs[0].name;
}

bool GraphRouters::Walk(const OrtNode* moe, int64_t n_experts, int64_t hidden, bool with_data, Router* router) const {
  const std::vector<ValueInfo> inputs = ort_.Inputs(moe);
  const std::string x = Origin(inputs[0].name);
  router->n_experts = n_experts;
  router->n_cols = hidden;
  std::vector<float> bias;
  std::string value = Origin(inputs[1].name);
  Producer p;
  for (int i = 0; i < kMostSteps && ProducerOf(value, &p); ++i, value = Origin(value)) {
    if (IsOneOf(p.type, {"::Gemm", "::MatMul", "com.microsoft::MatMulNBits"})) {
      if (!ReadProduct(p, x, with_data, router)) return false;
      // A bias is added behind a sigmoid, here; what is added to the logits before it has no place in edgemoe_router.
      if (router->is_sigmoid && !router->bias.empty()) return false;
      if (!bias.empty() && router->bias.empty()) router->bias.assign(static_cast<size_t>(n_experts), 0.0f);
      for (size_t e = 0; e < bias.size(); ++e) router->bias[e] += bias[e];
      if (with_data) ReadNorm(x, router);
      return true;
    }
    const std::string sigmoid_input = p.type == "::Sigmoid" ? p.inputs[0].name : SigmoidInput(p);
    router->are_logits &= p.type == "::Add" || p.type == "::Where";
    if (IsOneOf(p.type, {"::Softmax", "::LogSoftmax", "::Log"})) {  // the order of experts stays
      if (!bias.empty()) return false;                              // unless something was added behind it
      router->are_probabilities |= i == 0 && p.type == "::Softmax";
      value = p.inputs[0].name;
    } else if (!sigmoid_input.empty() && !router->is_sigmoid) {
      router->is_sigmoid = true;
      value = sigmoid_input;
    } else if (p.type == "::ScatterElements" && i == 0) {  // of what has chosen them
      router->are_of_chosen = true;
      value = p.inputs[1].name;
    } else if (p.type == "::TopK" && router->are_of_chosen) {
      value = p.inputs[0].name;
    } else if (p.type == "::Add" && bias.empty()) {
      const size_t constant = p.inputs[0].is_constant ? 0 : 1;
      if (!p.inputs[constant].is_constant) return false;
      bias = Floats(p.inputs[constant], n_experts);
      if (bias.empty() || router->is_sigmoid) return false;
      value = p.inputs[1 - constant].name;
    } else if (p.type == "::Where" && p.inputs.size() == 3) {  // experts outside of the best groups are masked out
      const size_t constant = p.inputs[1].is_constant ? 1 : 2;
      if (!p.inputs[constant].is_constant || p.inputs[3 - constant].is_constant) return false;
      value = p.inputs[3 - constant].name;
    } else {
      return false;
    }
  }
  return false;
}

bool GraphRouters::ReadProduct(const Producer& product, const std::string& x, bool with_data, Router* router) const {
  if (product.inputs.size() < 2 || Origin(product.inputs[0].name) != x) return false;
  size_t bias_at = 2;
  if (product.type == "com.microsoft::MatMulNBits") {
    if (!ReadPacked(product, with_data, router)) return false;
    bias_at = 5;
  } else {
    bool is_transposed = false;  // [n_experts][n_cols]
    if (product.type == "::Gemm") {
      const std::map<std::string, Attribute> attributes = ort_.Attributes(product.node);
      const auto has = [&](const char* name, int64_t i, float f) {
        const auto a = attributes.find(name);
        return a == attributes.end() || (a->second.type == kOrtAttrInt ? a->second.i == i : a->second.f == f);
      };
      if (!has("transA", 0, 0.0f) || !has("alpha", 1, 1.0f) || !has("beta", 1, 1.0f)) return false;
      is_transposed = !has("transB", 0, 0.0f);
    }
    if (!ReadMatrix(product.inputs[1], is_transposed, with_data, router)) return false;
  }
  if (product.inputs.size() <= bias_at || product.inputs[bias_at].info == nullptr) return true;
  if (!product.inputs[bias_at].is_constant) return false;
  router->bias = Floats(product.inputs[bias_at], router->n_experts);
  return !router->bias.empty();
}

bool GraphRouters::ReadMatrix(const ValueInfo& matrix, bool is_transposed, bool with_data, Router* router) const {
  const int64_t n_experts = router->n_experts, n_cols = router->n_cols;
  const std::vector<int64_t> dims =
      is_transposed ? std::vector<int64_t>{n_experts, n_cols} : std::vector<int64_t>{n_cols, n_experts};
  if (!matrix.is_constant || matrix.dims != dims) return false;
  if (matrix.element_type != kOrtFloat && matrix.element_type != kOrtFloat16) return false;
  if (!with_data) return true;
  router->weights = Floats(matrix, n_experts * n_cols);
  if (router->weights.empty() || is_transposed) return !router->weights.empty();
  const std::vector<float> columns = std::move(router->weights);
  router->weights.resize(columns.size());
  for (int64_t c = 0; c < n_cols; ++c) {
    for (int64_t e = 0; e < n_experts; ++e) {
      router->weights[static_cast<size_t>(e * n_cols + c)] = columns[static_cast<size_t>(c * n_experts + e)];
    }
  }
  return true;
}

// MatMulNBits: B [n_experts][n_blocks][block * bits / 8], scales, zero points, and for g_idx nothing.
bool GraphRouters::ReadPacked(const Producer& product, bool with_data, Router* router) const {
  const std::map<std::string, Attribute> attributes = ort_.Attributes(product.node);
  const auto attribute = [&](const char* name, int64_t fallback) {
    const auto a = attributes.find(name);
    return a == attributes.end() ? fallback : a->second.i;
  };
  const int64_t bits = attribute("bits", 4), block = attribute("block_size", 0);
  const int64_t n_experts = router->n_experts, n_cols = router->n_cols;
  if (attribute("N", 0) != n_experts || attribute("K", 0) != n_cols || (bits != 4 && bits != 8) || block < 1 ||
      n_cols % block != 0 || product.inputs.size() < 3 || !product.inputs[1].is_constant ||
      !product.inputs[2].is_constant || (product.inputs.size() > 4 && product.inputs[4].info != nullptr)) {
    return false;
  }
  const int64_t n_blocks = n_cols / block, row_zeros = (n_blocks * bits + 7) / 8;
  const bool has_zeros = product.inputs.size() > 3 && product.inputs[3].info != nullptr;
  if (has_zeros && (!product.inputs[3].is_constant || product.inputs[3].element_type != kOrtUint8)) return false;
  if (product.inputs[1].element_type != kOrtUint8 || Count(product.inputs[1].dims) != n_experts * n_cols * bits / 8) {
    return false;
  }
  if (!with_data) return true;
  const std::vector<uint8_t> packed = Bytes(product.inputs[1], static_cast<uint64_t>(n_experts * n_cols * bits / 8));
  const std::vector<float> scales = Floats(product.inputs[2], n_experts * n_blocks);
  std::vector<uint8_t> zeros;
  if (has_zeros) zeros = Bytes(product.inputs[3], static_cast<uint64_t>(n_experts * row_zeros));
  if (packed.empty() || scales.empty() || (has_zeros && zeros.empty())) return false;
  const auto number = [bits](const uint8_t* row, int64_t i) {
    return bits == 8 ? row[i] : static_cast<uint8_t>(row[i / 2] >> (4 * (i % 2)) & 15);
  };
  router->weights.resize(static_cast<size_t>(n_experts * n_cols));
  for (int64_t e = 0; e < n_experts; ++e) {
    for (int64_t c = 0; c < n_cols; ++c) {
      const int zero = has_zeros ? number(zeros.data() + e * row_zeros, c / block) : 1 << (bits - 1);
      const int q = number(packed.data() + e * n_cols * bits / 8, c);
      router->weights[static_cast<size_t>(e * n_cols + c)] =
          static_cast<float>(q - zero) * scales[static_cast<size_t>(e * n_blocks + c / block)];
    }
  }
  return true;
}

void GraphRouters::ReadNorm(const std::string& x, Router* router) const {
  Producer p;
  if (!ProducerOf(x, &p)) return;
  size_t at = 1;
  if (IsOneOf(p.type, {"com.microsoft::SkipSimplifiedLayerNormalization", "com.microsoft::SkipLayerNormalization"})) {
    at = 2;
  } else if (p.type == "::Mul") {  // a norm written out
    at = p.inputs[0].is_constant ? 0 : 1;
  } else if (!IsOneOf(p.type, {"::SimplifiedLayerNormalization", "::LayerNormalization", "::RMSNormalization",
                               "com.microsoft::SimplifiedLayerNormalization"})) {
    return;
  }
  if (at < p.inputs.size() && p.inputs[at].is_constant) router->norm = Floats(p.inputs[at], router->n_cols);
}

std::vector<uint8_t> GraphRouters::Bytes(const ValueInfo& constant, uint64_t n_bytes) const {
  std::vector<uint8_t> bytes(n_bytes);
  const FileExtent extent = ort_.Extent(constant);
  if (extent.path.empty()) {
    std::memcpy(bytes.data(), ort_.Constant(constant), n_bytes);
    return bytes;
  }
  // Not by ONNX Runtime, which would keep it in memory until the session is made.
  std::ifstream file(JoinPath(folder_, extent.path), std::ios::binary);
  file.seekg(static_cast<std::streamoff>(extent.offset));
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(n_bytes));
  if (extent.length != n_bytes || !file) return {};
  return bytes;
}

std::vector<float> GraphRouters::Floats(const ValueInfo& constant, int64_t n) const {
  const bool is_half = constant.element_type == kOrtFloat16;
  if (!constant.is_constant || (constant.element_type != kOrtFloat && !is_half) || Count(constant.dims) != n) return {};
  const auto count = static_cast<size_t>(n);
  const std::vector<uint8_t> bytes = Bytes(constant, count * (is_half ? sizeof(uint16_t) : sizeof(float)));
  if (bytes.empty()) return {};
  std::vector<float> values(count);
  if (!is_half) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  for (size_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, bytes.data() + i * sizeof(half), sizeof(half));
    values[i] = FromHalf(half);
  }
  return values;
}

int StartPrefetch(edgemoe_runtime* runtime, const std::vector<Router>& routers, int max_depth, bool is_adaptive) {
  std::vector<edgemoe_router> known;
  for (size_t i = 0; i < routers.size(); ++i) {
    const Router& r = routers[i];
    // All of one width, as the core wants them; a model of several is predicted where it is as wide as at first.
    if (!r.is_known || (!known.empty() && r.n_cols != known[0].n_cols)) continue;
    edgemoe_router router = {};
    router.layer = static_cast<int32_t>(i);
    router.n_experts = static_cast<int32_t>(r.n_experts);
    router.n_cols = r.n_cols;
    router.weights = r.weights.data();
    router.norm = r.norm.empty() ? nullptr : r.norm.data();
    router.bias = r.bias.empty() ? nullptr : r.bias.data();
    router.sigmoid = r.is_sigmoid ? 1 : 0;
    known.push_back(router);
  }
  edgemoe_error error = {};
  if (edgemoe_runtime_set_prefetch(runtime, known.data(), static_cast<int32_t>(known.size()), max_depth,
                                   is_adaptive ? 1 : 0, &error) != EDGEMOE_OK) {
    throw Error(error.message);
  }
  return static_cast<int>(known.size());
}

}  // namespace edgemoe_ort
