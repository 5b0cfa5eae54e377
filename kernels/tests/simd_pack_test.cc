// SPDX-License-Identifier: MIT
// Interleaving of rows and panels against a slow definition, byte by byte.
#include <algorithm>
#include <string>

#include "simd/pack.h"
#include "tests/simd_fakes.h"

namespace edgemoe::simd::test {
namespace {

// pack.h, word for word: for each block, field, unit, that unit of each row.
std::vector<uint8_t> SlowPackGroup(Format format, int64_t R, int64_t n_cols, const std::vector<uint8_t>& rows) {
  const FormatInfo& info = Info(format);
  std::vector<uint8_t> out;
  for (int64_t b = 0; b < n_cols / info.block_cols; ++b) {
    int64_t at = b * info.block_bytes;
    for (int f = 0; f < info.n_fields; ++f) {
      for (int u = 0; u < info.fields[f].n_units; ++u, at += info.fields[f].unit_bytes) {
        for (int64_t r = 0; r < R; ++r) {
          for (int byte = 0; byte < info.fields[f].unit_bytes; ++byte) {
            out.push_back(rows[static_cast<size_t>(r * RowBytes(format, n_cols) + at + byte)]);
          }
        }
      }
    }
  }
  return out;
}

// The first n_groups groups of rows. Exactly as many bytes as there are, so that AddressSanitizer sees one too many.
std::vector<uint8_t> Interleaved(const KernelTable& table, Format format, int64_t n_groups, int64_t n_cols,
                                 const uint8_t* rows) {
  const int64_t n = n_groups * table.rows_per_group * RowBytes(format, n_cols);
  std::vector<uint8_t> out(static_cast<size_t>(n));
  table.interleave[format](rows, n_groups, n_cols, out.data());
  return out;
}

TEST(SimdPackTest, FieldsFillTheirBlocks) {
  for (const Format format : AllFormats()) {
    int n_bytes = 0;
    const FormatInfo& info = Info(format);
    for (int f = 0; f < info.n_fields; ++f) n_bytes += info.fields[f].unit_bytes * info.fields[f].n_units;
    EXPECT_EQ(n_bytes, info.block_bytes) << info.name;
  }
  EXPECT_STREQ(Info(kNoFormat).name, "");
  EXPECT_EQ(Info(kNoFormat).block_cols, 0);
}

class SimdInterleaveTest : public ::testing::TestWithParam<const KernelTable*> {};

// Guards against: a unit in another place than the kernels look for it, and tables that differ. Slices lie at any byte
// of a file, so rows need no alignment.
TEST_P(SimdInterleaveTest, GroupsAreAsDefined) {
  const KernelTable& table = *GetParam();
  EDGEMOE_SKIP_IF_UNSUPPORTED(table);
  std::mt19937 rng(1);
  const int64_t R = table.rows_per_group;
  for (const Format format : AllFormats()) {
    for (const int64_t n_units : {1, 3, 7}) {
      for (const int64_t n_groups : {1, 3}) {
        const int64_t n_cols = n_units * ColumnUnit(format), group_bytes = R * RowBytes(format, n_cols);
        const std::vector<uint8_t> rows = MakeRows(format, n_groups * R, n_cols, Weights::kAnyFinite, &rng);
        std::vector<uint8_t> want;
        for (int64_t g = 0; g < n_groups; ++g) {
          const auto from = rows.begin() + g * group_bytes;
          const std::vector<uint8_t> group = SlowPackGroup(format, R, n_cols, {from, from + group_bytes});
          want.insert(want.end(), group.begin(), group.end());
        }
        const std::string what = Info(format).name + (", columns " + std::to_string(n_cols));
        EXPECT_EQ(Interleaved(table, format, n_groups, n_cols, rows.data()), want) << what;
        std::vector<uint8_t> shifted(rows.size() + 1);
        std::copy(rows.begin(), rows.end(), shifted.begin() + 1);
        EXPECT_EQ(Interleaved(table, format, n_groups, n_cols, shifted.data() + 1), want) << what << ", shifted";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, SimdInterleaveTest, ::testing::ValuesIn(AllTables()),
                         [](const auto& info) { return std::string(info.param->isa); });

// Guards against: a definition by which a byte comes twice and another one is lost. Follows each byte by its index.
TEST(SimdPackTest, GroupsArePermutations) {
  for (const Format format : AllFormats()) {
    for (const int R : {1, 4, 8, 16}) {
      const int64_t n_cols = 3 * ColumnUnit(format);
      std::vector<size_t> came_from(static_cast<size_t>(R * RowBytes(format, n_cols)));
      for (size_t shift = 0; shift < 16; shift += 8) {
        std::vector<uint8_t> rows(came_from.size());
        for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint8_t>(i >> shift);
        const std::vector<uint8_t> out = SlowPackGroup(format, R, n_cols, rows);
        for (size_t i = 0; i < out.size(); ++i) came_from[i] |= static_cast<size_t>(out[i]) << shift;
      }
      ASSERT_LT(came_from.size(), 65536u);
      std::sort(came_from.begin(), came_from.end());
      for (size_t i = 0; i < came_from.size(); ++i) ASSERT_EQ(came_from[i], i) << Info(format).name << ", R " << R;
    }
  }
}

// kernel_table.h, "Layout of a panel", element by element.
TEST(SimdPackTest, PanelsAreAsDefined) {
  std::mt19937 rng(3);
  for (const Activation activation : {kFloat, kInt8x32, kInt8x256}) {
    const size_t n_cols = 768, block = activation == kInt8x32 ? 32 : 256;
    const size_t row_bytes = static_cast<size_t>(PanelBytes(activation, 768, 1));
    for (const size_t T : {size_t{1}, size_t{2}, size_t{4}, size_t{8}}) {
      std::vector<std::vector<uint8_t>> rows(T, std::vector<uint8_t>(row_bytes));
      std::vector<const void*> pointers;
      for (std::vector<uint8_t>& row : rows) {
        for (uint8_t& byte : row) byte = static_cast<uint8_t>(rng());
        pointers.push_back(row.data());
      }
      ASSERT_EQ(static_cast<size_t>(PanelBytes(activation, 768, static_cast<int64_t>(T))), T * row_bytes);
      std::vector<uint8_t> out(T * row_bytes), want;
      PackPanel(activation, 768, static_cast<int>(T), pointers.data(), out.data());
      const auto interleave = [&](size_t at, size_t n, size_t bytes) {
        for (size_t i = 0; i < n; ++i) {
          for (size_t t = 0; t < T; ++t) {
            const auto from = rows[t].begin() + static_cast<std::ptrdiff_t>(at + i * bytes);
            want.insert(want.end(), from, from + static_cast<std::ptrdiff_t>(bytes));
          }
        }
      };
      if (activation == kFloat) {
        interleave(0, n_cols, 4);
      } else {
        interleave(0, n_cols / 4, 4);
        interleave(n_cols, n_cols / block, 4);
        interleave(n_cols + n_cols / block * 4, n_cols / 16, 4);
      }
      EXPECT_EQ(out, want) << "activation " << activation << ", T " << T;
    }
  }
}

}  // namespace
}  // namespace edgemoe::simd::test
