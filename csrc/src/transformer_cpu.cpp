#include "cemg/transformer_cpu.h"

#include <algorithm>
#include <cmath>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kTasksEach = 4;  // of a worker at least, so that all end at about the same time

CEMG_CLONES void norm_row(const Norm& norm, const float* x, int64_t width, float scale, float* out) noexcept {
  constexpr int64_t kLanes = 16;
  const int64_t whole = width - width % kLanes;
  const auto sum_of = [&](auto&& term) __attribute__((always_inline)) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t c = 0; c < kLanes; ++c) lanes[c] += term(x[i + c]);
    }
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    for (int64_t i = whole; i < width; ++i) sum += term(x[i]);
    return sum;
  };
  const auto count = static_cast<float>(width);
  if (!norm.bias) {
    const float mean = sum_of([](float v) { return v * v; }) / count;
    const float factor = scale / std::sqrt(mean + norm.eps);
    for (int64_t i = 0; i < width; ++i) out[i] = norm.weight[i] * (x[i] * factor);
    return;
  }
  const float mean = sum_of([](float v) { return v; }) / count;
  const float variance = sum_of([mean](float v) { return (v - mean) * (v - mean); }) / count;
  const float factor = 1.0f / std::sqrt(variance + norm.eps);
  for (int64_t i = 0; i < width; ++i) {
    out[i] = scale * (norm.weight[i] * ((x[i] - mean) * factor) + norm.bias[i]);
  }
}

void norm_rows(const Norm& norm, Rows<const float> x, int64_t rows, int64_t width, float scale,
               Rows<float> out, const Worker& worker) noexcept {
  const auto [begin, end] = worker.share(rows);
  for (int64_t row = begin; row < end; ++row) norm_row(norm, x.at(row), width, scale, out.at(row));
}

CEMG_CLONES void rotate(float* x, const float* cosine, const float* sine, int64_t size) noexcept {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosine[i] - second * sine[i];
    x[i + half] = second * cosine[i + half] + first * sine[i + half];
  }
}

// The queries and keys of some rows, normed and rotated in place where the layer does so.
void turn(const Transformer& model, const TransformerLayer& layer, const Places& places,
          const std::vector<int32_t>& place, float* qkv, const Worker& worker) noexcept {
  const int64_t size = model.head_dim, stride = layer.qkv.out;
  const auto [begin, end] = worker.share(static_cast<int64_t>(place.size()));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = place[static_cast<size_t>(row)] * size;
    for (int64_t head = 0; head < model.heads + model.kv_heads; ++head) {
      float* const x = qkv + row * stride + head * size;
      const Norm& norm = head < model.heads ? layer.query_norm : layer.key_norm;
      if (norm) norm_row(norm, x, size, 1.0f, x);
      if (places.cosine) rotate(x, places.cosine + at, places.sine + at, size);
    }
  }
}

bool turns(const TransformerLayer& layer, const Places& places) noexcept {
  return places.cosine != nullptr || layer.query_norm;
}

}  // namespace

BeamDecoder::BeamDecoder(const Transformer* encoder, const Transformer& decoder, int64_t threads)
    : encoder_(encoder), decoder_(decoder), threads_(threads), prompt_(decoder.layers.size()) {}

void BeamDecoder::begin_laps() {
  begun_ = Clock::now();
  laps_.clear();
}

double BeamDecoder::seconds() const {
  return std::chrono::duration<double>(Clock::now() - begun_).count();
}

void BeamDecoder::done(const char* part, const Worker& worker) const {
  worker.wait();
  if (noting_ && worker.index == 0) laps_.push_back({part, seconds()});
}

int64_t BeamDecoder::nbytes() const noexcept {
  int64_t total = 0;
  for (const Floats* own : {&x_, &seen_, &attended_, &query_, &hidden_, &lse_}) total += own->nbytes();
  for (const PromptHeads& heads : prompt_) total += heads.keys.nbytes() + heads.values.nbytes();
  for (const std::vector<Floats>& step : own_) {
    for (const Floats& rows : step) total += rows.nbytes();
  }
  return total;
}

int64_t BeamDecoder::wrong_token(const Prompts& prompts) const noexcept {
  const int64_t vocabulary = (encoder_ ? *encoder_ : decoder_).vocabulary;
  for (int64_t at = 0; at < prompts.batch * prompts.length; ++at) {
    const int64_t token = prompts.tokens[at];
    if (prompts.mask[at] != 0 && (token < 0 || token >= vocabulary)) return at;
  }
  return -1;
}

double BeamDecoder::start(const Prompts& prompts, const Places& places, int64_t start_token,
                          const Places& own_places, const Wanted& wanted) {
  begin_laps();
  read(prompts);
  const Transformer& reader = encoder_ ? *encoder_ : decoder_;
  const auto count = static_cast<int64_t>(tokens_.size());
  make_room(reader, count);
  make_room(decoder_, count);
  run_team(threads_, [&](const Worker& worker) { read_prompt(reader, places, worker); });
  const double spent = seconds();
  if (encoder_) {
    tokens_.assign(static_cast<size_t>(batch_), start_token);
    places_.assign(static_cast<size_t>(batch_), 0);
    for (int32_t user = 0; user < batch_; ++user) ancestors_.push_back(user);
    own_step(own_places, wanted);
  } else {
    RowTotals totals(wanted.all ? batch_ : 0, threads_);
    run_team(threads_, [&](const Worker& worker) { answer(wanted, totals, worker); });
  }
  return spent;
}

void BeamDecoder::step(const int64_t* tokens, const int64_t* parents, int64_t beams, const Places& places,
                       const Wanted& wanted) {
  begin_laps();
  const int64_t rows = batch_ * beams, before = batch_ * beams_;
  const auto steps = static_cast<int64_t>(steps_);
  std::vector<int32_t> grown(static_cast<size_t>((steps + 1) * rows));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t parent = row / beams * beams_ + parents[row];
    for (int64_t t = 0; t < steps; ++t) grown[t * rows + row] = ancestors_[t * before + parent];
    grown[steps * rows + row] = static_cast<int32_t>(row);
  }
  ancestors_ = std::move(grown);
  beams_ = beams;
  tokens_.assign(tokens, tokens + rows);
  places_.resize(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) places_[row] = lengths_[row / beams];
  for (int32_t& length : lengths_) ++length;
  own_step(places, wanted);
}

void BeamDecoder::read(const Prompts& prompts) {
  batch_ = prompts.batch;
  length_ = prompts.length;
  beams_ = 1;
  steps_ = 0;
  tokens_.clear();
  places_.clear();
  lengths_.clear();
  ancestors_.clear();
  first_.assign(1, 0);
  wide_.assign(1, 0);
  for (int64_t user = 0; user < batch_; ++user) {
    int32_t count = 0;
    for (int64_t s = 0; s < prompts.length; ++s) {
      const int64_t at = user * prompts.length + s;
      if (prompts.mask[at] == 0) continue;
      tokens_.push_back(prompts.tokens[at]);
      // an encoder's bias is by the place in the padded row
      places_.push_back(encoder_ ? static_cast<int32_t>(s) : count);
      ++count;
    }
    lengths_.push_back(count);
    first_.push_back(first_.back() + count);
    wide_.push_back(wide_.back() + padded(count));
  }
}

void BeamDecoder::make_room(const Transformer& model, int64_t rows) {
  x_.room(rows * model.width);
  seen_.room(rows * stride_of(model.width));
  attended_.room(rows * stride_of(model.heads * model.head_dim));
  lse_.room(rows * model.heads);
  int64_t query = 0, hidden = 0;
  for (const TransformerLayer& layer : model.layers) {
    query = std::max({query, layer.qkv.out, layer.cross_query.out, layer.cross_key_value.out});
    hidden = std::max(hidden, stride_of(layer.up.out));
  }
  query_.room(rows * query);
  hidden_.room(rows * hidden);
  for (PromptHeads& heads : prompt_) {
    heads.keys.room(model.kv_heads * model.head_dim * wide_.back());
    heads.values.room(model.kv_heads * padded(model.head_dim) * first_.back());
  }
}

void BeamDecoder::embed(const Transformer& model, const Places& places, int64_t rows, const Worker& worker) {
  const int64_t width = model.width;
  const auto [begin, end] = worker.share(rows);
  for (int64_t row = begin; row < end; ++row) {
    const float* const from = model.embedding + tokens_[row] * width;
    float* const to = x_.data() + row * width;
    std::copy(from, from + width, to);
    if (!places.embedding) continue;
    const float* const place = places.embedding + places_[row] * width;
    for (int64_t i = 0; i < width; ++i) to[i] += place[i];
  }
  done("embedding", worker);
}

// The prompts through all layers. Of a decoder, what the last token of each gives comes to the first rows of
// x_; of an encoder, its output becomes the keys and values of cross-attention.
void BeamDecoder::read_prompt(const Transformer& model, const Places& places, const Worker& worker) {
  const auto rows = static_cast<int64_t>(tokens_.size());
  embed(model, places, rows, worker);
  for (size_t number = 0; number < model.layers.size(); ++number) {
    const TransformerLayer& layer = model.layers[number];
    const PromptHeads& heads = encoder_ ? prompt_[0] : prompt_[number];
    const bool last = !encoder_ && number + 1 == model.layers.size();
    norm_rows(layer.norm, x(), rows, model.width, 1.0f, seen(), worker);
    done("norm", worker);
    linear(layer.qkv, seen(), rows, {}, Rows<float>{query_.data(), layer.qkv.out}, worker);
    done("projection", worker);
    if (turns(layer, places)) {
      turn(model, layer, places, places_, query_.data(), worker);
      done("rotation", worker);
    }
    const float* const keys = query_.data() + model.heads * model.head_dim;
    pack_prompt(model, keys, keys + model.kv_heads * model.head_dim, layer.qkv.out, heads, worker);
    done("packing", worker);
    attend_in_prompt(model, heads, places, last, worker);
    done("attention", worker);
    if (last && worker.index == 0) {
      for (int64_t user = 0; user < batch_; ++user) {
        const float* const from = x_.data() + (first_[user + 1] - 1) * model.width;
        std::copy(from, from + model.width, x_.data() + user * model.width);
      }
    }
    worker.wait();
    add(layer.out, attended(), last ? batch_ : rows, worker);
    done("projection", worker);
    feed(layer, last ? batch_ : rows, worker);
  }
  if (!encoder_) return;
  norm_rows(model.last, x(), rows, model.width, model.last_scale, seen(), worker);
  done("norm", worker);
  for (size_t number = 0; number < decoder_.layers.size(); ++number) {
    const Linear& weights = decoder_.layers[number].cross_key_value;
    linear(weights, seen(), rows, {}, Rows<float>{query_.data(), weights.out}, worker);
    done("projection", worker);
    const float* const keys = query_.data();
    pack_prompt(decoder_, keys, keys + weights.out / 2, weights.out, prompt_[number], worker);
    done("packing", worker);
  }
}

void BeamDecoder::pack_prompt(const Transformer& model, const float* keys, const float* values,
                              int64_t stride, const PromptHeads& to, const Worker& worker) const {
  const auto [begin, end] = worker.share(batch_ * model.kv_heads);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t user = task / model.kv_heads, group = task % model.kv_heads;
    const PackedHead head = prompt_head(model, to, user, group);
    const int64_t at = first_[user] * stride + group * model.head_dim;
    pack_head(keys + at, values + at, stride, model.head_dim, head);
  }
}

PackedHead BeamDecoder::prompt_head(const Transformer& model, const PromptHeads& heads, int64_t user,
                                    int64_t group) const {
  const int64_t count = first_[user + 1] - first_[user], deep = padded(model.head_dim);
  return {heads.keys.data() + model.head_dim * (model.kv_heads * wide_[user] + group * padded(count)),
          heads.values.data() + deep * (model.kv_heads * first_[user] + group * count), count};
}

// The tokens of each prompt over each other, or over all before in a decoder; there in the last layer the
// last token alone.
void BeamDecoder::attend_in_prompt(const Transformer& model, const PromptHeads& heads, const Places& places,
                                   bool last, const Worker& worker) const {
  const int64_t size = model.head_dim, stride = model.layers[0].qkv.out;
  const int64_t distances = 2 * length_ - 1;
  const int64_t chunks = std::max<int64_t>(1, kTasksEach * worker.count / (batch_ * model.heads));
  const auto [begin, end] = worker.share(batch_ * model.heads * chunks);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % chunks, head = task / chunks % model.heads,
                  user = task / chunks / model.heads;
    const PackedHead keys = prompt_head(model, heads, user, head * model.kv_heads / model.heads);
    const int64_t from = last ? keys.count - 1 : keys.count * chunk / chunks;
    const int64_t to = last ? keys.count : keys.count * (chunk + 1) / chunks;
    if (last && chunk > 0) continue;
    Sight sight;
    if (encoder_) {
      sight.own = places_.data() + first_[user] + from;
      sight.place = places_.data() + first_[user];
      if (places.bias) sight.bias = places.bias + head * distances + distances / 2;
    } else {
      sight.seen = from;
    }
    const int64_t row = last ? user : first_[user] + from;
    attend({query_.data() + (first_[user] + from) * stride + head * size, stride, to - from, size}, keys,
           model.scale, sight, attended().at(row) + head * size, attended().stride, nullptr, 0,
           AttentionRoom::of_thread());
  }
}

// Beams over the prompt of their user, and over their own tokens too where there are some.
void BeamDecoder::attend_to_prompt(Rows<const float> queries, const PromptHeads& heads, const OwnTokens* own,
                                   const Worker& worker) const {
  const Transformer& model = decoder_;
  const int64_t size = model.head_dim;
  const int64_t chunks = std::max<int64_t>(1, kTasksEach * worker.count / (batch_ * model.heads));
  const auto [begin, end] = worker.share(batch_ * model.heads * chunks);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % chunks, head = task / chunks % model.heads,
                  user = task / chunks / model.heads;
    const int64_t from = user * beams_ + beams_ * chunk / chunks;
    const int64_t to = user * beams_ + beams_ * (chunk + 1) / chunks;
    if (from == to) continue;
    const PackedHead keys = prompt_head(model, heads, user, head * model.kv_heads / model.heads);
    float* const lse = own ? lse_.data() + head : nullptr;
    attend({queries.at(from) + head * size, queries.stride, to - from, size}, keys, model.scale, {},
           attended().at(from) + head * size, attended().stride, own ? lse + from * model.heads : nullptr,
           model.heads, AttentionRoom::of_thread());
    if (!own) continue;
    for (int64_t row = from; row < to; ++row) {
      attend_own(*own, queries.at(row) + head * size, row, head, model.scale, lse + row * model.heads,
                 attended().at(row) + head * size);
    }
  }
}

// x_ += weights(from)
void BeamDecoder::add(const Linear& weights, Rows<const float> from, int64_t rows,
                      const Worker& worker) const {
  Finish finish;
  finish.plus_out = true;
  linear(weights, from, rows, finish, x(), worker);
}

void BeamDecoder::feed(const TransformerLayer& layer, int64_t rows, const Worker& worker) const {
  const Rows<float> hidden{hidden_.data(), stride_of(layer.up.out)};
  norm_rows(layer.feed_norm, x(), rows, layer.up.in, 1.0f, seen(), worker);
  done("norm", worker);
  Finish finish;
  finish.activation = layer.activation;
  if (layer.gate) {
    linear(layer.gate, seen(), rows, finish, hidden, worker);
    done("feed-forward", worker);
    finish = {};
    finish.times_out = true;
  }
  linear(layer.up, seen(), rows, finish, hidden, worker);
  done("feed-forward", worker);
  add(layer.down, hidden, rows, worker);
  done("feed-forward", worker);
}

// The tokens_ of all rows through the decoder.
void BeamDecoder::own_step(const Places& places, const Wanted& wanted) {
  const auto rows = static_cast<int64_t>(tokens_.size());
  make_room(decoder_, rows);
  tabled_ = decoder_.code_table && std::all_of(tokens_.begin(), tokens_.end(), [this](int64_t token) {
              return token >= decoder_.first_code && token < decoder_.first_code + decoder_.num_codes;
            });
  if (++steps_ > own_.size()) own_.emplace_back(decoder_.layers.size());
  for (size_t number = 0; number < decoder_.layers.size(); ++number) {
    own_[steps_ - 1][number].room(rows * decoder_.layers[number].qkv.out);
  }
  RowTotals totals(wanted.all ? rows : 0, threads_);
  run_team(threads_, [&](const Worker& worker) {
    embed(decoder_, places, rows, worker);
    for (size_t number = 0; number < decoder_.layers.size(); ++number) own_layer(number, places, worker);
    answer(wanted, totals, worker);
  });
}

// Queries, keys and values of the rows, from x_ or, in the first layer, from the table.
void BeamDecoder::project(size_t number, Rows<float> qkv, const Worker& worker) const {
  const Transformer& model = decoder_;
  const Linear& weights = model.layers[number].qkv;
  const int64_t rows = batch_ * beams_;
  if (number == 0 && tabled_) {
    const auto [begin, end] = worker.share(rows);
    for (int64_t row = begin; row < end; ++row) {
      const float* const from = model.code_table + (tokens_[row] - model.first_code) * weights.out;
      std::copy(from, from + weights.out, qkv.at(row));
    }
  } else {
    norm_rows(model.layers[number].norm, x(), rows, model.width, 1.0f, seen(), worker);
    done("norm", worker);
    linear(weights, seen(), rows, {}, qkv, worker);
  }
  done("projection", worker);
}

void BeamDecoder::own_layer(size_t number, const Places& places, const Worker& worker) const {
  const Transformer& model = decoder_;
  const TransformerLayer& layer = model.layers[number];
  const int64_t rows = batch_ * beams_, size = model.head_dim, stride = layer.qkv.out;
  float* const qkv = own_[steps_ - 1][number].data();
  project(number, {qkv, stride}, worker);
  if (turns(layer, places)) {
    turn(model, layer, places, places_, qkv, worker);
    done("rotation", worker);
  }
  std::vector<StepRows> steps;
  for (size_t t = 0; t < steps_; ++t) {
    const float* const keys = own_[t][number].data() + model.heads * size;
    steps.push_back({keys, keys + model.kv_heads * size, stride});
  }
  const OwnTokens own{steps, ancestors_.data(), rows, model.heads, model.kv_heads, size, places.bias};
  if (encoder_) {
    const auto [begin, end] = worker.share(rows);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < model.heads; ++head) {
        attend_own(own, qkv + row * stride + head * size, row, head, model.scale, nullptr,
                   attended().at(row) + head * size);
      }
    }
  } else {
    attend_to_prompt({qkv, stride}, prompt_[number], &own, worker);
  }
  done("attention", worker);
  add(layer.out, attended(), rows, worker);
  done("projection", worker);
  if (encoder_) {
    norm_rows(layer.cross_norm, x(), rows, model.width, 1.0f, seen(), worker);
    done("norm", worker);
    const Rows<float> queries{query_.data(), layer.cross_query.out};
    linear(layer.cross_query, seen(), rows, {}, queries, worker);
    done("projection", worker);
    attend_to_prompt(queries, prompt_[number], nullptr, worker);
    done("attention", worker);
    add(layer.cross_out, attended(), rows, worker);
    done("projection", worker);
  }
  feed(layer, rows, worker);
}

void BeamDecoder::answer(const Wanted& wanted, RowTotals& totals, const Worker& worker) const {
  const int64_t rows = batch_ * beams_;
  norm_rows(decoder_.last, x(), rows, decoder_.width, decoder_.last_scale, seen(), worker);
  done("norm", worker);
  linear(wanted.columns, seen(), rows, {}, Rows<float>{wanted.logits, wanted.columns.out}, worker);
  if (wanted.all) {
    totals.add(wanted.all, seen(), worker);
    worker.wait();
    totals.write(wanted.total, worker);
  }
  done("head", worker);
}

}  // namespace cemg
