#include "cemg/trie_step.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int64_t kParallelWork = 1 << 14;  // logits worth the waking of a thread
constexpr int64_t kScan = 256;              // logits against one bound

// NaN counts as -inf, +inf as the largest finite number.
float tame(float x) noexcept {
  if (std::isnan(x)) return kNever;
  return std::min(x, kLargest);
}

// log(sum(exp(x))) over the tame values of x [count]; -inf where all are. They are written out, to `room`,
// only where x has others.
float tame_log_sum_exp(const float* x, int64_t count, std::vector<float>& room) {
  const float total = log_sum_exp(x, count);
  if (total < std::numeric_limits<float>::infinity()) return total;
  room.resize(std::max(room.size(), static_cast<size_t>(count)));
  std::transform(x, x + count, room.begin(), tame);
  return log_sum_exp(room.data(), count);
}

// A log-probability. Only NaN needs taming: an infinite x gives what the largest number gives, 0.
float log_prob_of(float x, float total) noexcept {
  return std::isnan(x) ? kNever : smaller(x - total, 0.0f);
}

// The places in x [count], at most kScan, whose score + min(x - total, 0) is above `bound`: their number.
// NaN is above nothing.
CEMG_CLONES int64_t find_above(const float* x, int64_t count, float score, float total, float bound,
                               int32_t* found) noexcept {
  int64_t size = 0, i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    uint32_t above = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      above |= (score + smaller(x[i + lane] - total, 0.0f) > bound ? uint32_t{1} : uint32_t{0}) << lane;
    }
    for (; above != 0; above &= above - 1) found[size++] = static_cast<int32_t>(i + std::countr_zero(above));
  }
  for (; i < count; ++i) {
    if (score + smaller(x[i] - total, 0.0f) > bound) found[size++] = static_cast<int32_t>(i);
  }
  return size;
}

// A row's children that the filter allows, with their logits as they are; its memory is kept from row to row.
template <class Code>
class Children {
 public:
  void read(const TrieView<Code>& trie, const FilterView& filter, int64_t row, int32_t node,
            const float* logits) {
    const Range range = trie.children(node);
    begin_ = range.begin;
    size_ = range.end - range.begin;
    const RowFilter mine = filter.of(row);
    everything_ = mine.everything();
    if (!everything_) keep_allowed(trie, mine, range);
    logits_ = logits;
    if (everything_ && size_ == trie.codebook_size) return;
    gathered_.resize(std::max(gathered_.size(), static_cast<size_t>(size_)));
    if (everything_) {
      const Code* const codes = trie.code + begin_ - 1;
      for (int32_t i = 0; i < size_; ++i) gathered_[static_cast<size_t>(i)] = logits[codes[i]];
    } else {
      for (int32_t i = 0; i < size_; ++i) gathered_[static_cast<size_t>(i)] = logits[code(trie, i)];
    }
    logits_ = gathered_.data();
  }

  int32_t size() const noexcept { return size_; }
  const float* logits() const noexcept { return logits_; }
  int32_t node(int64_t i) const noexcept {
    return everything_ ? begin_ + static_cast<int32_t>(i) : kept_[static_cast<size_t>(i)];
  }
  int64_t code(const TrieView<Code>& trie, int64_t i) const noexcept { return trie.code[node(i) - 1]; }

 private:
  void keep_allowed(const TrieView<Code>& trie, const RowFilter& filter, Range range) {
    kept_.clear();
    for (int32_t child = range.begin; child < range.end; ++child) {
      if (filter.allows(trie.interval(child))) kept_.push_back(child);
    }
    size_ = static_cast<int32_t>(kept_.size());
  }

  int32_t begin_ = 0, size_ = 0;
  bool everything_ = true;
  std::vector<int32_t> kept_;
  const float* logits_ = nullptr;  // of all codes, where all are children; else gathered_
  std::vector<float> gathered_;
};

// What to subtract from the row's logits; -inf where the row has no log-probabilities.
template <class Code>
float row_total(const StepLogits& step, int64_t row, int64_t size, const Children<Code>& children,
                std::vector<float>& room) {
  switch (step.normalize) {
    case Normalize::kVocab:
      return tame(step.logsumexp[row]);
    case Normalize::kLevel:
      if (children.size() == size) break;
      return tame_log_sum_exp(step.logits + row * size, size, room);
    case Normalize::kValid:
      break;
  }
  return tame_log_sum_exp(children.logits(), children.size(), room);
}

struct Candidate {
  float score;
  int64_t place;  // parent * K + code: the lower wins a tie
  int32_t node;
};

bool better(const Candidate& a, const Candidate& b) noexcept {
  return a.score > b.score || (a.score == b.score && a.place < b.place);
}

// The best `limit` of the candidates offered, in the order of their places. A few more are kept, so that the
// worst are cut many at a time.
class Best {
 public:
  void clear(size_t limit) {
    limit_ = limit;
    most_ = limit + limit / 2 + 16;
    bound_ = kNever;
    kept_.clear();
    kept_.reserve(most_);
  }

  // Only a candidate above this score may be kept: a tie falls to the earlier.
  float bound() const noexcept { return bound_; }

  void offer(const Candidate& candidate) {
    if (candidate.score <= bound_) return;
    kept_.push_back(candidate);
    if (kept_.size() == most_) cut();
  }

  const std::vector<Candidate>& sorted() {
    if (kept_.size() > limit_) cut();
    std::sort(kept_.begin(), kept_.end(), better);
    return kept_;
  }

 private:
  void cut() {
    const auto worst = kept_.begin() + static_cast<std::ptrdiff_t>(limit_) - 1;
    std::nth_element(kept_.begin(), worst, kept_.end(), better);
    kept_.resize(limit_);
    bound_ = kept_.back().score;
  }

  size_t limit_ = 0, most_ = 0;
  float bound_ = kNever;
  std::vector<Candidate> kept_;
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

// What a thread works with; kept for its life, so that a step allocates nothing once it has grown.
template <class Code>
struct Workspace {
  Children<Code> children;
  std::vector<float> room;
  Best best;

  static Workspace& of_thread() {
    thread_local Workspace workspace;
    return workspace;
  }
};

}  // namespace

template <class Code>
void softmax(TrieView<Code> trie, FilterView filter, const StepLogits& step, const int32_t* nodes,
             int64_t rows, float* out) {
  const int64_t size = trie.codebook_size;
#pragma omp parallel for if (rows * size >= kParallelWork)
  for (int64_t row = 0; row < rows; ++row) {
    auto& space = Workspace<Code>::of_thread();
    auto& children = space.children;
    children.read(trie, filter, row, nodes[row], step.logits + row * size);
    const float total = row_total(step, row, size, children, space.room);
    float* const log_prob = out + row * size;
    std::fill(log_prob, log_prob + size, kNever);
    if (total == kNever) continue;
    for (int32_t i = 0; i < children.size(); ++i) {
      log_prob[children.code(trie, i)] = log_prob_of(children.logits()[i], total);
    }
  }
}

template <class Code>
void beam_step(TrieView<Code> trie, FilterView filter, const StepLogits& step, const float* scores,
               const int32_t* nodes, int64_t users, int64_t beams, int64_t width, const NextBeams& next) {
  const int64_t size = trie.codebook_size;
  const auto limit = static_cast<size_t>(std::min(width, beams * size)) + 1;  // the best that is cut too
#pragma omp parallel for if (users > 1 && users * beams * size >= kParallelWork)
  for (int64_t user = 0; user < users; ++user) {
    auto& space = Workspace<Code>::of_thread();
    auto& children = space.children;
    auto& best = space.best;
    best.clear(limit);
    for (int64_t beam = 0; beam < beams; ++beam) {
      const int64_t row = user * beams + beam;
      const float score = tame(scores[row]);
      if (score <= best.bound()) continue;  // a log-probability is at most 0
      children.read(trie, filter, row, nodes[row], step.logits + row * size);
      const int64_t count = children.size();
      const float total = count ? row_total(step, row, size, children, space.room) : kNever;
      if (total == kNever) continue;
      const float* const x = children.logits();
      for (int64_t begin = 0; begin < count; begin += kScan) {
        int32_t found[kScan];
        const int64_t size_here = std::min(kScan, count - begin);
        const int64_t above = find_above(x + begin, size_here, score, total, best.bound(), found);
        for (int64_t j = 0; j < above; ++j) {
          const int64_t i = begin + found[j];
          best.offer(
              {score + smaller(x[i] - total, 0.0f), beam * size + children.code(trie, i), children.node(i)});
        }
      }
    }
    write(best.sorted(), user, width, size, next);
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
