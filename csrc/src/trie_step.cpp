#include "cemg/trie_step.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "cemg/row_math.h"
#include "cemg/trie_row.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace cemg {
namespace {

constexpr int64_t kParallelWork = 1 << 14;   // logits worth the waking of a thread
constexpr int64_t kParallelBeams = 1 << 14;  // children of one user's beams worth sharing these out
constexpr uint64_t kLastPlace = kMostCandidates - 1;

// log(sum(exp(x))) over the tame values of x [count], whose highest is `highest`; -inf where all are. They
// are written out, to `room`, only where x has others.
float tame_log_sum_exp(const float* x, int64_t count, float highest, std::vector<float>& room) {
  if (highest == kNever) return kNever;
  if (highest < kLargest) {
    const float sum = sum_exp(x, count, highest);
    if (!std::isnan(sum)) return highest + std::log(sum);
  }
  room.resize(std::max(room.size(), static_cast<size_t>(count)));
  std::transform(x, x + count, room.begin(), tame);
  return highest + std::log(sum_exp(room.data(), count, highest));
}

// A node's children and their logits; its memory is kept from row to row.
template <class Code>
class Children {
 public:
  // `best`, unless null: as in best_of_groups.
  void read(const TrieView<Code>& trie, const FilterView& filter, int64_t row, Range range,
            const float* logits, float* best) {
    begin_ = range.begin;
    count_ = range.end - range.begin;
    const RowFilter mine = filter.of(row);
    const bool full = count_ == trie.codebook_size;
    logits_ = logits;
    if (!full || !mine.everything()) {
      gathered_.resize(static_cast<size_t>(trie.codebook_size));
      logits_ = gathered_.data();
      if (full) std::copy(logits, logits + count_, gathered_.data());
      if (!full) gather(logits, trie.codebook_size, trie.code + begin_ - 1, count_, gathered_.data());
      if (!mine.everything()) drop_forbidden(mine);
    }
    highest_ = best == nullptr ? tame(highest_of(logits_, count_)) : best_of_groups(logits_, count_, best);
  }

  int32_t count() const noexcept { return count_; }
  const float* logits() const noexcept { return logits_; }  // [count] as they are; -inf if forbidden
  float highest() const noexcept { return highest_; }       // tame
  int32_t node(int64_t i) const noexcept { return begin_ + static_cast<int32_t>(i); }

 private:
  void drop_forbidden(const RowFilter& filter) {
    if (filter.open != nullptr) keep_open(filter.open, begin_, count_, gathered_.data());
    if (filter.most_closed == 0) return;
    for (int32_t i = filter.first_closed(begin_); i < filter.most_closed; ++i) {
      if (filter.closed[i] >= begin_ + count_) break;
      gathered_[static_cast<size_t>(filter.closed[i] - begin_)] = kNever;
    }
  }

  int32_t begin_ = 0, count_ = 0;
  float highest_ = kNever;
  const float* logits_ = nullptr;  // of all codes, where all are children; else gathered_
  std::vector<float> gathered_;
};

// What to subtract from the row's logits; -inf where the row has no log-probabilities.
template <class Code>
float row_total(const StepLogits& step, int64_t row, int64_t size, const Children<Code>& children,
                std::vector<float>& room) {
  if (step.normalize == Normalize::kVocab) return tame(step.logsumexp[row]);
  if (step.normalize == Normalize::kLevel) {
    const float* const all = step.logits + row * size;
    return tame_log_sum_exp(all, size, tame(highest_of(all, size)), room);
  }
  return tame_log_sum_exp(children.logits(), children.count(), children.highest(), room);
}

// In one pass where that can be: the children of a dense node, all allowed, whose own log-sum-exp is the
// total.
template <class Code>
bool survey_dense(const TrieView<Code>& trie, const FilterView& filter, const StepLogits& step, int64_t row,
                  Range range, float* best, float& highest, float& total) {
  const int64_t size = trie.codebook_size, count = range.end - range.begin;
  if (step.normalize != Normalize::kValid || !can_survey(size, count)) return false;
  if (!filter.of(row).everything()) return false;
  const RowSurvey found =
      survey_row(step.logits + row * size, size, trie.code + range.begin - 1, count, best);
  highest = found.highest;
  total = found.log_sum_exp;
  return !std::isnan(total);
}

// A score and a place, parent * K + code, in one number: the higher is better, and of equal scores the one of
// the lower place.
uint64_t key_of(float score, int64_t place) noexcept {
  const auto bits = std::bit_cast<int32_t>(score + 0.0f);  // one zero, not two
  const auto ordered = static_cast<uint32_t>(bits < 0 ? bits ^ 0x7fffffff : bits) ^ 0x80000000u;
  return uint64_t{ordered} << 32 | (kLastPlace - static_cast<uint64_t>(place));
}

struct Candidate {
  uint64_t key;
  int32_t node;

  int64_t place() const noexcept { return static_cast<int64_t>(kLastPlace - (key & kLastPlace)); }
  float score() const noexcept {
    const auto ordered = static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u);
    return std::bit_cast<float>(ordered < 0 ? ordered ^ 0x7fffffff : ordered);
  }
};

// The best `limit` candidates of those offered.
class Best {
 public:
  void clear(size_t limit, float floor) {
    limit_ = limit;
    floor_ = floor;
    kept_.clear();
  }

  // A candidate below this score is not among the best.
  float floor() const noexcept { return floor_; }

  size_t size() const noexcept { return kept_.size(); }

  void offer(float score, int64_t place, int32_t node) {
    if (score < floor_) return;
    kept_.push_back({key_of(score, place), node});
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
    floor_ = worst->score();
    kept_.resize(limit_);
  }

  size_t limit_ = 0;
  float floor_ = kNever;
  std::vector<Candidate> kept_;
};

// What a thread works with; kept for its life, so that a step allocates nothing once it has grown.
template <class Code>
struct Workspace {
  Children<Code> children;
  std::vector<float> room;
  std::vector<float> best;          // [parts, kLanes] the best score of each group
  std::vector<float> few;           // [parts, kFew] the best of four groups each
  std::vector<int32_t> beam_of;     // [parts]
  std::vector<Range> children_of;   // [beams]
  std::vector<int32_t> first_part;  // [beams + 1]
  std::vector<float> total;         // [beams] what is subtracted from the logits; -inf: no candidates
  std::vector<char> loose;          // [beams] whether its groups are of all codes, be they children or not
  Best kept;

  static Workspace& of_thread() {
    thread_local Workspace workspace;
    return workspace;
  }
};

// One user's step. Beams are surveyed first: their log-sum-exps, and the best score of each group of their
// children. What the best `limit` groups reach bounds what can be kept, so that few groups are looked at
// again. A dense node's row is surveyed as it lies, where its sum is given: the groups are then of all codes
// and bound the children's scores from above, so that too few may reach the floor, which is lowered.
template <class Code>
class UserStep {
 public:
  UserStep(const TrieView<Code>& trie, const FilterView& filter, const StepLogits& step, const float* scores,
           const int32_t* nodes, int64_t user, int64_t beams, int64_t limit)
      : trie_(trie),
        filter_(filter),
        step_(step),
        scores_(scores + user * beams),
        nodes_(nodes + user * beams),
        first_row_(user * beams),
        beams_(beams),
        limit_(limit),
        space_(Workspace<Code>::of_thread()) {
    space_.children_of.resize(static_cast<size_t>(beams));
    space_.total.resize(static_cast<size_t>(beams));
    space_.loose.resize(static_cast<size_t>(beams));
    space_.first_part.resize(static_cast<size_t>(beams) + 1);
    const auto most = static_cast<size_t>(beams * parts_of(trie.codebook_size));
    if (space_.beam_of.size() < most) {
      space_.beam_of.resize(most);
      space_.best.resize(most * kLanes);
      space_.few.resize(most * kFew);
    }
    int32_t parts = 0;
    for (int64_t beam = 0; beam < beams; ++beam) {
      const Range range = space_.children_of[static_cast<size_t>(beam)] = trie_.children(nodes_[beam]);
      const int32_t count = range.end - range.begin;
      const bool loose = may_be_loose(beam, count);
      space_.loose[static_cast<size_t>(beam)] = loose;
      space_.first_part[static_cast<size_t>(beam)] = parts;
      const int32_t end = parts + static_cast<int32_t>(parts_of(loose ? trie_.codebook_size : count));
      while (parts < end) space_.beam_of[static_cast<size_t>(parts++)] = static_cast<int32_t>(beam);
    }
    space_.first_part[static_cast<size_t>(beams)] = parts;
  }

  const std::vector<Candidate>& run(bool share) {
    if (share) {
      survey_on_all_threads();
    } else {
      survey(0, beams_);
    }
    collect();
    return space_.kept.sorted();
  }

 private:
  // Whether a beam's row is surveyed as it lies: where most codes are children, no bitmap forbids them and
  // the sum does not depend on which they are.
  bool may_be_loose(int64_t beam, int64_t count) const noexcept {
    return 2 * count >= trie_.codebook_size && step_.normalize != Normalize::kValid &&
           filter_.of(first_row_ + beam).open == nullptr;
  }

  // A score that `wanted` groups of some beams reach.
  float floor_of(int64_t begin, int64_t end, int64_t wanted) const {
    const int64_t first = space_.first_part[static_cast<size_t>(begin)];
    const int64_t parts = space_.first_part[static_cast<size_t>(end)] - first;
    if (parts * kFew >= 2 * wanted) {
      return floor_of_best(space_.few.data() + first * kFew, parts * kFew, wanted);
    }
    return floor_of_best(space_.best.data() + first * kLanes, parts * kLanes, wanted);
  }

  void survey_on_all_threads() const {
#if defined(_OPENMP)
#pragma omp parallel
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      survey(beams_ * thread / threads, beams_ * (thread + 1) / threads);
    }
#else
    survey(0, beams_);
#endif
  }

  // Some beams, one after the other; what they hold bounds what the next must reach.
  void survey(int64_t begin, int64_t end) const {
    float highest = kNever, floor = kNever;
    bool loose = false;
    for (int64_t beam = begin; beam < end; ++beam) {
      const int64_t seen = beam - begin;
      const bool look = !loose && seen >= 4 && (seen & (seen - 1)) == 0 && tame(scores_[beam]) < highest;
      if (look) floor = floor_of(begin, beam, limit_);
      highest = larger(highest, survey_one(beam, floor));
      loose = loose || space_.loose[static_cast<size_t>(beam)];
    }
  }

  // Fills in the total and the groups' best scores of a beam; the best of all. A log-probability is at most
  // 0, so a beam below `floor` has nothing to give.
  float survey_one(int64_t beam, float floor) const {
    const int64_t part = space_.first_part[static_cast<size_t>(beam)];
    const int64_t parts = space_.first_part[static_cast<size_t>(beam) + 1] - part;
    float* const best = space_.best.data() + part * kLanes;
    float* const few = space_.few.data() + part * kFew;
    float& total = space_.total[static_cast<size_t>(beam)] = kNever;
    const float score = tame(scores_[beam]);
    const float highest = score == kNever || score < floor ? kNever : survey_logits(beam, best, total);
    if (highest == kNever || total == kNever) {
      std::fill(best, best + parts * kLanes, kNever);
      std::fill(few, few + parts * kFew, kNever);
      return total = kNever;
    }
    for (int64_t i = 0; i < parts; ++i) to_scores(score, total, best + i * kLanes, few + i * kFew);
    return score + smaller(highest - total, 0.0f);
  }

  // The highest logit of a row, the highest of its groups, and what is subtracted from them.
  float survey_logits(int64_t beam, float* best, float& total) const {
    const int64_t size = trie_.codebook_size, row = first_row_ + beam;
    const float* const own = logits(beam);
    auto& space = Workspace<Code>::of_thread();
    if (space_.loose[static_cast<size_t>(beam)]) {
      const float highest = best_of_groups(own, size, best);
      total = step_.normalize == Normalize::kVocab ? tame(step_.logsumexp[row])
                                                   : tame_log_sum_exp(own, size, highest, space.room);
      return highest;
    }
    float highest;
    const Range range = space_.children_of[static_cast<size_t>(beam)];
    if (survey_dense(trie_, filter_, step_, row, range, best, highest, total)) return highest;
    auto& children = space.children;
    children.read(trie_, filter_, row, range, own, best);
    total = row_total(step_, row, size, children, space.room);
    return children.highest();
  }

  void collect() const {
    const int64_t groups = space_.first_part[static_cast<size_t>(beams_)] * kLanes;
    const float* const best = space_.best.data();
    const auto limit = static_cast<size_t>(limit_);
    Best& kept = space_.kept;
    const auto end = space_.loose.begin() + beams_;
    const bool loose = std::find(space_.loose.begin(), end, 1) != end;
    for (int64_t wanted = loose ? limit_ + limit_ / 4 : limit_;; wanted *= 2) {
      const float floor = floor_of(0, beams_, wanted);
      kept.clear(limit, larger(floor, -kLargest));
      for (int64_t at = find_at_least(best, 0, groups, kept.floor()); at < groups;
           at = find_at_least(best, at + 1, groups, kept.floor())) {
        collect_group(at / kLanes, at % kLanes);
      }
      if (!loose || kept.size() >= limit || floor == kNever) return;
    }
  }

  void collect_group(int64_t part, int64_t lane) const {
    const int64_t beam = space_.beam_of[static_cast<size_t>(part)];
    const int64_t begin = (part - space_.first_part[static_cast<size_t>(beam)]) * kPart;
    const Range range = space_.children_of[static_cast<size_t>(beam)];
    const bool loose = space_.loose[static_cast<size_t>(beam)];
    const int64_t count = loose ? trie_.codebook_size : range.end - range.begin;
    for (int64_t i = begin + lane; i < std::min(begin + kPart, count); i += kLanes) {
      const int64_t node = range.begin + i;
      if (loose) {
        offer(beam, i, kNone);
      } else {
        offer(beam, trie_.code[node - 1], static_cast<int32_t>(node));
      }
    }
  }

  // The child, looked for where it is not given, is kept where its score is high enough and it is allowed.
  void offer(int64_t beam, int64_t code, int32_t child) const {
    const float score = tame(scores_[beam]), total = space_.total[static_cast<size_t>(beam)];
    const float sum = score + smaller(logits(beam)[code] - total, 0.0f);
    if (!(sum >= space_.kept.floor())) return;  // nor is NaN
    if (child == kNone) child = trie_.advance(nodes_[beam], code);
    if (child == kNone) return;
    const RowFilter mine = filter_.of(first_row_ + beam);
    if (!mine.allows(child)) return;
    space_.kept.offer(sum, beam * trie_.codebook_size + code, child);
  }

  const float* logits(int64_t beam) const noexcept {
    return step_.logits + (first_row_ + beam) * trie_.codebook_size;
  }

  const TrieView<Code>& trie_;
  const FilterView& filter_;
  const StepLogits& step_;
  const float* scores_;
  const int32_t* nodes_;
  int64_t first_row_, beams_, limit_;
  Workspace<Code>& space_;
};

void write(const std::vector<Candidate>& best, int64_t user, int64_t width, int64_t size,
           const NextBeams& next) {
  const auto found = static_cast<int64_t>(best.size());
  for (int64_t i = 0; i < width; ++i) {
    const bool alive = i < found;
    const int64_t at = user * width + i;
    const Candidate one = alive ? best[static_cast<size_t>(i)] : Candidate{key_of(kNever, 0), kNone};
    const auto place = static_cast<uint32_t>(one.place()), codes = static_cast<uint32_t>(size);
    next.scores[at] = one.score();
    next.parents[at] = place / codes;
    next.codes[at] = place % codes;
    next.nodes[at] = one.node;
  }
  next.pruned[user] = found > width ? best[static_cast<size_t>(width)].score() : kNever;
}

template <class Code>
int64_t count_children(const TrieView<Code>& trie, const int32_t* nodes, int64_t beams) noexcept {
  int64_t count = 0;
  for (int64_t beam = 0; beam < beams; ++beam) {
    const Range range = trie.children(nodes[beam]);
    count += range.end - range.begin;
  }
  return count;
}

}  // namespace

template <class Code>
void softmax(TrieView<Code> trie, FilterView filter, const StepLogits& step, const int32_t* nodes,
             int64_t rows, float* out) {
  const int64_t size = trie.codebook_size;
#pragma omp parallel for if (rows * size >= kParallelWork)
  for (int64_t row = 0; row < rows; ++row) {
    auto& space = Workspace<Code>::of_thread();
    auto& children = space.children;
    const Range range = trie.children(nodes[row]);
    children.read(trie, filter, row, range, step.logits + row * size, nullptr);
    space.room.resize(std::max(space.room.size(), static_cast<size_t>(size)));
    space.best.resize(std::max(space.best.size(), static_cast<size_t>(parts_of(size) * kLanes)));
    float highest, total;
    if (!survey_dense(trie, filter, step, row, range, space.best.data(), highest, total)) {
      total = children.highest() > kNever ? row_total(step, row, size, children, space.room) : kNever;
    }
    float* const log_prob = out + row * size;
    if (children.count() == size && total > kNever) {  // whose codes are 0, 1, ...
      log_probabilities(children.logits(), size, total, log_prob);
      continue;
    }
    std::fill(log_prob, log_prob + size, kNever);
    if (total == kNever) continue;
    log_probabilities(children.logits(), children.count(), total, space.room.data());
    for (int32_t i = 0; i < children.count(); ++i) {
      log_prob[trie.code[children.node(i) - 1]] = space.room[static_cast<size_t>(i)];
    }
  }
}

template <class Code>
void beam_step(TrieView<Code> trie, FilterView filter, const StepLogits& step, const float* scores,
               const int32_t* nodes, int64_t users, int64_t beams, int64_t width, const NextBeams& next) {
  const int64_t size = trie.codebook_size;
  const int64_t limit = std::min(width, beams * size) + 1;  // the best that is cut too
  const int64_t work = users * beams * size;
  const bool share =
      users == 1 && work >= kParallelBeams && count_children(trie, nodes, beams) >= kParallelBeams;
  const auto run = [&](int64_t user) {
    UserStep<Code> own(trie, filter, step, scores, nodes, user, beams, limit);
    write(own.run(share), user, width, size, next);
  };
  if (users == 1) return run(0);  // no region: to enter one takes a microsecond
#pragma omp parallel for if (work >= kParallelWork)
  for (int64_t user = 0; user < users; ++user) run(user);
}

#define CEMG_INSTANTIATE(Code)                                                                           \
  template void softmax(TrieView<Code>, FilterView, const StepLogits&, const int32_t*, int64_t, float*); \
  template void beam_step(TrieView<Code>, FilterView, const StepLogits&, const float*, const int32_t*,   \
                          int64_t, int64_t, int64_t, const NextBeams&);
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
