// The trie inside one step of decoding, on the CPU: masked log-probabilities, and the choice of the next
// beams. B users, W beams, K codes a level; logits are float32, row by row.
#pragma once

#include <cstdint>

#include "cemg/trie_view.h"

namespace cemg {

inline constexpr int64_t kMostCandidates = int64_t{1} << 32;  // of a user: beams times K

// Over which logits the softmax runs: the caller's log-sum-exp, a row's K codes, or the codes that continue.
enum class Normalize : int32_t { kVocab, kLevel, kValid };

struct StepLogits {
  const float* logits;     // [rows, K]
  const float* logsumexp;  // [rows] for kVocab, else null
  Normalize normalize;
};

struct NextBeams {   // best first; a dead place is -inf, 0, 0, -1
  float* scores;     // [B, width]
  int64_t* parents;  // [B, width]
  int64_t* codes;    // [B, width]
  int32_t* nodes;    // [B, width]
  float* pruned;     // [B] the best that was cut, -inf where nothing was
};

// Log-probabilities [rows, K], -inf where nothing continues `nodes` [rows].
template <class Code>
void softmax(TrieView<Code> trie, FilterView filter, const StepLogits& step, const int32_t* nodes,
             int64_t rows, float* out);

// The `width` best continuations of each user's beams, no more than kMostCandidates: scores and nodes
// [users, beams].
template <class Code>
void beam_step(TrieView<Code> trie, FilterView filter, const StepLogits& step, const float* scores,
               const int32_t* nodes, int64_t users, int64_t beams, int64_t width, const NextBeams& next);

}  // namespace cemg
