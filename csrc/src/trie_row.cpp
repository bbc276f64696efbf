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
constexpr int64_t kVector = 16;           // floats of a register
constexpr int64_t kWindow = 2 * kVector;  // logits that two registers hold
constexpr __mmask16 kAllLanes = 0xffff;   // without a mask GCC 12 warns about its own header

CEMG_AVX512 inline __m512i widen(const uint8_t* codes) noexcept {
  return _mm512_maskz_cvtepu8_epi32(kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
CEMG_AVX512 inline __m512i widen(const int16_t* codes) noexcept {
  return _mm512_maskz_cvtepi16_epi32(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}

// The logits of 16 children. In a dense node, their codes span at most kWindow; permuting two registers then
// takes a third of the time of 16 loads.
template <class Code>
CEMG_AVX512 inline __m512 gather_16(const float* logits, int64_t size, const Code* codes) noexcept {
  const int64_t first = codes[0];
  const __m512i indices = widen(codes);
  if (codes[kVector - 1] - first >= kWindow || first + kWindow > size) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAllLanes, indices, logits, sizeof(float));
  }
  const __m512i index = _mm512_sub_epi32(indices, _mm512_set1_epi32(static_cast<int>(first)));
  const __m512 low = _mm512_loadu_ps(logits + first), high = _mm512_loadu_ps(logits + first + 16);
  return _mm512_permutex2var_ps(low, index, high);
}

CEMG_AVX512 inline __m512 larger_16(__m512 a, __m512 b) noexcept {  // b if one is NaN
  return _mm512_maskz_max_ps(kAllLanes, a, b);
}

// Like exp_of_negative(), but also for numbers up to 80.
CEMG_AVX512 inline __m512 exp_16(__m512 x) noexcept {
  x = larger_16(_mm512_set1_ps(kMinExponent), x);  // NaN stays
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(kLog2E));
  const __m512 whole =
      _mm512_maskz_roundscale_ps(kAllLanes, t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(t, whole);
  __m512 power = _mm512_set1_ps(kPowerOfTwo[0]);
  for (int i = 1; i < 6; ++i) power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(kPowerOfTwo[i]));
  return _mm512_maskz_scalef_ps(kAllLanes, power, whole);
}

// Implements prepass_row(): 16 children at a time, alternately into the lower and the upper half of the
// lanes.
template <class Code, bool kFull>
CEMG_AVX512 PrepassResult prepass_avx512(const float* logits, int64_t size, const Code* codes, int64_t count,
                                         float* group_max) noexcept {
  static_assert(kLanes == 2 * kVector);
  constexpr float kMaxDistance = 60.0f;  // from the sum's base: beyond, the sum may overflow or lose terms
  const __m512 neg_inf = _mm512_set1_ps(kNegInf);
  const int64_t whole = count - count % kVector;
  const auto load = [=](int64_t i) CEMG_AVX512 {
    return kFull ? _mm512_loadu_ps(logits + i) : gather_16(logits, size, codes + i);
  };
  float base = kNegInf;
  if (whole > 0) {
    float first[kVector];
    _mm512_storeu_ps(first, larger_16(load(0), neg_inf));
    base = highest_of_lanes(first);
  }
  const __m512 base_lanes = _mm512_set1_ps(base);
  __m512 top[2] = {neg_inf, neg_inf}, sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto add = [&](int half, __m512 x) CEMG_AVX512 {
    top[half] = larger_16(x, top[half]);
    sums[half] = _mm512_add_ps(sums[half], exp_16(_mm512_sub_ps(x, base_lanes)));
  };
  float lanes[kLanes];
  PrepassResult result{kNegInf, std::numeric_limits<float>::quiet_NaN()};
  for (int64_t begin = 0; begin < count; begin += kPartSize, group_max += kLanes) {
    top[0] = top[1] = neg_inf;
    const int64_t end = std::min(begin + kPartSize, whole);
    int64_t i = begin;
    for (; i + 2 * kVector <= end; i += 2 * kVector) {
      add(0, load(i));
      add(1, load(i + kVector));
    }
    if (i < end) add(0, load(i));
    if (whole < count && whole < begin + kPartSize) {
      float last[kVector];
      for (int64_t j = 0; j < kVector; ++j) {
        const int64_t child = whole + j;
        last[j] = child < count ? logits[kFull ? child : static_cast<int64_t>(codes[child])] : kNegInf;
      }
      add(i < end ? 1 : 0, _mm512_loadu_ps(last));
    }
    for (int64_t half = 0; half < 2; ++half) _mm512_storeu_ps(group_max + half * kVector, top[half]);
    for (int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] = group_max[lane] = smaller(group_max[lane], kMaxFloat);
    result.highest = larger(result.highest, highest_of_lanes(lanes));
  }
  if (base > kNegInf && result.highest < kMaxFloat && result.highest - base < kMaxDistance) {
    for (int64_t half = 0; half < 2; ++half) _mm512_storeu_ps(lanes + half * kVector, sums[half]);
    result.log_sum_exp = base + std::log(sum_of_lanes(lanes));
  }
  return result;
}
#endif

template <class Code>
PrepassResult prepass([[maybe_unused]] const float* logits, [[maybe_unused]] int64_t size,
                      [[maybe_unused]] const Code* codes, [[maybe_unused]] int64_t count,
                      [[maybe_unused]] float* group_max) noexcept {
#if defined(CEMG_AVX512)
  if (count == size) return prepass_avx512<Code, true>(logits, size, codes, count, group_max);
  return prepass_avx512<Code, false>(logits, size, codes, count, group_max);
#else
  return {kNegInf, kNegInf};  // never called, see can_prepass()
#endif
}

// One load per child; the codes are read eight bytes at a time.
template <class Code>
void gather_loads(const float* logits, const Code* codes, int64_t count, float* out) noexcept {
  constexpr int64_t kPerWord = sizeof(uint64_t) / sizeof(Code);
  constexpr int kBits = 8 * sizeof(Code);
  int64_t i = 0;
  if constexpr (std::endian::native == std::endian::little) {
    for (; i + kPerWord <= count; i += kPerWord) {
      uint64_t word;
      std::memcpy(&word, codes + i, sizeof(word));
      for (int j = 0; j < kPerWord; ++j) {
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
  for (; i + kVector <= count; i += kVector) {
    _mm512_storeu_ps(out + i, gather_16(logits, size, codes + i));
  }
  return i;
}
#endif

template <class Code>
void gather_any(const float* logits, int64_t size, const Code* codes, int64_t count, float* out) noexcept {
  int64_t i = 0;
#if defined(CEMG_AVX512)
  if (can_prepass(size, count)) i = gather_dense(logits, size, codes, count, out);
#endif
  gather_loads(logits, codes + i, count - i, out + i);
}

// coarse_max [kCoarse]: the highest of every kCoarse-th value of x [kLanes].
inline void fold_lanes(const float* __restrict x, float* __restrict coarse_max) noexcept {
  for (int64_t i = 0; i < kCoarse; ++i) {
    coarse_max[i] = larger(larger(x[i], x[i + kCoarse]), larger(x[i + 2 * kCoarse], x[i + 3 * kCoarse]));
  }
}

inline float highest_coarse(const float* x) noexcept {
  static_assert(kCoarse == 8);
  const float low = larger(larger(x[0], x[1]), larger(x[2], x[3]));
  return larger(low, larger(larger(x[4], x[5]), larger(x[6], x[7])));
}

CEMG_CLONES int64_t count_at_least(const float* x, int64_t count, float threshold) noexcept {
  int32_t reached = 0;
  for (int64_t i = 0; i < count; ++i) reached += x[i] >= threshold ? 1 : 0;
  return reached;
}

}  // namespace

bool can_prepass(int64_t size, int64_t count) noexcept {
  return has_wide_vectors() && count * 2 >= size;  // dense enough that 16 children mostly fit one window
}

PrepassResult prepass_row(const float* logits, int64_t size, const uint8_t* codes, int64_t count,
                          float* group_max) noexcept {
  return prepass(logits, size, codes, count, group_max);
}
PrepassResult prepass_row(const float* logits, int64_t size, const int16_t* codes, int64_t count,
                          float* group_max) noexcept {
  return prepass(logits, size, codes, count, group_max);
}

void gather(const float* logits, int64_t size, const uint8_t* codes, int64_t count, float* out) noexcept {
  gather_any(logits, size, codes, count, out);
}
void gather(const float* logits, int64_t size, const int16_t* codes, int64_t count, float* out) noexcept {
  gather_any(logits, size, codes, count, out);
}

CEMG_CLONES void mask_closed(const uint64_t* open, int64_t first, int64_t count, float* x) noexcept {
  constexpr int64_t kChunk = 32;
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t word = (first + i) / 64, shift = (first + i) % 64;
    const int64_t size = std::min(kChunk, count - i);
    uint64_t shifted = open[word] >> shift;
    if (shift + size > 64) shifted |= open[word + 1] << (64 - shift);
    const auto bits = static_cast<uint32_t>(shifted);
    float* const chunk = x + i;
    if (size == kChunk) {  // a constant size, so that the loop vectorizes
      for (int64_t j = 0; j < kChunk; ++j) chunk[j] = (bits >> j) & 1 ? chunk[j] : kNegInf;
    } else {
      for (int64_t j = 0; j < size; ++j) chunk[j] = (bits >> j) & 1 ? chunk[j] : kNegInf;
    }
  }
}

CEMG_CLONES float max_of_part_groups(const float* x, int64_t count, float* group_max) noexcept {
  float lanes[kLanes], last[kLanes], coarse_max[kCoarse];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = last[lane] = kNegInf;
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(lanes[lane], x[i + lane]);
  }
  if (whole < count) std::memcpy(last, x + whole, static_cast<size_t>(count - whole) * sizeof(float));
  for (int64_t lane = 0; lane < kLanes; ++lane) group_max[lane] = larger(lanes[lane], sanitize(last[lane]));
  for (int64_t lane = 0; lane < kLanes; ++lane) group_max[lane] = smaller(group_max[lane], kMaxFloat);
  fold_lanes(group_max, coarse_max);
  return highest_coarse(coarse_max);
}

float max_of_groups(const float* x, int64_t count, float* group_max) noexcept {
  float highest = kNegInf;
  for (; count > 0; count -= kPartSize, x += kPartSize, group_max += kLanes) {
    highest = larger(highest, max_of_part_groups(x, std::min(count, kPartSize), group_max));
  }
  return highest;
}

CEMG_CLONES void to_scores(float score, float total, float* group_max, float* coarse_max) noexcept {
  for (int64_t i = 0; i < kLanes; ++i) group_max[i] = score + smaller(group_max[i] - total, 0.0f);
  fold_lanes(group_max, coarse_max);
}

CEMG_CLONES void log_probabilities(const float* x, int64_t count, float total, float* out) noexcept {
  for (int64_t i = 0; i < count; ++i) out[i] = larger(kNegInf, smaller(x[i] - total, 0.0f));
}

CEMG_CLONES int64_t find_at_least(const float* x, int64_t first, int64_t count, float threshold) noexcept {
  int64_t i = first;
  for (; i < count && i % kLanes; ++i) {
    if (x[i] >= threshold) return i;
  }
  for (; i < count; i += kLanes) {
    int32_t any = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) any |= x[i + lane] >= threshold ? 1 : 0;
    if (any) break;
  }
  while (i < count && !(x[i] >= threshold)) ++i;
  return i;
}

float threshold_of_best(const float* x, int64_t count, int64_t needed) noexcept {
  constexpr int kMaxDoublings = 12, kHalvings = 9;
  float high = highest_of(x, count), low = high, width = 0.5f;
  for (int i = 0; i < kMaxDoublings && count_at_least(x, count, low) < needed; ++i) {
    width += width;
    low = high - width;
  }
  if (low == kNegInf || count_at_least(x, count, low) < needed) return kNegInf;
  for (int i = 0; i < kHalvings; ++i) {
    const float middle = low + (high - low) / 2;
    (count_at_least(x, count, middle) < needed ? high : low) = middle;
  }
  return low;
}

}  // namespace cemg
