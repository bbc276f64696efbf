// Attention on the CPU in float32: queries over shared keys, and beams over their own generated tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace cemg {

inline constexpr int64_t kMaxSteps = 256;  // decode steps: a semantic ID has at most 255 levels

// Keys and values of one head in the layout of multiply(): keys [head_dim, padded(count)], values
// [count, padded(head_dim)], zero in the padding.
struct PackedHead {
  float* keys;
  float* values;
  int64_t count;
};

// Packs one head from rows of keys and values that lie `stride` floats apart.
void pack_head(const float* keys, const float* values, int64_t stride, int64_t head_dim,
               const PackedHead& head) noexcept;

// The keys that query i may attend to, and what is added to the scores. Query i attends to keys
// 0 ... causal_offset + i, or to all keys if causal_offset is negative. `bias`, unless null, is indexed by
// distance: the score of query i and key j gets bias[key_positions[j] - query_positions[i]].
struct AttentionMask {
  int64_t causal_offset = -1;
  const float* bias = nullptr;
  const int32_t* query_positions = nullptr;
  const int32_t* key_positions = nullptr;
};

struct Queries {
  const float* data;  // row i is at data + i * stride
  int64_t stride;
  int64_t count;
  int64_t head_dim;
};

// Scratch buffers of one thread. They live as long as the thread, so a call allocates only when they grow.
struct AttentionWorkspace {
  std::vector<float> scores, sums;

  static AttentionWorkspace& of_thread() {
    thread_local AttentionWorkspace workspace;
    return workspace;
  }
};

// out row i = softmax(scale * query_i . keys + bias) . values. `lse`, unless null, receives the log-sum-exp
// of each row's scores, `lse_stride` floats apart.
void attend(const Queries& queries, const PackedHead& head, float scale, const AttentionMask& mask,
            float* out, int64_t out_stride, float* lse, int64_t lse_stride,
            AttentionWorkspace& workspace) noexcept;

// Keys and values of the tokens of one decode step: component d of key head g of row r is at
// keys + r * stride + g * head_dim + d; values have the same layout.
struct StepKeyValues {
  const float* keys;
  const float* values;
  int64_t stride;
};

// The tokens that the beams have generated. At step t, row r descends from row ancestors[t * rows + r] of
// steps[t]. `bias` [steps, heads], unless null, is added to the scores.
struct BeamKVCache {
  std::span<const StepKeyValues> steps;
  const int32_t* ancestors;
  int64_t rows, heads, kv_heads, head_dim;
  const float* bias;
};

// Attention of one head of one row over the row's generated tokens, to out [head_dim]. If `prefix_lse` is not
// null, `out` holds the head's attention over the prompt, which has that log-sum-exp, and the two are merged.
void attend_to_beam(const BeamKVCache& cache, const float* query, int64_t row, int64_t head, float scale,
                    const float* prefix_lse, float* out) noexcept;

}  // namespace cemg
