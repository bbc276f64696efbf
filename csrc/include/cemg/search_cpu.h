// A whole beam search in one call: the prompts, then for each code a step of the model and one of the trie.
#pragma once

#include <cstdint>
#include <vector>

#include "cemg/transformer_cpu.h"
#include "cemg/trie_step.h"

namespace cemg {

// What a search is asked for. `columns` and `own_places` [levels] are of each code's level; `all` of the
// whole head for kVocab, else nothing. Code c of level m is token first_token + m * K + c, or
// tokens[m * K + c] where there is such a table.
struct Question {
  Normalize normalize;
  int64_t width, first_token, start_token;
  Places prompt_places;
  std::vector<Places> own_places;
  std::vector<Linear> columns;
  Linear all;
  const int64_t* tokens = nullptr;  // [levels, K], all of the model's vocabulary

  int64_t levels() const noexcept { return static_cast<int64_t>(columns.size()); }
};

struct Found {      // best first; a dead place is -inf and -1, its codes anything
  float* scores;    // [B, width]
  int32_t* leaves;  // [B, width]
  int64_t* codes;   // [B, width, levels]
  float* pruned;    // [B] the best that was cut at any step, -inf where nothing was
};

struct Spent {
  double prompt = 0, model = 0, selection = 0;  // seconds
  int64_t rows = 0;                             // that the model ran for after the prompts
};

class BeamSearch : public BeamDecoder {
 public:
  using BeamDecoder::BeamDecoder;

  // The prompts are as `start` wants them, the width and the levels 1 or more, the levels no more than
  // kMostSteps and than the trie has.
  template <class Code>
  Spent search(const Prompts& prompts, TrieView<Code> trie, FilterView filter, const Question& question,
               const Found& found);

  int64_t nbytes() const noexcept { return BeamDecoder::nbytes() + logits_.nbytes() + row_totals_.nbytes(); }

 private:
  template <class Code>
  bool ask(const TrieView<Code>& trie, Normalize normalize);
  template <class Code>
  void finish(const TrieView<Code>& trie, int64_t level, int64_t levels, const Found& found);
  void feed(const Question& question, int64_t level, int64_t size);
  void spread(int64_t size, bool with_totals);
  void grow(int64_t users, int64_t width, int64_t level, const Found& found);

  Floats logits_, row_totals_;
  std::vector<float> scores_, pruned_;
  std::vector<int64_t> parents_, codes_, earlier_;
  std::vector<int64_t> fed_;  // the codes of a step, then their tokens
  std::vector<int32_t> nodes_;
  std::vector<uint8_t> asked_;  // [B, W] the beams that the model has to run for
  int64_t count_ = 0;           // of them
};

}  // namespace cemg
