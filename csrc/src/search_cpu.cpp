#include "cemg/search_cpu.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace cemg {
namespace {

constexpr float kDead = -std::numeric_limits<float>::infinity();

}  // namespace

// Notes the beams that live and, under kValid, have more than one item below them: what follows a sole one is
// certain. Whether there are any.
template <class Code>
bool BeamSearch::ask(const TrieView<Code>& trie, Normalize normalize) {
  count_ = 0;
  for (size_t beam = 0; beam < asked_.size(); ++beam) {
    bool open = nodes_[beam] >= 0;
    if (open && normalize == Normalize::kValid) {
      const Range ranks = trie.interval(nodes_[beam]);
      open = ranks.end - ranks.begin > 1;
    }
    asked_[beam] = open;
    count_ += open;
  }
  return count_ > 0;
}

// The codes of a level in `fed_` become their tokens.
void BeamSearch::feed(const Question& question, int64_t level, int64_t size) {
  const int64_t* const table = question.tokens ? question.tokens + level * size : nullptr;
  const int64_t first = question.first_token + level * size;
  for (int64_t& token : fed_) token = table ? table[token] : token + first;
}

// The answers for the beams that were asked for, moved to their places; 0 for the others.
void BeamSearch::spread(int64_t size, bool with_totals) {
  int64_t from = count_;
  for (int64_t beam = static_cast<int64_t>(asked_.size()) - 1; beam >= 0; --beam) {
    float* const to = logits_.data() + beam * size;
    if (!asked_[beam]) {
      std::fill(to, to + size, 0.0f);
      if (with_totals) row_totals_.data()[beam] = 0;
      continue;
    }
    if (--from == beam) return;  // so are all before
    std::copy_n(logits_.data() + from * size, size, to);
    if (with_totals) row_totals_.data()[beam] = row_totals_.data()[from];
  }
}

// Takes up what the last step left: codes, each behind those of its parent, scores, nodes and what was cut.
void BeamSearch::grow(int64_t users, int64_t width, int64_t level, const Found& found) {
  const int64_t beams = level == 0 ? 1 : width;
  std::swap(earlier_, codes_);
  codes_.resize(static_cast<size_t>(users * width * (level + 1)));
  for (int64_t beam = 0; beam < users * width; ++beam) {
    const int64_t parent = beam / width * beams + parents_[beam];
    int64_t* const own = codes_.data() + beam * (level + 1);
    std::copy_n(earlier_.data() + parent * level, level, own);
    own[level] = fed_[beam];
  }
  for (int64_t user = 0; user < users; ++user) {
    found.pruned[user] = std::max(found.pruned[user], pruned_[user]);
  }
  scores_.assign(found.scores, found.scores + users * width);
  nodes_.assign(found.leaves, found.leaves + users * width);
}

// The first `level` codes of each beam to `found`, and what follows a beam with one item below it.
template <class Code>
void BeamSearch::finish(const TrieView<Code>& trie, int64_t level, int64_t levels, const Found& found) {
  for (size_t beam = 0; beam < nodes_.size(); ++beam) {
    int64_t* const codes = found.codes + static_cast<int64_t>(beam) * levels;
    std::copy_n(codes_.data() + static_cast<int64_t>(beam) * level, level, codes);
    int32_t node = nodes_[beam];
    for (int64_t next = level; next < levels; ++next) {
      if (node >= 0) node = trie.children(node).begin;
      codes[next] = node >= 0 ? trie.code[node - 1] : 0;
    }
    found.leaves[beam] = node;
  }
}

template <class Code>
Spent BeamSearch::search(const Prompts& prompts, TrieView<Code> trie, FilterView filter,
                         const Question& question, const Found& found) {
  const int64_t users = prompts.batch, width = question.width, levels = question.levels();
  const int64_t size = trie.codebook_size;
  const bool totals = question.normalize == Normalize::kVocab;
  Spent spent;
  logits_.room(users * width * size);
  row_totals_.room(users * width);
  float* const total = totals ? row_totals_.data() : nullptr;
  const auto wanted = [&](int64_t level) {
    return Wanted{question.columns[level], question.all, logits_.data(), total};
  };
  spent.prompt =
      start(prompts, question.prompt_places, question.start_token, question.own_places[0], wanted(0));
  spent.model = seconds() - spent.prompt;
  const auto beams = static_cast<size_t>(users * width);
  parents_.resize(beams);
  fed_.resize(beams);
  asked_.resize(beams);
  pruned_.resize(static_cast<size_t>(users));
  codes_.clear();
  scores_.assign(static_cast<size_t>(users), 0.0f);
  nodes_.assign(static_cast<size_t>(users), kRoot);
  std::fill(found.pruned, found.pruned + users, kDead);
  int64_t level = 0;
  for (; level < levels; ++level) {
    if (level > 0) {
      if (!ask(trie, question.normalize)) break;
      feed(question, level - 1, size);
      const bool whole = count_ == users * width;
      step({fed_.data(), parents_.data(), whole ? nullptr : asked_.data(), width}, question.own_places[level],
           wanted(level));
      if (!whole) spread(size, totals);
      spent.rows += count_;
      spent.model += seconds();
    }
    const double stepped = seconds();
    const int64_t before = level == 0 ? 1 : width;
    filter.rows_per_request = before;
    beam_step(trie, filter, {logits_.data(), total, question.normalize}, scores_.data(), nodes_.data(), users,
              before, width, {found.scores, parents_.data(), fed_.data(), found.leaves, pruned_.data()});
    grow(users, width, level, found);
    spent.selection += seconds() - stepped;
  }
  finish(trie, level, levels, found);
  return spent;
}

#define CEMG_INSTANTIATE(Code)                                                                   \
  template Spent BeamSearch::search(const Prompts&, TrieView<Code>, FilterView, const Question&, \
                                    const Found&);
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
