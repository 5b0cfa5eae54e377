// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/qmoe_node.h"

#include <cstring>

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

std::string Text(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// A reason to leave a node to others; becomes the text that ReadQmoe returns.
class Refusal : public Error {
 public:
  using Error::Error;
};

class Reader {
 public:
  Reader(const Ort& ort, const OrtGraph* graph, const OrtNode* node, bool with_data, QmoeNode* result)
      : ort_(ort),
        has_path_(!ort.ModelPath(graph).empty()),
        with_data_(with_data),
        inputs_(ort.Inputs(node)),
        attributes_(ort.Attributes(node)),
        q_(*result) {}

  void Read() {
    ReadAttributes();
    for (size_t i = kFc3First; i <= kFc3Last; ++i) {
      if (Has(i)) throw Refusal("input " + inputs_[i].name + " (fc3): gate and up in one fc1 are implemented only");
    }
    if (Has(kFc3ZeroPoints)) throw Refusal("input " + inputs_[kFc3ZeroPoints].name + " (fc3) is not implemented");
    for (size_t i = kFirstOther; i < inputs_.size(); ++i) {
      if (Has(i))
        throw Refusal("input " + inputs_[i].name + " (position " + std::to_string(i) + ") is not implemented");
    }
    q_.x = Computed(kX);
    q_.router = Computed(kRouter);
    if (Has(kRouterWeights)) q_.router_weights = Computed(kRouterWeights);
    if (q_.router_weights.empty() && !q_.normalizes) {
      throw Refusal(
          "normalize_routing_weights 0 without router_weights (input 14): ONNX Runtime's CPU kernel takes it for 1, "
          "its "
          "CUDA kernel does not; write 1 for the softmax of the chosen experts, or give the weights as input 14");
    }
    const std::vector<int64_t>& w1 = Constant(kFc1Weights, kOrtUint8).dims;
    const std::vector<int64_t>& w2 = Constant(kFc2Weights, kOrtUint8).dims;
    if (w1.size() != 3 || w2.size() != 3 || w1[0] != w2[0]) {
      throw Refusal("expert weights of shapes " + Text(w1) + " and " + Text(w2) +
                    ", expected [experts, rows, packed columns] twice");
    }
    q_.n_experts = w1[0];
    q_.hidden = w2[1];
    q_.inter = q_.activation == Activation::kSwiglu ? w1[1] / 2 : w1[1];
    if (q_.n_used < 1 || q_.n_used > q_.n_experts) {
      throw Refusal("k " + std::to_string(q_.n_used) + " of " + std::to_string(q_.n_experts) + " experts");
    }
    ReadProjection(kFc1Weights, kFc1ZeroPoints, bits1_, w1[1], q_.hidden, &q_.fc1);
    ReadProjection(kFc2Weights, kFc2ZeroPoints, bits2_, q_.hidden, q_.inter, &q_.fc2);
    if (q_.activation == Activation::kSwiglu && w1[1] % 2 != 0) {
      throw Refusal("swiglu with " + std::to_string(w1[1]) + " rows in fc1, expected an even number");
    }
  }

 private:
  bool Has(size_t i) const { return i < inputs_.size() && inputs_[i].info != nullptr; }

  int64_t Int(const char* name, int64_t fallback) const {
    const auto it = attributes_.find(name);
    return it == attributes_.end() || it->second.type != kOrtAttrInt ? fallback : it->second.i;
  }
  float Float(const char* name, float fallback) const {
    const auto it = attributes_.find(name);
    return it == attributes_.end() || it->second.type != kOrtAttrFloat ? fallback : it->second.f;
  }
  std::string String(const char* name, const char* fallback) const {
    const auto it = attributes_.find(name);
    return it == attributes_.end() || it->second.type != kOrtAttrString ? fallback : it->second.s;
  }
  void Only(const char* name, int64_t fallback, int64_t implemented) const {
    const int64_t value = Int(name, fallback);
    if (value != implemented) {
      throw Refusal(std::string(name) + " " + std::to_string(value) + ", " + std::to_string(implemented) +
                    " is implemented only");
    }
  }

  void ReadAttributes() {
    static const char* const kKnown[] = {"k",
                                         "activation_type",
                                         "normalize_routing_weights",
                                         "use_sparse_mixer",
                                         "expert_weight_bits",
                                         "block_size",
                                         "swiglu_fusion",
                                         "swiglu_limit",
                                         "activation_alpha",
                                         "activation_beta",
                                         "quant_type",
                                         "accuracy_level",
                                         "weights_prepacked",
                                         "fc1_expert_weight_bits",
                                         "fc2_expert_weight_bits",
                                         "fc3_expert_weight_bits",
                                         "swiglu_limit_after_activation"};
    for (const auto& entry : attributes_) {
      bool is_known = false;
      for (const char* known : kKnown) is_known |= entry.first == known;
      if (!is_known) throw Refusal("attribute " + entry.first + " is not known");
    }
    q_.n_used = Int("k", 1);
    q_.normalizes = Int("normalize_routing_weights", 0) != 0;
    q_.alpha = Float("activation_alpha", 1.0f);
    q_.beta = Float("activation_beta", 0.0f);
    q_.limit = Float("swiglu_limit", q_.limit);
    Only("use_sparse_mixer", 0, 0);
    Only("swiglu_limit_after_activation", 0, 0);
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
  }

  std::string Computed(size_t i) const {
    if (!Has(i)) throw Refusal("input " + std::to_string(i) + " is missing");
    const ValueInfo& v = inputs_[i];
    if (v.is_constant) throw Refusal("input " + v.name + " is a constant");
    if (v.element_type != kOrtFloat) {
      throw Refusal("input " + v.name + " has element type " + std::to_string(v.element_type) +
                    ", 1 (float32) is implemented only");
    }
    return v.name;
  }

  const ValueInfo& Constant(size_t i, int32_t element_type) const {
    if (!Has(i)) throw Refusal("input " + std::to_string(i) + " is missing");
    const ValueInfo& v = inputs_[i];
    if (!v.is_constant) throw Refusal("input " + v.name + " is not a constant of the model");
    if (v.element_type != element_type) {
      throw Refusal("input " + v.name + " has element type " + std::to_string(v.element_type) + ", expected " +
                    std::to_string(element_type));
    }
    return v;
  }

  static uint64_t Count(const std::vector<int64_t>& dims) {
    uint64_t n = 1;
    for (const int64_t d : dims) n *= static_cast<uint64_t>(d);
    return n;
  }

  // Kept unless `may_stream` and the bytes lie in a file.
  void Locate(const ValueInfo& v, uint64_t element_bytes, bool may_stream, bool must_stream, ExpertBytes* bytes) const {
    bytes->exists = true;
    bytes->name = v.name;
    const uint64_t total = Count(v.dims) * element_bytes;
    bytes->expert_bytes = total / static_cast<uint64_t>(q_.n_experts);
    const FileExtent extent = ort_.Extent(v);
    if (may_stream && !extent.path.empty()) {
      if (!has_path_)
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
    const auto* data = static_cast<const uint8_t*>(ort_.Constant(v));
    bytes->bytes.assign(data, data + total);
  }

  void Expect(const ValueInfo& v, const std::vector<int64_t>& dims) const {
    if (v.dims != dims) throw Refusal("input " + v.name + " of shape " + Text(v.dims) + ", expected " + Text(dims));
  }

  void ReadProjection(size_t weights_at, size_t zero_points_at, int64_t bits, int64_t n_rows, int64_t n_cols,
                      Projection* p) {
    const ValueInfo& weights = Constant(weights_at, kOrtUint8);
    const ValueInfo& scales = Constant(weights_at + 1, kOrtFloat);
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
    Locate(weights, 1, true, true, &p->weights);
    const bool is_blockwise = p->n_blocks > 1;
    Locate(scales, sizeof(float), is_blockwise, false, &p->scales);
    if (Has(zero_points_at)) {
      const ValueInfo& z = Constant(zero_points_at, kOrtUint8);
      p->has_packed_row_zero_points = z.dims.size() == 2;
      if (z.dims.size() == 2 && !is_blockwise) {
        Expect(z, {e, (n_rows * bits + 7) / 8});
      } else {
        Expect(z, {e, n_rows, static_cast<int64_t>(p->zero_point_row_bytes())});
        if (!is_blockwise && bits != 8) {
          throw Refusal("input " + z.name + " of shape " + Text(z.dims) + " for one block a row, expected [" +
                        std::to_string(e) + ", " + std::to_string((n_rows * bits + 7) / 8) + "]");
        }
      }
      Locate(z, 1, is_blockwise, false, &p->zero_points);
    }
    if (Has(weights_at + 2)) {
      const ValueInfo& bias = Constant(weights_at + 2, kOrtFloat);
      Expect(bias, {e, n_rows});
      ExpertBytes bytes;
      Locate(bias, sizeof(float), false, false, &bytes);
      p->bias.resize(bytes.bytes.size() / sizeof(float));
      if (!p->bias.empty()) std::memcpy(p->bias.data(), bytes.bytes.data(), bytes.bytes.size());
    }
  }

  const Ort& ort_;
  const bool has_path_;
  const bool with_data_;
  const std::vector<ValueInfo> inputs_;
  const std::map<std::string, Attribute> attributes_;
  int64_t bits1_ = 0, bits2_ = 0, block_ = 0;
  QmoeNode& q_;
};

}  // namespace

std::string ReadQmoe(const Ort& ort, const OrtGraph* graph, const OrtNode* ort_node, bool with_data, QmoeNode* node) {
  node->name = ort.NodeName(ort_node);
  try {
    Reader(ort, graph, ort_node, with_data, node).Read();
  } catch (const Refusal& refusal) {
    return refusal.what();
  }
  return "";
}

}  // namespace edgemoe_ort
