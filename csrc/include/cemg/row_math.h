// Arithmetic over one row of floats, in vectors where the machine has them.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

// Functions marked so are built for several instruction sets, and the best is picked when the module loads.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define CEMG_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CEMG_CLONES
#endif

namespace cemg {

inline constexpr float kNever = -std::numeric_limits<float>::infinity();
inline constexpr float kLargest = std::numeric_limits<float>::max();
inline constexpr int64_t kLanes = 32;  // values side by side, so that the compiler may use vectors

// Vectors of so many floats, to be used as wide as the machine has them: GCC splits wider ones into single
// floats.
template <int kWidth>
struct Vectors {
  typedef float One __attribute__((vector_size(kWidth * sizeof(float)), aligned(alignof(float)), may_alias));
};

inline constexpr int kWide = 16;  // AVX-512
#if defined(__x86_64__)
inline constexpr int kNarrow = 8;  // AVX2
#else
inline constexpr int kNarrow = 4;  // NEON
#endif

bool has_wide_vectors() noexcept;

// By value, unlike std::min and std::max, so that loops of them have no branches.
constexpr float smaller(float a, float b) noexcept {
  return b < a ? b : a;
}
constexpr float larger(float a, float b) noexcept {
  return a < b ? b : a;
}

// The sum of x [kCount], a power of two, halved again and again; x is overwritten.
template <int64_t kCount>
[[gnu::always_inline]] inline float sum_of_lanes(float (&x)[kCount]) noexcept {
  for (int64_t half = kCount / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

// Its highest, likewise; NaN in the lower half is passed over.
template <int64_t kCount>
[[gnu::always_inline]] inline float highest_of_lanes(float (&x)[kCount]) noexcept {
  for (int64_t half = kCount / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] = larger(x[i], x[i + half]);
  }
  return x[0];
}

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kLeastExponent = -87.0f;  // of e, where a float ends

// 2^r for |r| <= 1/2: coefficients of the polynomial of the least relative error of its degree (2^-23.4), the
// highest first.
inline constexpr float kPowerOfTwo[] = {0.00132647257f, 0.00967151309f, 0.0555073375f,
                                        0.240222421f,   0.693146978f,   1.0f};

// e^x for x <= 0, within 2^-22 + |x| 2^-24 of it, and 1 for 0; below -87, where a float ends, e^-87; NaN for
// NaN. With x log2 e = n + r and |r| <= 1/2, it is 2^r times 2^n, the float of exponent n.
inline float exp_of_negative(float x) noexcept {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23: a sum with it ends in n + 127, as an integer
  x = larger(x, kLeastExponent);
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

// The highest of x [count]; NaN is passed over, -inf where there is nothing.
float highest_of(const float* x, int64_t count) noexcept;

// sum(exp(x - highest)) over x [count], none of them above `highest`, which is finite; NaN where one is.
float sum_exp(const float* x, int64_t count, float highest) noexcept;

}  // namespace cemg
