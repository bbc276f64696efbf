#include "cemg/trie_step.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cemg/row_math.h"
#include "cemg/trie_row.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace cemg {
namespace {

constexpr int64_t kParallelWork = 1 << 14;   // logits that are worth waking threads for
constexpr int64_t kParallelBeams = 1 << 14;  // children of a user's beams that are worth splitting them

// log(sum(exp(x))) of the sanitized values of x [count], given the highest of these; -inf if all are -inf.
// Copies the values to `scratch` only if x has others.
float sanitized_log_sum_exp(const float* x, int64_t count, float highest, std::vector<float>& scratch) {
  if (highest == kNegInf) return kNegInf;
  if (highest < kMaxFloat) {
    const float sum = sum_exp(x, count, highest);
    if (!std::isnan(sum)) return highest + std::log(sum);
  }
  scratch.resize(std::max(scratch.size(), static_cast<size_t>(count)));
  std::transform(x, x + count, scratch.begin(), sanitize);
  return highest + std::log(sum_exp(scratch.data(), count, highest));
}

// A node's children and their logits. Its memory is reused from row to row.
template <class Code>
class Children {
 public:
  // group_max, unless null, is written as in max_of_groups().
  void read(const TrieView<Code>& trie, const FilterView& filter, int64_t row, Range range,
            const float* logits, float* group_max) {
    begin_ = range.begin;
    count_ = range.end - range.begin;
    const RowFilter row_filter = filter.of(row);
    const bool full = count_ == trie.codebook_size;
    logits_ = logits;
    if (!full || !row_filter.allows_all()) {
      gathered_.resize(static_cast<size_t>(trie.codebook_size));
      logits_ = gathered_.data();
      if (full) std::copy(logits, logits + count_, gathered_.data());
      if (!full) gather(logits, trie.codebook_size, trie.code + begin_ - 1, count_, gathered_.data());
      if (!row_filter.allows_all()) drop_forbidden(row_filter);
    }
    highest_ = group_max == nullptr ? sanitize(highest_of(logits_, count_))
                                    : max_of_groups(logits_, count_, group_max);
  }

  int32_t count() const noexcept { return count_; }
  const float* logits() const noexcept { return logits_; }  // [count] not sanitized; -inf if not allowed
  float highest() const noexcept { return highest_; }       // sanitized
  int32_t node(int64_t i) const noexcept { return begin_ + static_cast<int32_t>(i); }

 private:
  void drop_forbidden(const RowFilter& filter) {
    if (filter.open != nullptr) mask_closed(filter.open, begin_, count_, gathered_.data());
    if (filter.max_closed == 0) return;
    for (int32_t i = filter.first_closed(begin_); i < filter.max_closed; ++i) {
      if (filter.closed[i] >= begin_ + count_) break;
      gathered_[static_cast<size_t>(filter.closed[i] - begin_)] = kNegInf;
    }
  }

  int32_t begin_ = 0, count_ = 0;
  float highest_ = kNegInf;
  const float* logits_ = nullptr;  // the row itself if all codes are allowed children, else gathered_
  std::vector<float> gathered_;
};

// The log-sum-exp to subtract from the row's logits; -inf if the row has no log-probabilities.
template <class Code>
float row_total(const StepLogits& step, int64_t row, int64_t size, const Children<Code>& children,
                std::vector<float>& scratch) {
  if (step.normalize == Normalize::kVocab) return sanitize(step.logsumexp[row]);
  if (step.normalize == Normalize::kLevel) {
    const float* const all = step.logits + row * size;
    return sanitized_log_sum_exp(all, size, sanitize(highest_of(all, size)), scratch);
  }
  return sanitized_log_sum_exp(children.logits(), children.count(), children.highest(), scratch);
}

// Computes the highest logit and the total of a dense node in one pass, where that is possible: all children
// are allowed and the softmax normalizes over them. Returns whether it did.
template <class Code>
bool prepass_dense(const TrieView<Code>& trie, const FilterView& filter, const StepLogits& step, int64_t row,
                   Range range, float* group_max, float& highest, float& total) {
  const int64_t size = trie.codebook_size, count = range.end - range.begin;
  if (step.normalize != Normalize::kValid || !can_prepass(size, count)) return false;
  if (!filter.of(row).allows_all()) return false;
  const PrepassResult result =
      prepass_row(step.logits + row * size, size, trie.code + range.begin - 1, count, group_max);
  highest = result.highest;
  total = result.log_sum_exp;
  return !std::isnan(total);
}

// Scratch memory of a thread. It lives as long as the thread, so a step allocates only when it grows.
template <class Code>
struct Workspace {
  Children<Code> children;
  std::vector<float> scratch;
  std::vector<float> group_max;       // [parts, kLanes] the best score of each group
  std::vector<float> coarse_max;      // [parts, kCoarse] the best score of each coarse group
  std::vector<int32_t> beam_of_part;  // [parts]
  std::vector<Range> children_of;     // [beams]
  std::vector<int32_t> first_part;    // [beams + 1]
  std::vector<float> total;    // [beams] the log-sum-exp subtracted from the logits; -inf: no candidates
  std::vector<char> unmasked;  // [beams] whether the groups cover all codes, not only children
  TopCandidates kept;
  // under a prior:
  std::vector<float> generator;  // [beams] the generator's sum; -inf for a dead beam
  MassedChildren massed;

  static Workspace& of_thread() {
    thread_local Workspace workspace;
    return workspace;
  }
};

// One user's step. A prepass computes each beam's log-sum-exp, and the best score of each group of its
// children. The score that `limit` groups reach is a threshold for the candidates, so that only few groups
// are read again. The prepass of a dense node may be unmasked: it reads the row of all codes without picking
// the children. Its groups then bound the children's scores from above, so fewer than `limit` candidates may
// reach the threshold; in that case the threshold is lowered.
//
// Under a prior, the rows and groups hold the generator's sums, whose order is that of the scores of children
// without mass. The few children with mass are candidates of their own; their groups bound their scores from
// below.
template <class Code>
class UserStep {
 public:
  UserStep(const TrieView<Code>& trie, const FilterView& filter, const StepLogits& step, const float* scores,
           const int32_t* nodes, int64_t user, int64_t beams, int64_t limit, const BeamPrior* prior)
      : trie_(trie),
        filter_(filter),
        step_(step),
        scores_(scores + user * beams),
        nodes_(nodes + user * beams),
        first_row_(user * beams),
        beams_(beams),
        limit_(limit),
        workspace_(Workspace<Code>::of_thread()) {
    workspace_.children_of.resize(static_cast<size_t>(beams));
    workspace_.total.resize(static_cast<size_t>(beams));
    workspace_.unmasked.resize(static_cast<size_t>(beams));
    workspace_.first_part.resize(static_cast<size_t>(beams) + 1);
    const auto max_parts = static_cast<size_t>(beams * num_parts(trie.codebook_size));
    if (workspace_.beam_of_part.size() < max_parts) {
      workspace_.beam_of_part.resize(max_parts);
      workspace_.group_max.resize(max_parts * kLanes);
      workspace_.coarse_max.resize(max_parts * kCoarse);
    }
    int32_t parts = 0;
    for (int64_t beam = 0; beam < beams; ++beam) {
      const Range range = workspace_.children_of[static_cast<size_t>(beam)] = trie_.children(nodes_[beam]);
      const int32_t count = range.end - range.begin;
      const bool unmasked = can_be_unmasked(beam, count);
      workspace_.unmasked[static_cast<size_t>(beam)] = unmasked;
      workspace_.first_part[static_cast<size_t>(beam)] = parts;
      const int32_t end = parts + static_cast<int32_t>(num_parts(unmasked ? trie_.codebook_size : count));
      while (parts < end) workspace_.beam_of_part[static_cast<size_t>(parts++)] = static_cast<int32_t>(beam);
    }
    workspace_.first_part[static_cast<size_t>(beams)] = parts;
    if (prior != nullptr) mix(*prior, user);
  }

  const std::vector<Candidate>& run(bool parallel) {
    if (parallel) {
      prepass_on_all_threads();
    } else {
      prepass(0, beams_);
    }
    if (mixture_) score_massed();
    collect();
    return workspace_.kept.sorted();
  }

  // The generator's sum of a candidate.
  float generator_of(const Candidate& candidate) const noexcept {
    if (!mixture_) return candidate.score();
    return generator_of(candidate.index() / trie_.codebook_size, candidate.index() % trie_.codebook_size);
  }

 private:
  // Finds the children with mass, unless the prior has no weight. From here on, scores_ are the generator's.
  void mix(const BeamPrior& prior, int64_t user) {
    const RequestPrior request = prior.prior.of(user);
    if (request.weight > 0) mixture_.emplace(request.weight);
    workspace_.generator.resize(static_cast<size_t>(beams_));
    workspace_.massed.clear();
    for (int64_t beam = 0; beam < beams_; ++beam) {
      const bool alive = sanitize(scores_[beam]) > kNegInf;
      const Range children = workspace_.children_of[static_cast<size_t>(beam)];
      workspace_.generator[static_cast<size_t>(beam)] = alive ? prior.generator[first_row_ + beam] : kNegInf;
      if (mixture_) workspace_.massed.add_beam(trie_, request, alive ? children : Range{0, 0});
    }
    scores_ = workspace_.generator.data();
  }

  bool has_mass(int64_t beam) const noexcept { return mixture_ && !workspace_.massed.of(beam).empty(); }

  bool has_mass(int64_t beam, int32_t child) const noexcept {
    return mixture_ && workspace_.massed.contains(beam, child);
  }

  void score_massed() const {
    for (int64_t beam = 0; beam < beams_; ++beam) {
      const RowFilter row_filter = filter_.of(first_row_ + beam);
      for (MassedChild& child : workspace_.massed.of(beam)) {
        const float generator = generator_of(beam, trie_.code[child.node - 1]);
        if (row_filter.allows(child.node)) child.score = mixture_->score(generator, child.mass);
      }
    }
  }

  void add_massed() const {
    for (int64_t beam = 0; beam < beams_; ++beam) {
      for (const MassedChild& child : workspace_.massed.of(beam)) {
        workspace_.kept.add(child.score, beam * trie_.codebook_size + trie_.code[child.node - 1], child.node);
      }
    }
  }

  // The generator's sum of a child; -inf if the row has no log-probabilities.
  float generator_of(int64_t beam, int64_t code) const noexcept {
    const float total = workspace_.total[static_cast<size_t>(beam)];
    if (total == kNegInf) return kNegInf;
    return sanitize(sanitize(scores_[beam]) + smaller(logits(beam)[code] - total, 0.0f));
  }

  // A score, from a child's sum in rows and groups. Children with mass score more.
  float score_of(float sum) const noexcept { return mixture_ ? mixture_->score(sum) : sum; }

  // The sum below which children without mass do not reach a score.
  float lowest_sum(float score) const noexcept {
    return mixture_ ? mixture_->lowest_generator(score) : score;
  }

  // Whether a beam's prepass may read all codes: most codes are children, no bitmap excludes any, and the
  // log-sum-exp does not depend on which codes are children.
  bool can_be_unmasked(int64_t beam, int64_t count) const noexcept {
    return 2 * count >= trie_.codebook_size && step_.normalize != Normalize::kValid &&
           filter_.of(first_row_ + beam).open == nullptr;
  }

  // A score that `needed` groups of beams begin ... end - 1 reach.
  float threshold_of(int64_t begin, int64_t end, int64_t needed) const {
    const int64_t first = workspace_.first_part[static_cast<size_t>(begin)];
    const int64_t parts = workspace_.first_part[static_cast<size_t>(end)] - first;
    if (parts * kCoarse >= 2 * needed) {
      return threshold_of_best(workspace_.coarse_max.data() + first * kCoarse, parts * kCoarse, needed);
    }
    return threshold_of_best(workspace_.group_max.data() + first * kLanes, parts * kLanes, needed);
  }

  void prepass_on_all_threads() const {
#if defined(_OPENMP)
#pragma omp parallel
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      prepass(beams_ * thread / threads, beams_ * (thread + 1) / threads);
    }
#else
    prepass(0, beams_);
#endif
  }

  // The prepass of beams begin ... end - 1. Now and then, the beams so far give a threshold for the next
  // ones.
  void prepass(int64_t begin, int64_t end) const {
    float highest = kNegInf, threshold = kNegInf;
    bool unmasked = false;
    for (int64_t beam = begin; beam < end; ++beam) {
      const int64_t done = beam - begin;
      const bool power_of_two = done >= 4 && (done & (done - 1)) == 0;
      if (!unmasked && power_of_two && sanitize(scores_[beam]) < highest)
        threshold = lowest_sum(score_of(threshold_of(begin, beam, limit_)));
      highest = larger(highest, prepass_beam(beam, threshold));
      unmasked = unmasked || workspace_.unmasked[static_cast<size_t>(beam)];
    }
  }

  // Writes the total and the groups' best scores of a beam. Returns the best score. A log-probability is at
  // most 0, so a beam whose score is below the threshold has no candidates, except children with mass.
  float prepass_beam(int64_t beam, float threshold) const {
    const int64_t part = workspace_.first_part[static_cast<size_t>(beam)];
    const int64_t parts = workspace_.first_part[static_cast<size_t>(beam) + 1] - part;
    float* const group_max = workspace_.group_max.data() + part * kLanes;
    float* const coarse_max = workspace_.coarse_max.data() + part * kCoarse;
    float& total = workspace_.total[static_cast<size_t>(beam)] = kNegInf;
    const float score = sanitize(scores_[beam]);
    const bool skipped = score == kNegInf || (score < threshold && !has_mass(beam));
    const float highest = skipped ? kNegInf : prepass_logits(beam, group_max, total);
    if (highest == kNegInf || total == kNegInf) {
      std::fill(group_max, group_max + parts * kLanes, kNegInf);
      std::fill(coarse_max, coarse_max + parts * kCoarse, kNegInf);
      return total = kNegInf;
    }
    for (int64_t i = 0; i < parts; ++i) {
      to_scores(score, total, group_max + i * kLanes, coarse_max + i * kCoarse);
    }
    return score + smaller(highest - total, 0.0f);
  }

  // Writes the highest logit of each group and the total of a beam. Returns the highest logit.
  float prepass_logits(int64_t beam, float* group_max, float& total) const {
    const int64_t size = trie_.codebook_size, row = first_row_ + beam;
    const float* const row_logits = logits(beam);
    auto& workspace = Workspace<Code>::of_thread();
    if (workspace_.unmasked[static_cast<size_t>(beam)]) {
      const float highest = max_of_groups(row_logits, size, group_max);
      total = step_.normalize == Normalize::kVocab
                  ? sanitize(step_.logsumexp[row])
                  : sanitized_log_sum_exp(row_logits, size, highest, workspace.scratch);
      return highest;
    }
    float highest;
    const Range range = workspace_.children_of[static_cast<size_t>(beam)];
    if (prepass_dense(trie_, filter_, step_, row, range, group_max, highest, total)) return highest;
    auto& children = workspace.children;
    children.read(trie_, filter_, row, range, row_logits, group_max);
    total = row_total(step_, row, size, children, workspace.scratch);
    return children.highest();
  }

  void collect() const {
    const int64_t groups = workspace_.first_part[static_cast<size_t>(beams_)] * kLanes;
    const float* const group_max = workspace_.group_max.data();
    const auto limit = static_cast<size_t>(limit_);
    TopCandidates& kept = workspace_.kept;
    const auto end = workspace_.unmasked.begin() + beams_;
    const bool unmasked = std::find(workspace_.unmasked.begin(), end, 1) != end;
    for (int64_t needed = unmasked ? limit_ + limit_ / 4 : limit_;; needed *= 2) {
      const float threshold = threshold_of(0, beams_, needed);
      kept.clear(limit, larger(score_of(threshold), -kMaxFloat));
      if (mixture_) add_massed();
      for (int64_t group = find_at_least(group_max, 0, groups, lowest_sum(kept.threshold())); group < groups;
           group = find_at_least(group_max, group + 1, groups, lowest_sum(kept.threshold()))) {
        collect_group(group / kLanes, group % kLanes);
      }
      if (!unmasked || kept.size() >= limit || threshold == kNegInf) return;
    }
  }

  void collect_group(int64_t part, int64_t lane) const {
    const int64_t beam = workspace_.beam_of_part[static_cast<size_t>(part)];
    const int64_t begin = (part - workspace_.first_part[static_cast<size_t>(beam)]) * kPartSize;
    const Range range = workspace_.children_of[static_cast<size_t>(beam)];
    const bool unmasked = workspace_.unmasked[static_cast<size_t>(beam)];
    const int64_t count = unmasked ? trie_.codebook_size : range.end - range.begin;
    for (int64_t i = begin + lane; i < std::min(begin + kPartSize, count); i += kLanes) {
      const int64_t node = range.begin + i;
      if (unmasked) {
        add_candidate(beam, i, kNone);
      } else {
        add_candidate(beam, trie_.code[node - 1], static_cast<int32_t>(node));
      }
    }
  }

  // Adds a child without mass if its score is high enough and the filter allows it. `child` is kNone if it is
  // not known, and is then looked up.
  void add_candidate(int64_t beam, int64_t code, int32_t child) const {
    const float score = sanitize(scores_[beam]), total = workspace_.total[static_cast<size_t>(beam)];
    const float sum = score_of(score + smaller(logits(beam)[code] - total, 0.0f));
    if (!(sum >= workspace_.kept.threshold())) return;  // also false for NaN
    if (child == kNone) child = trie_.advance(nodes_[beam], code);
    if (child == kNone) return;
    const RowFilter row_filter = filter_.of(first_row_ + beam);
    if (!row_filter.allows(child) || has_mass(beam, child)) return;
    workspace_.kept.add(sum, beam * trie_.codebook_size + code, child);
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
  Workspace<Code>& workspace_;
  std::optional<Mixture> mixture_;  // unless the prior has no weight
};

void write(const std::vector<Candidate>& best, int64_t user, int64_t width, int64_t size,
           const NextBeams& next) {
  const auto count = static_cast<int64_t>(best.size());
  for (int64_t i = 0; i < width; ++i) {
    const bool exists = i < count;
    const int64_t out = user * width + i;
    const Candidate candidate = exists ? best[static_cast<size_t>(i)] : Candidate{key_of(kNegInf, 0), kNone};
    const auto index = static_cast<uint32_t>(candidate.index()), codes = static_cast<uint32_t>(size);
    next.scores[out] = candidate.score();
    next.parents[out] = index / codes;
    next.codes[out] = index % codes;
    next.nodes[out] = candidate.node;
  }
  next.pruned[user] = count > width ? best[static_cast<size_t>(width)].score() : kNegInf;
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
    auto& workspace = Workspace<Code>::of_thread();
    auto& children = workspace.children;
    const Range range = trie.children(nodes[row]);
    children.read(trie, filter, row, range, step.logits + row * size, nullptr);
    workspace.scratch.resize(std::max(workspace.scratch.size(), static_cast<size_t>(size)));
    workspace.group_max.resize(
        std::max(workspace.group_max.size(), static_cast<size_t>(num_parts(size) * kLanes)));
    float highest, total;
    if (!prepass_dense(trie, filter, step, row, range, workspace.group_max.data(), highest, total)) {
      total =
          children.highest() > kNegInf ? row_total(step, row, size, children, workspace.scratch) : kNegInf;
    }
    float* const log_prob = out + row * size;
    if (children.count() == size && total > kNegInf) {  // the codes are 0, 1, ...
      log_probabilities(children.logits(), size, total, log_prob);
      continue;
    }
    std::fill(log_prob, log_prob + size, kNegInf);
    if (total == kNegInf) continue;
    log_probabilities(children.logits(), children.count(), total, workspace.scratch.data());
    for (int32_t i = 0; i < children.count(); ++i) {
      log_prob[trie.code[children.node(i) - 1]] = workspace.scratch[static_cast<size_t>(i)];
    }
  }
}

template <class Code>
void beam_step(TrieView<Code> trie, FilterView filter, const StepLogits& step, const float* scores,
               const int32_t* nodes, int64_t users, int64_t beams, int64_t width, const NextBeams& next,
               const BeamPrior* prior) {
  const int64_t size = trie.codebook_size;
  const int64_t limit = std::min(width, beams * size) + 1;  // one more, for `pruned`
  const int64_t work = users * beams * size;
  const bool parallel =
      users == 1 && work >= kParallelBeams && count_children(trie, nodes, beams) >= kParallelBeams;
  const auto run = [&](int64_t user) {
    UserStep<Code> user_step(trie, filter, step, scores, nodes, user, beams, limit, prior);
    const std::vector<Candidate>& best = user_step.run(parallel);
    write(best, user, width, size, next);
    if (prior == nullptr) return;
    for (int64_t i = 0; i < width; ++i) {
      const bool exists = i < static_cast<int64_t>(best.size());
      prior->next_generator[user * width + i] =
          exists ? user_step.generator_of(best[static_cast<size_t>(i)]) : kNegInf;
    }
  };
  if (users == 1) return run(0);  // entering a parallel region takes a microsecond
#pragma omp parallel for if (work >= kParallelWork)
  for (int64_t user = 0; user < users; ++user) run(user);
}

#define CEMG_INSTANTIATE(Code)                                                                           \
  template void softmax(TrieView<Code>, FilterView, const StepLogits&, const int32_t*, int64_t, float*); \
  template void beam_step(TrieView<Code>, FilterView, const StepLogits&, const float*, const int32_t*,   \
                          int64_t, int64_t, int64_t, const NextBeams&, const BeamPrior*);
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
