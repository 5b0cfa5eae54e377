// SPDX-License-Identifier: MIT
#include "plugins/onnxruntime/qmoe_model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "plugins/onnxruntime/half.h"
#include "plugins/onnxruntime/moe_float.h"
#include "plugins/onnxruntime/qmoe_math.h"

namespace edgemoe_ort {
namespace {

namespace simd = edgemoe::simd;

// Bytes of activations that are computed at once: a prompt of OLMoE (hidden 2048, inter 1024, 8 experts a token) goes
// through a layer in pieces of 100 tokens, which use nearly all of its 64 experts each.
constexpr uint64_t kActivationBytes = uint64_t{16} << 20;
// Results of experts that are summed by the calling thread: what it does in the time that others take to start.
constexpr int64_t kSerialFloats = 1 << 16;

simd::QmoeShape ShapeOf(const QmoeNode& node, const Projection& p) {
  return {p.bits, node.has_8_bit_activations ? simd::kQmoeInt8 : simd::kQmoeFloat, p.zero_points.exists, p.n_cols,
          p.block};
}

int64_t PanelBytes(const QmoeNode& node, const Projection& p) {
  return node.is_quantized ? simd::QmoePanelBytes(ShapeOf(node, p)) : p.n_cols * static_cast<int64_t>(sizeof(float));
}

uint64_t TokenBytes(const QmoeNode& n) {
  // Results of fc1 and fc2, their inputs as the kernels take them, and 32-bit copies of 16-bit inputs and results.
  const int64_t floats = n.n_used * (n.fc1.n_rows + n.hidden) + 3 * n.hidden + 2 * n.n_experts;
  const int64_t panels = n.n_used * PanelBytes(n, n.fc2) + PanelBytes(n, n.fc1);
  return static_cast<uint64_t>(floats) * sizeof(float) + static_cast<uint64_t>(panels);
}

// The kernels of this machine, or those that the environment's EDGEMOE_ISA names.
const simd::KernelTable& ActiveKernels() {
  edgemoe_error error = {};
  const char* isa = nullptr;
  if (edgemoe_isa_active(&isa, &error) != EDGEMOE_OK) throw Error(error.message);
  char text[400];
  const simd::KernelTable* const table = simd::Choose(isa, text, sizeof(text));
  if (table == nullptr) throw Error(text);
  return *table;
}

}  // namespace

QmoeModel::QmoeModel(const Ort* ort, const std::string& folder, std::vector<QmoeNode> nodes,
                     std::vector<Router> routers, const ModelOptions& options)
    : ort_(*ort), nodes_(std::move(nodes)), n_threads_(std::max(1, options.n_threads)), table_(ActiveKernels()) {
  routers.resize(nodes_.size());
  choosers_ = std::make_shared<Choosers>(options.choosers, nodes_, routers);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    layers_.emplace_back();
    layers_.back().max_tokens = std::max<int64_t>(1, static_cast<int64_t>(kActivationBytes / TokenBytes(nodes_[i])));
    for (int p = 0; p < kNProducts; ++p) AddTensor(folder, i, p);
    for (const Projection* p : {&nodes_[i].fc1, &nodes_[i].fc2}) {
      kept_bytes_ += p->bias.size() * sizeof(float) + p->scales.bytes.size() + p->zero_points.bytes.size();
    }
  }
  SizeWorkspace();
  OpenRuntime(options, routers);
}

QmoeModel::~QmoeModel() {
  if (session_ != nullptr) edgemoe_session_destroy(session_);
  if (runtime_ != nullptr) edgemoe_runtime_release(runtime_);
}

const ExpertBytes& QmoeModel::BytesOf(const QmoeNode& node, int product) {
  const Projection& p = product < kWeights2 ? node.fc1 : node.fc2;
  const int kind = product % kWeights2;
  return kind == kWeights1 ? p.weights : kind == kScales1 ? p.scales : p.zero_points;
}

void QmoeModel::AddTensor(const std::string& folder, size_t node_idx, int product) {
  const QmoeNode& node = nodes_[node_idx];
  const ExpertBytes& bytes = BytesOf(node, product);
  int32_t& tensor_idx = layers_[node_idx].tensor_idxs[product];
  tensor_idx = -1;
  if (!bytes.is_streamed) return;
  const std::string path = JoinPath(folder, bytes.extent.path);
  const auto found = std::find(paths_.begin(), paths_.end(), path);
  const int file_idx = static_cast<int>(found - paths_.begin());
  if (found == paths_.end()) paths_.push_back(path);
  tensor_idx = static_cast<int32_t>(tensors_.size());
  // Two nodes may share an initializer, so its name alone would not do.
  tensor_names_.push_back(std::to_string(node_idx) + "." + bytes.name);
  edgemoe_tensor t = {};
  t.file_idx = file_idx;
  t.layer = static_cast<int32_t>(node_idx);
  t.n_experts = static_cast<int32_t>(node.n_experts);
  t.n_experts_used = static_cast<int32_t>(node.n_used);
  t.offset = bytes.extent.offset;
  t.expert_bytes = bytes.expert_bytes;
  tensors_.push_back(t);
}

void QmoeModel::OpenRuntime(const ModelOptions& options, const std::vector<Router>& routers) {
  std::vector<const char*> paths;
  for (const std::string& path : paths_) paths.push_back(path.c_str());
  for (size_t i = 0; i < tensors_.size(); ++i) tensors_[i].name = tensor_names_[i].c_str();
  edgemoe_options o = {};
  o.struct_size = sizeof(o);
  o.n_files = static_cast<int32_t>(paths.size());
  o.file_paths = paths.data();
  o.n_tensors = static_cast<int32_t>(tensors_.size());
  o.n_io_threads = options.n_io_threads;
  o.tensors = tensors_.data();
  o.slots_bytes = options.slots_bytes;
  o.eviction = options.eviction;
  o.arithmetic = EDGEMOE_ARITHMETIC_PLUGIN;
  edgemoe_error error = {};
  if (!options.has_slots_bytes) {
    edgemoe_sizes sizes = {};
    Check(edgemoe_measure(&o, &sizes, &error), error);
    o.slots_bytes = sizes.bank_slot_bytes;
  }
  Check(edgemoe_runtime_open(&o, &runtime_, &error), error);
  edgemoe_kernels kernels = {};
  kernels.struct_size = sizeof(kernels);
  kernels.context = this;
  kernels.parallel = Parallel;
  kernels.activation_row_bytes = [](void* self, int32_t type, int64_t) -> uint64_t {
    if (type % kWeights2 != kWeights1) return 0;
    const QmoeNode& node = *static_cast<QmoeModel*>(self)->node_;
    return static_cast<uint64_t>(PanelBytes(node, type < kWeights2 ? node.fc1 : node.fc2));
  };
  kernels.quantize_row = [](void* self, int32_t type, const float* x, void* y, int64_t) {
    static_cast<QmoeModel*>(self)->Prepare(type, x, y);
  };
  kernels.multiply = [](void* self, int32_t, const edgemoe_product* product) {
    static_cast<QmoeModel*>(self)->Multiply(*product);
  };
  try {
    StartPrefetch(runtime_, routers, options.prefetch_depth, options.is_prefetch_adaptive);
    Check(edgemoe_session_create(runtime_, &kernels, &session_, &error), error);
  } catch (...) {
    edgemoe_runtime_release(runtime_);
    runtime_ = nullptr;
    throw;
  }
  edgemoe_session_set_threads(session_, n_threads_);
}

std::vector<edgemoe_ort_tensor> QmoeModel::Tensors() const {
  std::vector<edgemoe_ort_tensor> found(tensors_.size());
  for (size_t i = 0; i < nodes_.size(); ++i) {
    for (int p = 0; p < kNProducts; ++p) {
      const int32_t tensor_idx = layers_[i].tensor_idxs[p];
      if (tensor_idx < 0) continue;
      const edgemoe_tensor& t = tensors_[static_cast<size_t>(tensor_idx)];
      const int stage = (p < kWeights2 ? 0 : 2) + (p % kWeights2 == kWeights1 ? 1 : 0);
      found[static_cast<size_t>(tensor_idx)] = {t.layer, t.n_experts, t.n_experts_used, stage, t.expert_bytes};
    }
  }
  return found;
}

void QmoeModel::SizeWorkspace() {
  uint64_t activations = 0, sides[kNProducts] = {};
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const QmoeNode& n = nodes_[i];
    activations = std::max(activations, TokenBytes(n) * static_cast<uint64_t>(layers_[i].max_tokens));
    for (int p = 0; p < kNProducts; ++p) {
      if (p % kWeights2 == kWeights1 || layers_[i].tensor_idxs[p] < 0) continue;
      sides[p] = std::max(sides[p], BytesOf(n, p).memory_bytes * static_cast<uint64_t>(n.n_experts));
    }
  }
  workspace_bytes_ = activations;
  for (const uint64_t bytes : sides) workspace_bytes_ += bytes;
}

void QmoeModel::Check(int32_t code, const edgemoe_error& error) const {
  if (code != EDGEMOE_OK) throw Error(error.message);
}

void QmoeModel::Parallel(void* self, int32_t n_threads, void (*fn)(void*, int32_t, int32_t), void* arg) {
  const QmoeModel& model = *static_cast<const QmoeModel*>(self);
  // Scales stay where they are, or come from storage: either is faster than starting threads.
  if (n_threads <= 1 || model.copies_only_) {
    fn(arg, 0, 1);
    return;
  }
  struct Call {
    void (*fn)(void*, int32_t, int32_t);
    void* arg;
    int32_t n_threads;
  } call = {fn, arg, n_threads};
  const auto run = [](void* data, size_t i) {
    const Call& c = *static_cast<const Call*>(data);
    c.fn(c.arg, static_cast<int32_t>(i), c.n_threads);
  };
  OrtStatus* const status = api::KernelContext_ParallelFor::Call(model.ort_.table(), model.context_, run,
                                                                 static_cast<size_t>(n_threads), 0, &call);
  if (status == nullptr) return;
  // ONNX Runtime has no threads to give: this one does all.
  api::ReleaseStatus::Call(model.ort_.table(), status);
  fn(arg, 0, 1);
}

template <typename Fn>
void QmoeModel::ForEach(int64_t n, Fn fn) {
  struct Range {
    int64_t n;
    Fn* fn;
  } range = {n, &fn};
  Parallel(
      this, static_cast<int32_t>(std::min<int64_t>(n, n_threads_)),
      [](void* arg, int32_t idx, int32_t n_threads) {
        const Range& r = *static_cast<Range*>(arg);
        for (int64_t i = r.n * idx / n_threads; i < r.n * (idx + 1) / n_threads; ++i) (*r.fn)(i);
      },
      &range);
}

uint64_t QmoeModel::SideRowBytes(int product) const {
  const Projection& p = product < kWeights2 ? node_->fc1 : node_->fc2;
  return product % kWeights2 == kScales1 ? p.file_scale_row_bytes() : p.zero_point_row_bytes();
}

edgemoe_matmul QmoeModel::Matmul(int product) const {
  const bool is_first = product < kWeights2;
  const Projection& p = is_first ? node_->fc1 : node_->fc2;
  const bool is_weights = product % kWeights2 == kWeights1;
  const uint64_t row1_bytes = static_cast<uint64_t>(node_->fc1.n_rows) * sizeof(float);
  edgemoe_matmul m = {};
  m.tensor_idx = layer_->tensor_idxs[product];
  m.type = product;
  m.n_cols = p.n_cols;
  m.n_rows = p.n_rows;
  m.row_bytes = is_weights ? p.row_bytes() : SideRowBytes(product);
  m.x_n_used = 1;
  if (is_first) {
    // For copies of scales as well, which do not read it: the core predicts from the first product's input.
    m.x = x_;
    m.x_token_bytes = static_cast<uint64_t>(node_->hidden) * sizeof(float);
  } else if (is_weights) {
    m.x = rows1_.data();
    m.x_n_used = node_->n_used;
    m.x_used_bytes = row1_bytes;
    m.x_token_bytes = row1_bytes * static_cast<uint64_t>(node_->n_used);
  }
  // Copies of scales write nothing here: the place tells Multiply which expert and row a piece of them is of.
  m.y = const_cast<float*>(is_first ? rows1_.data() : rows2_.data());
  m.y_used_bytes = static_cast<uint64_t>(p.n_rows) * sizeof(float);
  m.y_token_bytes = m.y_used_bytes * static_cast<uint64_t>(node_->n_used);
  return m;
}

void QmoeModel::Products(const int* products, int n_products) {
  edgemoe_matmul matmuls[kNProducts];
  int n = 0;
  for (int i = 0; i < n_products; ++i) {
    if (layer_->tensor_idxs[products[i]] >= 0) matmuls[n++] = Matmul(products[i]);
  }
  if (n == 0) return;
  edgemoe_error error = {};
  Check(edgemoe_session_matmul(session_, matmuls, n, &error), error);
}

// An input of fc1 or fc2 -> what the kernels take. fc2's are fc1's results, each brought here once: until then they are
// not activated.
void QmoeModel::Prepare(int32_t product, const float* x, void* panel) {
  if (product % kWeights2 != kWeights1) return;
  if (product == kWeights2) Activate(table_, *node_, rows1_.data() + (x - rows1_.data()));
  const Projection& p = product < kWeights2 ? node_->fc1 : node_->fc2;
  if (node_->is_quantized) {
    simd::QmoePanel(ShapeOf(*node_, p), x, panel);
  } else {
    std::memcpy(panel, x, static_cast<size_t>(p.n_cols) * sizeof(float));
  }
}

void QmoeModel::Multiply(const edgemoe_product& product) {
  const bool is_first = product.type < kWeights2;
  const Projection& p = is_first ? node_->fc1 : node_->fc2;
  const int64_t at = product.y[0] - (is_first ? rows1_ : rows2_).data();
  const int64_t first_row = at % p.n_rows;
  const int32_t expert = experts_[static_cast<size_t>(at / p.n_rows)];
  const auto place = static_cast<uint64_t>(place_[static_cast<size_t>(expert)]);
  const auto* bytes = static_cast<const uint8_t*>(product.weights);
  if (product.type % kWeights2 != kWeights1) {
    uint8_t* const copy = sides_[product.type].data() + place * BytesOf(*node_, product.type).memory_bytes;
    const bool is_half = product.type % kWeights2 == kScales1 && p.has_half_scales;
    if (is_half) {
      HalvesToFloats(bytes, product.n_rows * p.n_blocks, reinterpret_cast<float*>(copy) + first_row * p.n_blocks);
    } else if (product.stays == 0) {
      std::memcpy(copy + static_cast<uint64_t>(first_row) * product.row_bytes, bytes,
                  static_cast<uint64_t>(product.n_rows) * product.row_bytes);
    }
    if (first_row == 0) side_ptrs_[product.type][place] = is_half || product.stays == 0 ? copy : bytes;
    return;
  }
  const float* const bias = p.bias.empty() ? nullptr : p.bias.data() + expert * p.n_rows + first_row;
  if (!node_->is_quantized) return MultiplyFloat(p, product, bias);
  const auto side = [&](int which) -> const uint8_t* {
    const ExpertBytes& b = BytesOf(*node_, which);
    if (!b.exists) return nullptr;
    return b.is_streamed ? side_ptrs_[which][place] : b.bytes.data() + static_cast<uint64_t>(expert) * b.memory_bytes;
  };
  simd::QmoeProduct q = {};
  q.shape = ShapeOf(*node_, p);
  q.weights = bytes;
  q.n_rows = product.n_rows;
  q.scales = side(is_first ? kScales1 : kScales2) + static_cast<uint64_t>(first_row) * p.scale_row_bytes();
  q.zero_points = side(is_first ? kZeroPoints1 : kZeroPoints2);
  q.zero_point_row_bits = p.has_packed_row_zero_points ? p.bits : static_cast<int64_t>(p.zero_point_row_bytes()) * 8;
  q.zero_points_bit = first_row * q.zero_point_row_bits;
  q.bias = bias;
  q.n_x = product.n_x;
  q.x = product.x;
  q.y = product.y;
  table_.qmoe(q);
}

void QmoeModel::Combine(int64_t token, float* out) {
  const auto first = static_cast<size_t>(token * node_->n_used);
  float* const y = out + token * node_->hidden;
  size_t n = 0;  // without empty places, whose rows nobody has written
  for (size_t i = first; i < first + static_cast<size_t>(node_->n_used); ++i) {
    if (experts_[i] == EDGEMOE_NO_EXPERT) continue;
    row2_ptrs_[first + n] = rows2_.data() + i * static_cast<size_t>(node_->hidden);
    weights_[first + n++] = weights_[i];
  }
  if (n == 0) {
    std::fill(y, y + node_->hidden, 0.0f);
    return;
  }
  table_.combine(row2_ptrs_.data() + first, nullptr, weights_.data() + first, static_cast<int>(n), y, node_->hidden);
}

void QmoeModel::Run(size_t node_idx, const InputIdxs& inputs, OrtKernelContext* context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  node_ = &nodes_[node_idx];
  layer_ = &layers_[node_idx];
  context_ = context;
  std::vector<int64_t> x_dims, dims;
  const Numbers x = Input(inputs.x, node_->x, &x_dims);
  if ((x_dims.size() != 2 && x_dims.size() != 3) || x_dims.back() != node_->hidden) {
    throw Error("node " + node_->name + ": input " + node_->x + " has " + std::to_string(x_dims.size()) + " axes and " +
                std::to_string(x_dims.empty() ? 0 : x_dims.back()) + " columns, expected 2 or 3 axes and " +
                std::to_string(node_->hidden) + " columns");
  }
  int64_t n_tokens = 1;
  for (size_t i = 0; i + 1 < x_dims.size(); ++i) n_tokens *= x_dims[i];
  const auto scores_of = [&](int idx, const std::string& name) {
    const Numbers numbers = Input(idx, name, &dims);
    if (dims.size() != 2 || dims[0] != n_tokens || dims[1] != node_->n_experts) {
      throw Error("node " + node_->name + ": input " + name + " has " + std::to_string(dims.size()) +
                  " axes, expected [" + std::to_string(n_tokens) + ", " + std::to_string(node_->n_experts) + "]");
    }
    return numbers;
  };
  const Numbers scores = scores_of(inputs.router, node_->router);
  const Numbers mixing =
      inputs.router_weights < 0 ? Numbers() : scores_of(inputs.router_weights, node_->router_weights);
  OrtValue* output = nullptr;
  ort_.Check(api::KernelContext_GetOutput::Call(ort_.table(), context, 0, x_dims.data(), x_dims.size(), &output));
  void* const out = ort_.Data(output);
  if (node_idx == 0) choosers_->CountTokens(n_tokens);
  is_decode_ = n_tokens == 1;
  for (int64_t token = 0; token < n_tokens; token += layer_->max_tokens) {
    const int64_t n = std::min(layer_->max_tokens, n_tokens - token);
    const int64_t at = token * node_->hidden, end = at + n * node_->hidden;
    const auto scores_at = [&](const Numbers& numbers, std::vector<float>* copy) {
      return Floats(numbers, token * node_->n_experts, n * node_->n_experts, copy);
    };
    float* to = static_cast<float*>(out) + at;
    if (x.is_half) {
      if (out_floats_.size() < static_cast<size_t>(end - at)) out_floats_.resize(static_cast<size_t>(end - at));
      to = out_floats_.data();
    }
    RunTokens(Floats(x, at, end - at, &x_floats_), scores_at(scores, &scores_floats_),
              scores_at(mixing, &mixing_floats_), n, to);
    if (x.is_half) FloatsToHalves(to, end - at, static_cast<uint16_t*>(out) + at);
  }
}

QmoeModel::Numbers QmoeModel::Input(int idx, const std::string& name, std::vector<int64_t>* dims) const {
  const OrtValue* value = nullptr;
  ort_.Check(api::KernelContext_GetInput::Call(ort_.table(), context_, static_cast<size_t>(idx), &value));
  int32_t element_type = 0;
  *dims = ort_.Dims(value, &element_type);
  if (element_type != kOrtFloat && element_type != kOrtFloat16) {
    throw Error("node " + node_->name + ": input " + name + " has element type " + std::to_string(element_type) +
                ", expected 1 (float32) or 10 (float16)");
  }
  return {ort_.Data(const_cast<OrtValue*>(value)), element_type == kOrtFloat16};
}

const float* QmoeModel::Floats(const Numbers& numbers, int64_t first, int64_t n, std::vector<float>* copy) {
  if (numbers.data == nullptr) return nullptr;
  if (!numbers.is_half) return static_cast<const float*>(numbers.data) + first;
  if (copy->size() < static_cast<size_t>(n)) copy->resize(static_cast<size_t>(n));
  HalvesToFloats(static_cast<const uint16_t*>(numbers.data) + first, n, copy->data());
  return copy->data();
}

void QmoeModel::RunTokens(const float* x, const float* scores, const float* router_weights, int64_t n_tokens,
                          float* out) {
  const auto grow = [](auto* v, int64_t n) {
    if (v->size() < static_cast<size_t>(n)) v->resize(static_cast<size_t>(n));
  };
  const int64_t n_pairs = n_tokens * node_->n_used;
  x_ = x;
  grow(&experts_, n_pairs);
  grow(&weights_, n_pairs);
  grow(&rows1_, n_pairs * node_->fc1.n_rows);
  grow(&rows2_, n_pairs * node_->hidden);
  grow(&row2_ptrs_, n_pairs);
  if (is_decode_ && choosers_->any()) {
    choosers_->Choose(runtime_, static_cast<int32_t>(node_ - nodes_.data()), *node_, scores, router_weights,
                      experts_.data());
    const edgemoe_choosers choosers = choosers_->native();
    edgemoe_session_set_choosers(session_, &choosers);
    Mix(*node_, scores, router_weights, experts_.data(), weights_.data());
  } else {
    for (int64_t t = 0; t < n_tokens; ++t) {
      Route(*node_, scores + t * node_->n_experts,
            router_weights == nullptr ? nullptr : router_weights + t * node_->n_experts, &order_,
            experts_.data() + t * node_->n_used, weights_.data() + t * node_->n_used);
    }
  }
  place_.assign(static_cast<size_t>(node_->n_experts), -1);
  int32_t n_places = 0;
  for (int64_t i = 0; i < n_pairs; ++i) {
    if (experts_[static_cast<size_t>(i)] == EDGEMOE_NO_EXPERT) continue;
    int32_t& place = place_[static_cast<size_t>(experts_[static_cast<size_t>(i)])];
    if (place < 0) place = n_places++;
  }
  for (int p = 0; p < kNProducts; ++p) {
    if (p % kWeights2 == kWeights1 || layer_->tensor_idxs[p] < 0) continue;
    grow(&sides_[p], n_places * static_cast<int64_t>(BytesOf(*node_, p).memory_bytes));
    grow(&side_ptrs_[p], n_places);
  }

  // In the order of use, which is that of reading.
  static constexpr int kOrder[] = {kScales1, kZeroPoints1, kWeights1, kScales2, kZeroPoints2, kWeights2};
  int32_t tensor_idxs[kNProducts];
  int n_tensors = 0;
  for (const int p : kOrder) {
    if (layer_->tensor_idxs[p] >= 0) tensor_idxs[n_tensors++] = layer_->tensor_idxs[p];
  }
  edgemoe_error error = {};
  Check(edgemoe_session_begin_layer(session_, experts_.data(), n_tokens, node_->n_used,
                                    static_cast<uint64_t>(node_->n_used) * sizeof(int32_t), tensor_idxs, n_tensors,
                                    &error),
        error);
  struct EndLayer {
    edgemoe_session* session;
    ~EndLayer() { edgemoe_session_end_layer(session); }
  } const end_layer{session_};
  copies_only_ = true;
  Products(kOrder, 2);
  copies_only_ = false;
  Products(kOrder + 2, 3);
  Products(kOrder + 5, 1);
  if (n_pairs * node_->hidden < kSerialFloats) {
    for (int64_t token = 0; token < n_tokens; ++token) Combine(token, out);
  } else {
    ForEach(n_tokens, [this, out](int64_t token) { Combine(token, out); });
  }
}

}  // namespace edgemoe_ort
