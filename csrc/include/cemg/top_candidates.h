// The best candidates of a user's beam step.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "cemg/row_math.h"

namespace cemg {

inline constexpr int64_t kMaxCandidates = int64_t{1} << 32;  // of a user: beams times K
inline constexpr uint64_t kMaxIndex = kMaxCandidates - 1;

// A score and an index, parent * K + code, in one number. Higher is better; of equal scores, the lower index
// is.
inline uint64_t key_of(float score, int64_t index) noexcept {
  const auto bits = std::bit_cast<int32_t>(score + 0.0f);  // turns -0 into 0
  const auto ordered = static_cast<uint32_t>(bits < 0 ? bits ^ 0x7fffffff : bits) ^ 0x80000000u;
  return uint64_t{ordered} << 32 | (kMaxIndex - static_cast<uint64_t>(index));
}

struct Candidate {
  uint64_t key;
  int32_t node;

  int64_t index() const noexcept { return static_cast<int64_t>(kMaxIndex - (key & kMaxIndex)); }
  float score() const noexcept {
    const auto ordered = static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u);
    return std::bit_cast<float>(ordered < 0 ? ordered ^ 0x7fffffff : ordered);
  }
};

// Keeps the best `limit` of the candidates that are added.
class TopCandidates {
 public:
  void clear(size_t limit, float threshold) {
    limit_ = limit;
    threshold_ = threshold;
    kept_.clear();
  }

  // Candidates with a lower score are not among the best.
  float threshold() const noexcept { return threshold_; }

  size_t size() const noexcept { return kept_.size(); }

  void add(float score, int64_t index, int32_t node) {
    if (score < threshold_) return;
    kept_.push_back({key_of(score, index), node});
    if (kept_.size() >= 4 * limit_) trim();
  }

  // Best first.
  const std::vector<Candidate>& sorted() {
    if (kept_.size() > limit_) trim();
    std::sort(kept_.begin(), kept_.end(), better);
    return kept_;
  }

 private:
  static bool better(const Candidate& a, const Candidate& b) noexcept { return a.key > b.key; }

  void trim() {
    const auto worst = kept_.begin() + static_cast<std::ptrdiff_t>(limit_) - 1;
    std::nth_element(kept_.begin(), worst, kept_.end(), better);
    threshold_ = worst->score();
    kept_.resize(limit_);
  }

  size_t limit_ = 0;
  float threshold_ = kNegInf;
  std::vector<Candidate> kept_;
};

}  // namespace cemg
