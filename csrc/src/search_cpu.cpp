#include "cemg/search_cpu.h"

#include <algorithm>
#include <utility>

#include "cemg/row_math.h"

namespace cemg {

// Selects the beams that are alive and, under Normalize::kValid, have more than one item below them: a single
// item's remaining codes have probability 1. Returns whether there are any.
template <class Code>
bool BeamSearch::select_active(const TrieView<Code>& trie, Normalize normalize) {
  num_active_ = 0;
  for (size_t beam = 0; beam < active_.size(); ++beam) {
    bool active = nodes_[beam] >= 0;
    if (active && normalize == Normalize::kValid) {
      const Range ranks = trie.interval(nodes_[beam]);
      active = ranks.end - ranks.begin > 1;
    }
    active_[beam] = active;
    num_active_ += active;
  }
  return num_active_ > 0;
}

// Replaces the level's codes in step_codes_ by their tokens.
void BeamSearch::codes_to_tokens(const SearchRequest& request, int64_t level, int64_t codebook_size) {
  const int64_t* const table = request.code_tokens ? request.code_tokens + level * codebook_size : nullptr;
  const int64_t first = request.first_token + level * codebook_size;
  for (int64_t& code : step_codes_) code = table ? table[code] : code + first;
}

// Moves the logits of the active beams, which the model wrote one after the other, to each beam's own row.
// The rows of inactive beams become 0.
void BeamSearch::scatter_logits(int64_t codebook_size, bool with_logsumexp) {
  int64_t row = num_active_;
  for (int64_t beam = static_cast<int64_t>(active_.size()) - 1; beam >= 0; --beam) {
    float* const out = logits_.data() + beam * codebook_size;
    if (!active_[beam]) {
      std::fill(out, out + codebook_size, 0.0f);
      if (with_logsumexp) logsumexp_.data()[beam] = 0;
      continue;
    }
    if (--row == beam) return;  // the rows before are in place already
    std::copy_n(logits_.data() + row * codebook_size, codebook_size, out);
    if (with_logsumexp) logsumexp_.data()[beam] = logsumexp_.data()[row];
  }
}

// Updates the state of the search after a step: each beam's codes are its parent's and the new one.
void BeamSearch::append_codes(int64_t users, int64_t beam_width, int64_t level, const SearchResult& result) {
  const int64_t parent_beams = level == 0 ? 1 : beam_width;
  std::swap(previous_codes_, codes_);
  codes_.resize(static_cast<size_t>(users * beam_width * (level + 1)));
  for (int64_t beam = 0; beam < users * beam_width; ++beam) {
    const int64_t parent = beam / beam_width * parent_beams + parents_[beam];
    int64_t* const codes = codes_.data() + beam * (level + 1);
    std::copy_n(previous_codes_.data() + parent * level, level, codes);
    codes[level] = step_codes_[beam];
  }
  for (int64_t user = 0; user < users; ++user) {
    result.pruned[user] = std::max(result.pruned[user], pruned_[user]);
  }
  scores_.assign(result.scores, result.scores + users * beam_width);
  nodes_.assign(result.leaves, result.leaves + users * beam_width);
}

// Writes the first `level` codes of each beam. If the search ended early, the single item below each beam
// determines the other codes and the leaf.
template <class Code>
void BeamSearch::complete_codes(const TrieView<Code>& trie, int64_t level, int64_t levels,
                                const SearchResult& result) {
  for (size_t beam = 0; beam < nodes_.size(); ++beam) {
    int64_t* const codes = result.codes + static_cast<int64_t>(beam) * levels;
    std::copy_n(codes_.data() + static_cast<int64_t>(beam) * level, level, codes);
    int32_t node = nodes_[beam];
    for (int64_t next = level; next < levels; ++next) {
      if (node >= 0) node = trie.children(node).begin;
      codes[next] = node >= 0 ? trie.code[node - 1] : 0;
    }
    result.leaves[beam] = node;
  }
}

void BeamSearch::begin_search(int64_t users, int64_t beam_width, int64_t codebook_size,
                              const SearchResult& result) {
  const int64_t beams = users * beam_width;
  logits_.reserve(beams * codebook_size);
  logsumexp_.reserve(beams);
  parents_.resize(static_cast<size_t>(beams));
  step_codes_.resize(static_cast<size_t>(beams));
  active_.resize(static_cast<size_t>(beams));
  pruned_.resize(static_cast<size_t>(users));
  codes_.clear();
  scores_.assign(static_cast<size_t>(users), 0.0f);
  generator_.assign(static_cast<size_t>(users), 0.0f);
  next_generator_.resize(static_cast<size_t>(beams));
  nodes_.assign(static_cast<size_t>(users), kRoot);
  std::fill(result.pruned, result.pruned + users, kNegInf);
}

template <class Code>
SearchTimings BeamSearch::search(const Prompts& prompts, TrieView<Code> trie, FilterView filter,
                                 const SearchRequest& request, const SearchResult& result) {
  const int64_t users = prompts.batch, width = request.beam_width, levels = request.levels();
  const int64_t codebook_size = trie.codebook_size;
  const bool with_logsumexp = request.normalize == Normalize::kVocab;
  begin_search(users, width, codebook_size, result);
  float* const logsumexp = with_logsumexp ? logsumexp_.data() : nullptr;
  const auto logits_request = [&](int64_t level) {
    return LogitsRequest{request.level_columns[level], request.vocabulary, logits_.data(), logsumexp};
  };
  SearchTimings timings;
  timings.prefill = prefill(prompts, request.prompt_positions, request.start_token, request.step_positions[0],
                            logits_request(0));
  timings.decode_steps = elapsed_seconds() - timings.prefill;
  int64_t level = 0;
  for (; level < levels; ++level) {
    if (level > 0) {
      if (!select_active(trie, request.normalize)) break;
      codes_to_tokens(request, level - 1, codebook_size);
      const bool all_active = num_active_ == users * width;
      decode_step({step_codes_.data(), parents_.data(), all_active ? nullptr : active_.data(), width},
                  request.step_positions[level], logits_request(level));
      if (!all_active) scatter_logits(codebook_size, with_logsumexp);
      timings.rows += num_active_;
      timings.decode_steps += elapsed_seconds();
    }
    const double selection_begin = elapsed_seconds();
    const int64_t beams = level == 0 ? 1 : width;
    filter.rows_per_request = beams;
    BeamPrior prior{};
    if (request.prior) prior = {*request.prior, generator_.data(), next_generator_.data()};
    beam_step(trie, filter, {logits_.data(), logsumexp, request.normalize}, scores_.data(), nodes_.data(),
              users, beams, width,
              {result.scores, parents_.data(), step_codes_.data(), result.leaves, pruned_.data()},
              request.prior ? &prior : nullptr);
    if (request.prior) generator_ = next_generator_;
    append_codes(users, width, level, result);
    timings.selection += elapsed_seconds() - selection_begin;
  }
  complete_codes(trie, level, levels, result);
  return timings;
}

#define CEMG_INSTANTIATE(Code)                                                          \
  template SearchTimings BeamSearch::search(const Prompts&, TrieView<Code>, FilterView, \
                                            const SearchRequest&, const SearchResult&);
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
