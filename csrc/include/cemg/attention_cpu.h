// Attention of many queries over the same keys, on the CPU in float32: beams are queries.
#pragma once

#include <cstdint>

namespace cemg {

// Component d of row i of head h of user b is at data + b * user + h * head + i * row + d.
template <class Float>
struct Strided {
  Float* data = nullptr;
  int64_t user = 0, head = 0, row = 0;

  Float* at(int64_t b, int64_t h, int64_t i) const noexcept { return data + b * user + h * head + i * row; }
};

struct AttentionShape {
  int64_t users, heads, kv_heads, queries, keys, head_dim;
};

// What is added to the scores: `bias` [users, heads, queries, keys] (strides of 0 repeat it) and `padding`
// [users, keys], each may be null; `causal` hides the keys after a query's own place, counted from the end.
struct ScoreTerms {
  float scale;
  Strided<const float> bias;
  const float* padding;
  bool causal;
};

// out = softmax(scale * query . keys + bias + padding) . values; `lse` [users, heads, queries], or null, gets
// the log-sum-exp of each row. Query head h reads key head h * kv_heads / heads.
void prefix_attention(const AttentionShape& shape, Strided<const float> query, Strided<const float> keys,
                      Strided<const float> values, const ScoreTerms& terms, Strided<float> out,
                      float* lse) noexcept;

}  // namespace cemg
