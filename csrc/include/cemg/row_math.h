// Arithmetic over one row of floats, with vector instructions where the machine has them.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

// Functions with this attribute are compiled for several instruction sets; the loader picks the best.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define CEMG_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CEMG_CLONES
#endif

namespace cemg {

inline constexpr float kNegInf = -std::numeric_limits<float>::infinity();
inline constexpr float kMaxFloat = std::numeric_limits<float>::max();
inline constexpr int64_t kLanes = 32;  // independent partial results per loop, so that it vectorizes

// A vector of kWidth floats. Use no wider ones than the machine has: GCC splits these into single floats.
template <int kWidth>
struct VectorOf {
  typedef float Type __attribute__((vector_size(kWidth * sizeof(float)), aligned(alignof(float)), may_alias));
};

inline constexpr int kWide = 16;  // AVX-512
#if defined(__x86_64__)
inline constexpr int kNarrow = 8;  // AVX2
#else
inline constexpr int kNarrow = 4;  // NEON
#endif

bool has_wide_vectors() noexcept;

// These take their arguments by value, unlike std::min and std::max, so that GCC vectorizes loops of them.
constexpr float smaller(float a, float b) noexcept {
  return b < a ? b : a;
}
constexpr float larger(float a, float b) noexcept {
  return a < b ? b : a;
}

// The sum of x [kCount], by adding halves; kCount is a power of two. Overwrites x.
template <int64_t kCount>
[[gnu::always_inline]] inline float sum_of_lanes(float (&x)[kCount]) noexcept {
  for (int64_t half = kCount / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

// The highest of x [kCount], likewise. Skips NaN in the lower half.
template <int64_t kCount>
[[gnu::always_inline]] inline float highest_of_lanes(float (&x)[kCount]) noexcept {
  for (int64_t half = kCount / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] = larger(x[i], x[i + half]);
  }
  return x[0];
}

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kMinExponent = -87.0f;  // e^-87 is close to the smallest normal float

// Coefficients, highest degree first, of the polynomial of degree 5 with the smallest relative error
// (2^-23.4) for 2^r with |r| <= 1/2.
inline constexpr float kPowerOfTwo[] = {0.00132647257f, 0.00967151309f, 0.0555073375f,
                                        0.240222421f,   0.693146978f,   1.0f};

// e^x for x <= 0, with a relative error of at most 2^-22 + |x| 2^-24; exactly 1 for 0, e^-87 below -87, NaN
// for NaN. With x log2 e = n + r and |r| <= 1/2 it is 2^r, from the polynomial, times 2^n, set as exponent
// bits.
inline float exp_of_negative(float x) noexcept {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 + 127: the low bits of t + kRound are n + 127
  x = larger(x, kMinExponent);
  const float shifted = x * kLog2E + kRound;
  const float r = x * kLog2E - (shifted - kRound);
  float power = kPowerOfTwo[0];
  power = power * r + kPowerOfTwo[1];
  power = power * r + kPowerOfTwo[2];
  power = power * r + kPowerOfTwo[3];
  power = power * r + kPowerOfTwo[4];
  power = power * r + kPowerOfTwo[5];
  return power * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);
}

// The highest of x [count], without NaN; -inf if there is none.
float highest_of(const float* x, int64_t count) noexcept;

// sum(exp(x - highest)) over x [count]. `highest` is finite and no value exceeds it; NaN if a value is NaN.
float sum_exp(const float* x, int64_t count, float highest) noexcept;

}  // namespace cemg
