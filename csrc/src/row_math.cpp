#include "cemg/row_math.h"

#include <algorithm>
#include <cmath>

namespace cemg {
namespace {

constexpr int64_t kParallelWork = 1 << 14;  // logits worth the waking of a thread

}  // namespace

CEMG_CLONES float highest_of(const float* x, int64_t count) noexcept {
  const int64_t whole = count - count % kLanes;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, kNever);
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(lanes[lane], x[i + lane]);
  }
  float highest = kNever;
  for (const float lane : lanes) highest = larger(highest, lane);
  for (int64_t i = whole; i < count; ++i) highest = larger(highest, x[i]);
  return highest;
}

CEMG_CLONES float sum_exp(const float* x, int64_t count, float highest) noexcept {
  const int64_t whole = count - count % kLanes;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += exp_of_negative(x[i + lane] - highest);
  }
  float last[kLanes] = {};
  for (int64_t i = whole; i < count; ++i) last[i - whole] = exp_of_negative(x[i] - highest);
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane] + last[lane];
  return sum;
}

float log_sum_exp(const float* x, int64_t count) noexcept {
  const float highest = highest_of(x, count);
  if (std::isfinite(highest)) return highest + std::log(sum_exp(x, count, highest));
  const float* const end = x + count;
  const float* const wrong = std::find_if(x, end, [](float one) { return std::isnan(one); });
  return wrong == end ? highest : *wrong;
}

void row_logsumexp(const float* logits, int64_t rows, int64_t width, int64_t stride, float* out) noexcept {
#pragma omp parallel for if (rows * width >= kParallelWork)
  for (int64_t row = 0; row < rows; ++row) out[row] = log_sum_exp(logits + row * stride, width);
}

}  // namespace cemg
