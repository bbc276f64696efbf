// Checks what runs on the CPU besides the trie; the test builds it with sanitizers. Products, attention,
// quantization and propagation are compared with sums in double. Searches run over random models of every
// kind, and each user alone must give the same as all users together. Prints how many searches it checked.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <new>
#include <random>
#include <set>
#include <thread>
#include <variant>
#include <vector>

#include "cemg/propagate_cpu.h"
#include "cemg/quantize_cpu.h"
#include "cemg/row_math.h"
#include "cemg/search_cpu.h"
#include "cemg/trie_build.h"

namespace {

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

std::vector<float> draw(std::mt19937& random, int64_t count, float size = 1.0f) {
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> values(static_cast<size_t>(count));
  std::generate(values.begin(), values.end(), [&] { return normal(random); });
  return values;
}

// Every array has exactly the size it needs, so that AddressSanitizer sees reads past its end.
struct Weights {
  std::mt19937 random{7};
  std::deque<std::vector<float>> kept;

  const float* some(int64_t count, float size = 1.0f) {
    kept.push_back(draw(random, count, size));
    return kept.back().data();
  }
  cemg::Linear linear(int64_t in, int64_t out, bool bias = false) {
    std::vector<float> panels = draw(random, cemg::padded(out) * in, 0.4f);
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t c = out; c < cemg::padded(out); ++c) panels[(c / 32 * in + k) * 32 + c % 32] = 0;
    }
    kept.push_back(std::move(panels));
    return {in, out, kept.back().data(), bias ? some(out) : nullptr};
  }
  cemg::Norm norm(int64_t width, bool bias = false) {
    return {some(width), bias ? some(width) : nullptr, 1e-6f};
  }
};

void check_linear(int64_t rows, int64_t in, int64_t out, bool bias, int64_t threads) {
  Weights weights;
  const cemg::Linear linear = weights.linear(in, out, bias);
  const int64_t stride = cemg::padded_stride(in);
  const auto x = draw(weights.random, (rows - 1) * stride + in), before = draw(weights.random, rows * out);
  auto result = before;
  cemg::Epilogue epilogue;
  epilogue.add_out = true;
  std::vector<float> totals(static_cast<size_t>(rows));
  cemg::RowLogSumExp row_logsumexp;
  cemg::ThreadPool pool(threads);
  cemg::run_with_workers(pool, [&] {
    cemg::linear(linear, {x.data(), stride}, rows, epilogue, {result.data(), out}, pool);
    row_logsumexp.compute(linear, {x.data(), stride}, rows, totals.data(), pool);
  });
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < out; ++c) {
      double sum = bias ? linear.bias[c] : 0;
      for (int64_t k = 0; k < in; ++k) {
        sum += static_cast<double>(x[r * stride + k]) * linear.panels[(c / 32 * in + k) * 32 + c % 32];
      }
      total += std::exp(sum);
      require(std::abs(sum + before[r * out + c] - result[r * out + c]) < 1e-3,
              "a product is close to the sum in double");
    }
    require(std::abs(std::log(total) - totals[r]) < 1e-3,
            "the log-sum-exp of a row is close to that in double");
  }
}

// Logits of -inf, which a bias makes, add nothing to the log-sum-exp. If all are -inf, it is too.
void check_logsumexp_of_neg_inf() {
  Weights weights;
  const int64_t rows = 3, in = 5, out = 300;
  cemg::Linear linear = weights.linear(in, out);
  const auto x = draw(weights.random, rows * in);
  cemg::ThreadPool pool(1);
  cemg::RowLogSumExp row_logsumexp;
  const auto total = [&](int64_t first) {  // of row 1, with the logits before `first` at -inf
    std::vector<float> bias(static_cast<size_t>(out), 0.0f), totals(static_cast<size_t>(rows));
    std::fill(bias.begin(), bias.begin() + first, cemg::kNegInf);
    linear.bias = bias.data();
    row_logsumexp.compute(linear, {x.data(), in}, rows, totals.data(), pool);
    return totals[1];
  };
  for (int64_t first : {1, 32, 200, 299}) {
    double sum = 0;
    for (int64_t c = first; c < out; ++c) {
      double logit = 0;
      for (int64_t k = 0; k < in; ++k) {
        logit += static_cast<double>(x[in + k]) * linear.panels[(c / 32 * in + k) * 32 + c % 32];
      }
      sum += std::exp(logit);
    }
    require(std::abs(std::log(sum) - total(first)) < 1e-3, "logits of -inf add nothing to the log-sum-exp");
  }
  require(total(out) == cemg::kNegInf, "the log-sum-exp of logits that are all -inf is -inf");
}

// An exception of the program reaches the caller, and the pool can be used again.
void check_exceptions(int64_t threads) {
  cemg::ThreadPool pool(threads);
  bool caught = false;
  try {
    cemg::run_with_workers(pool, [] { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  int64_t done = 0;
  cemg::run_with_workers(pool, [&] { pool.parallel_for(1, 1, [&](cemg::TaskRange) { ++done; }); });
  require(caught && done == 1, "an exception reaches the caller and the pool works afterwards");
}

// Consecutive loops, some large enough for several threads: each task runs once, before the next loop begins.
void check_thread_pool(int64_t threads, int jobs) {
  cemg::ThreadPool pool(threads);
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < threads; ++t) workers.emplace_back([&, t] { pool.run_worker(t); });
  std::mt19937 random(3);
  std::vector<int> done(100);
  for (int job = 1; job <= jobs; ++job) {
    const auto tasks = static_cast<int64_t>(random() % done.size());
    pool.parallel_for(tasks, int64_t{1} << random() % 20, [&](cemg::TaskRange some) {
      for (int64_t task = some.begin; task < some.end; ++task) ++done[task];
    });
    for (auto& count : done) {
      require(count == (&count < done.data() + tasks ? 1 : 0), "each task runs exactly once");
      count = 0;
    }
  }
  pool.stop();
  for (std::thread& worker : workers) worker.join();
}

void check_attention(std::mt19937& random, int64_t queries, int64_t keys, int64_t size) {
  const auto query = draw(random, queries * size), key = draw(random, keys * size),
             value = draw(random, keys * size), bias = draw(random, 2 * (queries + keys));
  std::vector<float> out(query.size()), lse(static_cast<size_t>(queries));
  std::vector<float> packed_keys(static_cast<size_t>(size * cemg::padded(keys))),
      packed_values(static_cast<size_t>(keys * cemg::padded(size)));
  const cemg::PackedHead head{packed_keys.data(), packed_values.data(), keys};
  cemg::pack_head(key.data(), value.data(), size, size, head);
  std::vector<int32_t> positions(static_cast<size_t>(std::max(queries, keys)));
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int32_t>(i);
  const int64_t causal_offset = queries <= keys ? keys - queries : -1;
  const float* const middle = bias.data() + queries + keys;
  cemg::attend({query.data(), size, queries, size}, head, 0.5f,
               {causal_offset, middle, positions.data(), positions.data()}, out.data(), size, lse.data(), 1,
               cemg::AttentionWorkspace::of_thread());
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<double> expected(static_cast<size_t>(size));
    double total = 0;
    for (int64_t k = 0; k < (causal_offset < 0 ? keys : causal_offset + q + 1); ++k) {
      double score = middle[k - q];
      for (int64_t d = 0; d < size; ++d) score += 0.5 * query[q * size + d] * key[k * size + d];
      total += std::exp(score);
      for (int64_t d = 0; d < size; ++d) expected[d] += std::exp(score) * value[k * size + d];
    }
    require(std::abs(std::log(total) - lse[q]) < 1e-3, "the log-sum-exp of attention scores");
    for (int64_t d = 0; d < size; ++d) {
      require(std::abs(expected[d] / total - out[q * size + d]) < 1e-3,
              "a row of attention is close to that in double");
    }
  }
}

void check_quantize(std::mt19937& random, int64_t rows, int64_t levels, int64_t size, int64_t dim) {
  const auto x = draw(random, rows * dim), vectors = draw(random, levels * size * dim);
  std::vector<int64_t> codes(static_cast<size_t>(rows * levels));
  std::vector<float> quantized(x.size());
  cemg::residual_quantize(x.data(), rows, {levels, size, dim, vectors.data()}, codes.data(),
                          quantized.data());
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> residual(x.begin() + r * dim, x.begin() + (r + 1) * dim);
    for (int64_t m = 0; m < levels; ++m) {
      int64_t nearest = 0;
      double least = 1e300;
      for (int64_t k = 0; k < size; ++k) {
        double distance = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const double off = static_cast<double>(residual[d]) - vectors[(m * size + k) * dim + d];
          distance += off * off;
        }
        if (distance < least) nearest = k;
        least = std::min(least, distance);
      }
      require(codes[r * levels + m] == nearest, "the code is the nearest one");
      for (int64_t d = 0; d < dim; ++d) residual[d] -= vectors[(m * size + nearest) * dim + d];
    }
  }
}

// A path with an edge from every third vertex to the first, and one vertex without neighbours.
void check_propagate(std::mt19937& random, int64_t vertices, int64_t dim, int64_t layers) {
  std::vector<std::vector<int64_t>> near(static_cast<size_t>(vertices));
  const auto join = [&](int64_t a, int64_t b) {
    near[a].push_back(b);
    near[b].push_back(a);
  };
  for (int64_t v = 0; v + 2 < vertices; ++v) join(v, v + 1);
  for (int64_t v = 3; v + 1 < vertices; v += 3) join(v, 0);
  std::vector<int64_t> row_ptr{0}, neighbours;
  std::vector<float> scale;
  for (const auto& adjacent : near) {
    neighbours.insert(neighbours.end(), adjacent.begin(), adjacent.end());
    row_ptr.push_back(static_cast<int64_t>(neighbours.size()));
    scale.push_back(adjacent.empty() ? 0.0f : 1.0f / std::sqrt(static_cast<float>(adjacent.size())));
  }
  const auto x = draw(random, vertices * dim);
  std::vector<float> out(x.size()), scratch(x.size());
  cemg::lightgcn_propagate({vertices, row_ptr.data(), neighbours.data(), scale.data()}, x.data(), dim, layers,
                           out.data(), scratch.data());
  std::vector<double> now(x.begin(), x.end()), sum = now;
  for (int64_t layer = 0; layer < layers; ++layer) {
    std::vector<double> next(now.size());
    for (int64_t v = 0; v < vertices; ++v) {
      for (const int64_t w : near[v]) {
        const double weight = static_cast<double>(scale[v]) * scale[w];
        for (int64_t d = 0; d < dim; ++d) next[v * dim + d] += weight * now[w * dim + d];
      }
    }
    now = next;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += now[i];
  }
  for (size_t i = 0; i < sum.size(); ++i) {
    require(std::abs(sum[i] / static_cast<double>(layers + 1) - out[i]) < 1e-4,
            "a propagated value is close to that in double");
  }
}

constexpr int64_t kVocabulary = 37, kCodes = 9, kPositions = 16, kLength = 5;

// A model of two layers; `cross` adds cross-attention.
cemg::Transformer make_stack(Weights& weights, int64_t width, int64_t heads, int64_t groups, int64_t size,
                             bool gated, bool biased, bool normed, bool cross) {
  cemg::Transformer model{width,       heads,
                          groups,      size,
                          0.3f,        weights.some(kVocabulary * width),
                          kVocabulary, weights.norm(width, biased),
                          0.7f,        {}};
  const int64_t inner = heads * size, hidden = 2 * width + 1;
  for (int number = 0; number < 2; ++number) {
    cemg::TransformerLayer layer{};
    layer.attention_norm = weights.norm(width, biased);
    layer.qkv = weights.linear(width, (heads + 2 * groups) * size, biased);
    if (normed) {
      layer.query_norm = weights.norm(size);
      layer.key_norm = weights.norm(size);
    }
    layer.attention_out = weights.linear(inner, width, biased);
    if (cross) {
      layer.cross_norm = weights.norm(width);
      layer.cross_query = weights.linear(width, inner);
      layer.cross_key_value = weights.linear(width, 2 * inner);
      layer.cross_out = weights.linear(inner, width);
    }
    layer.feed_forward_norm = weights.norm(width, biased);
    if (gated) layer.gate = weights.linear(width, hidden);
    layer.up = weights.linear(width, hidden, biased);
    layer.down = weights.linear(hidden, width, biased);
    layer.activation = gated ? cemg::Activation::kSilu : cemg::Activation::kGeluTanh;
    model.layers.push_back(layer);
  }
  return model;
}

struct StepLogits {
  std::vector<float> logits, totals;
};

// Three steps: one row per user, then three beams, then five. `some`: after the first step, only beams of the
// first user are active, beams 0 and 2, then those with an active parent: 0, 2 and 3.
std::vector<StepLogits> run(cemg::BeamSearch& search, const std::vector<int64_t>& tokens,
                            const std::vector<int64_t>& mask, const cemg::PositionTables& prompt_positions,
                            const cemg::PositionTables& step_positions, const cemg::Linear& columns,
                            const cemg::Linear& all, bool some = false) {
  const auto batch = static_cast<int64_t>(tokens.size()) / kLength;
  const cemg::Prompts prompts{tokens.data(), mask.data(), batch, kLength};
  std::vector<StepLogits> steps;
  int64_t before = 1;
  for (const int64_t beams : {int64_t{1}, int64_t{3}, int64_t{5}}) {
    std::vector<uint8_t> active;
    std::vector<int64_t> tokens_fed, parents;
    int64_t rows = 0;
    for (int64_t row = 0; row < batch * beams; ++row) {
      tokens_fed.push_back((row % beams * 5 + beams) % kVocabulary);
      parents.push_back(row % beams % before);
      active.push_back(!some || beams == 1 || (row < beams && (beams == 3 ? row : parents.back()) % 2 == 0));
      rows += active.back();
    }
    StepLogits& now = steps.emplace_back(
        StepLogits{std::vector<float>(rows * kCodes), std::vector<float>(static_cast<size_t>(rows))});
    const cemg::LogitsRequest request{columns, all, now.logits.data(), now.totals.data()};
    const cemg::BeamInput input{tokens_fed.data(), parents.data(), some ? active.data() : nullptr, beams};
    if (beams == 1) {
      require(search.first_invalid_token(prompts) == -1, "valid tokens are accepted");
      search.prefill(prompts, prompt_positions, 1, step_positions, request);
    } else {
      require(search.first_invalid_parent(input) == -1, "active parents are accepted");
      if (some && beams == 5) {
        const cemg::BeamInput more{tokens_fed.data(), parents.data(), nullptr, beams};
        require(search.first_invalid_parent(more) == 1, "the first beam with an inactive parent is returned");
      }
      search.decode_step(input, step_positions, request);
    }
    before = beams;
  }
  return steps;
}

void check_active_rows(const std::vector<StepLogits>& some, const std::vector<StepLogits>& whole) {
  const std::vector<std::vector<size_t>> rows{{0, 1}, {0, 2}, {0, 2, 3}};
  for (size_t step = 0; step < rows.size(); ++step) {
    require(some[step].totals.size() == rows[step].size(), "only active beams have rows");
    for (size_t i = 0; i < rows[step].size(); ++i) {
      const size_t row = rows[step][i];
      require(std::abs(some[step].totals[i] - whole[step].totals[row]) < 1e-3,
              "active beams have the same log-sum-exp as without inactive ones");
      for (size_t code = 0; code < kCodes; ++code) {
        const float mine = some[step].logits[i * kCodes + code];
        require(std::abs(mine - whole[step].logits[row * kCodes + code]) < 1e-3,
                "active beams have the same logits as without inactive ones");
      }
    }
  }
}

// 30 items of three codes. No two items share their first two codes.
template <class Code>
struct Items {
  std::vector<Code> code;
  std::vector<uint64_t> first_child;
  std::vector<int32_t> rows;
  cemg::TrieView<Code> trie;

  Items() : rows(30) {
    std::vector<int32_t> codes;
    for (int item = 0; item < 30; ++item) {
      codes.insert(codes.end(), {item % 4, item * 5 % 9, item / 4});
    }
    const auto built = cemg::TrieBuilder::sort<int32_t>(codes, 3, kCodes);
    const auto& builder = std::get<cemg::TrieBuilder>(built);
    code.resize(builder.num_nodes() - 1);
    first_child = builder.write(code.data(), rows.data());
    trie = {code.data(), {first_child.data()}, builder.num_inner(), builder.num_nodes(), kCodes};
  }
};

// Whole searches return as many distinct items as fit the list, best first, each with its codes.
template <class Code>
void check_searches(cemg::BeamSearch& search, int64_t start_steps, const cemg::Prompts& prompts,
                    const cemg::PositionTables& prompt_positions, const cemg::PositionTables& step_positions,
                    const cemg::Linear& columns, const cemg::Linear& all) {
  const Items<Code> items;
  for (const auto normalize : {cemg::Normalize::kVocab, cemg::Normalize::kLevel, cemg::Normalize::kValid}) {
    for (const int64_t width : {1, 7, 40}) {
      const auto num_beams = static_cast<size_t>(prompts.batch * width);
      const cemg::SearchRequest request{normalize,
                                        width,
                                        4,
                                        1,
                                        prompt_positions,
                                        {step_positions, step_positions, step_positions},
                                        {columns, columns, columns},
                                        normalize == cemg::Normalize::kVocab ? all : cemg::Linear{}};
      std::vector<float> scores(num_beams), pruned(static_cast<size_t>(prompts.batch));
      std::vector<int32_t> leaves(num_beams);
      std::vector<int64_t> codes(num_beams * 3);
      const auto timings = search.search(prompts, items.trie, {}, request,
                                         {scores.data(), leaves.data(), codes.data(), pruned.data()});
      const bool valid = normalize == cemg::Normalize::kValid;
      require(search.num_steps() == start_steps + (valid ? 1 : 2),
              "codes that are certain need no decode step");
      // there are four first codes with seven or eight items each; beams without an item are not active
      require(timings.rows ==
                  prompts.batch * (std::min<int64_t>(width, 4) + (valid ? 0 : std::min<int64_t>(width, 30))),
              "the number of rows of all decode steps");
      for (int64_t user = 0; user < prompts.batch; ++user) {
        std::set<int32_t> distinct;
        for (int64_t beam = user * width; beam < (user + 1) * width; ++beam) {
          if (leaves[beam] < 0) continue;
          int32_t node = cemg::kRoot;
          for (int64_t level = 0; level < 3; ++level)
            node = items.trie.advance(node, codes[beam * 3 + level]);
          require(node == leaves[beam] && node >= items.trie.num_inner, "the codes lead to the leaf");
          require(beam == user * width || scores[beam] <= scores[beam - 1], "scores descend");
          distinct.insert(node);
        }
        require(static_cast<int64_t>(distinct.size()) == std::min<int64_t>(width, 30), "the list is full");
        require((width == 40) == std::isinf(pruned[user]),
                "the pruned score is -inf exactly if nothing was cut");
      }
    }
  }
}

// In searches under a prior, one without weight changes nothing, and the weight of 1 ranks the prior's items.
template <class Code>
void check_prior_searches(cemg::BeamSearch& search, const cemg::Prompts& prompts,
                          const cemg::PositionTables& prompt_positions,
                          const cemg::PositionTables& step_positions, const cemg::Linear& columns) {
  constexpr int64_t kWidth = 7;
  const Items<Code> items;
  const std::vector<int32_t> ranks{2, 5, 9, 2, 5, 9};
  const std::vector<double> sums{0, 0.25, 0.375, 1, 0, 0.25, 0.375, 1}, weight{0, 1};
  const auto run = [&](const std::optional<cemg::PriorView>& prior, std::vector<float>& scores) {
    const cemg::SearchRequest request{cemg::Normalize::kLevel,
                                      kWidth,
                                      4,
                                      1,
                                      prompt_positions,
                                      {step_positions, step_positions, step_positions},
                                      {columns, columns, columns},
                                      {},
                                      nullptr,
                                      prior};
    std::vector<float> pruned(2);
    std::vector<int64_t> codes(2 * kWidth * 3);
    std::vector<int32_t> leaves(2 * kWidth);
    scores.resize(2 * kWidth);
    search.search(prompts, items.trie, {}, request,
                  {scores.data(), leaves.data(), codes.data(), pruned.data()});
    return leaves;
  };
  std::vector<float> alone_scores, scores;
  const std::vector<int32_t> alone = run({}, alone_scores);
  const std::vector<int32_t> leaves = run({{ranks.data(), sums.data(), weight.data(), 3}}, scores);
  require(std::equal(alone.begin(), alone.begin() + kWidth, leaves.begin()) &&
              std::equal(alone_scores.begin(), alone_scores.begin() + kWidth, scores.begin()),
          "a prior without weight changes nothing");
  const std::vector<int32_t> expected{9, 2, 5};
  for (size_t i = 0; i < kWidth; ++i) {
    const bool exists = i < expected.size();
    require(leaves[kWidth + i] == (exists ? items.trie.num_inner + expected[i] : cemg::kNone),
            "a weight of 1 ranks the items of the prior");
    require(exists || std::isinf(scores[kWidth + i]), "the list ends with the prior");
  }
  require(scores[kWidth] == std::log(0.625f), "the score of a prior alone");
}

void check_search(bool encoder, bool gated, bool biased, bool normed, bool rotated, int64_t width,
                  int64_t heads, int64_t groups, int64_t size, int64_t threads) {
  Weights weights;
  cemg::Transformer decoder = make_stack(weights, width, heads, groups, size, gated, biased, normed, encoder);
  if (threads > 1) {  // a code table from token 4 on; in some steps, some tokens are not in it
    decoder.code_table = weights.some((kVocabulary - 4) * decoder.layers[0].qkv.out_features);
    decoder.first_code = 4;
    decoder.num_codes = kVocabulary - 4;
  }
  const cemg::Transformer reader =
      make_stack(weights, width, heads, groups, size, gated, biased, normed, false);
  const cemg::Linear columns = weights.linear(width, kCodes), all = weights.linear(width, kVocabulary);
  cemg::PositionTables prompt_positions, step_positions;
  if (encoder) {
    prompt_positions.bias = weights.some(heads * (2 * kLength - 1));
    step_positions.bias = weights.some(3 * heads);
  } else if (rotated) {
    prompt_positions.cosine = weights.some(kPositions * size);
    prompt_positions.sine = weights.some(kPositions * size);
    step_positions = prompt_positions;
  } else {
    prompt_positions.embedding = weights.some(kPositions * width);
    step_positions = prompt_positions;
  }
  const std::vector<int64_t> tokens{3, 4, 5, 6, 7, 9, 9, 8, 1, 2}, mask{1, 1, 1, 1, 1, 0, 0, 1, 1, 0};
  cemg::BeamSearch search(encoder ? &reader : nullptr, decoder, threads);
  const auto both = run(search, tokens, mask, prompt_positions, step_positions, columns, all);
  check_active_rows(run(search, tokens, mask, prompt_positions, step_positions, columns, all, true), both);
  for (int64_t user = 0; user < 2; ++user) {
    const auto begin = user * kLength, end = begin + kLength;
    const auto alone =
        run(search, {tokens.begin() + begin, tokens.begin() + end},
            {mask.begin() + begin, mask.begin() + end}, prompt_positions, step_positions, columns, all);
    for (size_t step = 0; step < alone.size(); ++step) {
      const size_t rows = alone[step].totals.size();
      for (size_t i = 0; i < rows; ++i) {
        require(std::abs(alone[step].totals[i] - both[step].totals[user * rows + i]) < 1e-3,
                "a user's log-sum-exp does not depend on other users");
      }
      for (size_t i = 0; i < rows * kCodes; ++i) {
        require(std::isfinite(alone[step].logits[i]), "logits are finite");
        require(std::abs(alone[step].logits[i] - both[step].logits[user * rows * kCodes + i]) < 1e-3,
                "a user's logits do not depend on other users");
      }
    }
  }
  const cemg::Prompts prompts{tokens.data(), mask.data(), 2, kLength};
  check_searches<uint8_t>(search, encoder, prompts, prompt_positions, step_positions, columns, all);
  check_searches<int16_t>(search, encoder, prompts, prompt_positions, step_positions, columns, all);
  check_prior_searches<uint8_t>(search, prompts, prompt_positions, step_positions, columns);
  const std::vector<int64_t> wrong{3, 4, kVocabulary, 6, 7};
  require(search.first_invalid_token({wrong.data(), mask.data(), 1, kLength}) == 2,
          "the first invalid token is found");
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int searches = 0;
  for (int64_t rows : {1, 3, 14, 40}) {
    for (int64_t in : {1, 7, 64}) check_linear(rows, in, 1 + (rows * in) % 70, in > 1, 1 + in % 2);
  }
  check_linear(5, 1024, 33, false, 1);
  check_linear(50, 600, 500, true, 3);  // tiles that prefetch
  check_logsumexp_of_neg_inf();
  check_thread_pool(3, 20000);
  check_exceptions(3);
  for (int64_t queries : {1, 6, 7, 70}) {
    for (int64_t keys : {1, 5, 32, 71}) check_attention(random, queries, keys, 1 + (queries + keys) % 40);
  }
  for (int64_t dim : {1, 7, 8, 17, 31, 33, 64, 100, 200}) {
    check_quantize(random, 1 + dim % 30, 3, 1 + dim, dim);
    check_propagate(random, 2 + dim % 50, dim, dim % 4);
  }
  for (int64_t threads : {1, 3}) {
    for (bool gated : {false, true}) {
      for (bool biased : {false, true}) {
        check_search(true, gated, biased, false, false, 12, 3, 3, 5, threads);
        check_search(false, gated, biased, false, false, 33, 2, 1, 17, threads);
        check_search(false, gated, biased, true, true, 16, 4, 2, 8, threads);
        searches += 3;
      }
    }
  }
  std::printf("%d searches\n", searches);
  return 0;
}
