#include "cemg/trie_row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__GNUC__) && defined(__x86_64__)
#define CEMG_AVX512 __attribute__((target("avx512f")))
#include <immintrin.h>
#endif

namespace cemg {
namespace {

#if defined(CEMG_AVX512)
constexpr int64_t kWindow = 32;  // logits that two registers hold
constexpr int64_t kTogether = 16;
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own header where there is no mask

CEMG_AVX512 inline __m512i widen(const uint8_t* codes) noexcept {
  return _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
CEMG_AVX512 inline __m512i widen(const int16_t* codes) noexcept {
  return _mm512_maskz_cvtepi16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}

// The logits of 16 children. Where they lie within one window, as they do in a dense node, a permutation of
// two registers takes a third of the time of 16 loads.
template <class Code>
CEMG_AVX512 inline __m512 gather_16(const float* logits, int64_t size, const Code* codes) noexcept {
  const int64_t first = codes[0];
  const __m512i at = widen(codes);
  if (codes[kTogether - 1] - first >= kWindow || first + kWindow > size) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, at, logits, sizeof(float));
  }
  const __m512i place = _mm512_sub_epi32(at, _mm512_set1_epi32(static_cast<int>(first)));
  const __m512 low = _mm512_loadu_ps(logits + first), high = _mm512_loadu_ps(logits + first + 16);
  return _mm512_permutex2var_ps(low, place, high);
}

CEMG_AVX512 inline __m512 larger_16(__m512 a, __m512 b) noexcept {  // b where one is NaN
  return _mm512_maskz_max_ps(kAll, a, b);
}

// `exp_of_negative`, of numbers up to 80 too.
CEMG_AVX512 inline __m512 exp_16(__m512 x) noexcept {
  x = larger_16(_mm512_set1_ps(kLeastExponent), x);  // NaN stays
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(kLog2E));
  const __m512 whole = _mm512_maskz_roundscale_ps(kAll, t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(t, whole);
  __m512 power = _mm512_set1_ps(kPowerOfTwo[0]);
  for (int i = 1; i < 6; ++i) power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(kPowerOfTwo[i]));
  return _mm512_maskz_scalef_ps(kAll, power, whole);
}

// The pass of `survey_row`: children 16 at a time, in turn to the lower and the upper half of the lanes.
template <class Code, bool kFull>
CEMG_AVX512 RowSurvey survey_all(const float* logits, int64_t size, const Code* codes, int64_t count,
                                 float* best) noexcept {
  static_assert(kLanes == 2 * kTogether);
  constexpr float kFar = 60.0f;  // of the base of the sum: beyond, it may overflow or lose what it has
  const __m512 never = _mm512_set1_ps(kNever);
  const int64_t whole = count - count % kTogether;
  const auto load = [=](int64_t i) CEMG_AVX512 {
    return kFull ? _mm512_loadu_ps(logits + i) : gather_16(logits, size, codes + i);
  };
  float base = kNever;
  if (whole > 0) {
    float first[kTogether];
    _mm512_storeu_ps(first, larger_16(load(0), never));
    base = highest_of_lanes(first);
  }
  const __m512 below = _mm512_set1_ps(base);
  __m512 top[2] = {never, never}, sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto take = [&](int half, __m512 x) CEMG_AVX512 {
    top[half] = larger_16(x, top[half]);  // the second where one is NaN
    sums[half] = _mm512_add_ps(sums[half], exp_16(_mm512_sub_ps(x, below)));
  };
  float lanes[kLanes];
  RowSurvey found{kNever, std::numeric_limits<float>::quiet_NaN()};
  for (int64_t begin = 0; begin < count; begin += kPart, best += kLanes) {
    top[0] = top[1] = never;
    const int64_t end = std::min(begin + kPart, whole);
    int64_t i = begin;
    for (; i + 2 * kTogether <= end; i += 2 * kTogether) {
      take(0, load(i));
      take(1, load(i + kTogether));
    }
    if (i < end) take(0, load(i));
    if (whole < count && whole < begin + kPart) {
      float last[kTogether];
      for (int64_t j = 0; j < kTogether; ++j) {
        const int64_t at = whole + j;
        last[j] = at < count ? logits[kFull ? at : static_cast<int64_t>(codes[at])] : kNever;
      }
      take(i < end ? 1 : 0, _mm512_loadu_ps(last));
    }
    for (int64_t half = 0; half < 2; ++half) _mm512_storeu_ps(best + half * kTogether, top[half]);
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = best[lane] = smaller(best[lane], kLargest);
    found.highest = larger(found.highest, highest_of_lanes(lanes));
  }
  if (base > kNever && found.highest < kLargest && found.highest - base < kFar) {
    for (int64_t half = 0; half < 2; ++half) _mm512_storeu_ps(lanes + half * kTogether, sums[half]);
    found.log_sum_exp = base + std::log(sum_of_lanes(lanes));
  }
  return found;
}
#endif

template <class Code>
RowSurvey survey_any([[maybe_unused]] const float* logits, [[maybe_unused]] int64_t size,
                     [[maybe_unused]] const Code* codes, [[maybe_unused]] int64_t count,
                     [[maybe_unused]] float* best) noexcept {
#if defined(CEMG_AVX512)
  if (count == size) return survey_all<Code, true>(logits, size, codes, count, best);
  return survey_all<Code, false>(logits, size, codes, count, best);
#else
  return {kNever, kNever};  // not asked for, see can_survey
#endif
}

// One load a child; their codes come eight bytes at a time.
template <class Code>
void gather_loads(const float* logits, const Code* codes, int64_t count, float* out) noexcept {
  constexpr int64_t kTogether = sizeof(uint64_t) / sizeof(Code);
  constexpr int kBits = 8 * sizeof(Code);
  int64_t i = 0;
  if constexpr (std::endian::native == std::endian::little) {
    for (; i + kTogether <= count; i += kTogether) {
      uint64_t word;
      std::memcpy(&word, codes + i, sizeof(word));
      for (int j = 0; j < kTogether; ++j) {
        out[i + j] = logits[static_cast<std::make_unsigned_t<Code>>(word >> (j * kBits))];
      }
    }
  }
  for (; i < count; ++i) out[i] = logits[codes[i]];
}

#if defined(CEMG_AVX512)
template <class Code>
CEMG_AVX512 int64_t gather_dense(const float* logits, int64_t size, const Code* codes, int64_t count,
                                 float* out) noexcept {
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether) {
    _mm512_storeu_ps(out + i, gather_16(logits, size, codes + i));
  }
  return i;
}
#endif

template <class Code>
void gather_any(const float* logits, int64_t size, const Code* codes, int64_t count, float* out) noexcept {
  int64_t i = 0;
#if defined(CEMG_AVX512)
  if (can_survey(size, count)) i = gather_dense(logits, size, codes, count, out);
#endif
  gather_loads(logits, codes + i, count - i, out + i);
}

// few [kFew]: the highest of every kFew-th of x [kLanes].
inline void fold_lanes(const float* __restrict x, float* __restrict few) noexcept {
  for (int64_t i = 0; i < kFew; ++i) {
    few[i] = larger(larger(x[i], x[i + kFew]), larger(x[i + 2 * kFew], x[i + 3 * kFew]));
  }
}

inline float highest_of_few(const float* x) noexcept {
  static_assert(kFew == 8);
  const float low = larger(larger(x[0], x[1]), larger(x[2], x[3]));
  return larger(low, larger(larger(x[4], x[5]), larger(x[6], x[7])));
}

CEMG_CLONES int64_t count_at_least(const float* x, int64_t count, float floor) noexcept {
  int32_t reached = 0;
  for (int64_t i = 0; i < count; ++i) reached += x[i] >= floor ? 1 : 0;
  return reached;
}

}  // namespace

bool can_survey(int64_t size, int64_t count) noexcept {
  return has_wide_vectors() && count * 2 >= size;  // so that most 16 children lie within one window
}

RowSurvey survey_row(const float* logits, int64_t size, const uint8_t* codes, int64_t count,
                     float* best) noexcept {
  return survey_any(logits, size, codes, count, best);
}
RowSurvey survey_row(const float* logits, int64_t size, const int16_t* codes, int64_t count,
                     float* best) noexcept {
  return survey_any(logits, size, codes, count, best);
}

void gather(const float* logits, int64_t size, const uint8_t* codes, int64_t count, float* out) noexcept {
  gather_any(logits, size, codes, count, out);
}
void gather(const float* logits, int64_t size, const int16_t* codes, int64_t count, float* out) noexcept {
  gather_any(logits, size, codes, count, out);
}

CEMG_CLONES void keep_open(const uint64_t* open, int64_t first, int64_t count, float* x) noexcept {
  constexpr int64_t kTogether = 32;
  for (int64_t i = 0; i < count; i += kTogether) {
    const int64_t word = (first + i) / 64, shift = (first + i) % 64;
    const int64_t here = std::min(kTogether, count - i);
    uint64_t wide = open[word] >> shift;
    if (shift + here > 64) wide |= open[word + 1] << (64 - shift);
    const auto bits = static_cast<uint32_t>(wide);
    float* const at = x + i;
    if (here == kTogether) {
      for (int64_t j = 0; j < kTogether; ++j) at[j] = (bits >> j) & 1 ? at[j] : kNever;
    } else {
      for (int64_t j = 0; j < here; ++j) at[j] = (bits >> j) & 1 ? at[j] : kNever;
    }
  }
}

CEMG_CLONES float best_of_part(const float* x, int64_t count, float* best) noexcept {
  float lanes[kLanes], last[kLanes], few[kFew];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = last[lane] = kNever;
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(lanes[lane], x[i + lane]);
  }
  if (whole < count) std::memcpy(last, x + whole, static_cast<size_t>(count - whole) * sizeof(float));
  for (int64_t lane = 0; lane < kLanes; ++lane) best[lane] = larger(lanes[lane], tame(last[lane]));
  for (int64_t lane = 0; lane < kLanes; ++lane) best[lane] = smaller(best[lane], kLargest);
  fold_lanes(best, few);
  return highest_of_few(few);
}

float best_of_groups(const float* x, int64_t count, float* best) noexcept {
  float highest = kNever;
  for (; count > 0; count -= kPart, x += kPart, best += kLanes) {
    highest = larger(highest, best_of_part(x, std::min(count, kPart), best));
  }
  return highest;
}

CEMG_CLONES void to_scores(float score, float total, float* best, float* few) noexcept {
  for (int64_t i = 0; i < kLanes; ++i) best[i] = score + smaller(best[i] - total, 0.0f);
  fold_lanes(best, few);
}

CEMG_CLONES void log_probabilities(const float* x, int64_t count, float total, float* out) noexcept {
  for (int64_t i = 0; i < count; ++i) out[i] = larger(kNever, smaller(x[i] - total, 0.0f));
}

CEMG_CLONES int64_t find_at_least(const float* x, int64_t first, int64_t count, float floor) noexcept {
  int64_t i = first;
  for (; i < count && i % kLanes; ++i) {
    if (x[i] >= floor) return i;
  }
  for (; i < count; i += kLanes) {
    int32_t found = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) found |= x[i + lane] >= floor ? 1 : 0;
    if (found) break;
  }
  while (i < count && !(x[i] >= floor)) ++i;
  return i;
}

float floor_of_best(const float* x, int64_t count, int64_t wanted) noexcept {
  constexpr int kDoublings = 12, kHalvings = 9;
  float high = highest_of(x, count), low = high, width = 0.5f;
  for (int i = 0; i < kDoublings && count_at_least(x, count, low) < wanted; ++i) {
    width += width;
    low = high - width;
  }
  if (low == kNever || count_at_least(x, count, low) < wanted) return kNever;
  for (int i = 0; i < kHalvings; ++i) {
    const float middle = low + (high - low) / 2;
    (count_at_least(x, count, middle) < wanted ? high : low) = middle;
  }
  return low;
}

}  // namespace cemg
