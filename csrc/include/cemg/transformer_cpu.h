// A transformer's decoder for beam search on the CPU in float32: T5, GPT-2 and the Llama family. One call per
// decode step, whose threads share each product.
//
// B users, W beams, R rows (the beams that a step runs for), T tokens of all prompts without padding, H heads
// over G key-value heads of size Dh, d the hidden size.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "cemg/attention_cpu.h"
#include "cemg/gemm_cpu.h"

namespace cemg {

// RMSNorm, or LayerNorm if it has a bias. A norm without a weight counts as absent.
struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0;

  explicit operator bool() const noexcept { return weight != nullptr; }
};

// Parts that a model does not have are absent: the norms of single heads, cross-attention, the gate.
struct TransformerLayer {
  Norm attention_norm;
  Linear qkv;  // queries of H heads, keys and values of G heads
  Norm query_norm, key_norm;
  Linear attention_out;
  Norm cross_norm;
  Linear cross_query, cross_key_value, cross_out;
  Norm feed_forward_norm;
  Linear gate, up, down;  // down(activation(up(x))), or down(activation(gate(x)) * up(x))
  Activation activation;
};

struct Transformer {
  int64_t hidden_size, heads, kv_heads, head_dim;
  float attention_scale;
  const float* embedding;  // [vocabulary, d]
  int64_t vocabulary;
  Norm final_norm;
  float final_scale;  // multiplies the output of final_norm
  std::vector<TransformerLayer> layers;
  // Outputs of the first layer's qkv for the tokens from `first_code` on, [num_codes, qkv.out_features]; null
  // if they are not precomputed.
  const float* code_table = nullptr;
  int64_t first_code = 0, num_codes = 0;
};

// Tables indexed by a token's position; each may be null.
struct PositionTables {
  const float* embedding = nullptr;  // [P, d], added to the token embeddings
  const float* cosine = nullptr;     // [P, Dh] of the rotary embedding
  const float* sine = nullptr;
  const float* bias = nullptr;  // of an encoder by distance [H, 2 S - 1]; of generated tokens [T, H]
};

struct Prompts {
  const int64_t* tokens;  // [B, S]
  const int64_t* mask;    // [B, S], 0 for padding
  int64_t batch, length;
};

// The beams [B, W] of a decode step: the token of each, and the beam of the previous step that it extends. If
// `active` is not null, only the beams for which it is true become rows; later steps cannot extend the
// others.
struct BeamInput {
  const int64_t* tokens;
  const int64_t* parents;
  const uint8_t* active;
  int64_t beams;
};

// The outputs of a step: the logits of `columns`, to `logits` [R, columns.out_features], and, unless
// `vocabulary` is absent, the log-sum-exp of its logits, to `logsumexp` [R].
struct LogitsRequest {
  Linear columns;
  Linear vocabulary;
  float* logits;
  float* logsumexp;
};

// Uninitialized floats that only grow.
class Buffer {
 public:
  float* reserve(int64_t count) {
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

// A stage of a call, for profiles: its name, and when it ended, in seconds since the call began.
struct ProfileEvent {
  const char* name;
  double end;
};

// The state of one search, and scratch buffers that the next search reuses. `encoder` is null for a
// decoder-only model. The weights are borrowed.
class BeamDecoder {
 public:
  BeamDecoder(const Transformer* encoder, const Transformer& decoder, int64_t threads);

  int64_t threads() const noexcept { return pool_.threads(); }

  // Turns the recording of profile events on or off for the following calls.
  void set_profiling(bool enabled) noexcept { profiling_ = enabled; }

  // The events of the last call.
  const std::vector<ProfileEvent>& profile_events() const noexcept { return profile_events_; }

  // The size of all buffers in bytes.
  int64_t nbytes() const noexcept;

  // Tokens generated per row so far, at most kMaxSteps. The start token of an encoder-decoder model counts.
  int64_t num_steps() const noexcept { return static_cast<int64_t>(num_steps_); }

  // The index of the first prompt without tokens; -1 if all have some.
  static int64_t first_empty_prompt(const Prompts& prompts) noexcept;

  // The index in [B, S] of the first token outside the vocabulary; -1 if there is none.
  int64_t first_invalid_token(const Prompts& prompts) const noexcept;

  // Whether the decoder's vocabulary has this token.
  bool in_vocabulary(int64_t token) const noexcept { return token >= 0 && token < decoder_.vocabulary; }

  // The number of users; 0 before prefill.
  int64_t batch() const noexcept { return batch_; }

  // Runs the model on the prompts and computes logits for one row per user. An encoder-decoder model then
  // runs its decoder on `start_token`. There must be one prompt or more, each with one token or more.
  // `prompt_positions` are the tables of the prompt, `start_positions` those of the start token. Returns the
  // seconds that the prompts took.
  double prefill(const Prompts& prompts, const PositionTables& prompt_positions, int64_t start_token,
                 const PositionTables& start_positions, const LogitsRequest& request);

  // The first active beam whose parent was not an active beam of the previous step; -1 if there is none.
  int64_t first_invalid_parent(const BeamInput& input) const noexcept;

  // The first active beam whose token is outside the decoder's vocabulary; -1 if there is none.
  int64_t first_invalid_beam_token(const BeamInput& input) const noexcept;

  // Runs the decoder on the tokens of the active beams, of which there must be one or more, and computes
  // their logits in the order of the beams.
  void decode_step(const BeamInput& input, const PositionTables& positions, const LogitsRequest& request);

  // Returns to the state after prefill, without running the prompts again.
  void reset_to_prefill();

 protected:
  // Since the last prefill or decode step began.
  double elapsed_seconds() const { return std::chrono::duration<double>(Clock::now() - call_begin_).count(); }

 private:
  // Packed keys and values of all prompts in one layer, by user and head.
  struct PromptKVCache {
    Buffer keys, values;
  };

  using Clock = std::chrono::steady_clock;

  void begin_call();
  void record_event(const char* name);
  void append_ancestors(const std::vector<int32_t>& parent_rows);
  void reset_beams();
  void unpad_prompts(const Prompts& prompts);
  void reserve_buffers(const Transformer& model, int64_t rows);
  void embed_tokens(const Transformer& model, const PositionTables& positions, int64_t rows);
  void run_prompts(const Transformer& model, const PositionTables& positions);
  void run_prompt_layer(const Transformer& model, size_t number, const PositionTables& positions);
  void select_last_tokens(int64_t hidden_size);
  void pack_cross_attention();
  void pack_prompts(const Transformer& model, const float* keys, const float* values, int64_t stride,
                    const PromptKVCache& cache);
  PackedHead prompt_head(const Transformer& model, const PromptKVCache& cache, int64_t user,
                         int64_t kv_head) const;
  template <class Count, class Work>
  void parallel_for_heads(const Transformer& model, const Count& num_queries, const Work& work);
  void attend_within_prompts(const Transformer& model, const PromptKVCache& cache,
                             const PositionTables& positions, bool last_token_only);
  void attend_to_prompts(RowsView<const float> queries, const PromptKVCache& prompt_cache,
                         const BeamKVCache* beam_cache);
  void attend_to_beams(RowsView<const float> queries, const BeamKVCache& cache);
  void add_linear(const Linear& weights, RowsView<const float> x, int64_t rows);
  void normalize_rows(const Norm& norm, int64_t rows, int64_t hidden_size, float scale = 1.0f);
  void feed_forward(const TransformerLayer& layer, int64_t rows);
  void run_decoder(const PositionTables& positions, const LogitsRequest& request);
  void run_decoder_layer(size_t number, const PositionTables& positions);
  void cross_attention(size_t number, int64_t rows);
  void project_qkv(size_t number, RowsView<float> qkv);
  void compute_logits(const LogitsRequest& request);

  RowsView<float> hidden_states() const noexcept { return {hidden_states_.data(), decoder_.hidden_size}; }
  RowsView<float> normed() const noexcept { return {normed_.data(), padded_stride(decoder_.hidden_size)}; }
  RowsView<float> attn_out() const noexcept {
    return {attn_out_.data(), padded_stride(decoder_.heads * decoder_.head_dim)};
  }

  const Transformer* encoder_;
  const Transformer& decoder_;
  ThreadPool pool_;
  int64_t batch_ = 0, prompt_length_ = 0, beams_ = 1;
  bool use_code_table_ = false;  // whether the code table has all tokens of this step
  size_t num_steps_ = 0;
  std::vector<int64_t> tokens_;                // during prefill of the prompts [T], then of the rows [R]
  std::vector<int32_t> positions_;             // of these tokens in their prompt or sequence
  std::vector<int32_t> lengths_;               // [B] tokens of each user's sequences, prompt included
  std::vector<int64_t> prompt_offsets_;        // [B + 1] the first token of each prompt
  std::vector<int64_t> padded_offsets_;        // [B + 1] the same with each prompt padded to whole panels
  std::vector<PromptKVCache> prompt_kv_;       // of each layer
  std::vector<std::vector<Buffer>> step_qkv_;  // of each step and layer: queries, keys and values of the rows
  std::vector<int64_t> row_offsets_;           // [B + 1] the first row of each user
  std::vector<int32_t> row_of_beam_;           // [B, W], -1 for inactive beams
  std::vector<int32_t> ancestors_;             // [steps, R], see BeamKVCache
  bool profiling_ = false;
  Clock::time_point call_begin_;
  std::vector<ProfileEvent> profile_events_;
  RowLogSumExp row_logsumexp_;
  // Activations of the current layer; projected_: queries, or queries, keys and values; prompt_lse_ [R, H].
  Buffer hidden_states_, normed_, attn_out_, projected_, intermediate_, prompt_lse_;
};

}  // namespace cemg
