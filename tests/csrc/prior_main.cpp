// Checks item priors in C++ against the definition; the test builds it with sanitizers. Prints how many steps
// it checked.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>
#include <vector>

#include "cemg/trie_prior.h"
#include "cemg/trie_step.h"
#include "random_tries.h"

namespace {

struct Outcome {  // of a step with `width` next beams per user
  std::vector<float> scores, generator, pruned;
  std::vector<int64_t> parents, codes;
  std::vector<int32_t> nodes;

  Outcome(int64_t users, int64_t width)
      : scores(users * width),
        generator(users * width),
        pruned(users),
        parents(users * width),
        codes(users * width),
        nodes(users * width) {}

  cemg::NextBeams next() {
    return {scores.data(), parents.data(), codes.data(), nodes.data(), pruned.data()};
  }

  bool operator==(const Outcome&) const = default;
};

// Random beams of users with random logits, priors and filters, which are one request per user.
template <class Code>
struct MixedStep {
  static constexpr int64_t kUsers = 4;
  const OwnedTrie<Code>& trie;
  int64_t beams, size, entries;
  std::vector<float> logits, total, scores, generator;
  std::vector<int32_t> nodes, ranks;
  std::vector<double> sums, weight = {0.0, 0.3, 0.7, 1.0};
  Bitmap bitmap;
  cemg::FilterView filter;

  MixedStep(std::mt19937& random, const OwnedTrie<Code>& owned, int64_t width)
      : trie(owned),
        beams(width),
        size(trie.view.codebook_size),
        entries(1 + static_cast<int64_t>(random() % 40)),
        bitmap(draw_bitmap(random, trie)) {
    if (random() % 2 == 0) filter.open = bitmap.open.data();
    filter.rows_per_request = beams;
    const auto items = static_cast<int32_t>(trie.rows.size());
    for (int64_t beam = 0; beam < kUsers * beams; ++beam) {
      const auto level = static_cast<int32_t>(random() % 2 == 0 ? trie.view.num_inner : trie.view.num_nodes);
      nodes.push_back(static_cast<int32_t>(random() % (level + 1)) - 1);
      scores.push_back(random() % 8 == 0 ? cemg::kNegInf : -static_cast<float>(random() % 16) / 4);
      generator.push_back(scores.back() - static_cast<float>(random() % 16) / 4);
      if (beam < beams)
        generator.back() = scores.back();  // the first user's prior has no weight
      else if (random() % 8 == 0)
        generator.back() = cemg::kNegInf;
      total.push_back(random() % 8 == 0 ? cemg::kNegInf : 9.0f);
      for (int64_t code = 0; code < size; ++code)
        logits.push_back(random() % 16 == 0 ? NAN : static_cast<float>(random() % 64) / 8);
    }
    for (int64_t user = 0; user < kUsers; ++user) {
      std::set<int32_t> drawn;
      for (int64_t i = 0; i < entries; ++i) {
        const auto rank = static_cast<int32_t>(random() % items);
        if (filter.open == nullptr || bitmap.has(rank)) drawn.insert(rank);
      }
      ranks.insert(ranks.end(), drawn.begin(), drawn.end());
      ranks.resize((user + 1) * entries, items);
      sums.push_back(0);
      for (int64_t i = 0; i < entries; ++i) {
        const double mass = random() % 8 == 0 ? 0 : 1.0 / static_cast<double>(1 << random() % 16);
        sums.push_back(sums.back() + (i < static_cast<int64_t>(drawn.size()) ? mass : 0));
      }
    }
  }

  Outcome run(cemg::Normalize normalize, int64_t width, bool with_prior) {
    Outcome outcome(kUsers, width);
    const cemg::BeamPrior prior = {
        {ranks.data(), sums.data(), weight.data(), entries}, generator.data(), outcome.generator.data()};
    cemg::beam_step(trie.view, filter, {logits.data(), total.data(), normalize}, scores.data(), nodes.data(),
                    kUsers, beams, width, outcome.next(), with_prior ? &prior : nullptr);
    return outcome;
  }

  // The mass below a node, entry by entry.
  double mass(int64_t user, int32_t node) const {
    const cemg::Range below = trie.view.interval(node);
    const auto at = [&](int32_t rank) {
      const auto begin = ranks.begin() + user * entries;
      return sums[user * (entries + 1) + (std::lower_bound(begin, begin + entries, rank) - begin)];
    };
    return at(below.end) - at(below.begin);
  }

  // The definition: all children are scored and sorted.
  Outcome expected(cemg::Normalize normalize, int64_t width) {
    std::vector<float> log_prob(logits.size());
    cemg::softmax(trie.view, filter, {logits.data(), total.data(), normalize}, nodes.data(), kUsers * beams,
                  log_prob.data());
    Outcome outcome(kUsers, width);
    for (int64_t user = 0; user < kUsers; ++user) {
      const cemg::Mixture mixture(weight[user]);
      std::vector<std::array<float, 4>> candidates;  // -score, parent, code, the generator's sum
      for (int64_t beam = 0; beam < beams; ++beam) {
        const int64_t row = user * beams + beam;
        const cemg::Range range = trie.view.children(nodes[row]);
        for (int32_t child = range.begin; child < range.end; ++child) {
          if (scores[row] == cemg::kNegInf || !filter.of(row).allows(child)) continue;
          const Code code = trie.code[child - 1];
          const float sum = generator[row] + log_prob[row * size + code];
          const double below = mass(user, child);
          const float score = weight[user] == 0 ? sum
                              : below > 0       ? mixture.score(sum, below)
                                                : mixture.score(sum);
          if (score == cemg::kNegInf) continue;
          candidates.push_back({-score, static_cast<float>(beam), static_cast<float>(code), sum});
        }
      }
      std::sort(candidates.begin(), candidates.end());
      const auto count = static_cast<int64_t>(candidates.size());
      for (int64_t i = 0; i < width; ++i) {
        const int64_t out = user * width + i;
        const auto [cost, parent, code, sum] =
            i < count ? candidates[i] : std::array<float, 4>{-cemg::kNegInf, 0, 0, cemg::kNegInf};
        outcome.scores[out] = -cost;
        outcome.parents[out] = static_cast<int64_t>(parent);
        outcome.codes[out] = static_cast<int64_t>(code);
        outcome.generator[out] = sum;
        outcome.nodes[out] =
            i < count ? trie.view.advance(nodes[user * beams + outcome.parents[out]], outcome.codes[out])
                      : cemg::kNone;
      }
      outcome.pruned[user] = count > width ? -candidates[width][0] : cemg::kNegInf;
    }
    return outcome;
  }
};

// A step under a prior returns the best candidates of the mixture.
template <class Code>
void check_mixture(std::mt19937& random, const OwnedTrie<Code>& trie, int64_t beams, int64_t width) {
  MixedStep<Code> step(random, trie, beams);
  for (const auto normalize : {cemg::Normalize::kVocab, cemg::Normalize::kLevel, cemg::Normalize::kValid}) {
    const Outcome found = step.run(normalize, width, true), expected = step.expected(normalize, width);
    require(found == expected, "a step under a prior keeps the best candidates of the mixture");
    const Outcome alone = step.run(normalize, width, false);
    require(std::equal(alone.scores.begin(), alone.scores.begin() + width, found.scores.begin()) &&
                std::equal(alone.codes.begin(), alone.codes.begin() + width, found.codes.begin()) &&
                std::equal(alone.parents.begin(), alone.parents.begin() + width, found.parents.begin()) &&
                alone.pruned[0] == found.pruned[0],
            "a prior without weight changes nothing");
  }
}

// Priors of three requests: ranks ascend, and a prefix sum holds the masses of the allowed items of lower
// rank.
template <class Code>
void check_build_prior(std::mt19937& random, const OwnedTrie<Code>& trie) {
  constexpr int64_t kSize = 60;
  const auto items = static_cast<int32_t>(trie.rows.size());
  const Bitmap bitmap = draw_bitmap(random, trie);
  cemg::FilterView filter;
  if (random() % 2 == 0) filter.open = bitmap.open.data();
  std::vector<int32_t> rank_of(trie.rows.size());
  for (int32_t rank = 0; rank < items; ++rank) rank_of[trie.rows[rank]] = rank;
  std::vector<int64_t> known;  // the ids of the rows, if they are not the rows themselves
  if (random() % 2 == 0) {
    for (int64_t row = 0; row < items; ++row) known.push_back(100 + 3 * row);
  }
  std::vector<int64_t> drawn, rows(trie.rows.begin(), trie.rows.end()), counts;
  std::vector<double> mass;
  for (int64_t request = 0; request < 3; ++request) {
    counts.push_back(request == 2 ? 0 : static_cast<int64_t>(random() % std::min<int64_t>(kSize, items)) + 1);
    std::shuffle(rows.begin(), rows.end(), random);
    for (int64_t i = 0; i < counts.back(); ++i) {
      drawn.push_back(known.empty() ? rows[i] : known[rows[i]]);
      mass.push_back(random() % 4 == 0 ? 0 : 1e-9 + static_cast<double>(random() % 1000));
    }
  }
  const cemg::PriorSource source = {
      drawn.data(),   mass.data(), counts.data(),      known.empty() ? nullptr : known.data(),
      rank_of.data(), items,       trie.view.num_inner};
  std::vector<int32_t> ranks(3 * kSize);
  std::vector<double> sums(3 * (kSize + 1)), weight(3, 0.5);
  const auto build = [&] {
    return cemg::build_prior(source, filter, 3, kSize, ranks.data(), sums.data(), weight.data());
  };
  require(build(), "a prior of distinct items of the trie is valid");
  int64_t first = 0;
  for (int64_t request = 0; request < 3; first += counts[request], ++request) {
    double total = 0;
    std::vector<double> by_rank(items);
    for (int64_t i = first; i < first + counts[request]; ++i) {
      const int32_t rank = rank_of[known.empty() ? drawn[i] : (drawn[i] - 100) / 3];
      by_rank[rank] = filter.open == nullptr || bitmap.has(rank) ? mass[i] : 0;
      total += by_rank[rank];
    }
    require(weight[request] == (total > 0 ? 0.5 : 0), "the weight is 0 exactly if no mass is left");
    double below = 0;
    int32_t next = 0;
    for (int64_t i = 0; i <= kSize; ++i) {
      const int32_t rank = i < counts[request] ? ranks[request * kSize + i] : items;
      for (; next < rank; ++next) below += total > 0 ? by_rank[next] / total : 0;
      require(i == kSize || ranks[request * kSize + i] == rank, "the number of items pads the ranks");
      require(i == 0 || i >= counts[request] || ranks[request * kSize + i - 1] < rank, "ranks ascend");
      require(std::abs(sums[request * (kSize + 1) + i] - below) < 1e-12, "sums hold the masses before");
    }
  }
  drawn.back() = drawn.size() > 1 ? drawn[drawn.size() - 2] : -1;
  require(!build() || counts[1] == 1, "an item that is there twice is found");
  drawn.back() = int64_t{1} << 40;
  require(!build(), "an unknown item is found");
}

// Scores equal log((1 - weight) e^generator + weight mass) in float precision; weights of 0 and 1 leave one
// part.
void check_mixture_scores() {
  for (const double weight : {1e-9, 0.3, 0.7, 1 - 1e-9}) {
    const cemg::Mixture mixture(weight);
    for (const float sum : {-40.0f, -5.5f, -0.25f, 0.0f}) {
      for (const double mass : {1e-12, 1e-3, 0.5, 1.0}) {
        const double exact = std::log((1 - weight) * std::exp(static_cast<double>(sum)) + weight * mass);
        require(std::abs(mixture.score(sum, mass) - exact) <= 1e-6 * (1 + std::abs(exact)),
                "the score of a mixture");
      }
      const float lowest = mixture.lowest_generator(mixture.score(sum));
      require(lowest < sum && mixture.score(std::nextafter(lowest, -1e9f)) < mixture.score(sum) &&
                  sum - lowest < 1e-4f,
              "below the bound, scores are lower");
    }
    require(mixture.score(cemg::kNegInf, 0.5) == static_cast<float>(std::log(weight * 0.5)),
            "the score of a prior alone");
  }
  const cemg::Mixture prior(1.0);
  require(prior.score(-1.0f) == cemg::kNegInf && prior.score(-1.0f, 0.5) == static_cast<float>(std::log(0.5)),
          "a weight of 1 leaves the prior");
}

}  // namespace

int main() {
  std::mt19937 random(3);
  int steps = 0;
  check_mixture_scores();
  for (int round = 0; round < 20; ++round) {
    check_build_prior(random, build<uint8_t>(draw_rows(random, 1 + round * 20, 3, 8), 3, 8, 1));
  }
  for (int round = 0; round < 12; ++round) {
    const int64_t beams = 1 + random() % 30, width = 1 + random() % 40;
    check_mixture(random, build<uint8_t>(draw_rows(random, 300, 3, 8), 3, 8, 1), beams, width);
    check_mixture(random, build<int16_t>(draw_rows(random, 900, 2, 300), 2, 300, 1), beams, width);
    check_mixture(random, build<uint8_t>(draw_rows(random, 5000, 2, 100), 2, 100, 1), beams, width);
    steps += 9;
  }
  std::printf("%d steps\n", steps);
  return 0;
}
