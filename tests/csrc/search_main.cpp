// Checks searches on the CPU; the test builds it with sanitizers. They run over random models of every kind,
// and each user alone must give the same as all users together. Prints how many searches it checked.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <random>
#include <set>
#include <variant>
#include <vector>

#include "cemg/row_math.h"
#include "cemg/search_cpu.h"
#include "cemg/trie_build.h"
#include "random_weights.h"

namespace {

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
  int searches = 0;
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
