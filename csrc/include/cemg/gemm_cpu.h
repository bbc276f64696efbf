// Products of few rows with weight matrices, on the CPU in float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cemg/thread_pool.h"

namespace cemg {

inline constexpr int64_t kPanel = 32;        // columns of a tile: two AVX-512 vectors
inline constexpr int64_t kMaxTileRows = 13;  // rows of a tile: its 26 sums fit the 32 AVX-512 registers

constexpr int64_t padded(int64_t columns) noexcept {
  return (columns + kPanel - 1) / kPanel * kPanel;
}

// How many rows a tile may have on this machine, by the number and width of its registers.
int64_t max_tile_rows() noexcept;

// Rows split into the fewest tiles of at most max_tile_rows() rows, of nearly equal size.
struct RowTiles {
  int64_t rows, count;

  explicit RowTiles(int64_t rows) noexcept;
  TaskRange rows_of(int64_t tile) const noexcept { return {rows * tile / count, rows * (tile + 1) / count}; }
};

// c [rows, columns] = a [rows, depth] . b [depth, columns]. b and c are contiguous; `rows` is at most
// max_tile_rows(), `columns` a multiple of kPanel.
void multiply(int64_t rows, const float* a, int64_t stride_a, const float* b, int64_t columns, int64_t depth,
              float* c) noexcept;

enum class Activation : int { kNone, kRelu, kSilu, kGelu, kGeluTanh };

// A linear layer: its weight [out_features, in_features] as `panels`
// [ceil(out_features / kPanel), in_features, kPanel], zero past out_features, and its bias [out_features] or
// null. A layer without outputs counts as absent.
struct Linear {
  int64_t in_features = 0, out_features = 0;
  const float* panels = nullptr;
  const float* bias = nullptr;

  explicit operator bool() const noexcept { return out_features > 0; }
};

// Rows of floats that lie `stride` floats apart.
template <class Float>
struct RowsView {
  Float* data;
  int64_t stride;

  Float* row(int64_t index) const noexcept { return data + index * stride; }
  operator RowsView<const Float>() const noexcept { return {data, stride}; }
};

// The stride of rows of this width. A multiple of 4 KB would map all rows to the same set of the L1 cache.
constexpr int64_t padded_stride(int64_t width) noexcept {
  return width % 1024 == 0 ? width + kPanel : width;
}

// What is done to a product before it is stored: out = activation(product + bias), multiplied by or added to
// the values that `out` already holds.
struct Epilogue {
  Activation activation = Activation::kNone;
  bool multiply_out = false;
  bool add_out = false;
};

// out [rows, out_features] = epilogue(x [rows, in_features] . weight).
void linear(const Linear& weights, RowsView<const float> x, int64_t rows, const Epilogue& epilogue,
            RowsView<float> out, ThreadPool& pool) noexcept;

// The log-sum-exp of each row of a linear layer's output, without storing the output. The result has the same
// bits for any number of threads.
class RowLogSumExp {
 public:
  // lse [rows] of linear(x).
  void compute(const Linear& weights, RowsView<const float> x, int64_t rows, float* lse, ThreadPool& pool);

 private:
  std::vector<float> highest_, sums_;  // [rows, groups of panels]; the sum of exp(logit - highest)
};

}  // namespace cemg
