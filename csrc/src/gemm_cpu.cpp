#include "cemg/gemm_cpu.h"

#include <cmath>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kMaxNarrowTileRows = 3;  // its sums fit the 16 AVX2 registers, or the 32 of NEON

// The most terms of a running sum; longer sums are sums of these. The rounding error of a running sum grows
// with its length, and models with sharp attention magnify it.
constexpr int64_t kDepthBlock = 128;

// Addresses to prefetch, one per row of b: data, data + step and so on. Null: none.
struct Prefetch {
  const float* data = nullptr;
  int64_t step = 0;
};

// c [R, kPanel] = a [R, depth] . b [depth, kPanel]
template <int kWidth, int R, bool kPrefetch>
[[gnu::always_inline]] inline void tile_product(const float* a, int64_t stride_a, const float* b,
                                                int64_t stride_b, int64_t depth, float* c, int64_t stride_c,
                                                Prefetch prefetch) noexcept {
  using Vector = typename VectorOf<kWidth>::Type;
  constexpr int kCount = kPanel / kWidth;
  int64_t k = 0;
  do {
    const int64_t end = std::min(depth, k + kDepthBlock);
    const bool first = k == 0;
    Vector sums[R][kCount] = {};
    for (; k < end; ++k) {
      if constexpr (kPrefetch) __builtin_prefetch(prefetch.data + k * prefetch.step, 0, 2);
      Vector row[kCount];
      for (int v = 0; v < kCount; ++v)
        row[v] = *reinterpret_cast<const Vector*>(b + k * stride_b + v * kWidth);
      for (int r = 0; r < R; ++r) {
        const float factor = a[r * stride_a + k];
        for (int v = 0; v < kCount; ++v) sums[r][v] += factor * row[v];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kCount; ++v) {
        Vector* const out = reinterpret_cast<Vector*>(c + r * stride_c + v * kWidth);
        *out = first ? sums[r][v] : *out + sums[r][v];
      }
    }
  } while (k < depth);
}

template <bool kPrefetch>
[[gnu::always_inline]] inline void tile_product(int64_t rows, const float* a, int64_t stride_a,
                                                const float* b, int64_t stride_b, int64_t depth, float* c,
                                                int64_t stride_c, Prefetch prefetch) noexcept {
#define CEMG_ROWS(WIDTH, R) \
  case R:                   \
    return tile_product<WIDTH, R, kPrefetch>(a, stride_a, b, stride_b, depth, c, stride_c, prefetch)
  if (!has_wide_vectors()) {
    switch (rows) {
      CEMG_ROWS(kNarrow, 1);
      CEMG_ROWS(kNarrow, 2);
      CEMG_ROWS(kNarrow, 3);
    }
    return;
  }
  switch (rows) {
    CEMG_ROWS(kWide, 1);
    CEMG_ROWS(kWide, 2);
    CEMG_ROWS(kWide, 3);
    CEMG_ROWS(kWide, 4);
    CEMG_ROWS(kWide, 5);
    CEMG_ROWS(kWide, 6);
    CEMG_ROWS(kWide, 7);
    CEMG_ROWS(kWide, 8);
    CEMG_ROWS(kWide, 9);
    CEMG_ROWS(kWide, 10);
    CEMG_ROWS(kWide, 11);
    CEMG_ROWS(kWide, 12);
    CEMG_ROWS(kWide, 13);
  }
#undef CEMG_ROWS
}

CEMG_CLONES void product(int64_t rows, const float* a, int64_t stride_a, const float* b, int64_t stride_b,
                         int64_t depth, float* c, int64_t stride_c) noexcept {
  tile_product<false>(rows, a, stride_a, b, stride_b, depth, c, stride_c, {});
}

CEMG_CLONES void product_with_prefetch(int64_t rows, const float* a, int64_t stride_a, const float* b,
                                       int64_t depth, float* c, Prefetch prefetch) noexcept {
  tile_product<true>(rows, a, stride_a, b, kPanel, depth, c, kPanel, prefetch);
}

// 1 / (1 + e^-x)
[[gnu::always_inline]] inline float sigmoid(float x) noexcept {
  const float small = exp_of_negative(-std::fabs(x));
  return (x < 0 ? small : 1.0f) / (1.0f + small);
}

// erfc(x) for x >= 0 with a relative error of at most 1.2e-7: the Chebyshev fit of Numerical Recipes, 6.2.
[[gnu::always_inline]] inline float erfc_of_positive(float x) noexcept {
  const float t = 1.0f / (1.0f + 0.5f * x);
  float sum = 0.17087277f;
  sum = sum * t - 0.82215223f;
  sum = sum * t + 1.48851587f;
  sum = sum * t - 1.13520398f;
  sum = sum * t + 0.27886807f;
  sum = sum * t - 0.18628806f;
  sum = sum * t + 0.09678418f;
  sum = sum * t + 0.37409196f;
  sum = sum * t + 1.00002368f;
  sum = sum * t - 1.26551223f;
  return t * exp_of_negative(sum - x * x);
}

[[gnu::always_inline]] inline float gelu(float x) noexcept {
  const float tail = 0.5f * erfc_of_positive(std::fabs(x) * 0.70710678f);
  return x * (x < 0 ? tail : 1.0f - tail);
}

// x/2 (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
[[gnu::always_inline]] inline float gelu_tanh(float x) noexcept {
  return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
}

[[gnu::always_inline]] inline void activate(Activation activation, float* x) noexcept {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      for (int64_t c = 0; c < kPanel; ++c) x[c] = larger(x[c], 0.0f);
      break;
    case Activation::kSilu:
      for (int64_t c = 0; c < kPanel; ++c) x[c] *= sigmoid(x[c]);
      break;
    case Activation::kGelu:
      for (int64_t c = 0; c < kPanel; ++c) x[c] = gelu(x[c]);
      break;
    case Activation::kGeluTanh:
      for (int64_t c = 0; c < kPanel; ++c) x[c] = gelu_tanh(x[c]);
      break;
  }
}

// Writes the first `width` columns of one row of a tile to `out`.
[[gnu::always_inline]] inline void apply_epilogue(float* sums, int64_t width, const float* bias,
                                                  const Epilogue& epilogue, float* out) noexcept {
  if (bias) {
    for (int64_t c = 0; c < width; ++c) sums[c] += bias[c];
  }
  activate(epilogue.activation, sums);
  if (epilogue.multiply_out) {
    for (int64_t c = 0; c < width; ++c) sums[c] *= out[c];
  }
  if (epilogue.add_out) {
    for (int64_t c = 0; c < width; ++c) sums[c] += out[c];
  }
  for (int64_t c = 0; c < width; ++c) out[c] = sums[c];
}

constexpr int64_t panels_of(const Linear& weights) noexcept {
  return padded(weights.out_features) / kPanel;
}

// The part of the next panels that tile `tile` prefetches. `tiles` tiles read each of the `panels` panels
// from `first` on, and `tile` counts all of these. Only large panels that few tiles share are prefetched,
// where it was measured to be faster (6 % for T5-small and one user): two tiles leave no time for it, and
// many tiles hide the time of reading a panel without it.
Prefetch prefetch_of(const Linear& weights, int64_t first, int64_t panels, int64_t tile,
                     int64_t tiles) noexcept {
  constexpr int64_t kMinPanelSize = 512 * kPanel, kMinTiles = 3, kMaxTiles = 6;
  const int64_t size = weights.in_features * kPanel;
  if (size < kMinPanelSize || tiles < kMinTiles || tiles > kMaxTiles) return {};
  if (first + 2 * panels > panels_of(weights)) return {};
  return {weights.panels + (first + panels) * size + size * tile / tiles, kPanel / tiles};
}

// In operations. Reading a panel takes as long as the operations of a few rows.
int64_t tile_cost(const Linear& weights, const RowTiles& tiles) noexcept {
  constexpr int64_t kReadingCost = 4;  // rows
  return 2 * kPanel * weights.in_features * std::max(kReadingCost, tiles.rows / tiles.count);
}

// tile [rows, kPanel] = the rows of x . one panel.
inline void panel_product(const Linear& weights, int64_t panel, RowsView<const float> x, TaskRange rows,
                          float* tile, Prefetch prefetch) noexcept {
  const int64_t count = rows.end - rows.begin, depth = weights.in_features;
  const float* const a = x.row(rows.begin);
  const float* const b = weights.panels + panel * depth * kPanel;
  if (prefetch.data) return product_with_prefetch(count, a, x.stride, b, depth, tile, prefetch);
  product(count, a, x.stride, b, kPanel, depth, tile, kPanel);
}

// Computes the columns of one panel for some rows, and writes them to out.
CEMG_CLONES void linear_tile(const Linear& weights, int64_t panel, RowsView<const float> x, TaskRange rows,
                             const Epilogue& epilogue, RowsView<float> out, Prefetch prefetch) noexcept {
  const int64_t count = rows.end - rows.begin;
  float sums[kMaxTileRows][kPanel];
  panel_product(weights, panel, x, rows, sums[0], prefetch);
  const int64_t column = panel * kPanel, width = std::min(kPanel, weights.out_features - column);
  const float* const bias = weights.bias ? weights.bias + column : nullptr;
  for (int64_t r = 0; r < count; ++r) {
    float* const out_row = out.row(rows.begin + r) + column;
    if (width == kPanel) {  // a constant width, so that the compiler unrolls the loops
      apply_epilogue(sums[r], kPanel, bias, epilogue, out_row);
    } else {
      apply_epilogue(sums[r], width, bias, epilogue, out_row);
    }
  }
}

// Adds a panel's logits, the first `rows` rows of `tile`, to each row's running sums.
CEMG_CLONES void add_logits(const Linear& weights, int64_t panel, int64_t rows, float* tile, float* highest,
                            float* sums) noexcept {
  const int64_t column = panel * kPanel, width = std::min(kPanel, weights.out_features - column);
  for (int64_t r = 0; r < rows; ++r) {
    float* const logits = tile + r * kPanel;
    if (weights.bias) {
      for (int64_t c = 0; c < width; ++c) logits[c] += weights.bias[column + c];
    }
    for (int64_t c = width; c < kPanel; ++c) logits[c] = kNegInf;
    float* const sum = sums + r * kPanel;
    int32_t above = 0;
    for (int64_t c = 0; c < kPanel; ++c) above |= logits[c] > highest[r] ? 1 : 0;
    const float new_highest = above ? highest_of(logits, kPanel) : highest[r];
    const float base = larger(new_highest, -kMaxFloat);  // finite even if all logits so far are -inf
    if (above) {
      const float shrink = exp_of_negative(highest[r] - new_highest);
      for (int64_t c = 0; c < kPanel; ++c) sum[c] *= shrink;
      highest[r] = new_highest;
    }
    for (int64_t c = 0; c < kPanel; ++c) sum[c] += exp_of_negative(logits[c] - base);
  }
}

// Writes the highest logit and the sum of each row of a group, `stride` floats apart.
CEMG_CLONES void finish_group(int64_t rows, const float* highest, float (*sums)[kPanel], int64_t stride,
                              float* highest_out, float* sums_out) noexcept {
  for (int64_t r = 0; r < rows; ++r) {
    highest_out[r * stride] = highest[r];
    sums_out[r * stride] = sum_of_lanes(sums[r]);
  }
}

// The log-sum-exp of all groups, given the highest logit and the sum of each.
CEMG_CLONES float merge_groups(const float* highest, const float* sums, int64_t groups) noexcept {
  const float overall = highest_of(highest, groups);
  if (std::isinf(overall)) return overall;
  float lanes[kPanel] = {};
  int64_t g = 0;
  for (; g + kPanel <= groups; g += kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) lanes[c] += sums[g + c] * exp_of_negative(highest[g + c] - overall);
  }
  for (; g < groups; ++g) lanes[g % kPanel] += sums[g] * exp_of_negative(highest[g] - overall);
  return overall + std::log(sum_of_lanes(lanes));
}

}  // namespace

int64_t max_tile_rows() noexcept {
  return has_wide_vectors() ? kMaxTileRows : kMaxNarrowTileRows;
}

RowTiles::RowTiles(int64_t rows) noexcept
    : rows(rows), count(std::max<int64_t>((rows + max_tile_rows() - 1) / max_tile_rows(), 1)) {}

CEMG_CLONES void multiply(int64_t rows, const float* a, int64_t stride_a, const float* b, int64_t columns,
                          int64_t depth, float* c) noexcept {
  for (int64_t j = 0; j < columns; j += kPanel) {
    product(rows, a, stride_a, b + j, columns, depth, c + j, columns);
  }
}

void linear(const Linear& weights, RowsView<const float> x, int64_t rows, const Epilogue& epilogue,
            RowsView<float> out, ThreadPool& pool) noexcept {
  const RowTiles tiles(rows);
  const int64_t cost = tile_cost(weights, tiles);
  pool.parallel_for(panels_of(weights) * tiles.count, cost, [&](TaskRange tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t panel = task / tiles.count, tile = task % tiles.count;
      linear_tile(weights, panel, x, tiles.rows_of(tile), epilogue, out,
                  prefetch_of(weights, panel, 1, tile, tiles.count));
    }
  });
}

void RowLogSumExp::compute(const Linear& weights, RowsView<const float> x, int64_t rows, float* lse,
                           ThreadPool& pool) {
  // as many panels as stay in the L2 cache while all rows are computed, and enough to pay for finish_group
  const int64_t group_size = std::clamp<int64_t>(2048 / weights.in_features, 4, 16);
  const RowTiles tiles(rows);
  const int64_t panels = panels_of(weights), groups = (panels + group_size - 1) / group_size;
  highest_.resize(static_cast<size_t>(rows * groups));
  sums_.resize(static_cast<size_t>(rows * groups));
  const int64_t cost = group_size * tile_cost(weights, tiles);
  pool.parallel_for(groups * tiles.count, cost, [&](TaskRange tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t group = task / tiles.count, tile = task % tiles.count;
      const int64_t first = group * group_size, count = std::min(group_size, panels - first);
      const TaskRange tile_rows = tiles.rows_of(tile);
      const int64_t num_rows = tile_rows.end - tile_rows.begin;
      float logits[kMaxTileRows * kPanel], sums[kMaxTileRows][kPanel] = {}, highest[kMaxTileRows];
      std::fill(highest, highest + kMaxTileRows, kNegInf);
      for (int64_t p = 0; p < count; ++p) {
        panel_product(weights, first + p, x, tile_rows, logits,
                      prefetch_of(weights, first, group_size, tile * group_size + p, tiles.count));
        add_logits(weights, first + p, num_rows, logits, highest, sums[0]);
      }
      const int64_t offset = tile_rows.begin * groups + group;
      finish_group(num_rows, highest, sums, groups, highest_.data() + offset, sums_.data() + offset);
    }
  });
  pool.parallel_for(rows, 16 * groups, [&](TaskRange range) {
    for (int64_t row = range.begin; row < range.end; ++row) {
      lse[row] = merge_groups(highest_.data() + row * groups, sums_.data() + row * groups, groups);
    }
  });
}

}  // namespace cemg
