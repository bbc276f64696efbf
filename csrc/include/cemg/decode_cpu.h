// What a beam-search step does besides matrix products and the trie, on the CPU in float32.
#pragma once

#include <cstdint>
#include <span>

namespace cemg {

// Keys and values of the tokens fed at one step: row r, head g, component d of the keys is at
// keys + r * key_stride + g * Dh + d, of the values likewise.
struct StepRows {
  const float* keys;
  const float* values;
  int64_t key_stride;
  int64_t value_stride;
};

// Attention that was taken over other keys already, to be merged in: of row (b, w), head h = g * shared + j
// the output is at out + b * out_b + (w * shared + j) * out_q + g * out_g, and its log-sum-exp likewise.
struct PrefixAttention {
  const float* out = nullptr;
  int64_t out_b = 0, out_q = 0, out_g = 0;
  const float* lse = nullptr;
  int64_t lse_b = 0, lse_q = 0, lse_g = 0;
};

struct BeamShape {
  int64_t users, beams, heads, kv_heads, head_dim;
};

// Each beam over its own tokens: row r = (b, w) sees row ancestors[t * rows + r] of steps[t].
// queries: row r at query + r * query_stride, [heads, head_dim]; bias [steps, heads] or null; out [rows,
// heads, Dh].
void beam_attention(const BeamShape& shape, const float* query, int64_t query_stride,
                    std::span<const StepRows> steps, const int32_t* ancestors, const float* bias, float scale,
                    const PrefixAttention& prefix, float* out) noexcept;

// out[r, i] = weight[i] * x[r, i] / sqrt(mean(x[r]^2) + eps); out may be x.
void rms_norm(const float* x, const float* weight, int64_t rows, int64_t width, float eps,
              float* out) noexcept;

}  // namespace cemg
