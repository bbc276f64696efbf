#include "cemg/trie_row.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#if defined(__GNUC__) && defined(__x86_64__)
#define CEMG_AVX512 __attribute__((target("avx512f")))
#include <immintrin.h>
#endif

namespace cemg {
namespace {

#if defined(CEMG_AVX512)
constexpr int64_t kWindow = 32;  // logits that two registers hold

CEMG_AVX512 inline __m512i widen(const uint8_t* codes) noexcept {
  return _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
CEMG_AVX512 inline __m512i widen(const int16_t* codes) noexcept {
  return _mm512_maskz_cvtepi16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}

// Gathers 16 children at a time as long as each 16 lie within one window, where a permutation of two
// registers takes a third of the time of 16 loads. How many were gathered.
template <class Code>
CEMG_AVX512 int64_t gather_windows(const float* logits, int64_t size, const Code* codes, int64_t count,
                                   float* out) noexcept {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const int64_t first = codes[i];
    if (codes[i + 15] - first >= kWindow || first + kWindow > size) break;
    const __m512i place = _mm512_sub_epi32(widen(codes + i), _mm512_set1_epi32(static_cast<int>(first)));
    const __m512 low = _mm512_loadu_ps(logits + first), high = _mm512_loadu_ps(logits + first + 16);
    _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(low, place, high));
  }
  return i;
}
#endif

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

template <class Code>
void gather_any(const float* logits, int64_t size, const Code* codes, int64_t count, float* out) noexcept {
  int64_t i = 0;
#if defined(CEMG_AVX512)
  static const bool wide = __builtin_cpu_supports("avx512f");
  while (wide && i < count && count * 2 >= size) {  // dense, so that most windows hold 16
    i += gather_windows(logits, size, codes + i, count - i, out + i);
    const int64_t here = std::min<int64_t>(16, count - i);
    gather_loads(logits, codes + i, here, out + i);
    i += here;
  }
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

void gather(const float* logits, int64_t size, const uint8_t* codes, int64_t count, float* out) noexcept {
  gather_any(logits, size, codes, count, out);
}
void gather(const float* logits, int64_t size, const int16_t* codes, int64_t count, float* out) noexcept {
  gather_any(logits, size, codes, count, out);
}

CEMG_CLONES float best_of_lanes(const float* x, int64_t count, float* best) noexcept {
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

CEMG_CLONES void to_scores(float score, float total, float* best, float* few) noexcept {
  for (int64_t i = 0; i < kLanes; ++i) best[i] = score + smaller(best[i] - total, 0.0f);
  fold_lanes(best, few);
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
