// SPDX-License-Identifier: MIT
#include "core/predictor.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/arithmetic.h"
#include "core/io.h"
#include "simd/quant_blocks.h"

namespace edgemoe {
namespace {

constexpr int64_t kBlockCols = 32;
// A norm weight this near to zero hides its column from the present layer: nothing is known about it.
constexpr float kSmallestNorm = 1e-6f;

// Of a number that is zero or in the range of normal IEEE halves.
uint16_t HalfOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x < 6.2e-5f) return 0;
  bits += 0x0fff + (bits >> 13 & 1);  // to nearest, ties to even
  return static_cast<uint16_t>(std::min<uint32_t>((bits >> 13) - ((127 - 15) << 10), 0x7bff));
}

void QuantizeRow(const float* x, int64_t n_cols, uint8_t* out) {
  for (int64_t c = 0; c < n_cols; c += kBlockCols) {
    float largest = 0.0f;
    for (int64_t i = 0; i < kBlockCols; ++i) largest = std::max(largest, std::fabs(x[c + i]));
    const uint16_t d = HalfOf(largest / 127.0f);
    const float inverse = d != 0 ? 127.0f / largest : 0.0f;
    std::memcpy(out, &d, sizeof(d));
    for (int64_t i = 0; i < kBlockCols; ++i) {
      out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::lround(x[c + i] * inverse)));
    }
    out += 2 + kBlockCols;
  }
}

uint64_t PaddedRows(const simd::KernelTable& table, int n_experts) {
  return RoundUp(static_cast<uint64_t>(n_experts), static_cast<uint64_t>(table.rows_per_group));
}

uint64_t RowBytes(int64_t n_cols) { return static_cast<uint64_t>(n_cols / kBlockCols) * sizeof(simd::BlockQ8_0); }

}  // namespace

Status Predictor::Set(const edgemoe_router* routers, int n_routers, int max_depth) {
  matrices_.clear();
  if (max_depth < 0 || max_depth > kMaxDepth) {
    return Status(EDGEMOE_INVALID_ARGUMENT, Format("prefetch depth %d, expected 0 to %d", max_depth, kMaxDepth));
  }
  if (Status s = ActiveKernels(&table_); !s.ok()) return s;
  for (int i = 0; i < n_routers; ++i) {
    const edgemoe_router& r = routers[i];
    const bool in_order = i == 0 ? r.layer >= 0 : r.layer > routers[i - 1].layer;
    if (!in_order || r.n_experts < 1 || r.n_cols < kBlockCols || r.n_cols % kBlockCols != 0 ||
        r.n_cols != routers[0].n_cols) {
      return Status(
          EDGEMOE_INVALID_ARGUMENT,
          Format("router %d of layer %d has %d experts and %lld columns: expected growing layers, and the same "
                 "multiple of 32 columns in all",
                 i, r.layer, r.n_experts, static_cast<long long>(r.n_cols)));
    }
  }
  if (n_routers == 0 || max_depth == 0) return Status();
  n_cols_ = routers[0].n_cols;
  max_experts_ = 0;
  matrices_.resize(static_cast<size_t>(routers[n_routers - 1].layer + 2) * kMaxDepth);
  std::vector<float> row(static_cast<size_t>(n_cols_));
  for (int i = -1; i < n_routers; ++i) {
    const int from_layer = i < 0 ? kToken : routers[i].layer;
    const float* const own_norm = i < 0 ? nullptr : routers[i].norm;
    for (int distance = 1; distance <= max_depth && i + distance < n_routers; ++distance) {
      const edgemoe_router& to = routers[i + distance];
      Matrix& m = matrices_[static_cast<size_t>((from_layer + 1) * kMaxDepth + distance - 1)];
      m.target = to.layer;
      m.n_experts = to.n_experts;
      m.sigmoid = to.sigmoid != 0;
      if (to.bias != nullptr) m.bias.assign(to.bias, to.bias + to.n_experts);
      m.rows.assign(PaddedRows(*table_, to.n_experts) * RowBytes(n_cols_), 0);
      max_experts_ = std::max(max_experts_, to.n_experts);
      for (int e = 0; e < to.n_experts; ++e) {
        const float* const weights = to.weights + static_cast<int64_t>(e) * n_cols_;
        for (int64_t c = 0; c < n_cols_; ++c) {
          const float own = own_norm != nullptr ? own_norm[c] : 1.0f;
          const float next = to.norm != nullptr ? to.norm[c] : 1.0f;
          row[static_cast<size_t>(c)] = std::fabs(own) < kSmallestNorm ? 0.0f : weights[c] * (next / own);
        }
        QuantizeRow(row.data(), n_cols_, m.rows.data() + static_cast<uint64_t>(e) * RowBytes(n_cols_));
      }
    }
  }
  return Status();
}

uint64_t Predictor::Bytes(const edgemoe_router* routers, int n_routers, int max_depth) {
  uint64_t n_bytes = 0;
  // 16: the most rows that a table's group has.
  for (int i = 0; i < n_routers; ++i) {
    const uint64_t n_rows = RoundUp(static_cast<uint64_t>(std::max(0, routers[i].n_experts)), 16);
    n_bytes += static_cast<uint64_t>(std::min(i + 1, max_depth)) * n_rows * RowBytes(routers[i].n_cols);
  }
  return n_bytes;
}

const Predictor::Matrix* Predictor::Find(int layer, int distance) const {
  const size_t i = static_cast<size_t>((layer + 1) * kMaxDepth + distance - 1);
  return layer >= kToken && i < matrices_.size() && matrices_[i].target >= 0 ? &matrices_[i] : nullptr;
}

int Predictor::TargetOf(int layer, int distance) const {
  const Matrix* const m = Find(layer, distance);
  return m != nullptr ? m->target : -1;
}

void Predictor::Reserve(Scratch* scratch) const {
  if (matrices_.empty()) return;
  scratch->panel.resize(static_cast<size_t>(simd::PanelBytes(simd::kInt8x32, n_cols_, 1)) + 64);
  scratch->scores.resize(PaddedRows(*table_, max_experts_));
  scratch->order.reserve(static_cast<size_t>(max_experts_));
}

void Predictor::Rank(int layer, int distance, int n_best, const float* x, Scratch* scratch) const {
  const Matrix& m = *Find(layer, distance);
  char* const panel = scratch->panel.data() + (64 - reinterpret_cast<uint64_t>(scratch->panel.data()) % 64) % 64;
  table_->quantize[simd::kInt8x32](x, panel, n_cols_);
  float* y = scratch->scores.data();
  const int64_t n_groups = static_cast<int64_t>(PaddedRows(*table_, m.n_experts)) / table_->rows_per_group;
  table_->multiply_rows[simd::kQ8_0]({m.rows.data(), n_groups, n_cols_, panel, &y});
  for (int e = 0; e < m.n_experts; ++e) {
    if (m.sigmoid) y[e] = 1.0f / (1.0f + std::exp(-y[e]));
    if (!m.bias.empty()) y[e] += m.bias[static_cast<size_t>(e)];
  }
  Best(y, m.n_experts, n_best, &scratch->order);
}

bool Predictor::Masses(int layer, int distance, const float* scores, float* masses) const {
  const Matrix& m = *Find(layer, distance);
  std::copy_n(scores, m.n_experts, masses);
  if (!m.sigmoid) return true;
  for (size_t e = 0; e < m.bias.size(); ++e) masses[e] -= m.bias[e];
  return false;
}

void Predictor::Best(const float* scores, int n, int n_best, std::vector<int32_t>* order) {
  order->clear();
  for (int e = 0; e < n; ++e) order->push_back(e);
  const auto n_named = static_cast<std::ptrdiff_t>(std::min(n_best, n));
  // A NaN would break the order that sorting needs; it ranks last.
  const auto score = [scores](int32_t e) { return std::isnan(scores[e]) ? -INFINITY : scores[e]; };
  std::partial_sort(order->begin(), order->begin() + n_named, order->end(),
                    [&](int32_t a, int32_t b) { return score(a) != score(b) ? score(a) > score(b) : a < b; });
  order->resize(static_cast<size_t>(n_named));
}

}  // namespace edgemoe
