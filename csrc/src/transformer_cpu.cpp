#include "cemg/transformer_cpu.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kTasksEach = 4;  // of a thread at least, so that all end at about the same time
constexpr int64_t kScalar = 32;    // operations of products in the time that one number takes elsewhere

CEMG_CLONES void norm_row(const Norm& norm, const float* x, int64_t width, float scale, float* out) noexcept {
  constexpr int64_t kLanes = 16;
  const int64_t whole = width - width % kLanes;
  const auto sum_of = [&](auto&& term) __attribute__((always_inline)) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t c = 0; c < kLanes; ++c) lanes[c] += term(x[i + c]);
    }
    float sum = sum_of_lanes(lanes);
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
               Rows<float> out, Team& team) noexcept {
  team.each(rows, kScalar * width, [&](Share some) {
    for (int64_t row = some.begin; row < some.end; ++row) {
      norm_row(norm, x.at(row), width, scale, out.at(row));
    }
  });
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
          const std::vector<int32_t>& place, float* qkv, Team& team) noexcept {
  const int64_t size = model.head_dim, stride = layer.qkv.out;
  const int64_t turned = model.heads + model.kv_heads;
  team.each(static_cast<int64_t>(place.size()), kScalar * turned * size, [&](Share some) {
    for (int64_t row = some.begin; row < some.end; ++row) {
      const int64_t at = place[static_cast<size_t>(row)] * size;
      for (int64_t head = 0; head < turned; ++head) {
        float* const x = qkv + row * stride + head * size;
        const Norm& norm = head < model.heads ? layer.query_norm : layer.key_norm;
        if (norm) norm_row(norm, x, size, 1.0f, x);
        if (places.cosine) rotate(x, places.cosine + at, places.sine + at, size);
      }
    }
  });
}

bool turns(const TransformerLayer& layer, const Places& places) noexcept {
  return places.cosine != nullptr || layer.query_norm;
}

}  // namespace

BeamDecoder::BeamDecoder(const Transformer* encoder, const Transformer& decoder, int64_t threads)
    : encoder_(encoder), decoder_(decoder), team_(threads), prompt_(decoder.layers.size()) {}

void BeamDecoder::done(const char* part) {
  if (noting_) laps_.push_back({part, seconds()});
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

int64_t BeamDecoder::empty_prompt(const Prompts& prompts) noexcept {
  for (int64_t user = 0; user < prompts.batch; ++user) {
    const int64_t* const own = prompts.mask + user * prompts.length;
    if (std::all_of(own, own + prompts.length, [](int64_t there) { return there == 0; })) return user;
  }
  return -1;
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
  run_team(team_, [&] { read_prompt(reader, places); });
  const double spent = seconds();
  if (encoder_) {
    tokens_.assign(static_cast<size_t>(batch_), start_token);
    places_.assign(static_cast<size_t>(batch_), 0);
    own_step(own_places, wanted);
  } else {
    run_team(team_, [&] { answer(wanted); });
  }
  return spent;
}

int64_t BeamDecoder::orphan(const Grown& grown) const noexcept {
  for (int64_t beam = 0; beam < batch_ * grown.beams; ++beam) {
    if (grown.asked && !grown.asked[beam]) continue;
    const int64_t parent = grown.parents[beam];
    if (parent < 0 || parent >= beams_ || row_of_[beam / grown.beams * beams_ + parent] < 0) return beam;
  }
  return -1;
}

int64_t BeamDecoder::stranger(const Grown& grown) const noexcept {
  for (int64_t beam = 0; beam < batch_ * grown.beams; ++beam) {
    if ((!grown.asked || grown.asked[beam]) && !knows(grown.tokens[beam])) return beam;
  }
  return -1;
}

void BeamDecoder::step(const Grown& grown, const Places& places, const Wanted& wanted) {
  begin_laps();
  std::vector<int32_t> row_of(static_cast<size_t>(batch_ * grown.beams), -1), from;
  tokens_.clear();
  places_.clear();
  begin_.assign(1, 0);
  for (int64_t user = 0; user < batch_; ++user) {
    for (int64_t beam = user * grown.beams; beam < (user + 1) * grown.beams; ++beam) {
      if (grown.asked && !grown.asked[beam]) continue;
      row_of[beam] = static_cast<int32_t>(tokens_.size());
      from.push_back(row_of_[user * beams_ + grown.parents[beam]]);
      tokens_.push_back(grown.tokens[beam]);
      places_.push_back(lengths_[user]);
    }
    begin_.push_back(static_cast<int64_t>(tokens_.size()));
    ++lengths_[user];
  }
  const auto rows = static_cast<int64_t>(from.size()), steps = static_cast<int64_t>(steps_);
  const int64_t before = steps_ == 0 ? 0 : static_cast<int64_t>(ancestors_.size()) / steps;
  std::vector<int32_t> ancestors(static_cast<size_t>((steps + 1) * rows));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t t = 0; t < steps; ++t) ancestors[t * rows + row] = ancestors_[t * before + from[row]];
    ancestors[steps * rows + row] = static_cast<int32_t>(row);
  }
  ancestors_ = std::move(ancestors);
  row_of_ = std::move(row_of);
  beams_ = grown.beams;
  own_step(places, wanted);
}

void BeamDecoder::rewind() {
  const size_t first = encoder_ ? 1 : 0;  // the start token's step
  if (steps_ < first) return;
  for (int32_t& length : lengths_) length -= static_cast<int32_t>(steps_ - first);
  steps_ = first;
  stand_at_start();
}

void BeamDecoder::stand_at_start() {
  beams_ = 1;
  row_of_.resize(static_cast<size_t>(batch_));
  std::iota(row_of_.begin(), row_of_.end(), 0);
  begin_.resize(static_cast<size_t>(batch_ + 1));
  std::iota(begin_.begin(), begin_.end(), 0);
  ancestors_.resize(static_cast<size_t>(encoder_ ? batch_ : 0));  // of the start token, if there is one
  std::iota(ancestors_.begin(), ancestors_.end(), 0);
}

void BeamDecoder::read(const Prompts& prompts) {
  batch_ = prompts.batch;
  length_ = prompts.length;
  steps_ = 0;
  stand_at_start();
  tokens_.clear();
  places_.clear();
  lengths_.clear();
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

void BeamDecoder::embed(const Transformer& model, const Places& places, int64_t rows) {
  const int64_t width = model.width;
  team_.each(rows, kScalar * width, [&](Share some) {
    for (int64_t row = some.begin; row < some.end; ++row) {
      const float* const from = model.embedding + tokens_[row] * width;
      float* const to = x_.data() + row * width;
      std::copy(from, from + width, to);
      if (!places.embedding) continue;
      const float* const place = places.embedding + places_[row] * width;
      for (int64_t i = 0; i < width; ++i) to[i] += place[i];
    }
  });
  done("embedding");
}

// The prompts through all layers. Of a decoder, what the last token of each gives comes to the first rows of
// x_; of an encoder, its output becomes the keys and values of cross-attention.
void BeamDecoder::read_prompt(const Transformer& model, const Places& places) {
  const auto rows = static_cast<int64_t>(tokens_.size());
  embed(model, places, rows);
  for (size_t number = 0; number < model.layers.size(); ++number) {
    const TransformerLayer& layer = model.layers[number];
    const PromptHeads& heads = encoder_ ? prompt_[0] : prompt_[number];
    const bool last = !encoder_ && number + 1 == model.layers.size();
    norm_rows(layer.norm, x(), rows, model.width, 1.0f, seen(), team_);
    done("norm");
    linear(layer.qkv, seen(), rows, {}, Rows<float>{query_.data(), layer.qkv.out}, team_);
    done("projection");
    if (turns(layer, places)) {
      turn(model, layer, places, places_, query_.data(), team_);
      done("rotation");
    }
    const float* const keys = query_.data() + model.heads * model.head_dim;
    pack_prompt(model, keys, keys + model.kv_heads * model.head_dim, layer.qkv.out, heads);
    done("packing");
    attend_in_prompt(model, heads, places, last);
    done("attention");
    if (last) {
      for (int64_t user = 0; user < batch_; ++user) {
        const float* const from = x_.data() + (first_[user + 1] - 1) * model.width;
        std::copy(from, from + model.width, x_.data() + user * model.width);
      }
    }
    add(layer.out, attended(), last ? batch_ : rows);
    done("projection");
    feed(layer, last ? batch_ : rows);
  }
  if (!encoder_) return;
  norm_rows(model.last, x(), rows, model.width, model.last_scale, seen(), team_);
  done("norm");
  for (size_t number = 0; number < decoder_.layers.size(); ++number) {
    const Linear& weights = decoder_.layers[number].cross_key_value;
    linear(weights, seen(), rows, {}, Rows<float>{query_.data(), weights.out}, team_);
    done("projection");
    const float* const keys = query_.data();
    pack_prompt(decoder_, keys, keys + weights.out / 2, weights.out, prompt_[number]);
    done("packing");
  }
}

void BeamDecoder::pack_prompt(const Transformer& model, const float* keys, const float* values,
                              int64_t stride, const PromptHeads& to) {
  const int64_t numbers = first_[batch_] / batch_ * model.head_dim;
  team_.each(batch_ * model.kv_heads, kScalar * numbers, [&](Share tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t user = task / model.kv_heads, group = task % model.kv_heads;
      const PackedHead head = prompt_head(model, to, user, group);
      const int64_t at = first_[user] * stride + group * model.head_dim;
      pack_head(keys + at, values + at, stride, model.head_dim, head);
    }
  });
}

PackedHead BeamDecoder::prompt_head(const Transformer& model, const PromptHeads& heads, int64_t user,
                                    int64_t group) const {
  const int64_t count = first_[user + 1] - first_[user], deep = padded(model.head_dim);
  return {heads.keys.data() + model.head_dim * (model.kv_heads * wide_[user] + group * padded(count)),
          heads.values.data() + deep * (model.kv_heads * first_[user] + group * count), count};
}

// Calls work(user, head, part) on parts of the queries of each head of each user, who has rows(user) of them.
template <class Count, class Work>
void BeamDecoder::each_head(const Transformer& model, const Count& rows, const Work& work) {
  const int64_t chunks = std::max<int64_t>(1, kTasksEach * team_.threads() / (batch_ * model.heads));
  int64_t all = 0;
  for (int64_t user = 0; user < batch_; ++user) all += rows(user);
  const int64_t cost = 4 * (first_[batch_] / batch_) * model.head_dim * all / (batch_ * chunks);
  team_.each(batch_ * model.heads * chunks, cost, [&](Share tasks) {
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t chunk = task % chunks, user = task / chunks / model.heads, count = rows(user);
      const Share part{count * chunk / chunks, count * (chunk + 1) / chunks};
      if (part.begin < part.end) work(user, task / chunks % model.heads, part);
    }
  });
}

// The tokens of each prompt over each other, or over all before in a decoder; there in the last layer the
// last token alone.
void BeamDecoder::attend_in_prompt(const Transformer& model, const PromptHeads& heads, const Places& places,
                                   bool last) {
  const int64_t size = model.head_dim, stride = model.layers[0].qkv.out;
  const int64_t distances = 2 * length_ - 1;
  const auto rows = [&](int64_t user) { return last ? 1 : first_[user + 1] - first_[user]; };
  each_head(model, rows, [&](int64_t user, int64_t head, Share part) {
    const PackedHead keys = prompt_head(model, heads, user, head * model.kv_heads / model.heads);
    const int64_t from = last ? keys.count - 1 : part.begin;
    Sight sight;
    if (encoder_) {
      sight.own = places_.data() + first_[user] + from;
      sight.place = places_.data() + first_[user];
      if (places.bias) sight.bias = places.bias + head * distances + distances / 2;
    } else {
      sight.seen = from;
    }
    const float* const queries = query_.data() + (first_[user] + from) * stride + head * size;
    const int64_t row = last ? user : first_[user] + from;
    attend({queries, stride, part.end - part.begin, size}, keys, model.scale, sight,
           attended().at(row) + head * size, attended().stride, nullptr, 0, AttentionRoom::of_thread());
  });
}

// Beams over the prompt of their user, and over their own tokens too where there are some.
void BeamDecoder::attend_to_prompt(Rows<const float> queries, const PromptHeads& heads,
                                   const OwnTokens* own) {
  const Transformer& model = decoder_;
  const int64_t size = model.head_dim;
  each_head(
      model, [&](int64_t user) { return begin_[user + 1] - begin_[user]; },
      [&](int64_t user, int64_t head, Share part) {
        const int64_t from = begin_[user] + part.begin, to = begin_[user] + part.end;
        const PackedHead keys = prompt_head(model, heads, user, head * model.kv_heads / model.heads);
        float* const lse = own ? lse_.data() + head : nullptr;
        attend({queries.at(from) + head * size, queries.stride, to - from, size}, keys, model.scale, {},
               attended().at(from) + head * size, attended().stride, own ? lse + from * model.heads : nullptr,
               model.heads, AttentionRoom::of_thread());
        if (!own) return;
        for (int64_t row = from; row < to; ++row) {
          attend_own(*own, queries.at(row) + head * size, row, head, model.scale, lse + row * model.heads,
                     attended().at(row) + head * size);
        }
      });
}

// x_ += weights(from)
void BeamDecoder::add(const Linear& weights, Rows<const float> from, int64_t rows) {
  Finish finish;
  finish.plus_out = true;
  linear(weights, from, rows, finish, x(), team_);
}

void BeamDecoder::feed(const TransformerLayer& layer, int64_t rows) {
  const Rows<float> hidden{hidden_.data(), stride_of(layer.up.out)};
  norm_rows(layer.feed_norm, x(), rows, layer.up.in, 1.0f, seen(), team_);
  done("norm");
  Finish finish;
  finish.activation = layer.activation;
  if (layer.gate) {
    linear(layer.gate, seen(), rows, finish, hidden, team_);
    done("feed-forward");
    finish = {};
    finish.times_out = true;
  }
  linear(layer.up, seen(), rows, finish, hidden, team_);
  done("feed-forward");
  add(layer.down, hidden, rows);
  done("feed-forward");
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
  run_team(team_, [&] {
    embed(decoder_, places, rows);
    for (size_t number = 0; number < decoder_.layers.size(); ++number) own_layer(number, places);
    answer(wanted);
  });
}

// Queries, keys and values of the rows, from x_ or, in the first layer, from the table.
void BeamDecoder::project(size_t number, Rows<float> qkv) {
  const Transformer& model = decoder_;
  const Linear& weights = model.layers[number].qkv;
  const int64_t rows = begin_.back();
  if (number == 0 && tabled_) {
    team_.each(rows, kScalar * weights.out, [&](Share some) {
      for (int64_t row = some.begin; row < some.end; ++row) {
        const float* const from = model.code_table + (tokens_[row] - model.first_code) * weights.out;
        std::copy(from, from + weights.out, qkv.at(row));
      }
    });
  } else {
    norm_rows(model.layers[number].norm, x(), rows, model.width, 1.0f, seen(), team_);
    done("norm");
    linear(weights, seen(), rows, {}, qkv, team_);
  }
  done("projection");
}

void BeamDecoder::own_layer(size_t number, const Places& places) {
  const Transformer& model = decoder_;
  const TransformerLayer& layer = model.layers[number];
  const int64_t rows = begin_.back(), size = model.head_dim, stride = layer.qkv.out;
  float* const qkv = own_[steps_ - 1][number].data();
  project(number, {qkv, stride});
  if (turns(layer, places)) {
    turn(model, layer, places, places_, qkv, team_);
    done("rotation");
  }
  std::vector<StepRows> steps;
  for (size_t t = 0; t < steps_; ++t) {
    const float* const keys = own_[t][number].data() + model.heads * size;
    steps.push_back({keys, keys + model.kv_heads * size, stride});
  }
  const OwnTokens own{steps, ancestors_.data(), rows, model.heads, model.kv_heads, size, places.bias};
  if (encoder_) {
    const auto numbers = 2 * static_cast<int64_t>(steps_) * model.heads * size;
    team_.each(rows, kScalar * numbers, [&](Share some) {
      for (int64_t row = some.begin; row < some.end; ++row) {
        for (int64_t head = 0; head < model.heads; ++head) {
          attend_own(own, qkv + row * stride + head * size, row, head, model.scale, nullptr,
                     attended().at(row) + head * size);
        }
      }
    });
  } else {
    attend_to_prompt({qkv, stride}, prompt_[number], &own);
  }
  done("attention");
  add(layer.out, attended(), rows);
  done("projection");
  if (encoder_) {
    norm_rows(layer.cross_norm, x(), rows, model.width, 1.0f, seen(), team_);
    done("norm");
    const Rows<float> queries{query_.data(), layer.cross_query.out};
    linear(layer.cross_query, seen(), rows, {}, queries, team_);
    done("projection");
    attend_to_prompt(queries, prompt_[number], nullptr);
    done("attention");
    add(layer.cross_out, attended(), rows);
    done("projection");
  }
  feed(layer, rows);
}

void BeamDecoder::answer(const Wanted& wanted) {
  const int64_t rows = begin_.back();
  norm_rows(decoder_.last, x(), rows, decoder_.width, decoder_.last_scale, seen(), team_);
  done("norm");
  linear(wanted.columns, seen(), rows, {}, Rows<float>{wanted.logits, wanted.columns.out}, team_);
  if (wanted.all) totals_.write(wanted.all, seen(), rows, wanted.total, team_);
  done("head");
}

}  // namespace cemg
