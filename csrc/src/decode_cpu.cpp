#include "cemg/decode_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kParallelWork = 1 << 14;  // multiply-adds worth the waking of a thread
constexpr int64_t kMaxSteps = 256;          // a semantic ID has at most 255 levels

CEMG_CLONES float dot(const float* a, const float* b, int64_t size) noexcept {
  constexpr int64_t kLanes = 16;  // sums side by side, so that the compiler may use vectors
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  for (; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

CEMG_CLONES void add_scaled(float factor, const float* x, int64_t size, float* out) noexcept {
  for (int64_t i = 0; i < size; ++i) out[i] += factor * x[i];
}

CEMG_CLONES void scale_by(const float* x, const float* weight, float factor, int64_t size,
                          float* out) noexcept {
  for (int64_t i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * factor);
}

}  // namespace

void beam_attention(const BeamShape& shape, const float* query, int64_t query_stride,
                    std::span<const StepRows> steps, const int32_t* ancestors, const float* bias, float scale,
                    const PrefixAttention& prefix, float* out) noexcept {
  const int64_t rows = shape.users * shape.beams, shared = shape.heads / shape.kv_heads,
                size = shape.head_dim;
  const auto count = static_cast<int64_t>(steps.size());
  [[maybe_unused]] const int64_t work = rows * count * shape.heads * size;
#pragma omp parallel for if (work >= kParallelWork)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t user = row / shape.beams, beam = row % shape.beams;
    for (int64_t head = 0; head < shape.heads; ++head) {
      const int64_t group = head / shared, place = beam * shared + head % shared;
      const float* const own = query + row * query_stride + head * size;
      float scores[kMaxSteps];
      float highest = -std::numeric_limits<float>::infinity();
      if (prefix.out) {
        highest = prefix.lse[user * prefix.lse_b + place * prefix.lse_q + group * prefix.lse_g];
      }
      const float before = highest;
      for (int64_t t = 0; t < count; ++t) {
        const float* const key =
            steps[t].keys + ancestors[t * rows + row] * steps[t].key_stride + group * size;
        scores[t] = dot(own, key, size) * scale + (bias ? bias[t * shape.heads + head] : 0.0f);
        highest = std::max(highest, scores[t]);
      }
      float* const sum = out + (row * shape.heads + head) * size;
      float total = 0;
      if (prefix.out) {
        const float* const other =
            prefix.out + user * prefix.out_b + place * prefix.out_q + group * prefix.out_g;
        total = std::exp(before - highest);
        for (int64_t i = 0; i < size; ++i) sum[i] = total * other[i];
      } else {
        std::fill(sum, sum + size, 0.0f);
      }
      for (int64_t t = 0; t < count; ++t) {
        const float weight = std::exp(scores[t] - highest);
        total += weight;
        const int64_t from = ancestors[t * rows + row] * steps[t].value_stride + group * size;
        add_scaled(weight, steps[t].values + from, size, sum);
      }
      for (int64_t i = 0; i < size; ++i) sum[i] /= total;
    }
  }
}

void rms_norm(const float* x, const float* weight, int64_t rows, int64_t width, float eps,
              float* out) noexcept {
#pragma omp parallel for if (rows * width >= kParallelWork)
  for (int64_t row = 0; row < rows; ++row) {
    const float* const in = x + row * width;
    const float mean = dot(in, in, width) / static_cast<float>(width);
    scale_by(in, weight, 1.0f / std::sqrt(mean + eps), width, out + row * width);
  }
}

}  // namespace cemg
