#include "cemg/layer_ops_cpu.h"

#include <cmath>

#include "cemg/row_math.h"

namespace cemg {
namespace {

CEMG_CLONES void norm_row(const Norm& norm, const float* x, int64_t width, float scale, float* out) noexcept {
  constexpr int64_t kLanes = 16;
  const int64_t whole = width - width % kLanes;
  const auto sum_of = [&](auto&& term) __attribute__((always_inline)) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t c = 0; c < kLanes; ++c) lanes[c] += term(x[i + c]);
    }
    float sum = sum_of_lanes(lanes);
    for (int64_t i = whole; i < width; ++i) sum += term(x[i]);
    return sum;
  };
  const auto count = static_cast<float>(width);
  if (!norm.bias) {
    const float mean = sum_of([](float v) { return v * v; }) / count;
    const float factor = scale / std::sqrt(mean + norm.eps);
    for (int64_t i = 0; i < width; ++i) out[i] = norm.weight[i] * (x[i] * factor);
    return;
  }
  const float mean = sum_of([](float v) { return v; }) / count;
  const float variance = sum_of([mean](float v) { return (v - mean) * (v - mean); }) / count;
  const float factor = 1.0f / std::sqrt(variance + norm.eps);
  for (int64_t i = 0; i < width; ++i) {
    out[i] = scale * (norm.weight[i] * ((x[i] - mean) * factor) + norm.bias[i]);
  }
}

CEMG_CLONES void rotate(float* x, const float* cosine, const float* sine, int64_t size) noexcept {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosine[i] - second * sine[i];
    x[i + half] = second * cosine[i + half] + first * sine[i + half];
  }
}

}  // namespace

void norm_rows(const Norm& norm, RowsView<const float> x, int64_t rows, int64_t width, float scale,
               RowsView<float> out, ThreadPool& pool) noexcept {
  pool.parallel_for(rows, kScalarCost * width, [&](TaskRange range) {
    for (int64_t row = range.begin; row < range.end; ++row) {
      norm_row(norm, x.row(row), width, scale, out.row(row));
    }
  });
}

bool uses_rotary_or_head_norms(const TransformerLayer& layer, const PositionTables& tables) noexcept {
  return tables.cosine != nullptr || layer.query_norm;
}

void apply_rotary(const Transformer& model, const TransformerLayer& layer, const PositionTables& tables,
                  const std::vector<int32_t>& positions, float* qkv, ThreadPool& pool) noexcept {
  const int64_t size = model.head_dim, stride = layer.qkv.out_features;
  const int64_t heads = model.heads + model.kv_heads;  // a row's queries and keys are adjacent
  const auto rows = static_cast<int64_t>(positions.size());
  pool.parallel_for(rows, kScalarCost * heads * size, [&](TaskRange range) {
    for (int64_t row = range.begin; row < range.end; ++row) {
      const int64_t offset = positions[static_cast<size_t>(row)] * size;
      for (int64_t head = 0; head < heads; ++head) {
        float* const x = qkv + row * stride + head * size;
        const Norm& norm = head < model.heads ? layer.query_norm : layer.key_norm;
        if (norm) norm_row(norm, x, size, 1.0f, x);
        if (tables.cosine) rotate(x, tables.cosine + offset, tables.sine + offset, size);
      }
    }
  });
}

}  // namespace cemg
