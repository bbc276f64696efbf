#include "cemg/trie_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace cemg {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// NaN counts as -inf, +inf as the largest finite number.
float tame(float x) noexcept {
  if (std::isnan(x)) return kNever;
  return std::min(x, kLargest);
}

// log(sum(exp(value(i)))) over i < count; -inf where all are.
template <class Value>
float log_sum_exp(int64_t count, Value value) noexcept {
  float highest = kNever;
  for (int64_t i = 0; i < count; ++i) highest = std::max(highest, value(i));
  if (highest == kNever) return kNever;
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(value(i) - highest);
  return highest + std::log(sum);
}

// The children of a node that the filter allows; every child where there is no filter.
template <class Code>
class AllowedChildren {
 public:
  AllowedChildren(const TrieView<Code>& trie, const FilterView& filter) : trie_(trie), filter_(filter) {}

  void read(int32_t node) {
    const Range range = trie_.children(node);
    begin_ = range.begin;
    count_ = range.end - range.begin;
    if (filter_.words == nullptr) return;
    kept_.clear();
    for (int32_t child = range.begin; child < range.end; ++child) {
      if (filter_.allows(trie_.interval(child))) kept_.push_back(child);
    }
    count_ = static_cast<int32_t>(kept_.size());
  }

  int32_t size() const noexcept { return count_; }
  int32_t operator[](int64_t i) const noexcept {
    return filter_.words == nullptr ? begin_ + static_cast<int32_t>(i) : kept_[static_cast<size_t>(i)];
  }
  int64_t code(int32_t child) const noexcept { return trie_.code[child - 1]; }

 private:
  const TrieView<Code>& trie_;
  const FilterView& filter_;
  int32_t begin_ = 0, count_ = 0;
  std::vector<int32_t> kept_;
};

// What to subtract from the row's logits; -inf where the row has no log-probabilities.
template <class Code>
float row_total(const StepLogits& step, int64_t row, int64_t size, const AllowedChildren<Code>& children) {
  const float* const logits = step.logits + row * size;
  switch (step.normalize) {
    case Normalize::kVocab:
      return tame(step.logsumexp[row]);
    case Normalize::kLevel:
      return log_sum_exp(size, [&](int64_t k) { return tame(logits[k]); });
    case Normalize::kValid:
      return log_sum_exp(children.size(),
                         [&](int64_t i) { return tame(logits[children.code(children[i])]); });
  }
  return kNever;
}

struct Candidate {
  float score;
  int64_t place;  // parent * K + code: the lower wins a tie
  int32_t node;

  friend bool better(const Candidate& a, const Candidate& b) noexcept {
    return a.score > b.score || (a.score == b.score && a.place < b.place);
  }
};

// The best `limit` candidates offered, a heap whose top is the worst kept.
class Best {
 public:
  explicit Best(size_t limit) : limit_(limit) { heap_.reserve(limit); }

  void clear() noexcept { heap_.clear(); }

  // No candidate of this score, offered after those kept, would be kept: a tie falls to the earlier.
  bool refuses(float score) const noexcept {
    return score == kNever || (heap_.size() == limit_ && score <= heap_.front().score);
  }

  void offer(const Candidate& candidate) {
    if (refuses(candidate.score)) return;
    if (heap_.size() == limit_) {
      std::pop_heap(heap_.begin(), heap_.end(), worse_on_top);
      heap_.back() = candidate;
    } else {
      heap_.push_back(candidate);
    }
    std::push_heap(heap_.begin(), heap_.end(), worse_on_top);
  }

  const std::vector<Candidate>& sorted() {
    std::sort(heap_.begin(), heap_.end(), worse_on_top);
    return heap_;
  }

 private:
  static bool worse_on_top(const Candidate& a, const Candidate& b) noexcept { return better(a, b); }

  size_t limit_;
  std::vector<Candidate> heap_;
};

void write(const std::vector<Candidate>& best, int64_t user, int64_t width, int64_t size,
           const NextBeams& next) {
  const auto found = static_cast<int64_t>(best.size());
  for (int64_t i = 0; i < width; ++i) {
    const bool alive = i < found;
    const Candidate one = alive ? best[static_cast<size_t>(i)] : Candidate{kNever, 0, kNone};
    const int64_t at = user * width + i;
    next.scores[at] = one.score;
    next.parents[at] = one.place / size;
    next.codes[at] = one.place % size;
    next.nodes[at] = one.node;
  }
  next.pruned[user] = found > width ? best[static_cast<size_t>(width)].score : kNever;
}

}  // namespace

template <class Code>
void softmax(TrieView<Code> trie, FilterView filter, const StepLogits& step, const int32_t* nodes,
             int64_t rows, float* out) {
  const int64_t size = trie.codebook_size;
#pragma omp parallel if (rows * size >= (1 << 14))
  {
    AllowedChildren<Code> children(trie, filter);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      children.read(nodes[row]);
      const float total = row_total(step, row, size, children);
      float* const log_prob = out + row * size;
      std::fill(log_prob, log_prob + size, kNever);
      if (total == kNever) continue;
      for (int32_t i = 0; i < children.size(); ++i) {
        const int64_t code = children.code(children[i]);
        log_prob[code] = std::min(tame(step.logits[row * size + code]) - total, 0.0f);
      }
    }
  }
}

template <class Code>
void beam_step(TrieView<Code> trie, FilterView filter, const StepLogits& step, const float* scores,
               const int32_t* nodes, int64_t users, int64_t beams, int64_t width, const NextBeams& next) {
  const int64_t size = trie.codebook_size;
#pragma omp parallel if (users > 1)
  {
    AllowedChildren<Code> children(trie, filter);
    Best best(static_cast<size_t>(std::min(width, beams * size)) + 1);  // one more: the best that is cut
#pragma omp for
    for (int64_t user = 0; user < users; ++user) {
      best.clear();
      for (int64_t beam = 0; beam < beams; ++beam) {
        const int64_t row = user * beams + beam;
        const float score = tame(scores[row]);
        if (best.refuses(score)) continue;  // a log-probability is at most 0
        children.read(nodes[row]);
        if (children.size() == 0) continue;
        const float total = row_total(step, row, size, children);
        if (total == kNever) continue;
        const float* const logits = step.logits + row * size;
        for (int32_t i = 0; i < children.size(); ++i) {
          const int64_t code = children.code(children[i]);
          const float log_prob = std::min(tame(logits[code]) - total, 0.0f);
          best.offer({score + log_prob, beam * size + code, children[i]});
        }
      }
      write(best.sorted(), user, width, size, next);
    }
  }
}

#define CEMG_INSTANTIATE(Code)                                                                           \
  template void softmax(TrieView<Code>, FilterView, const StepLogits&, const int32_t*, int64_t, float*); \
  template void beam_step(TrieView<Code>, FilterView, const StepLogits&, const float*, const int32_t*,   \
                          int64_t, int64_t, int64_t, const NextBeams&);
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
