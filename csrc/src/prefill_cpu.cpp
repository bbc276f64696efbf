// The part of BeamDecoder that runs the prompts and attends to them.
#include <algorithm>

#include "cemg/layer_ops_cpu.h"
#include "cemg/transformer_cpu.h"

namespace cemg {
namespace {

constexpr int64_t kTasksPerThread = 4;  // at least, so that all threads finish at about the same time

}  // namespace

int64_t BeamDecoder::first_empty_prompt(const Prompts& prompts) noexcept {
  for (int64_t user = 0; user < prompts.batch; ++user) {
    const int64_t* const mask = prompts.mask + user * prompts.length;
    if (std::all_of(mask, mask + prompts.length, [](int64_t value) { return value == 0; })) return user;
  }
  return -1;
}

int64_t BeamDecoder::first_invalid_token(const Prompts& prompts) const noexcept {
  const int64_t vocabulary = (encoder_ ? *encoder_ : decoder_).vocabulary;
  for (int64_t i = 0; i < prompts.batch * prompts.length; ++i) {
    const int64_t token = prompts.tokens[i];
    if (prompts.mask[i] != 0 && (token < 0 || token >= vocabulary)) return i;
  }
  return -1;
}

double BeamDecoder::prefill(const Prompts& prompts, const PositionTables& prompt_positions,
                            int64_t start_token, const PositionTables& start_positions,
                            const LogitsRequest& request) {
  begin_call();
  unpad_prompts(prompts);
  const Transformer& model = encoder_ ? *encoder_ : decoder_;
  const auto count = static_cast<int64_t>(tokens_.size());
  reserve_buffers(model, count);
  reserve_buffers(decoder_, count);
  run_with_workers(pool_, [&] { run_prompts(model, prompt_positions); });
  const double seconds = elapsed_seconds();
  if (encoder_) {
    tokens_.assign(static_cast<size_t>(batch_), start_token);
    positions_.assign(static_cast<size_t>(batch_), 0);
    run_decoder(start_positions, request);
  } else {
    run_with_workers(pool_, [&] { compute_logits(request); });
  }
  return seconds;
}

// Copies the prompts' tokens without padding, and sets the state of a search before its first decode step.
void BeamDecoder::unpad_prompts(const Prompts& prompts) {
  batch_ = prompts.batch;
  prompt_length_ = prompts.length;
  num_steps_ = 0;
  reset_beams();
  tokens_.clear();
  positions_.clear();
  lengths_.clear();
  prompt_offsets_.assign(1, 0);
  padded_offsets_.assign(1, 0);
  for (int64_t user = 0; user < batch_; ++user) {
    int32_t count = 0;
    for (int64_t s = 0; s < prompts.length; ++s) {
      const int64_t i = user * prompts.length + s;
      if (prompts.mask[i] == 0) continue;
      tokens_.push_back(prompts.tokens[i]);
      // an encoder's bias depends on the position in the padded row
      positions_.push_back(encoder_ ? static_cast<int32_t>(s) : count);
      ++count;
    }
    lengths_.push_back(count);
    prompt_offsets_.push_back(prompt_offsets_.back() + count);
    padded_offsets_.push_back(padded_offsets_.back() + padded(count));
  }
}

// Runs the prompts through all layers. A decoder leaves the hidden states of each prompt's last token in the
// first rows of hidden_states_; an encoder's output becomes the keys and values of cross-attention.
void BeamDecoder::run_prompts(const Transformer& model, const PositionTables& positions) {
  embed_tokens(model, positions, static_cast<int64_t>(tokens_.size()));
  for (size_t number = 0; number < model.layers.size(); ++number) run_prompt_layer(model, number, positions);
  if (!encoder_) return;
  normalize_rows(model.final_norm, prompt_offsets_.back(), model.hidden_size, model.final_scale);
  pack_cross_attention();
}

void BeamDecoder::run_prompt_layer(const Transformer& model, size_t number, const PositionTables& positions) {
  const TransformerLayer& layer = model.layers[number];
  const PromptKVCache& cache = encoder_ ? prompt_kv_[0] : prompt_kv_[number];
  const int64_t tokens = prompt_offsets_.back(), stride = layer.qkv.out_features;
  const bool last_token_only = !encoder_ && number + 1 == model.layers.size();
  const int64_t rows = last_token_only ? batch_ : tokens;
  normalize_rows(layer.attention_norm, tokens, model.hidden_size);
  linear(layer.qkv, normed(), tokens, {}, RowsView<float>{projected_.data(), stride}, pool_);
  record_event("projection");
  if (uses_rotary_or_head_norms(layer, positions)) {
    apply_rotary(model, layer, positions, positions_, projected_.data(), pool_);
    record_event("rotation");
  }
  const float* const keys = projected_.data() + model.heads * model.head_dim;
  pack_prompts(model, keys, keys + model.kv_heads * model.head_dim, stride, cache);
  record_event("packing");
  attend_within_prompts(model, cache, positions, last_token_only);
  record_event("attention");
  if (last_token_only) select_last_tokens(model.hidden_size);
  add_linear(layer.attention_out, attn_out(), rows);
  record_event("projection");
  feed_forward(layer, rows);
}

// Moves the hidden states of each prompt's last token to the first rows.
void BeamDecoder::select_last_tokens(int64_t hidden_size) {
  for (int64_t user = 0; user < batch_; ++user) {
    const float* const last = hidden_states_.data() + (prompt_offsets_[user + 1] - 1) * hidden_size;
    std::copy(last, last + hidden_size, hidden_states_.data() + user * hidden_size);
  }
}

// Computes the decoder's cross-attention keys and values from the encoder's output in normed_.
void BeamDecoder::pack_cross_attention() {
  for (size_t number = 0; number < decoder_.layers.size(); ++number) {
    const Linear& weights = decoder_.layers[number].cross_key_value;
    const int64_t stride = weights.out_features;
    linear(weights, normed(), prompt_offsets_.back(), {}, RowsView<float>{projected_.data(), stride}, pool_);
    record_event("projection");
    const float* const keys = projected_.data();
    pack_prompts(decoder_, keys, keys + stride / 2, stride, prompt_kv_[number]);
    record_event("packing");
  }
}

void BeamDecoder::pack_prompts(const Transformer& model, const float* keys, const float* values,
                               int64_t stride, const PromptKVCache& cache) {
  const int64_t numbers_per_head = prompt_offsets_[batch_] / batch_ * model.head_dim;
  pool_.parallel_for(batch_ * model.kv_heads, kScalarCost * numbers_per_head, [&](TaskRange tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t user = task / model.kv_heads, kv_head = task % model.kv_heads;
      const PackedHead head = prompt_head(model, cache, user, kv_head);
      const int64_t offset = prompt_offsets_[user] * stride + kv_head * model.head_dim;
      pack_head(keys + offset, values + offset, stride, model.head_dim, head);
    }
  });
}

PackedHead BeamDecoder::prompt_head(const Transformer& model, const PromptKVCache& cache, int64_t user,
                                    int64_t kv_head) const {
  const int64_t count = prompt_offsets_[user + 1] - prompt_offsets_[user];
  const int64_t value_width = padded(model.head_dim);
  const int64_t key_offset = model.kv_heads * padded_offsets_[user] + kv_head * padded(count);
  const int64_t value_offset = model.kv_heads * prompt_offsets_[user] + kv_head * count;
  return {cache.keys.data() + model.head_dim * key_offset, cache.values.data() + value_width * value_offset,
          count};
}

// Calls work(user, head, range) on ranges of the queries of each head of each user, of which there are
// num_queries(user).
template <class Count, class Work>
void BeamDecoder::parallel_for_heads(const Transformer& model, const Count& num_queries, const Work& work) {
  const int64_t chunks = std::max<int64_t>(1, kTasksPerThread * pool_.threads() / (batch_ * model.heads));
  int64_t total = 0;
  for (int64_t user = 0; user < batch_; ++user) total += num_queries(user);
  const int64_t keys = prompt_offsets_[batch_] / batch_;
  const int64_t cost = 4 * keys * model.head_dim * total / (batch_ * chunks);
  pool_.parallel_for(batch_ * model.heads * chunks, cost, [&](TaskRange tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t chunk = task % chunks, user = task / chunks / model.heads, count = num_queries(user);
      const TaskRange range{count * chunk / chunks, count * (chunk + 1) / chunks};
      if (range.begin < range.end) work(user, task / chunks % model.heads, range);
    }
  });
}

// Self-attention of the prompts: over all tokens in an encoder, causal in a decoder. `last_token_only`: only
// the last token of each prompt has a query.
void BeamDecoder::attend_within_prompts(const Transformer& model, const PromptKVCache& cache,
                                        const PositionTables& positions, bool last_token_only) {
  const int64_t size = model.head_dim, stride = model.layers[0].qkv.out_features;
  const int64_t distances = 2 * prompt_length_ - 1;
  const auto num_queries = [&](int64_t user) {
    return last_token_only ? 1 : prompt_offsets_[user + 1] - prompt_offsets_[user];
  };
  parallel_for_heads(model, num_queries, [&](int64_t user, int64_t head, TaskRange range) {
    const PackedHead keys = prompt_head(model, cache, user, head * model.kv_heads / model.heads);
    const int64_t first = last_token_only ? keys.count - 1 : range.begin;
    AttentionMask mask;
    if (encoder_) {
      mask.query_positions = positions_.data() + prompt_offsets_[user] + first;
      mask.key_positions = positions_.data() + prompt_offsets_[user];
      if (positions.bias) mask.bias = positions.bias + head * distances + distances / 2;
    } else {
      mask.causal_offset = first;
    }
    const float* const queries = projected_.data() + (prompt_offsets_[user] + first) * stride + head * size;
    const int64_t out_row = last_token_only ? user : prompt_offsets_[user] + first;
    attend({queries, stride, range.end - range.begin, size}, keys, model.attention_scale, mask,
           attn_out().row(out_row) + head * size, attn_out().stride, nullptr, 0,
           AttentionWorkspace::of_thread());
  });
}

// Attention of the beams over their user's prompt, merged with that over the beams' own tokens if there is a
// cache of these.
void BeamDecoder::attend_to_prompts(RowsView<const float> queries, const PromptKVCache& prompt_cache,
                                    const BeamKVCache* beam_cache) {
  const Transformer& model = decoder_;
  const int64_t size = model.head_dim;
  const auto num_queries = [&](int64_t user) { return row_offsets_[user + 1] - row_offsets_[user]; };
  parallel_for_heads(model, num_queries, [&](int64_t user, int64_t head, TaskRange range) {
    const int64_t begin = row_offsets_[user] + range.begin, end = row_offsets_[user] + range.end;
    const PackedHead keys = prompt_head(model, prompt_cache, user, head * model.kv_heads / model.heads);
    float* const lse = beam_cache ? prompt_lse_.data() + head : nullptr;
    attend({queries.row(begin) + head * size, queries.stride, end - begin, size}, keys, model.attention_scale,
           {}, attn_out().row(begin) + head * size, attn_out().stride,
           beam_cache ? lse + begin * model.heads : nullptr, model.heads, AttentionWorkspace::of_thread());
    if (!beam_cache) return;
    for (int64_t row = begin; row < end; ++row) {
      attend_to_beam(*beam_cache, queries.row(row) + head * size, row, head, model.attention_scale,
                     lse + row * model.heads, attn_out().row(row) + head * size);
    }
  });
}

}  // namespace cemg
