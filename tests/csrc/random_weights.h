// Random arrays and layers, for the tests of what runs on the CPU besides the trie.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <vector>

#include "cemg/search_cpu.h"

inline void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

inline std::vector<float> draw(std::mt19937& random, int64_t count, float size = 1.0f) {
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> values(static_cast<size_t>(count));
  std::generate(values.begin(), values.end(), [&] { return normal(random); });
  return values;
}

// Every array has exactly the size it needs, so that AddressSanitizer sees reads past its end.
struct Weights {
  std::mt19937 random{7};
  std::deque<std::vector<float>> kept;

  const float* some(int64_t count, float size = 1.0f) {
    kept.push_back(draw(random, count, size));
    return kept.back().data();
  }
  cemg::Linear linear(int64_t in, int64_t out, bool bias = false) {
    std::vector<float> panels = draw(random, cemg::padded(out) * in, 0.4f);
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t c = out; c < cemg::padded(out); ++c) panels[(c / 32 * in + k) * 32 + c % 32] = 0;
    }
    kept.push_back(std::move(panels));
    return {in, out, kept.back().data(), bias ? some(out) : nullptr};
  }
  cemg::Norm norm(int64_t width, bool bias = false) {
    return {some(width), bias ? some(width) : nullptr, 1e-6f};
  }
};
