#include "cemg/transformer_cpu.h"

#include <algorithm>
#include <numeric>

#include "cemg/layer_ops_cpu.h"

namespace cemg {

BeamDecoder::BeamDecoder(const Transformer* encoder, const Transformer& decoder, int64_t threads)
    : encoder_(encoder), decoder_(decoder), pool_(threads), prompt_kv_(decoder.layers.size()) {}

void BeamDecoder::begin_call() {
  call_begin_ = Clock::now();
  profile_events_.clear();
}

// Ends a stage of the call.
void BeamDecoder::record_event(const char* name) {
  if (profiling_) profile_events_.push_back({name, elapsed_seconds()});
}

int64_t BeamDecoder::nbytes() const noexcept {
  int64_t total = 0;
  for (const Buffer* buffer :
       {&hidden_states_, &normed_, &attn_out_, &projected_, &intermediate_, &prompt_lse_}) {
    total += buffer->nbytes();
  }
  for (const PromptKVCache& cache : prompt_kv_) total += cache.keys.nbytes() + cache.values.nbytes();
  for (const std::vector<Buffer>& step : step_qkv_) {
    for (const Buffer& layer : step) total += layer.nbytes();
  }
  return total;
}

int64_t BeamDecoder::first_invalid_parent(const BeamInput& input) const noexcept {
  for (int64_t beam = 0; beam < batch_ * input.beams; ++beam) {
    if (input.active && !input.active[beam]) continue;
    const int64_t parent = input.parents[beam];
    if (parent < 0 || parent >= beams_ || row_of_beam_[beam / input.beams * beams_ + parent] < 0) return beam;
  }
  return -1;
}

int64_t BeamDecoder::first_invalid_beam_token(const BeamInput& input) const noexcept {
  for (int64_t beam = 0; beam < batch_ * input.beams; ++beam) {
    if ((!input.active || input.active[beam]) && !in_vocabulary(input.tokens[beam])) return beam;
  }
  return -1;
}

void BeamDecoder::decode_step(const BeamInput& input, const PositionTables& positions,
                              const LogitsRequest& request) {
  begin_call();
  std::vector<int32_t> row_of_beam(static_cast<size_t>(batch_ * input.beams), -1), parent_rows;
  tokens_.clear();
  positions_.clear();
  row_offsets_.assign(1, 0);
  for (int64_t user = 0; user < batch_; ++user) {
    for (int64_t beam = user * input.beams; beam < (user + 1) * input.beams; ++beam) {
      if (input.active && !input.active[beam]) continue;
      row_of_beam[beam] = static_cast<int32_t>(tokens_.size());
      parent_rows.push_back(row_of_beam_[user * beams_ + input.parents[beam]]);
      tokens_.push_back(input.tokens[beam]);
      positions_.push_back(lengths_[user]);
    }
    row_offsets_.push_back(static_cast<int64_t>(tokens_.size()));
    ++lengths_[user];
  }
  append_ancestors(parent_rows);
  row_of_beam_ = std::move(row_of_beam);
  beams_ = input.beams;
  run_decoder(positions, request);
}

// Extends the ancestors of each new row's parent by the row itself.
void BeamDecoder::append_ancestors(const std::vector<int32_t>& parent_rows) {
  const auto rows = static_cast<int64_t>(parent_rows.size()), steps = static_cast<int64_t>(num_steps_);
  const int64_t previous_rows = steps == 0 ? 0 : static_cast<int64_t>(ancestors_.size()) / steps;
  std::vector<int32_t> ancestors(static_cast<size_t>((steps + 1) * rows));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t t = 0; t < steps; ++t) {
      ancestors[t * rows + row] = ancestors_[t * previous_rows + parent_rows[row]];
    }
    ancestors[steps * rows + row] = static_cast<int32_t>(row);
  }
  ancestors_ = std::move(ancestors);
}

void BeamDecoder::reset_to_prefill() {
  const size_t prefill_steps = encoder_ ? 1 : 0;  // the start token's step
  if (num_steps_ < prefill_steps) return;
  for (int32_t& length : lengths_) length -= static_cast<int32_t>(num_steps_ - prefill_steps);
  num_steps_ = prefill_steps;
  reset_beams();
}

// One beam per user. The start token of an encoder-decoder model, if any, is its only ancestor.
void BeamDecoder::reset_beams() {
  beams_ = 1;
  row_of_beam_.resize(static_cast<size_t>(batch_));
  std::iota(row_of_beam_.begin(), row_of_beam_.end(), 0);
  row_offsets_.resize(static_cast<size_t>(batch_ + 1));
  std::iota(row_offsets_.begin(), row_offsets_.end(), 0);
  ancestors_.resize(static_cast<size_t>(encoder_ ? batch_ : 0));
  std::iota(ancestors_.begin(), ancestors_.end(), 0);
}

void BeamDecoder::reserve_buffers(const Transformer& model, int64_t rows) {
  hidden_states_.reserve(rows * model.hidden_size);
  normed_.reserve(rows * padded_stride(model.hidden_size));
  attn_out_.reserve(rows * padded_stride(model.heads * model.head_dim));
  prompt_lse_.reserve(rows * model.heads);
  int64_t projected = 0, intermediate = 0;
  for (const TransformerLayer& layer : model.layers) {
    projected = std::max({projected, layer.qkv.out_features, layer.cross_query.out_features,
                          layer.cross_key_value.out_features});
    intermediate = std::max(intermediate, padded_stride(layer.up.out_features));
  }
  projected_.reserve(rows * projected);
  intermediate_.reserve(rows * intermediate);
  for (PromptKVCache& cache : prompt_kv_) {
    cache.keys.reserve(model.kv_heads * model.head_dim * padded_offsets_.back());
    cache.values.reserve(model.kv_heads * padded(model.head_dim) * prompt_offsets_.back());
  }
}

void BeamDecoder::embed_tokens(const Transformer& model, const PositionTables& positions, int64_t rows) {
  const int64_t width = model.hidden_size;
  pool_.parallel_for(rows, kScalarCost * width, [&](TaskRange range) {
    for (int64_t row = range.begin; row < range.end; ++row) {
      const float* const embedding = model.embedding + tokens_[row] * width;
      float* const out = hidden_states_.data() + row * width;
      std::copy(embedding, embedding + width, out);
      if (!positions.embedding) continue;
      const float* const position = positions.embedding + positions_[row] * width;
      for (int64_t i = 0; i < width; ++i) out[i] += position[i];
    }
  });
  record_event("embedding");
}

// normed_ = scale * norm(hidden_states_)
void BeamDecoder::normalize_rows(const Norm& norm, int64_t rows, int64_t hidden_size, float scale) {
  norm_rows(norm, hidden_states(), rows, hidden_size, scale, normed(), pool_);
  record_event("norm");
}

// hidden_states_ += linear(x)
void BeamDecoder::add_linear(const Linear& weights, RowsView<const float> x, int64_t rows) {
  Epilogue epilogue;
  epilogue.add_out = true;
  linear(weights, x, rows, epilogue, hidden_states(), pool_);
}

void BeamDecoder::feed_forward(const TransformerLayer& layer, int64_t rows) {
  const RowsView<float> intermediate{intermediate_.data(), padded_stride(layer.up.out_features)};
  normalize_rows(layer.feed_forward_norm, rows, layer.up.in_features);
  Epilogue epilogue;
  epilogue.activation = layer.activation;
  if (layer.gate) {
    linear(layer.gate, normed(), rows, epilogue, intermediate, pool_);
    record_event("feed-forward");
    epilogue = {};
    epilogue.multiply_out = true;
  }
  linear(layer.up, normed(), rows, epilogue, intermediate, pool_);
  record_event("feed-forward");
  add_linear(layer.down, intermediate, rows);
  record_event("feed-forward");
}

// Runs the decoder on tokens_, one per row.
void BeamDecoder::run_decoder(const PositionTables& positions, const LogitsRequest& request) {
  const auto rows = static_cast<int64_t>(tokens_.size());
  reserve_buffers(decoder_, rows);
  use_code_table_ = decoder_.code_table && std::all_of(tokens_.begin(), tokens_.end(), [this](int64_t token) {
                      return token >= decoder_.first_code && token < decoder_.first_code + decoder_.num_codes;
                    });
  if (++num_steps_ > step_qkv_.size()) step_qkv_.emplace_back(decoder_.layers.size());
  for (size_t number = 0; number < decoder_.layers.size(); ++number) {
    step_qkv_[num_steps_ - 1][number].reserve(rows * decoder_.layers[number].qkv.out_features);
  }
  run_with_workers(pool_, [&] {
    embed_tokens(decoder_, positions, rows);
    for (size_t number = 0; number < decoder_.layers.size(); ++number) run_decoder_layer(number, positions);
    compute_logits(request);
  });
}

// Queries, keys and values of the rows: from the code table in the first layer if it has all tokens, else
// from hidden_states_.
void BeamDecoder::project_qkv(size_t number, RowsView<float> qkv) {
  const Transformer& model = decoder_;
  const Linear& weights = model.layers[number].qkv;
  const int64_t rows = row_offsets_.back(), width = weights.out_features;
  if (number == 0 && use_code_table_) {
    pool_.parallel_for(rows, kScalarCost * width, [&](TaskRange range) {
      for (int64_t row = range.begin; row < range.end; ++row) {
        const float* const entry = model.code_table + (tokens_[row] - model.first_code) * width;
        std::copy(entry, entry + width, qkv.row(row));
      }
    });
  } else {
    normalize_rows(model.layers[number].attention_norm, rows, model.hidden_size);
    linear(weights, normed(), rows, {}, qkv, pool_);
  }
  record_event("projection");
}

void BeamDecoder::run_decoder_layer(size_t number, const PositionTables& positions) {
  const Transformer& model = decoder_;
  const TransformerLayer& layer = model.layers[number];
  const int64_t rows = row_offsets_.back(), size = model.head_dim, stride = layer.qkv.out_features;
  float* const qkv = step_qkv_[num_steps_ - 1][number].data();
  project_qkv(number, {qkv, stride});
  if (uses_rotary_or_head_norms(layer, positions)) {
    apply_rotary(model, layer, positions, positions_, qkv, pool_);
    record_event("rotation");
  }
  std::vector<StepKeyValues> steps;
  for (size_t t = 0; t < num_steps_; ++t) {
    const float* const keys = step_qkv_[t][number].data() + model.heads * size;
    steps.push_back({keys, keys + model.kv_heads * size, stride});
  }
  const BeamKVCache cache{steps, ancestors_.data(), rows, model.heads, model.kv_heads, size, positions.bias};
  if (encoder_) {
    attend_to_beams({qkv, stride}, cache);
  } else {
    attend_to_prompts({qkv, stride}, prompt_kv_[number], &cache);
  }
  record_event("attention");
  add_linear(layer.attention_out, attn_out(), rows);
  record_event("projection");
  if (encoder_) cross_attention(number, rows);
  feed_forward(layer, rows);
}

// Attention of the beams over their own tokens alone.
void BeamDecoder::attend_to_beams(RowsView<const float> queries, const BeamKVCache& cache) {
  const Transformer& model = decoder_;
  const int64_t size = model.head_dim;
  const auto numbers_per_row = 2 * static_cast<int64_t>(num_steps_) * model.heads * size;
  pool_.parallel_for(cache.rows, kScalarCost * numbers_per_row, [&](TaskRange range) {
    for (int64_t row = range.begin; row < range.end; ++row) {
      for (int64_t head = 0; head < model.heads; ++head) {
        attend_to_beam(cache, queries.row(row) + head * size, row, head, model.attention_scale, nullptr,
                       attn_out().row(row) + head * size);
      }
    }
  });
}

void BeamDecoder::cross_attention(size_t number, int64_t rows) {
  const TransformerLayer& layer = decoder_.layers[number];
  normalize_rows(layer.cross_norm, rows, decoder_.hidden_size);
  const RowsView<float> queries{projected_.data(), layer.cross_query.out_features};
  linear(layer.cross_query, normed(), rows, {}, queries, pool_);
  record_event("projection");
  attend_to_prompts(queries, prompt_kv_[number], nullptr);
  record_event("attention");
  add_linear(layer.cross_out, attn_out(), rows);
  record_event("projection");
}

void BeamDecoder::compute_logits(const LogitsRequest& request) {
  const int64_t rows = row_offsets_.back();
  normalize_rows(decoder_.final_norm, rows, decoder_.hidden_size, decoder_.final_scale);
  const RowsView<float> logits{request.logits, request.columns.out_features};
  linear(request.columns, normed(), rows, {}, logits, pool_);
  if (request.vocabulary)
    row_logsumexp_.compute(request.vocabulary, normed(), rows, request.logsumexp, pool_);
  record_event("head");
}

}  // namespace cemg
