#include "cemg/attention_cpu.h"

#include <algorithm>
#include <cmath>

#include "cemg/gemm_cpu.h"
#include "cemg/row_math.h"

namespace cemg {
namespace {

// scores [wide] in place, of which the first `count` are seen: exp(score - highest), 0 elsewhere. Returns
// highest and the sum.
struct RowSum {
  float highest, sum;
};

CEMG_CLONES RowSum exponentials(float* scores, int64_t count, int64_t wide, float scale, const float* bias,
                                const int32_t* place) noexcept {
  for (int64_t s = 0; s < count; ++s) scores[s] *= scale;
  if (bias) {
    for (int64_t s = 0; s < count; ++s) scores[s] += bias[place[s]];
  }
  for (int64_t s = count; s < wide; ++s) scores[s] = kNever;
  const float highest = highest_of(scores, wide);
  float lanes[kPanel] = {};
  for (int64_t s = 0; s < wide; s += kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) {
      scores[s + c] = exp_of_negative(scores[s + c] - highest);
      lanes[c] += scores[s + c];
    }
  }
  for (int64_t s = count; s < wide; ++s) scores[s] = 0.0f;
  return {highest, sum_of_lanes(lanes)};
}

CEMG_CLONES void divide(const float* x, float by, int64_t size, float* out) noexcept {
  const float factor = 1.0f / by;
  for (int64_t i = 0; i < size; ++i) out[i] = factor * x[i];
}

}  // namespace

void pack_head(const float* keys, const float* values, int64_t stride, int64_t head_dim,
               const PackedHead& head) noexcept {
  const int64_t count = head.count, wide = padded(count), deep = padded(head_dim);
  for (int64_t d = 0; d < head_dim; ++d) {
    float* const to = head.keys + d * wide;
    for (int64_t s = 0; s < count; ++s) to[s] = keys[s * stride + d];
    std::fill(to + count, to + wide, 0.0f);
  }
  for (int64_t s = 0; s < count; ++s) {
    float* const to = head.values + s * deep;
    std::copy(values + s * stride, values + s * stride + head_dim, to);
    std::fill(to + head_dim, to + deep, 0.0f);
  }
}

void attend(const Queries& queries, const PackedHead& head, float scale, const Sight& sight, float* out,
            int64_t out_stride, float* lse, int64_t lse_stride, AttentionRoom& room) noexcept {
  const int64_t size = queries.head_dim, deep = padded(size);
  room.scores.resize(static_cast<size_t>(kMostRows * padded(head.count)));
  room.sums.resize(static_cast<size_t>(kMostRows * deep));
  const RowBlocks blocks(queries.count);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const auto [begin, end] = blocks.of(block);
    const int64_t wide = padded(head.count);
    multiply(end - begin, queries.data + begin * queries.stride, queries.stride, head.keys, wide, size,
             room.scores.data());
    float totals[kMostRows];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t seen = sight.seen < 0 ? head.count : std::min(head.count, sight.seen + i + 1);
      const float* const bias = sight.bias ? sight.bias - sight.own[i] : nullptr;
      const auto [highest, sum] =
          exponentials(room.scores.data() + (i - begin) * wide, seen, wide, scale, bias, sight.place);
      totals[i - begin] = sum;
      if (lse) lse[i * lse_stride] = highest + std::log(sum);
    }
    multiply(end - begin, room.scores.data(), wide, head.values, deep, head.count, room.sums.data());
    for (int64_t i = begin; i < end; ++i) {
      divide(room.sums.data() + (i - begin) * deep, totals[i - begin], size, out + i * out_stride);
    }
  }
}

CEMG_CLONES void attend_own(const OwnTokens& tokens, const float* query, int64_t row, int64_t head,
                            float scale, const float* prefix_lse, float* out) noexcept {
  constexpr int64_t kLanes = 16;
  const int64_t size = tokens.head_dim, group = head * tokens.kv_heads / tokens.heads,
                whole = size - size % kLanes;
  const auto count = static_cast<int64_t>(tokens.steps.size());
  float scores[kMostSteps];
  float highest = prefix_lse ? *prefix_lse : kNever;
  for (int64_t t = 0; t < count; ++t) {
    const StepRows& step = tokens.steps[static_cast<size_t>(t)];
    const float* const key = step.keys + tokens.ancestors[t * tokens.rows + row] * step.stride + group * size;
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t c = 0; c < kLanes; ++c) lanes[c] += query[i + c] * key[i + c];
    }
    float sum = sum_of_lanes(lanes);
    for (int64_t i = whole; i < size; ++i) sum += query[i] * key[i];
    scores[t] = sum * scale + (tokens.bias ? tokens.bias[t * tokens.heads + head] : 0.0f);
    highest = larger(highest, scores[t]);
  }
  const float prefix = prefix_lse ? exp_of_negative(*prefix_lse - highest) : 0.0f;
  float total = prefix;
  for (int64_t t = 0; t < count; ++t) total += scores[t] = exp_of_negative(scores[t] - highest);
  if (prefix_lse) {
    for (int64_t i = 0; i < size; ++i) out[i] *= prefix / total;
  } else {
    std::fill(out, out + size, 0.0f);
  }
  for (int64_t t = 0; t < count; ++t) {
    const StepRows& step = tokens.steps[static_cast<size_t>(t)];
    const float* const value =
        step.values + tokens.ancestors[t * tokens.rows + row] * step.stride + group * size;
    const float weight = scores[t] / total;
    for (int64_t i = 0; i < size; ++i) out[i] += weight * value[i];
  }
}

}  // namespace cemg
