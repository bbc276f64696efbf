#include "cemg/row_math.h"

#include <algorithm>

namespace cemg {

bool has_wide_vectors() noexcept {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(CEMG_NARROW)  // which tests define
  static const bool wide = __builtin_cpu_supports("avx512f");
  return wide;
#else
  return false;
#endif
}

CEMG_CLONES float highest_of(const float* x, int64_t count) noexcept {
  const int64_t whole = count - count % kLanes;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, kNegInf);
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(lanes[lane], x[i + lane]);
  }
  float highest = highest_of_lanes(lanes);
  for (int64_t i = whole; i < count; ++i) highest = larger(highest, x[i]);
  return highest;
}

CEMG_CLONES float sum_exp(const float* x, int64_t count, float highest) noexcept {
  const int64_t whole = count - count % kLanes;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += exp_of_negative(x[i + lane] - highest);
  }
  if (whole < count) {
    float last[kLanes] = {};
    for (int64_t i = whole; i < count; ++i) last[i - whole] = exp_of_negative(x[i] - highest);
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += last[lane];
  }
  return sum_of_lanes(lanes);
}

}  // namespace cemg
