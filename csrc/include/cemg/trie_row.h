// What a beam step does with one row of logits, and with the best scores of its groups of children.
#pragma once

#include <cstdint>

#include "cemg/row_math.h"

namespace cemg {

inline constexpr int64_t kFew = kLanes / 4;
inline constexpr int64_t kPart = 512;  // of a row: a group is every kLanes-th value of a part

constexpr int64_t parts_of(int64_t count) noexcept {
  return (count + kPart - 1) / kPart;
}

// NaN counts as -inf, +inf as the largest finite number.
constexpr float tame(float x) noexcept {
  return smaller(larger(kNever, x), kLargest);  // no number is below NaN, so -inf stays
}

// out[i] = logits[codes[i]] of logits [size]; codes [count] ascend.
void gather(const float* logits, int64_t size, const uint8_t* codes, int64_t count, float* out) noexcept;
void gather(const float* logits, int64_t size, const int16_t* codes, int64_t count, float* out) noexcept;

// x [count] of the nodes from `first` on: -inf where the bit of a node, in open, is not set.
void keep_open(const uint64_t* open, int64_t first, int64_t count, float* x) noexcept;

// best [parts_of(count), kLanes]: the highest of each group of x [count], tame; the highest of all.
float best_of_groups(const float* x, int64_t count, float* best) noexcept;

// best [kLanes] from logits to scores, score + min(x - total, 0), and the highest of each four groups to few
// [kFew].
void to_scores(float score, float total, float* best, float* few) noexcept;

// out[i] = min(x[i] - total, 0) of x [count], -inf for NaN.
void log_probabilities(const float* x, int64_t count, float total, float* out) noexcept;

// What one pass over a node's children finds: the highest of their logits, tame, and their log-sum-exp, NaN
// where it has to be computed another way.
struct RowSurvey {
  float highest;
  float log_sum_exp;
};

// Whether this machine surveys a node of `count` children in one pass; it is worth it where they are dense.
bool can_survey(int64_t size, int64_t count) noexcept;

// The children `codes` [count] of logits [size], where `can_survey`; best as in `best_of_groups`.
RowSurvey survey_row(const float* logits, int64_t size, const uint8_t* codes, int64_t count,
                     float* best) noexcept;
RowSurvey survey_row(const float* logits, int64_t size, const int16_t* codes, int64_t count,
                     float* best) noexcept;

// The first of x [count], a multiple of kLanes, from `first` on that is at least `floor`; else `count`.
int64_t find_at_least(const float* x, int64_t first, int64_t count, float floor) noexcept;

// A number that at least `wanted` of x [count] reach, close to the highest that they do; -inf where none is
// found.
float floor_of_best(const float* x, int64_t count, int64_t wanted) noexcept;

}  // namespace cemg
