// A whole beam search in one call: prefill, then one step of the model and one of the trie per code.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cemg/transformer_cpu.h"
#include "cemg/trie_step.h"

namespace cemg {

// Code c of level m is token first_token + m * K + c, or code_tokens[m * K + c] if there is such a table.
struct SearchRequest {
  Normalize normalize;
  int64_t beam_width, first_token, start_token;
  PositionTables prompt_positions;
  std::vector<PositionTables> step_positions;  // [levels]
  std::vector<Linear> level_columns;           // [levels] the columns of the head for each level's codes
  Linear vocabulary;                           // the whole head for Normalize::kVocab, else absent
  const int64_t* code_tokens = nullptr;        // [levels, K], all in the model's vocabulary
  std::optional<PriorView> prior{};            // one request per user

  int64_t levels() const noexcept { return static_cast<int64_t>(level_columns.size()); }
};

// Best first; under a prior the scores are those of the mixture. A list with fewer items than beams ends with
// score -inf, leaf -1 and arbitrary codes.
struct SearchResult {
  float* scores;    // [B, width]
  int32_t* leaves;  // [B, width]
  int64_t* codes;   // [B, width, levels]
  float* pruned;    // [B] the best score cut at any step, -inf if nothing was cut
};

struct SearchTimings {
  double prefill = 0, decode_steps = 0, selection = 0;  // seconds
  int64_t rows = 0;                                     // that the decode steps ran for, over all steps
};

class BeamSearch : public BeamDecoder {
 public:
  using BeamDecoder::BeamDecoder;

  // The prompts must satisfy the conditions of prefill(). The beam width and the number of levels are 1 or
  // more; there are at most kMaxSteps levels, and no more than the trie has.
  template <class Code>
  SearchTimings search(const Prompts& prompts, TrieView<Code> trie, FilterView filter,
                       const SearchRequest& request, const SearchResult& result);

  int64_t nbytes() const noexcept { return BeamDecoder::nbytes() + logits_.nbytes() + logsumexp_.nbytes(); }

 private:
  template <class Code>
  bool select_active(const TrieView<Code>& trie, Normalize normalize);
  template <class Code>
  void complete_codes(const TrieView<Code>& trie, int64_t level, int64_t levels, const SearchResult& result);
  void begin_search(int64_t users, int64_t beam_width, int64_t codebook_size, const SearchResult& result);
  void codes_to_tokens(const SearchRequest& request, int64_t level, int64_t codebook_size);
  void scatter_logits(int64_t codebook_size, bool with_logsumexp);
  void append_codes(int64_t users, int64_t beam_width, int64_t level, const SearchResult& result);

  Buffer logits_, logsumexp_;
  std::vector<float> scores_, pruned_;
  std::vector<float> generator_, next_generator_;  // [B, W] the generator's own sums, under a prior
  std::vector<int64_t> parents_, codes_, previous_codes_;
  std::vector<int64_t> step_codes_;  // the codes that a step chose, later their tokens
  std::vector<int32_t> nodes_;
  std::vector<uint8_t> active_;  // [B, W] the beams that the model runs for
  int64_t num_active_ = 0;
};

}  // namespace cemg
