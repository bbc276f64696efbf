// Matrix products of few rows with weights, on the CPU in float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cemg/team.h"

namespace cemg {

inline constexpr int64_t kPanel = 32;     // columns multiplied at once: two vectors of AVX-512
inline constexpr int64_t kMostRows = 13;  // rows multiplied at once: 26 sums fit its 32 registers

constexpr int64_t padded(int64_t columns) noexcept {
  return (columns + kPanel - 1) / kPanel * kPanel;
}

// As many as this machine's registers allow.
int64_t rows_at_once() noexcept;

// Some rows, cut into as few blocks of no more than rows_at_once() as there can be, of nearly equal size.
struct RowBlocks {
  int64_t rows, count;

  explicit RowBlocks(int64_t rows) noexcept;
  Share of(int64_t block) const noexcept { return {rows * block / count, rows * (block + 1) / count}; }
};

// c [rows, columns] = a [rows, depth] . b [depth, columns], contiguous but for the rows of a; rows no more
// than rows_at_once(), columns a multiple of kPanel.
void multiply(int64_t rows, const float* a, int64_t stride_a, const float* b, int64_t columns, int64_t depth,
              float* c) noexcept;

enum class Activation : int { kNone, kRelu, kSilu, kGelu, kGeluTanh };

// A linear layer's weight [out, in] as `panels` [ceil(out / kPanel), in, kPanel], zero past `out`, and its
// bias [out] or null. One of no outputs is not there.
struct Linear {
  int64_t in = 0, out = 0;
  const float* panels = nullptr;
  const float* bias = nullptr;

  explicit operator bool() const noexcept { return out > 0; }
};

// Rows of floats, each `stride` after the one before.
template <class Float>
struct Rows {
  Float* data;
  int64_t stride;

  Float* at(int64_t row) const noexcept { return data + row * stride; }
  operator Rows<const Float>() const noexcept { return {data, stride}; }
};

// The distance of rows so wide: a multiple of 4 KB would put all of them in one place of the first cache.
constexpr int64_t stride_of(int64_t width) noexcept {
  return width % 1024 == 0 ? width + kPanel : width;
}

// What becomes of a product: activation(product + bias), times or plus what is in the output already.
struct Finish {
  Activation activation = Activation::kNone;
  bool times_out = false;
  bool plus_out = false;
};

// out [rows, linear.out] of x [rows, linear.in].
void linear(const Linear& weights, Rows<const float> x, int64_t rows, const Finish& finish, Rows<float> out,
            Team& team) noexcept;

// The log-sum-exp of each row of a product, which is never stored; the same bits on any number of threads.
class RowTotals {
 public:
  // totals [rows] of linear(x).
  void write(const Linear& weights, Rows<const float> x, int64_t rows, float* totals, Team& team);

 private:
  std::vector<float> highest_, sums_;  // [rows, groups of panels], the sum of exp(logit - highest)
};

}  // namespace cemg
