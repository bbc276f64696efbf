#include "cemg/gemm_cpu.h"

#include <cmath>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kMostNarrowRows = 3;  // whose sums fit 16 registers of AVX2, or 32 of NEON

// Terms that are added up in a row. Longer sums are sums of such sums: the rounding error of a running sum
// grows with its length, and models whose attention is sharp magnify it.
constexpr int64_t kTerms = 128;

// Floats that will be read soon: those at `data`, `data` + `step` and so on, one a row of b; null: none.
struct Ahead {
  const float* data = nullptr;
  int64_t step = 0;
};

// c [R, kPanel] = a [R, depth] . b [depth, kPanel]
template <int kWidth, int R, bool kAhead>
[[gnu::always_inline]] inline void product_of(const float* a, int64_t stride_a, const float* b,
                                              int64_t stride_b, int64_t depth, float* c, int64_t stride_c,
                                              Ahead ahead) noexcept {
  using Vector = typename Vectors<kWidth>::One;
  constexpr int kCount = kPanel / kWidth;
  int64_t k = 0;
  do {
    const int64_t end = std::min(depth, k + kTerms);
    const bool first = k == 0;
    Vector sums[R][kCount] = {};
    for (; k < end; ++k) {
      if constexpr (kAhead) __builtin_prefetch(ahead.data + k * ahead.step, 0, 2);
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

template <bool kAhead>
[[gnu::always_inline]] inline void product_of(int64_t rows, const float* a, int64_t stride_a, const float* b,
                                              int64_t stride_b, int64_t depth, float* c, int64_t stride_c,
                                              Ahead ahead) noexcept {
#define CEMG_ROWS(WIDTH, R) \
  case R:                   \
    return product_of<WIDTH, R, kAhead>(a, stride_a, b, stride_b, depth, c, stride_c, ahead)
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
  product_of<false>(rows, a, stride_a, b, stride_b, depth, c, stride_c, {});
}

CEMG_CLONES void product_and_fetch(int64_t rows, const float* a, int64_t stride_a, const float* b,
                                   int64_t depth, float* c, Ahead ahead) noexcept {
  product_of<true>(rows, a, stride_a, b, kPanel, depth, c, kPanel, ahead);
}

// 1 / (1 + e^-x)
[[gnu::always_inline]] inline float sigmoid(float x) noexcept {
  const float small = exp_of_negative(-std::fabs(x));
  return (x < 0 ? small : 1.0f) / (1.0f + small);
}

// erfc(x) for x >= 0 within 1.2e-7 of itself: Chebyshev fitting of Numerical Recipes, 6.2
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

// One row of a tile, `width` columns of it that there are, to `out`.
[[gnu::always_inline]] inline void finish_row(float* sums, int64_t width, const float* bias,
                                              const Finish& finish, float* out) noexcept {
  if (bias) {
    for (int64_t c = 0; c < width; ++c) sums[c] += bias[c];
  }
  activate(finish.activation, sums);
  if (finish.times_out) {
    for (int64_t c = 0; c < width; ++c) sums[c] *= out[c];
  }
  if (finish.plus_out) {
    for (int64_t c = 0; c < width; ++c) sums[c] += out[c];
  }
  for (int64_t c = 0; c < width; ++c) out[c] = sums[c];
}

constexpr int64_t panels_of(const Linear& weights) noexcept {
  return padded(weights.out) / kPanel;
}

// What a tile fetches of the panels to come, where that measured faster (6 % for T5-small and one user): with
// large panels that few tiles share. Two tiles leave no time for it, many hardly need it. This is tile `tile`
// of all those of `panels` panels from `first` on.
Ahead ahead_of(const Linear& weights, int64_t first, int64_t panels, int64_t tile, int64_t blocks) noexcept {
  constexpr int64_t kLarge = 512 * kPanel, kLeast = 3, kMost = 6;
  const int64_t size = weights.in * kPanel;
  if (size < kLarge || blocks < kLeast || blocks > kMost || first + 2 * panels > panels_of(weights))
    return {};
  return {weights.panels + (first + panels) * size + size * tile / blocks, kPanel / blocks};
}

// Operations; reading the panel costs as much as those of a few rows.
int64_t tile_cost(const Linear& weights, const RowBlocks& blocks) noexcept {
  constexpr int64_t kReading = 4;
  return 2 * kPanel * weights.in * std::max(kReading, blocks.rows / blocks.count);
}

// tile [rows, kPanel] of some rows of x against one panel.
inline void panel_product(const Linear& weights, int64_t panel, Rows<const float> x, Share which, float* tile,
                          Ahead ahead) noexcept {
  const int64_t rows = which.end - which.begin;
  const float* const own = weights.panels + panel * weights.in * kPanel;
  if (ahead.data) return product_and_fetch(rows, x.at(which.begin), x.stride, own, weights.in, tile, ahead);
  product(rows, x.at(which.begin), x.stride, own, kPanel, weights.in, tile, kPanel);
}

// Some rows of x against one panel, to the columns of out that are its own.
CEMG_CLONES void linear_tile(const Linear& weights, int64_t panel, Rows<const float> x, Share which,
                             const Finish& finish, Rows<float> out, Ahead ahead) noexcept {
  const int64_t rows = which.end - which.begin;
  float sums[kMostRows][kPanel];
  panel_product(weights, panel, x, which, sums[0], ahead);
  const int64_t column = panel * kPanel, width = std::min(kPanel, weights.out - column);
  const float* const bias = weights.bias ? weights.bias + column : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    float* const to = out.at(which.begin + r) + column;
    if (width == kPanel) {  // whose number the compiler knows
      finish_row(sums[r], kPanel, bias, finish, to);
    } else {
      finish_row(sums[r], width, bias, finish, to);
    }
  }
}

// Adds the logits of a panel to the running sums of some rows.
CEMG_CLONES void add_logits(const Linear& weights, int64_t panel, int64_t rows, float* tile, float* highest,
                            float* sums) noexcept {
  const int64_t column = panel * kPanel, width = std::min(kPanel, weights.out - column);
  for (int64_t r = 0; r < rows; ++r) {
    float* const logits = tile + r * kPanel;
    if (weights.bias) {
      for (int64_t c = 0; c < width; ++c) logits[c] += weights.bias[column + c];
    }
    for (int64_t c = width; c < kPanel; ++c) logits[c] = kNever;
    float* const sum = sums + r * kPanel;
    int32_t above = 0;
    for (int64_t c = 0; c < kPanel; ++c) above |= logits[c] > highest[r] ? 1 : 0;
    const float most = above ? highest_of(logits, kPanel) : highest[r];
    const float least = larger(most, -kLargest);  // a number even where all so far are -inf
    if (above) {
      const float shrink = exp_of_negative(highest[r] - most);
      for (int64_t c = 0; c < kPanel; ++c) sum[c] *= shrink;
      highest[r] = most;
    }
    for (int64_t c = 0; c < kPanel; ++c) sum[c] += exp_of_negative(logits[c] - least);
  }
}

// highest and sum of each row's lanes, `stride` floats apart.
CEMG_CLONES void end_group(int64_t rows, const float* highest, float (*sums)[kPanel], int64_t stride,
                           float* highest_out, float* sums_out) noexcept {
  for (int64_t r = 0; r < rows; ++r) {
    highest_out[r * stride] = highest[r];
    sums_out[r * stride] = sum_of_lanes(sums[r]);
  }
}

// The log-sum-exp of groups of numbers, each by its highest and its sum.
CEMG_CLONES float merge(const float* highest, const float* sums, int64_t groups) noexcept {
  const float most = highest_of(highest, groups);
  if (std::isinf(most)) return most;
  float lanes[kPanel] = {};
  int64_t g = 0;
  for (; g + kPanel <= groups; g += kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) lanes[c] += sums[g + c] * exp_of_negative(highest[g + c] - most);
  }
  for (; g < groups; ++g) lanes[g % kPanel] += sums[g] * exp_of_negative(highest[g] - most);
  return most + std::log(sum_of_lanes(lanes));
}

}  // namespace

int64_t rows_at_once() noexcept {
  return has_wide_vectors() ? kMostRows : kMostNarrowRows;
}

RowBlocks::RowBlocks(int64_t rows) noexcept
    : rows(rows), count(std::max<int64_t>((rows + rows_at_once() - 1) / rows_at_once(), 1)) {}

CEMG_CLONES void multiply(int64_t rows, const float* a, int64_t stride_a, const float* b, int64_t columns,
                          int64_t depth, float* c) noexcept {
  for (int64_t j = 0; j < columns; j += kPanel) {
    product(rows, a, stride_a, b + j, columns, depth, c + j, columns);
  }
}

void linear(const Linear& weights, Rows<const float> x, int64_t rows, const Finish& finish, Rows<float> out,
            Team& team) noexcept {
  const RowBlocks blocks(rows);
  const int64_t cost = tile_cost(weights, blocks);
  team.each(panels_of(weights) * blocks.count, cost, [&](Share tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t panel = task / blocks.count, block = task % blocks.count;
      linear_tile(weights, panel, x, blocks.of(block), finish, out,
                  ahead_of(weights, panel, 1, block, blocks.count));
    }
  });
}

void RowTotals::write(const Linear& weights, Rows<const float> x, int64_t rows, float* totals, Team& team) {
  // panels that stay in the second cache while all rows pass, and are worth the end of a group
  const int64_t together = std::clamp<int64_t>(2048 / weights.in, 4, 16);
  const RowBlocks blocks(rows);
  const int64_t panels = panels_of(weights), groups = (panels + together - 1) / together;
  highest_.resize(static_cast<size_t>(rows * groups));
  sums_.resize(static_cast<size_t>(rows * groups));
  const int64_t cost = together * tile_cost(weights, blocks);
  team.each(groups * blocks.count, cost, [&](Share tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t group = task / blocks.count, block = task % blocks.count;
      const int64_t first = group * together, count = std::min(together, panels - first);
      const Share which = blocks.of(block);
      const int64_t some = which.end - which.begin;
      float tile[kMostRows * kPanel], sums[kMostRows][kPanel] = {}, highest[kMostRows];
      std::fill(highest, highest + kMostRows, kNever);
      for (int64_t p = 0; p < count; ++p) {
        panel_product(weights, first + p, x, which, tile,
                      ahead_of(weights, first, together, block * together + p, blocks.count));
        add_logits(weights, first + p, some, tile, highest, sums[0]);
      }
      const int64_t at = which.begin * groups + group;
      end_group(some, highest, sums, groups, highest_.data() + at, sums_.data() + at);
    }
  });
  team.each(rows, 16 * groups, [&](Share some) {
    for (int64_t row = some.begin; row < some.end; ++row) {
      totals[row] = merge(highest_.data() + row * groups, sums_.data() + row * groups, groups);
    }
  });
}

}  // namespace cemg
