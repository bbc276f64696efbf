// A transformer in the middle of a beam search, on the CPU in float32: T5, GPT-2 and the Llama family. One
// call a step, whose threads share each product.
//
// B users, W beams, R rows, one a beam or fewer, T tokens of all prompts, H heads over G key-value heads of
// Dh, d the width.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "cemg/attention_cpu.h"
#include "cemg/gemm_cpu.h"

namespace cemg {

// RMSNorm, or LayerNorm where there is a bias; without a weight it is not there.
struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0;

  explicit operator bool() const noexcept { return weight != nullptr; }
};

// What a layer lacks is not there: the norms of single heads, cross-attention, the gate.
struct TransformerLayer {
  Norm norm;
  Linear qkv;  // queries of H heads, keys and values of G
  Norm query_norm, key_norm;
  Linear out;
  Norm cross_norm;
  Linear cross_query, cross_key_value, cross_out;
  Norm feed_norm;
  Linear gate, up, down;  // down(activation(up(x))), or down(activation(gate(x)) * up(x))
  Activation activation;
};

struct Transformer {
  int64_t width, heads, kv_heads, head_dim;
  float scale;             // of the scores of attention
  const float* embedding;  // [vocabulary, d]
  int64_t vocabulary;
  std::vector<TransformerLayer> layers;
  Norm last;
  float last_scale;  // of what the last norm gives
  // What the first layer's qkv gives for tokens from `first_code` on, [num_codes, qkv.out]; may be null.
  const float* code_table = nullptr;
  int64_t first_code = 0, num_codes = 0;
};

// What depends on the place of a token; each may be null.
struct Places {
  const float* embedding = nullptr;  // [P, d], added to the tokens'
  const float* cosine = nullptr;     // [P, Dh] of the rotation
  const float* sine = nullptr;
  const float* bias = nullptr;  // of an encoder's scores by distance [H, 2 S - 1], of own tokens' [T, H]
};

struct Prompts {
  const int64_t* tokens;  // [B, S]
  const int64_t* mask;    // [B, S], 0 where there is no token
  int64_t batch, length;
};

// The beams [B, W] that a step feeds, each with its token and the beam before that it grew from. Where
// `asked` is not null, only the beams it is true for are rows; nothing grows from the others later.
struct Grown {
  const int64_t* tokens;
  const int64_t* parents;
  const uint8_t* asked;
  int64_t beams;
};

// The logits of `columns` to `logits` [R, columns.out]; of `all`, where it is there, the log-sum-exp to
// `total` [R].
struct Wanted {
  Linear columns;
  Linear all;
  float* logits;
  float* total;
};

// Floats that are not cleared.
class Floats {
 public:
  float* room(int64_t count) {
    const auto size = static_cast<size_t>(count);
    if (size > size_) {
      data_ = std::make_unique_for_overwrite<float[]>(size);
      size_ = size;
    }
    return data_.get();
  }
  float* data() const noexcept { return data_.get(); }
  int64_t nbytes() const noexcept { return static_cast<int64_t>(size_ * sizeof(float)); }

 private:
  std::unique_ptr<float[]> data_;
  size_t size_ = 0;
};

// What a call did, for profiles: `part`, and the seconds after the call's begin at which it ended.
struct Lap {
  const char* part;
  double end;
};

// The state of one search, and the room it works in, which the next one finds as it was left. `encoder` is
// null for a decoder-only model. The weights are borrowed.
class BeamDecoder {
 public:
  BeamDecoder(const Transformer* encoder, const Transformer& decoder, int64_t threads);

  int64_t threads() const noexcept { return team_.threads(); }

  // Whether calls from now on note their laps; those of the last call.
  void note_laps(bool wanted) noexcept { noting_ = wanted; }
  const std::vector<Lap>& laps() const noexcept { return laps_; }

  // What it works with, in bytes.
  int64_t nbytes() const noexcept;

  // Own tokens of each row so far, no more than kMostSteps.
  int64_t steps() const noexcept { return static_cast<int64_t>(steps_); }

  // The first prompt without a token; -1 where each has one.
  static int64_t empty_prompt(const Prompts& prompts) noexcept;

  // The place in [B, S] of a token outside the vocabulary; -1 where there is none.
  int64_t wrong_token(const Prompts& prompts) const noexcept;

  // Whether the decoder has an embedding for a token.
  bool knows(int64_t token) const noexcept { return token >= 0 && token < decoder_.vocabulary; }

  // Users of the search; 0 before its start.
  int64_t batch() const noexcept { return batch_; }

  // Reads prompts, one or more, each of a token or more, and answers for one row a user. After an encoder the
  // decoder is fed `start_token`. `places` are the encoder's, or the prompt's; `own_places` those of the
  // start token. Returns the seconds that the prompts took.
  double start(const Prompts& prompts, const Places& places, int64_t start_token, const Places& own_places,
               const Wanted& wanted);

  // The first beam that is asked for and grew from none that was; -1 where there is none.
  int64_t orphan(const Grown& grown) const noexcept;

  // The first beam that is asked for with a token that the decoder does not know; -1 where there is none.
  int64_t stranger(const Grown& grown) const noexcept;

  // Feeds one row or more and answers for them, in their order.
  void step(const Grown& grown, const Places& places, const Wanted& wanted);

  // Back to where `start` left it: the prompts stay read.
  void rewind();

 protected:
  // Since the last start or step began.
  double seconds() const { return std::chrono::duration<double>(Clock::now() - begun_).count(); }

 private:
  // The keys and values of all prompts in one layer, by user and head.
  struct PromptHeads {
    Floats keys, values;
  };

  using Clock = std::chrono::steady_clock;

  void stand_at_start();  // a beam a user, without a step behind it
  void begin_laps() {
    begun_ = Clock::now();
    laps_.clear();
  }
  void done(const char* part);  // ends a lap
  void read(const Prompts& prompts);
  void make_room(const Transformer& model, int64_t rows);
  void embed(const Transformer& model, const Places& places, int64_t rows);
  void read_prompt(const Transformer& model, const Places& places);
  void pack_prompt(const Transformer& model, const float* keys, const float* values, int64_t stride,
                   const PromptHeads& to);
  PackedHead prompt_head(const Transformer& model, const PromptHeads& heads, int64_t user,
                         int64_t group) const;
  template <class Count, class Work>
  void each_head(const Transformer& model, const Count& rows, const Work& work);
  void attend_in_prompt(const Transformer& model, const PromptHeads& heads, const Places& places, bool last);
  void attend_to_prompt(Rows<const float> queries, const PromptHeads& heads, const OwnTokens* own);
  void add(const Linear& weights, Rows<const float> from, int64_t rows);
  void feed(const TransformerLayer& layer, int64_t rows);
  void own_step(const Places& places, const Wanted& wanted);
  void own_layer(size_t number, const Places& places);
  void project(size_t number, Rows<float> qkv);
  Rows<float> x() const noexcept { return {x_.data(), decoder_.width}; }
  Rows<float> seen() const noexcept { return {seen_.data(), stride_of(decoder_.width)}; }
  Rows<float> attended() const noexcept {
    return {attended_.data(), stride_of(decoder_.heads * decoder_.head_dim)};
  }
  void answer(const Wanted& wanted);

  const Transformer* encoder_;
  const Transformer& decoder_;
  Team team_;
  int64_t batch_ = 0, length_ = 0, beams_ = 1;
  bool tabled_ = false;                   // whether the rows' tokens are all in the decoder's table
  size_t steps_ = 0;                      // own tokens of each row
  std::vector<int64_t> tokens_;           // of the prompts [T], later of the rows [R]
  std::vector<int32_t> places_;           // of each in its prompt, later in its sequence
  std::vector<int32_t> lengths_;          // [B] tokens of each user's sequence
  std::vector<int64_t> first_;            // [B + 1] the first token of each user's prompt
  std::vector<int64_t> wide_;             // [B + 1] the same with each prompt padded to whole panels
  std::vector<PromptHeads> prompt_;       // of each layer
  std::vector<std::vector<Floats>> own_;  // of each step and layer: queries, keys and values of its rows
  std::vector<int64_t> begin_;            // [B + 1] the first row of each user
  std::vector<int32_t> row_of_;           // [B, W] of each beam; -1 where it is none
  std::vector<int32_t> ancestors_;        // [steps, R]
  bool noting_ = false;
  Clock::time_point begun_;
  std::vector<Lap> laps_;
  RowTotals totals_;
  Floats x_, seen_, attended_, query_, hidden_, lse_;
};

}  // namespace cemg
