#include "cemg/attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kRows = 6;                // queries multiplied at once, each with two vectors of sums
constexpr int64_t kWidth = 16;              // floats of a vector
constexpr int64_t kColumns = 2 * kWidth;    // columns multiplied at once
constexpr int64_t kChunk = 64;              // queries of a task, at most
constexpr int64_t kParallelWork = 1 << 16;  // multiply-adds worth the waking of a thread

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(alignof(float)), may_alias));

constexpr int64_t padded(int64_t count) noexcept {
  return (count + kColumns - 1) / kColumns * kColumns;
}

// c [R, 32] = a [R, depth] . b [depth, 32]
template <int R>
[[gnu::always_inline]] inline void product_of(const float* a, int64_t stride_a, const float* b,
                                              int64_t stride_b, int64_t depth, float* c,
                                              int64_t stride_c) noexcept {
  Vector sums[R][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector first = *reinterpret_cast<const Vector*>(b + k * stride_b);
    const Vector second = *reinterpret_cast<const Vector*>(b + k * stride_b + kWidth);
    for (int r = 0; r < R; ++r) {
      const float factor = a[r * stride_a + k];
      sums[r][0] += factor * first;
      sums[r][1] += factor * second;
    }
  }
  for (int r = 0; r < R; ++r) {
    *reinterpret_cast<Vector*>(c + r * stride_c) = sums[r][0];
    *reinterpret_cast<Vector*>(c + r * stride_c + kWidth) = sums[r][1];
  }
}

// c [rows, columns] = a [rows, depth] . b [depth, columns]; rows up to kRows, columns a multiple of 32.
CEMG_CLONES void multiply(int64_t rows, const float* a, int64_t stride_a, const float* b, int64_t columns,
                          int64_t depth, float* c) noexcept {
  for (int64_t j = 0; j < columns; j += kColumns) {
    switch (rows) {
      case 1:
        product_of<1>(a, stride_a, b + j, columns, depth, c + j, columns);
        break;
      case 2:
        product_of<2>(a, stride_a, b + j, columns, depth, c + j, columns);
        break;
      case 3:
        product_of<3>(a, stride_a, b + j, columns, depth, c + j, columns);
        break;
      case 4:
        product_of<4>(a, stride_a, b + j, columns, depth, c + j, columns);
        break;
      case 5:
        product_of<5>(a, stride_a, b + j, columns, depth, c + j, columns);
        break;
      default:
        product_of<6>(a, stride_a, b + j, columns, depth, c + j, columns);
        break;
    }
  }
}

// scores [count] in place: their terms added, then exp(score - highest). Returns highest and the sum.
struct RowSum {
  float highest, sum;
};

CEMG_CLONES RowSum exponentials(float* scores, int64_t count, float scale, const float* bias,
                                const float* padding) noexcept {
  for (int64_t s = 0; s < count; ++s) scores[s] *= scale;
  if (bias) {
    for (int64_t s = 0; s < count; ++s) scores[s] += bias[s];
  }
  if (padding) {
    for (int64_t s = 0; s < count; ++s) scores[s] += padding[s];
  }
  const float highest = highest_of(scores, count);
  for (int64_t s = 0; s < count; ++s) scores[s] = exp_of_negative(scores[s] - highest);
  float lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t s = 0; s < whole; s += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += scores[s + lane];
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  for (int64_t s = whole; s < count; ++s) sum += scores[s];
  return {highest, sum};
}

// What a thread works with; kept for its life, so that a call allocates nothing once it has grown.
struct Room {
  std::vector<float> keys;    // [Dh, S padded], transposed
  std::vector<float> values;  // [S, Dh padded]
  std::vector<float> scores;  // [kRows, S padded]
  std::vector<float> sums;    // [kRows, Dh padded]

  static Room& of_thread() {
    thread_local Room room;
    return room;
  }

  void read(const AttentionShape& shape, const float* key_rows, int64_t key_stride, const float* value_rows,
            int64_t value_stride) {
    const int64_t size = shape.head_dim, wide = padded(shape.keys), deep = padded(size);
    keys.assign(static_cast<size_t>(size * wide), 0.0f);
    values.assign(static_cast<size_t>(shape.keys * deep), 0.0f);
    scores.resize(static_cast<size_t>(kRows * wide));
    sums.resize(static_cast<size_t>(kRows * deep));
    for (int64_t s = 0; s < shape.keys; ++s) {
      for (int64_t d = 0; d < size; ++d) keys[d * wide + s] = key_rows[s * key_stride + d];
      std::copy(value_rows + s * value_stride, value_rows + s * value_stride + size, &values[s * deep]);
    }
  }
};

// The queries begin ... end of one user's head.
void attend(const AttentionShape& shape, Strided<const float> query, const ScoreTerms& terms,
            Strided<float> out, float* lse, int64_t b, int64_t h, int64_t begin, int64_t end, Room& room) {
  const int64_t size = shape.head_dim, wide = padded(shape.keys), deep = padded(size);
  const float* const padding = terms.padding ? terms.padding + b * shape.keys : nullptr;
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = std::min(kRows, end - i);
    multiply(rows, query.at(b, h, i), query.row, room.keys.data(), wide, size, room.scores.data());
    float total[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      float* const scores = room.scores.data() + r * wide;
      const int64_t hidden = terms.causal ? shape.queries - 1 - (i + r) : 0;
      const int64_t seen = shape.keys - hidden;
      const float* const bias = terms.bias.data ? terms.bias.at(b, h, i + r) : nullptr;
      const auto [highest, sum] = exponentials(scores, seen, terms.scale, bias, padding);
      std::fill(scores + seen, scores + shape.keys, 0.0f);
      total[r] = sum;
      if (lse) lse[(b * shape.heads + h) * shape.queries + i + r] = highest + std::log(sum);
    }
    multiply(rows, room.scores.data(), wide, room.values.data(), deep, shape.keys, room.sums.data());
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = out.at(b, h, i + r);
      for (int64_t d = 0; d < size; ++d) to[d] = room.sums[r * deep + d] / total[r];
    }
  }
}

}  // namespace

void prefix_attention(const AttentionShape& shape, Strided<const float> query, Strided<const float> keys,
                      Strided<const float> values, const ScoreTerms& terms, Strided<float> out,
                      float* lse) noexcept {
  const int64_t chunks = (shape.queries + kChunk - 1) / kChunk;
  const int64_t tasks = shape.users * shape.heads * chunks;
  [[maybe_unused]] const int64_t work =
      tasks / std::max<int64_t>(chunks, 1) * shape.queries * shape.keys * shape.head_dim;
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1 && work >= kParallelWork)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t chunk = task % chunks, head = task / chunks % shape.heads,
                  user = task / chunks / shape.heads;
    const int64_t group = head * shape.kv_heads / shape.heads;
    Room& room = Room::of_thread();
    room.read(shape, keys.at(user, group, 0), keys.row, values.at(user, group, 0), values.row);
    attend(shape, query, terms, out, lse, user, head, shape.queries * chunk / chunks,
           shape.queries * (chunk + 1) / chunks, room);
  }
}

}  // namespace cemg
