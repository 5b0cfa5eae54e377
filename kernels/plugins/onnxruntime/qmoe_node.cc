// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/qmoe_node.h"

#include <cstring>

#include "plugins/onnxruntime/half.h"

namespace edgemoe_ort {
namespace {

// Inputs of QMoE by position, from its schema.
enum Input {
  kX = 0,
  kRouter = 1,
  kFc1Weights = 2,
  kFc1Scales = 3,
  kFc1Bias = 4,
  kFc2Weights = 5,
  kFc2Scales = 6,
  kFc2Bias = 7,
  kFc3First = 8,
  kFc3Last = 10,
  kFc1ZeroPoints = 11,
  kFc2ZeroPoints = 12,
  kFc3ZeroPoints = 13,
  kRouterWeights = 14,
  kFirstOther = 15  // global and activation scales of other quantizations
};

// Inputs of MoE; x and router as above.
enum FloatInput { kFloatFc1 = 2, kFloatFc1Bias = 3, kFloatFc2 = 4, kFloatFc2Bias = 5, kFloatFc3First = 6 };

std::string TypeName(int32_t element_type) {
  if (element_type == kOrtFloat) return "float32";
  if (element_type == kOrtFloat16) return "float16";
  if (element_type == kOrtUint8) return "uint8";
  return "element type " + std::to_string(element_type);
}

std::string Text(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// A reason to leave a node to others; becomes the text that ReadMoe returns.
class Refusal : public Error {
 public:
  using Error::Error;
};

class Reader {
 public:
  Reader(const NodeSource& source, bool with_data, QmoeNode* result)
      : source_(source), inputs_(source.inputs), attributes_(source.attributes), with_data_(with_data), q_(*result) {
    q_.is_quantized = source.type == "com.microsoft::QMoE";
  }

  void Read() {
    if (source_.is_in_subgraph) throw Refusal("it lies inside of a Loop, If or Scan, which is not implemented");
    ReadAttributes();
    for (size_t i = q_.is_quantized ? size_t{kFc3First} : size_t{kFloatFc3First};
         i < inputs_.size() && (i <= kFc3Last || !q_.is_quantized); ++i) {
      if (Has(i)) throw Refusal("input " + inputs_[i].name + " (fc3): gate and up in one fc1 are implemented only");
    }
    q_.x = Computed(kX);
    q_.router = Computed(kRouter);
    if (!q_.is_quantized) {
      ReadFloat();
      return;
    }
    if (Has(kFc3ZeroPoints)) throw Refusal("input " + inputs_[kFc3ZeroPoints].name + " (fc3) is not implemented");
    for (size_t i = kFirstOther; i < inputs_.size(); ++i) {
      if (Has(i))
        throw Refusal("input " + inputs_[i].name + " (position " + std::to_string(i) + ") is not implemented");
    }
    if (Has(kRouterWeights)) q_.router_weights = Computed(kRouterWeights);
    if (q_.router_weights.empty() && !q_.normalizes) {
      throw Refusal(
          "normalize_routing_weights 0 without router_weights (input 14): ONNX Runtime's CPU kernel takes it for 1, "
          "its CUDA kernel does not; write 1 for the softmax of the chosen experts, or give the weights as input 14");
    }
    const std::vector<int64_t>& w1 = Constant(kFc1Weights, {kOrtUint8}).dims;
    const std::vector<int64_t>& w2 = Constant(kFc2Weights, {kOrtUint8}).dims;
    ReadSizes(kFc1Weights, kFc2Weights);
    ReadProjection(kFc1Weights, kFc1ZeroPoints, bits1_, w1[1], q_.hidden, &q_.fc1);
    ReadProjection(kFc2Weights, kFc2ZeroPoints, bits2_, w2[1], q_.inter, &q_.fc2);
  }

 private:
  bool Has(size_t i) const { return i < inputs_.size() && inputs_[i].is_given; }

  // Experts, rows and columns, from the shapes of fc1 and fc2: [experts, rows, columns], columns of fc2 perhaps packed.
  void ReadSizes(size_t fc1, size_t fc2) {
    for (const size_t i : {fc1, fc2}) {
      const ValueInfo& v = inputs_[i];
      if (v.dims.size() != 3) {
        throw Refusal("input " + v.name + " of shape " + Text(v.dims) + ", expected [experts, rows, columns]");
      }
      for (const int64_t d : v.dims) {
        if (d < 1) throw Refusal("input " + v.name + " of shape " + Text(v.dims) + " is empty");
      }
    }
    const std::vector<int64_t>&w1 = inputs_[fc1].dims, &w2 = inputs_[fc2].dims;
    if (w1[0] != w2[0]) {
      throw Refusal("inputs " + inputs_[fc1].name + " of shape " + Text(w1) + " and " + inputs_[fc2].name +
                    " of shape " + Text(w2) + ": expected as many experts");
    }
    q_.n_experts = w1[0];
    q_.hidden = w2[1];
    q_.inter = q_.activation == Activation::kSwiglu ? w1[1] / 2 : w1[1];
    if (q_.n_used < 1 || q_.n_used > q_.n_experts) {
      throw Refusal("k " + std::to_string(q_.n_used) + " of " + std::to_string(q_.n_experts) + " experts");
    }
    if (q_.activation == Activation::kSwiglu && w1[1] % 2 != 0) {
      throw Refusal("input " + inputs_[fc1].name + ": swiglu with " + std::to_string(w1[1]) +
                    " rows, expected an even number");
    }
    // No dims: not known before the model runs. MoE weights with columns before rows are found here or then.
    const ValueInfo& x = inputs_[kX];
    if (x.dims.empty()) return;
    if ((x.dims.size() != 2 && x.dims.size() != 3) || (x.dims.back() >= 0 && x.dims.back() != q_.hidden)) {
      throw Refusal("input " + x.name + " of shape " + Text(x.dims) + ", expected 2 or 3 axes, the last one of " +
                    std::to_string(q_.hidden) + " columns as " + inputs_[fc2].name + " has rows");
    }
  }

  void ReadFloat() {
    const ValueInfo& fc1 = Constant(kFloatFc1, {kOrtFloat, kOrtFloat16});
    Constant(kFloatFc2, {kOrtFloat, kOrtFloat16});
    ReadSizes(kFloatFc1, kFloatFc2);
    ReadFloatProjection(kFloatFc1, fc1.dims[1], q_.hidden, &q_.fc1);
    ReadFloatProjection(kFloatFc2, q_.hidden, q_.inter, &q_.fc2);
  }

  void ReadFloatProjection(size_t weights_at, int64_t n_rows, int64_t n_cols, Projection* p) {
    const ValueInfo& weights = inputs_[weights_at];
    Expect(weights, {q_.n_experts, n_rows, n_cols});
    p->bits = weights.element_type == kOrtFloat ? 32 : 16;
    p->n_rows = n_rows;
    p->n_cols = n_cols;
    p->block = n_cols;
    Locate(weights, true, true, &p->weights);
    ReadBias(weights_at + 1, n_rows, p);
  }

  // Null: not given.
  const Attribute* Find(const char* name, int32_t type) const {
    const auto it = attributes_.find(name);
    if (it == attributes_.end()) return nullptr;
    if (it->second.type != type) {
      throw Refusal(std::string("attribute ") + name + " has type " + std::to_string(it->second.type) + ", expected " +
                    (type == kOrtAttrInt     ? "a whole number"
                     : type == kOrtAttrFloat ? "a float"
                                             : "a string"));
    }
    return &it->second;
  }
  int64_t Int(const char* name, int64_t fallback) const {
    const Attribute* const a = Find(name, kOrtAttrInt);
    return a == nullptr ? fallback : a->i;
  }
  float Float(const char* name, float fallback) const {
    const Attribute* const a = Find(name, kOrtAttrFloat);
    return a == nullptr ? fallback : a->f;
  }
  std::string String(const char* name, const char* fallback) const {
    const Attribute* const a = Find(name, kOrtAttrString);
    return a == nullptr ? fallback : a->s;
  }
  void Only(const char* name, int64_t fallback, int64_t implemented) const {
    const int64_t value = Int(name, fallback);
    if (value != implemented) {
      throw Refusal(std::string(name) + " " + std::to_string(value) + ", " + std::to_string(implemented) +
                    " is implemented only");
    }
  }

  void ReadAttributes() {
    static const char* const kOfBoth[] = {"k",
                                          "activation_type",
                                          "normalize_routing_weights",
                                          "use_sparse_mixer",
                                          "swiglu_fusion",
                                          "swiglu_limit",
                                          "activation_alpha",
                                          "activation_beta",
                                          "swiglu_limit_after_activation"};
    static const char* const kOfQuantized[] = {"expert_weight_bits",
                                               "block_size",
                                               "quant_type",
                                               "accuracy_level",
                                               "weights_prepacked",
                                               "fc1_expert_weight_bits",
                                               "fc2_expert_weight_bits",
                                               "fc3_expert_weight_bits"};
    for (const auto& entry : attributes_) {
      bool is_known = false;
      for (const char* known : kOfBoth) is_known |= entry.first == known;
      for (const char* known : kOfQuantized) is_known |= q_.is_quantized && entry.first == known;
      if (!is_known) throw Refusal("attribute " + entry.first + " is not known");
    }
    q_.n_used = Int("k", 1);
    q_.normalizes = Int("normalize_routing_weights", 0) != 0;
    q_.alpha = Float("activation_alpha", 1.0f);
    q_.beta = Float("activation_beta", 0.0f);
    q_.limit = Float("swiglu_limit", q_.limit);
    Only("use_sparse_mixer", 0, 0);
    Only("swiglu_limit_after_activation", 0, 0);
    if (q_.is_quantized) ReadQuantization();
    ReadActivation();
  }

  void ReadQuantization() {
    // 0 and the default are the plain layout on the CPU; 1 is a layout of another provider.
    if (Int("weights_prepacked", -1) != -1) Only("weights_prepacked", 0, 0);
    if (const std::string type = String("quant_type", "int"); type != "int") {
      throw Refusal("quant_type " + type + ", int is implemented only");
    }
    // The least that is asked for: 4 is 8-bit activations, for their speed; all others get 32 bits.
    q_.has_8_bit_activations = Int("accuracy_level", 0) == 4;
    const int64_t bits = Int("expert_weight_bits", 4);
    bits1_ = Int("fc1_expert_weight_bits", bits);
    bits2_ = Int("fc2_expert_weight_bits", bits);
    for (const int64_t b : {bits1_, bits2_}) {
      if (b != 2 && b != 4 && b != 8) {
        throw Refusal("expert_weight_bits " + std::to_string(b) + ", 2, 4 and 8 are implemented only");
      }
    }
    block_ = Int("block_size", 0);
    if (block_ != 0 && (block_ < 16 || (block_ & (block_ - 1)) != 0)) {
      throw Refusal("block_size " + std::to_string(block_) + ", expected a power of two from 16 on");
    }
  }

  void ReadActivation() {
    const std::string name = String("activation_type", "relu");
    if (name == "relu") {
      q_.activation = Activation::kRelu;
    } else if (name == "gelu") {
      q_.activation = Activation::kGelu;
    } else if (name == "silu") {
      q_.activation = Activation::kSilu;
    } else if (name == "identity") {
      q_.activation = Activation::kIdentity;
    } else if (name == "swiglu") {
      q_.activation = Activation::kSwiglu;
      Only("swiglu_fusion", 0, 1);
    } else {
      throw Refusal("activation_type " + name + " is not implemented");
    }
    if (q_.activation != Activation::kSwiglu && (q_.alpha != 1.0f || q_.beta != 0.0f)) {
      throw Refusal("activation_alpha " + std::to_string(q_.alpha) + " and activation_beta " + std::to_string(q_.beta) +
                    " with activation_type " + name + ", 1 and 0 are implemented only");
    }
  }

  std::string Computed(size_t i) const {
    if (!Has(i)) throw Refusal("input " + std::to_string(i) + " is missing");
    const ValueInfo& v = inputs_[i];
    if (v.is_constant) throw Refusal("input " + v.name + " is a constant");
    if (v.element_type != 0) ExpectType(v, {kOrtFloat, kOrtFloat16});
    return v.name;
  }

  const ValueInfo& Constant(size_t i, std::initializer_list<int32_t> element_types) const {
    if (!Has(i)) throw Refusal("input " + std::to_string(i) + " is missing");
    const ValueInfo& v = inputs_[i];
    if (!v.is_constant) throw Refusal("input " + v.name + " is not a constant of the model");
    ExpectType(v, element_types);
    return v;
  }

  static void ExpectType(const ValueInfo& v, std::initializer_list<int32_t> element_types) {
    std::string expected;
    for (const int32_t type : element_types) {
      if (v.element_type == type) return;
      expected += (expected.empty() ? "" : " or ") + TypeName(type);
    }
    throw Refusal("input " + v.name + " is " + TypeName(v.element_type) + ", expected " + expected);
  }

  static uint64_t TotalBytes(const ValueInfo& v) {
    uint64_t n = BytesOfType(v.element_type);
    for (const int64_t d : v.dims) {
      if (d < 0 || __builtin_mul_overflow(n, static_cast<uint64_t>(d), &n)) {
        throw Refusal("input " + v.name + " of shape " + Text(v.dims) + " has no size; the model is corrupt");
      }
    }
    return n;
  }

  // Kept unless `may_stream` and the bytes lie in a file.
  void Locate(const ValueInfo& v, bool may_stream, bool must_stream, ExpertBytes* bytes) const {
    bytes->exists = true;
    bytes->name = v.name;
    const uint64_t total = TotalBytes(v);
    bytes->expert_bytes = total / static_cast<uint64_t>(q_.n_experts);
    bytes->memory_bytes = v.element_type == kOrtFloat16 ? 2 * bytes->expert_bytes : bytes->expert_bytes;
    const FileExtent extent = source_.Extent(v);
    if (may_stream && !extent.path.empty()) {
      if (!source_.is_in_file)
        throw Refusal("the model was given as bytes, so its external data cannot be found; give its path");
      if (extent.length != total) {
        throw Refusal("tensor " + v.name + ": " + std::to_string(extent.length) + " bytes in " + extent.path +
                      ", expected " + std::to_string(total) + " for shape " + Text(v.dims) +
                      "; export the model again");
      }
      bytes->is_streamed = true;
      bytes->extent = extent;
      return;
    }
    if (must_stream) {
      throw Refusal("tensor " + v.name + " lies inside the .onnx file; save the model with external data");
    }
    if (!with_data_) return;
    bytes->bytes = source_.Bytes(v, total);
    if (v.element_type != kOrtFloat16) return;
    std::vector<float> floats(total / sizeof(uint16_t));
    HalvesToFloats(bytes->bytes.data(), static_cast<int64_t>(floats.size()), floats.data());
    bytes->bytes.resize(floats.size() * sizeof(float));
    std::memcpy(bytes->bytes.data(), floats.data(), bytes->bytes.size());
  }

  void Expect(const ValueInfo& v, const std::vector<int64_t>& dims) const {
    if (v.dims != dims) throw Refusal("input " + v.name + " of shape " + Text(v.dims) + ", expected " + Text(dims));
  }

  void ReadProjection(size_t weights_at, size_t zero_points_at, int64_t bits, int64_t n_rows, int64_t n_cols,
                      Projection* p) {
    const ValueInfo& weights = inputs_[weights_at];
    const ValueInfo& scales = Constant(weights_at + 1, {kOrtFloat, kOrtFloat16});
    p->has_half_scales = scales.element_type == kOrtFloat16;
    p->bits = static_cast<int>(bits);
    p->n_rows = n_rows;
    p->n_cols = n_cols;
    if (n_rows < 1 || n_cols < 1 || n_cols * bits % 8 != 0 || (block_ != 0 && n_cols % block_ != 0)) {
      throw Refusal("input " + weights.name + ": rows of " + std::to_string(n_cols) +
                    " columns, expected whole blocks of " + std::to_string(block_ != 0 ? block_ : 2));
    }
    p->block = block_ != 0 ? block_ : n_cols;
    p->n_blocks = n_cols / p->block;
    const int64_t e = q_.n_experts;
    Expect(weights, {e, n_rows, n_cols * bits / 8});
    // One scale for a row may be written with or without its axis.
    if (p->n_blocks > 1 || scales.dims.size() == 3) {
      Expect(scales, {e, n_rows, p->n_blocks});
    } else {
      Expect(scales, {e, n_rows});
    }
    Locate(weights, true, true, &p->weights);
    const bool is_blockwise = p->n_blocks > 1;
    Locate(scales, is_blockwise, false, &p->scales);
    if (Has(zero_points_at)) {
      const ValueInfo& z = Constant(zero_points_at, {kOrtUint8});
      p->has_packed_row_zero_points = z.dims.size() == 2;
      if (z.dims.size() == 2 && !is_blockwise) {
        Expect(z, {e, (n_rows * bits + 7) / 8});
      } else {
        Expect(z, {e, n_rows, static_cast<int64_t>(p->zero_point_row_bytes())});
        if (block_ == 0 && bits != 8) {  // with blocks, a row of one block has a byte of its own
          throw Refusal("input " + z.name + " of shape " + Text(z.dims) + " for one block a row, expected [" +
                        std::to_string(e) + ", " + std::to_string((n_rows * bits + 7) / 8) + "]");
        }
      }
      Locate(z, is_blockwise, false, &p->zero_points);
    }
    ReadBias(weights_at + 2, n_rows, p);
  }

  void ReadBias(size_t at, int64_t n_rows, Projection* p) {
    if (!Has(at)) return;
    const ValueInfo& bias = Constant(at, {kOrtFloat, kOrtFloat16});
    Expect(bias, {q_.n_experts, n_rows});
    ExpertBytes bytes;
    Locate(bias, false, false, &bytes);
    p->bias.resize(bytes.bytes.size() / sizeof(float));
    if (!p->bias.empty()) std::memcpy(p->bias.data(), bytes.bytes.data(), bytes.bytes.size());
  }

  const NodeSource& source_;
  const std::vector<ValueInfo>& inputs_;
  const std::map<std::string, Attribute>& attributes_;
  const bool with_data_;
  int64_t bits1_ = 0, bits2_ = 0, block_ = 0;
  QmoeNode& q_;
};

}  // namespace

std::string ReadMoe(const NodeSource& source, bool with_data, QmoeNode* node) {
  node->name = source.name;
  try {
    Reader(source, with_data, node).Read();
  } catch (const Refusal& refusal) {
    return refusal.what();
  }
  return "";
}

}  // namespace edgemoe_ort
