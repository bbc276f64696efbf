// The steps of beam_step() and softmax() on one row of logits, and on the best scores of groups of children.
#pragma once

#include <cstdint>

#include "cemg/row_math.h"

namespace cemg {

// A row is split into parts of kPartSize values. Every kLanes-th value of a part forms a group, so a part has
// kLanes groups. Four groups each form one of the part's kCoarse coarse groups.
inline constexpr int64_t kPartSize = 512;
inline constexpr int64_t kCoarse = kLanes / 4;

constexpr int64_t num_parts(int64_t count) noexcept {
  return (count + kPartSize - 1) / kPartSize;
}

// Replaces NaN by -inf, and +inf by the largest finite number.
constexpr float sanitize(float x) noexcept {
  return smaller(larger(kNegInf, x), kMaxFloat);  // larger() returns its first argument if the second is NaN
}

// out[i] = logits[codes[i]] of logits [size]; codes [count] ascend.
void gather(const float* logits, int64_t size, const uint8_t* codes, int64_t count, float* out) noexcept;
void gather(const float* logits, int64_t size, const int16_t* codes, int64_t count, float* out) noexcept;

// Sets x[i] of x [count] to -inf if node first + i is not open.
void mask_closed(const uint64_t* open, int64_t first, int64_t count, float* x) noexcept;

// group_max [num_parts(count), kLanes]: the highest sanitized value of each group of x [count]. Returns the
// highest of all.
float max_of_groups(const float* x, int64_t count, float* group_max) noexcept;

// Turns the group_max [kLanes] of a part from logits into scores, score + min(x - total, 0), and writes the
// highest of each coarse group to coarse_max [kCoarse].
void to_scores(float score, float total, float* group_max, float* coarse_max) noexcept;

// out[i] = min(x[i] - total, 0) of x [count], -inf for NaN.
void log_probabilities(const float* x, int64_t count, float total, float* out) noexcept;

// The result of one pass over a node's children: the highest sanitized logit, and the log-sum-exp, which is
// NaN if it must be computed in another way.
struct PrepassResult {
  float highest;
  float log_sum_exp;
};

// Whether prepass_row() supports a node with `count` children of `size` codes on this machine. It pays only
// where children are dense.
bool can_prepass(int64_t size, int64_t count) noexcept;

// One pass over the children `codes` [count] of logits [size]; requires can_prepass(). group_max is as in
// max_of_groups().
PrepassResult prepass_row(const float* logits, int64_t size, const uint8_t* codes, int64_t count,
                          float* group_max) noexcept;
PrepassResult prepass_row(const float* logits, int64_t size, const int16_t* codes, int64_t count,
                          float* group_max) noexcept;

// The index of the first of x [count], from `first` on, that is at least `threshold`; `count` if there is
// none. `count` is a multiple of kLanes.
int64_t find_at_least(const float* x, int64_t first, int64_t count, float threshold) noexcept;

// A threshold that at least `needed` of x [count] reach, close to the highest such number; -inf if none is
// found.
float threshold_of_best(const float* x, int64_t count, int64_t needed) noexcept;

}  // namespace cemg
