// SPDX-License-Identifier: MIT
#include "core/corrections.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace edgemoe {
namespace {

// On the tiny trained model .05 to .2 give the same within .01.
constexpr float kRate = 0.1f;
// The row for every choice, as a share of the others together.
constexpr float kCommonShare = 0.25f;
// In standard deviations of scores; routers whose choices follow no rule let corrections wander.
constexpr float kLargest = 4.0f;
constexpr double kAdvantageRate = 0.02;  // the mean of about the last 50 tokens

size_t TableSize(int n_sources, int n_targets) {
  return static_cast<size_t>(n_sources + 1) * static_cast<size_t>(n_targets);
}

size_t TableIdx(int layer, int distance) {
  return static_cast<size_t>((layer + 1) * Predictor::kMaxDepth + distance - 1);
}

// The row of an id; -1: none.
int SourceOf(int32_t id, int n_sources) {
  if (id >= n_sources) id -= n_sources;
  return id >= 0 && id < n_sources ? id : -1;
}

float SpreadOf(const float* scores, int n) {
  float sum = 0.0f, squares = 0.0f;
  for (int i = 0; i < n; ++i) {
    sum += scores[i];
    squares += scores[i] * scores[i];
  }
  const float mean = sum / static_cast<float>(n);
  return std::sqrt(std::max(squares / static_cast<float>(n) - mean * mean, 0.0f));
}

template <typename Function>
void ForTables(const edgemoe_router* routers, int n_routers, int max_depth, Function function) {
  for (int i = -1; i < n_routers; ++i) {
    const int layer = i < 0 ? Predictor::kToken : routers[i].layer;
    const int n_sources = i < 0 ? Corrections::kTokenRows : std::max(0, routers[i].n_experts);
    for (int distance = 1; distance <= max_depth && i + distance < n_routers; ++distance) {
      function(layer, distance, n_sources, std::max(0, routers[i + distance].n_experts));
    }
  }
}

}  // namespace

int32_t Corrections::TokenRow(const float* embedding, int64_t n_cols) {
  // Tokens differ in their first numbers already.
  uint32_t hash = 2166136261u;
  for (int64_t i = 0; i < std::min<int64_t>(n_cols, 32); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &embedding[i], sizeof(bits));
    hash = (hash ^ bits) * 16777619u;
    hash ^= hash >> 15;
  }
  return static_cast<int32_t>(hash % kTokenRows);
}

void Corrections::Start(const edgemoe_router* routers, int n_routers, int max_depth) {
  tables_.clear();
  if (n_routers == 0) return;
  tables_.resize(static_cast<size_t>(routers[n_routers - 1].layer + 2) * Predictor::kMaxDepth);
  ForTables(routers, n_routers, max_depth, [&](int layer, int distance, int n_sources, int n_targets) {
    Table& table = tables_[TableIdx(layer, distance)];
    table.n_sources = n_sources;
    table.n_targets = n_targets;
    table.rows.assign(TableSize(n_sources, n_targets), 0.0f);
  });
}

uint64_t Corrections::Bytes(const edgemoe_router* routers, int n_routers, int max_depth) {
  uint64_t n_bytes = 0;
  ForTables(routers, n_routers, max_depth, [&](int, int, int n_sources, int n_targets) {
    n_bytes += TableSize(n_sources, n_targets) * sizeof(float);
  });
  return n_bytes;
}

Corrections::Table* Corrections::Find(int layer, int distance) {
  const size_t i = TableIdx(layer, distance);
  return i < tables_.size() && tables_[i].n_targets > 0 ? &tables_[i] : nullptr;
}

bool Corrections::Apply(int layer, int distance, const int32_t* chosen, int64_t n_chosen, float* scores) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Table* const table = Find(layer, distance);
  if (table == nullptr || n_chosen == 0) return false;
  const int n = table->n_targets;
  const float unit = SpreadOf(scores, n);
  const auto add = [&](int source, float share) {
    const float* const row = table->rows.data() + static_cast<size_t>(source) * static_cast<size_t>(n);
    for (int e = 0; e < n; ++e) scores[e] += share * row[e];
  };
  for (int64_t i = 0; i < n_chosen; ++i) {
    if (const int source = SourceOf(chosen[i], table->n_sources); source >= 0) {
      add(source, unit / static_cast<float>(n_chosen));
    }
  }
  add(table->n_sources, unit * kCommonShare);
  return table->advantage > 0.0;
}

void Corrections::Learn(const Guess& guess, const std::vector<int32_t>& chosen_of_id) {
  std::lock_guard<std::mutex> lock(mutex_);
  Table* const table = Find(guess.layer, guess.distance);
  if (table == nullptr || guess.chosen.empty()) return;
  const size_t n_targets = static_cast<size_t>(table->n_targets);
  const bool has_copies = chosen_of_id.size() == 2 * n_targets;
  if (chosen_of_id.size() != n_targets && !has_copies) return;
  const auto is_chosen = [&](int32_t e) {
    const size_t id = static_cast<size_t>(e);
    return chosen_of_id[id] >= 0 || (has_copies && chosen_of_id[n_targets + id] >= 0);
  };
  const auto n_right = [&](const std::vector<int32_t>& named) {
    return static_cast<double>(std::count_if(named.begin(), named.end(), is_chosen));
  };
  // Choosers may name fewer by one than by the other: a name in vain costs half of what a right one is worth.
  const auto worth = [&](const std::vector<int32_t>& named) {
    return n_right(named) - 0.5 * static_cast<double>(named.size());
  };
  table->advantage += kAdvantageRate * (worth(guess.corrected) - worth(guess.plain) - table->advantage);
  const float rate = kRate / static_cast<float>(guess.chosen.size());
  const auto move = [&](int32_t target, float sign) {
    const auto step = [&](int source, float by) {
      float& c =
          table
              ->rows[static_cast<size_t>(source) * static_cast<size_t>(table->n_targets) + static_cast<size_t>(target)];
      c = std::clamp(c + by, -kLargest, kLargest);
    };
    for (int32_t id : guess.chosen) {
      if (const int source = SourceOf(id, table->n_sources); source >= 0) step(source, sign * rate);
    }
    step(table->n_sources, sign * kRate * kCommonShare);
  };
  for (int32_t e = 0; e < table->n_targets; ++e) {
    const bool is_named = std::find(guess.corrected.begin(), guess.corrected.end(), e) != guess.corrected.end();
    if (is_chosen(e) != is_named) move(e, is_named ? -1.0f : 1.0f);
  }
}

}  // namespace edgemoe
