#include "cemg/trie_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int64_t kParallelWork = 1 << 14;  // logits worth the waking of a thread

// NaN counts as -inf, +inf as the largest finite number.
float tame(float x) noexcept {
  if (std::isnan(x)) return kNever;
  return std::min(x, kLargest);
}

// The tame values of a row's logits [count].
CEMG_CLONES void read_row(const float* logits, int64_t count, float* out) noexcept {
  for (int64_t i = 0; i < count; ++i) {
    const float x = smaller(logits[i], kLargest);
    out[i] = x == x ? x : kNever;
  }
}

// From `first` on, the first of x [count] whose score + min(x - total, 0) is above `bound`; else `count`.
CEMG_CLONES int64_t find_above(const float* x, int64_t first, int64_t count, float score, float total,
                               float bound) noexcept {
  int64_t i = first;
  for (; i + kLanes <= count; i += kLanes) {
    int32_t found = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      found |= score + smaller(x[i + lane] - total, 0.0f) > bound ? 1 : 0;
    }
    if (found) break;
  }
  for (; i < count; ++i) {
    if (score + smaller(x[i] - total, 0.0f) > bound) break;
  }
  return i;
}

// A row's children that the filter allows, with their logits; its memory is kept from row to row.
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
    logits_.resize(std::max(logits_.size(), static_cast<size_t>(size_)));
    if (everything_ && size_ == trie.codebook_size) {
      read_row(logits, size_, logits_.data());
      return;
    }
    for (int32_t i = 0; i < size_; ++i) logits_[static_cast<size_t>(i)] = tame(logits[code(trie, i)]);
  }

  int32_t size() const noexcept { return size_; }
  const float* logits() const noexcept { return logits_.data(); }
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
  std::vector<float> logits_;
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
      room.resize(static_cast<size_t>(size));
      read_row(step.logits + row * size, size, room.data());
      return log_sum_exp(room.data(), size);
    case Normalize::kValid:
      break;
  }
  return log_sum_exp(children.logits(), children.size());
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
  void clear(size_t limit) {
    limit_ = limit;
    heap_.clear();
    heap_.reserve(limit);
  }

  // Only a candidate above this score would be kept: a tie falls to the earlier.
  float bound() const noexcept { return heap_.size() == limit_ ? heap_.front().score : kNever; }

  // A candidate above the bound.
  void offer(const Candidate& candidate) {
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

  size_t limit_ = 0;
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
      log_prob[children.code(trie, i)] = smaller(children.logits()[i] - total, 0.0f);
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
      const auto next_after = [&](int64_t i) { return find_above(x, i, count, score, total, best.bound()); };
      for (int64_t i = next_after(0); i < count; i = next_after(i + 1)) {
        const float log_prob = smaller(x[i] - total, 0.0f);
        best.offer({score + log_prob, beam * size + children.code(trie, i), children.node(i)});
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
