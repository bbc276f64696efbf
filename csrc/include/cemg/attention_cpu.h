// Attention on the CPU in float32: many queries over the same keys, and beams over their own tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace cemg {

inline constexpr int64_t kMostSteps = 256;  // own tokens of a row: a semantic ID has at most 255 levels

// Keys and values of one head, as the products read them: keys [head_dim, padded(count)], values
// [count, padded(head_dim)], zero where there is nothing.
struct PackedHead {
  float* keys;
  float* values;
  int64_t count;
};

// Fills in a head from its rows of keys and of values, `stride` floats apart.
void pack_head(const float* keys, const float* values, int64_t stride, int64_t head_dim,
               const PackedHead& head) noexcept;

// What bounds and biases the scores of queries i = 0, 1 ... over keys j: query i sees the keys up to
// `seen + i`, or all where `seen` is negative; `bias`, unless null, is a table by distance, and to the score
// of query i, at place own[i], it adds bias[place[j] - own[i]].
struct Sight {
  int64_t seen = -1;
  const float* bias = nullptr;
  const int32_t* own = nullptr;
  const int32_t* place = nullptr;
};

struct Queries {
  const float* data;  // row i at data + i * stride
  int64_t stride;
  int64_t count;
  int64_t head_dim;
};

// What a thread works with; kept for its life, so that a call allocates nothing once it has grown.
struct AttentionRoom {
  std::vector<float> scores, sums;

  static AttentionRoom& of_thread() {
    thread_local AttentionRoom room;
    return room;
  }
};

// out row i = softmax(scale * query_i . keys + bias) . values; `lse`, or null, gets the log-sum-exp of each
// row's scores, `lse_stride` floats apart.
void attend(const Queries& queries, const PackedHead& head, float scale, const Sight& sight, float* out,
            int64_t out_stride, float* lse, int64_t lse_stride, AttentionRoom& room) noexcept;

// Keys and values of the tokens fed at one step: row r, head g, component d of the keys is at
// keys + r * stride + g * head_dim + d, of the values likewise.
struct StepRows {
  const float* keys;
  const float* values;
  int64_t stride;
};

// The tokens that rows have been fed: row r descends from row ancestors[t * rows + r] of steps[t]. `bias`
// [steps, heads], or null, is added to the scores.
struct OwnTokens {
  std::span<const StepRows> steps;
  const int32_t* ancestors;
  int64_t rows, heads, kv_heads, head_dim;
  const float* bias;
};

// One row's head over its own tokens, to out [head_dim]. Where `prefix_lse` is not null, `out` holds what the
// head saw elsewhere, with that log-sum-exp, and the two are merged.
void attend_own(const OwnTokens& tokens, const float* query, int64_t row, int64_t head, float scale,
                const float* prefix_lse, float* out) noexcept;

}  // namespace cemg
