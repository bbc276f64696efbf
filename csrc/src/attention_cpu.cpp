#include "cemg/attention_cpu.h"

#include <algorithm>
#include <cmath>

#include "cemg/gemm_cpu.h"
#include "cemg/row_math.h"

namespace cemg {
namespace {

struct SoftmaxTerms {
  float highest, sum;
};

// Replaces scores [width] by exp(score - highest) for the first `count`, which are scaled and biased before,
// and by 0 for the others.
CEMG_CLONES SoftmaxTerms exponentiate(float* scores, int64_t count, int64_t width, float scale,
                                      const float* bias, const int32_t* key_positions) noexcept {
  for (int64_t s = 0; s < count; ++s) scores[s] *= scale;
  if (bias) {
    for (int64_t s = 0; s < count; ++s) scores[s] += bias[key_positions[s]];
  }
  for (int64_t s = count; s < width; ++s) scores[s] = kNegInf;
  const float highest = highest_of(scores, width);
  float lanes[kPanel] = {};
  for (int64_t s = 0; s < width; s += kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) {
      scores[s + c] = exp_of_negative(scores[s + c] - highest);
      lanes[c] += scores[s + c];
    }
  }
  for (int64_t s = count; s < width; ++s) scores[s] = 0.0f;
  return {highest, sum_of_lanes(lanes)};
}

CEMG_CLONES void divide(const float* x, float divisor, int64_t size, float* out) noexcept {
  const float factor = 1.0f / divisor;
  for (int64_t i = 0; i < size; ++i) out[i] = factor * x[i];
}

}  // namespace

void pack_head(const float* keys, const float* values, int64_t stride, int64_t head_dim,
               const PackedHead& head) noexcept {
  const int64_t count = head.count, key_width = padded(count), value_width = padded(head_dim);
  for (int64_t d = 0; d < head_dim; ++d) {
    float* const out = head.keys + d * key_width;
    for (int64_t s = 0; s < count; ++s) out[s] = keys[s * stride + d];
    std::fill(out + count, out + key_width, 0.0f);
  }
  for (int64_t s = 0; s < count; ++s) {
    float* const out = head.values + s * value_width;
    std::copy(values + s * stride, values + s * stride + head_dim, out);
    std::fill(out + head_dim, out + value_width, 0.0f);
  }
}

void attend(const Queries& queries, const PackedHead& head, float scale, const AttentionMask& mask,
            float* out, int64_t out_stride, float* lse, int64_t lse_stride,
            AttentionWorkspace& workspace) noexcept {
  const int64_t size = queries.head_dim, key_width = padded(head.count), value_width = padded(size);
  workspace.scores.resize(static_cast<size_t>(kMaxTileRows * key_width));
  workspace.sums.resize(static_cast<size_t>(kMaxTileRows * value_width));
  const RowTiles tiles(queries.count);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const auto [begin, end] = tiles.rows_of(tile);
    multiply(end - begin, queries.data + begin * queries.stride, queries.stride, head.keys, key_width, size,
             workspace.scores.data());
    float totals[kMaxTileRows];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t visible =
          mask.causal_offset < 0 ? head.count : std::min(head.count, mask.causal_offset + i + 1);
      const float* const bias = mask.bias ? mask.bias - mask.query_positions[i] : nullptr;
      const auto [highest, sum] = exponentiate(workspace.scores.data() + (i - begin) * key_width, visible,
                                               key_width, scale, bias, mask.key_positions);
      totals[i - begin] = sum;
      if (lse) lse[i * lse_stride] = highest + std::log(sum);
    }
    multiply(end - begin, workspace.scores.data(), key_width, head.values, value_width, head.count,
             workspace.sums.data());
    for (int64_t i = begin; i < end; ++i) {
      divide(workspace.sums.data() + (i - begin) * value_width, totals[i - begin], size,
             out + i * out_stride);
    }
  }
}

CEMG_CLONES void attend_to_beam(const BeamKVCache& cache, const float* query, int64_t row, int64_t head,
                                float scale, const float* prefix_lse, float* out) noexcept {
  constexpr int64_t kLanes = 16;
  const int64_t size = cache.head_dim, kv_head = head * cache.kv_heads / cache.heads,
                whole = size - size % kLanes;
  const auto count = static_cast<int64_t>(cache.steps.size());
  float scores[kMaxSteps];
  float highest = prefix_lse ? *prefix_lse : kNegInf;
  for (int64_t t = 0; t < count; ++t) {
    const StepKeyValues& step = cache.steps[static_cast<size_t>(t)];
    const float* const key = step.keys + cache.ancestors[t * cache.rows + row] * step.stride + kv_head * size;
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t c = 0; c < kLanes; ++c) lanes[c] += query[i + c] * key[i + c];
    }
    float sum = sum_of_lanes(lanes);
    for (int64_t i = whole; i < size; ++i) sum += query[i] * key[i];
    scores[t] = sum * scale + (cache.bias ? cache.bias[t * cache.heads + head] : 0.0f);
    highest = larger(highest, scores[t]);
  }
  const float prefix_weight = prefix_lse ? exp_of_negative(*prefix_lse - highest) : 0.0f;
  float total = prefix_weight;
  for (int64_t t = 0; t < count; ++t) total += scores[t] = exp_of_negative(scores[t] - highest);
  if (prefix_lse) {
    for (int64_t i = 0; i < size; ++i) out[i] *= prefix_weight / total;
  } else {
    std::fill(out, out + size, 0.0f);
  }
  for (int64_t t = 0; t < count; ++t) {
    const StepKeyValues& step = cache.steps[static_cast<size_t>(t)];
    const float* const value =
        step.values + cache.ancestors[t * cache.rows + row] * step.stride + kv_head * size;
    const float weight = scores[t] / total;
    for (int64_t i = 0; i < size; ++i) out[i] += weight * value[i];
  }
}

}  // namespace cemg
