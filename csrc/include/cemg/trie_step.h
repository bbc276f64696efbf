// The trie in one decode step on the CPU: masked log-probabilities, and the selection of the next beams.
// B users, W beams, K codes per level. Logits are float32, row by row.
#pragma once

#include <cstdint>

#include "cemg/top_candidates.h"
#include "cemg/trie_prior.h"
#include "cemg/trie_view.h"

namespace cemg {

// What the softmax normalizes over: the whole vocabulary, whose log-sum-exp the caller passes; the K codes of
// the level; or the codes that continue the node.
enum class Normalize : int32_t { kVocab, kLevel, kValid };

struct StepLogits {
  const float* logits;     // [rows, K]
  const float* logsumexp;  // [rows] for kVocab, else null
  Normalize normalize;
};

// Best first. Where there are fewer candidates than beams: -inf, 0, 0, -1.
struct NextBeams {
  float* scores;     // [B, width]
  int64_t* parents;  // [B, width]
  int64_t* codes;    // [B, width]
  int32_t* nodes;    // [B, width]
  float* pruned;     // [B] the best score that was cut, -inf if nothing was cut
};

// The prior of a step. The beams' scores are those of the mixture, and their order is.
struct BeamPrior {
  PriorView prior;         // one request per user
  const float* generator;  // [B, W] the generator's sum of log-probabilities of each beam
  float* next_generator;   // [B, width] of each next beam; -inf where there is none
};

// Log-probabilities [rows, K] of the codes after `nodes` [rows]; -inf for codes that do not continue the
// node.
template <class Code>
void softmax(TrieView<Code> trie, FilterView filter, const StepLogits& step, const int32_t* nodes,
             int64_t rows, float* out);

// The `width` best continuations of each user's beams, given scores and nodes [users, beams]. beams * K is at
// most kMaxCandidates. With a prior, a continuation scores log((1 - weight) e^generator + weight mass). A
// weight of 0 gives the results without a prior.
template <class Code>
void beam_step(TrieView<Code> trie, FilterView filter, const StepLogits& step, const float* scores,
               const int32_t* nodes, int64_t users, int64_t beams, int64_t width, const NextBeams& next,
               const BeamPrior* prior = nullptr);

}  // namespace cemg
