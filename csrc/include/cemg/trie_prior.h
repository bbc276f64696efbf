// An item prior below the trie: the mass of a node is a difference of prefix sums over the ranks of its
// items. B requests, Z entries each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "cemg/row_math.h"
#include "cemg/trie_view.h"

namespace cemg {

// The prior of one request.
struct RequestPrior {
  const int32_t* ranks;  // [size] ascending; the number of items pads the end
  const double* sums;    // [size + 1] sums[i] is the mass of the entries before i
  int64_t size;
  double weight;  // of the prior in the mixture, 0 to 1
};

struct PriorView {
  const int32_t* ranks = nullptr;  // [B, Z]
  const double* sums = nullptr;    // [B, Z + 1]
  const double* weight = nullptr;  // [B]
  int64_t size = 0;                // Z

  RequestPrior of(int64_t request) const noexcept {
    return {ranks + request * size, sums + request * (size + 1), size, weight[request]};
  }
};

// Items with masses, P in all requests.
struct PriorSource {
  const int64_t* items;    // [P]
  const double* mass;      // [P] finite, 0 or more
  const int64_t* counts;   // [B] the entries of each request, one request after the other
  const int64_t* known;    // [N] the items of the trie, ascending; null: 0 ... N - 1
  const int32_t* rank_of;  // [N] the rank of each
  int64_t num_items;       // N
  int32_t num_inner;       // of the trie
};

// Sorts and sums the masses of each request: ranks [B, size], sums [B, size + 1], where no request has more
// than `size` entries. Masses are normalized over the items that the filter, with one row per request,
// allows, and rounded up to multiples of 2^-52. Sets weight [B] to 0 where no mass is left. Returns false,
// with the output unfinished, if an item is not in the trie or is twice in a request.
bool build_prior(const PriorSource& source, FilterView filter, int64_t requests, int64_t size, int32_t* ranks,
                 double* sums, double* weight);

// The scores of a mixture: log((1 - weight) e^generator + weight mass), in double precision, then rounded.
class Mixture {
 public:
  explicit Mixture(double weight) noexcept
      : log_generator_(std::log1p(-weight)), log_prior_(std::log(weight)) {}

  // The score of a node without mass.
  float score(float generator) const noexcept {
    return static_cast<float>(log_generator_ + static_cast<double>(generator));
  }

  // The score of a node with mass.
  float score(float generator, double mass) const noexcept {
    const double a = log_generator_ + static_cast<double>(generator), b = log_prior_ + std::log(mass);
    return static_cast<float>(std::max(a, b) + std::log1p(std::exp(-std::abs(a - b))));
  }

  // A generator below which the score of a node without mass is lower than `score`, or -inf.
  float lowest_generator(float score) const noexcept {
    if (std::isinf(log_generator_)) return -kNegInf;  // all such scores are -inf
    constexpr double kMoreThanRounding = 1 + 0x1p-22;
    const double lowest = static_cast<double>(score) * kMoreThanRounding - log_generator_;
    return larger(-kMaxFloat, std::nextafter(static_cast<float>(lowest), kNegInf));
  }

 private:
  double log_generator_, log_prior_;
};

// With at least one entry per so many children, the first ranks of all of them are read at once.
constexpr int64_t kReadsPerEntry = 16;

struct MassedChild {
  int32_t node;
  double mass;            // above 0
  float score = kNegInf;  // of the mixture, where a step has computed it
};

// The first rank below a node. `levels` is the number of levels between the node and the leaves; `node` may
// be one past the last of its level.
template <class Code>
int32_t first_rank(const TrieView<Code>& trie, int32_t node, int levels) noexcept {
  for (int level = 0; level < levels; ++level) node = trie.first_child[node];
  return node - trie.num_inner;
}

// The first rank below each child of a range and below the one after the last: [children + 1]. Reads each
// level of the trie for all children at once, so that the reads of a large trie overlap.
template <class Code>
void first_ranks(const TrieView<Code>& trie, Range children, int levels, std::vector<int32_t>& out) {
  out.resize(static_cast<size_t>(children.end - children.begin) + 1);
  std::iota(out.begin(), out.end(), children.begin);
  for (int level = 0; level < levels; ++level) {
    for (int32_t& node : out) node = trie.first_child[node];
  }
  for (int32_t& node : out) node -= trie.num_inner;
}

// Appends the children with mass of a node, in order. `children` are all of its children; `scratch` is for
// their first ranks.
template <class Code>
void append_child_masses(const TrieView<Code>& trie, const RequestPrior& prior, Range children,
                         std::vector<int32_t>& scratch, std::vector<MassedChild>& out) {
  if (children.begin == children.end) return;
  int levels = 0;
  for (int32_t node = children.begin; node < trie.num_inner; node = trie.first_child[node]) ++levels;
  const int32_t* const ranks = prior.ranks;
  const int32_t* const ranks_end = ranks + prior.size;
  const int32_t* entry = std::lower_bound(ranks, ranks_end, first_rank(trie, children.begin, levels));
  const int32_t* const end = std::lower_bound(entry, ranks_end, first_rank(trie, children.end, levels));
  if (entry == end) return;
  const int64_t count = children.end - children.begin;
  const bool reads_all = levels > 0 && (end - entry) * kReadsPerEntry >= count;
  if (reads_all) first_ranks(trie, children, levels, scratch);
  const auto begin_of = [&](int32_t child) {
    return reads_all ? scratch[static_cast<size_t>(child - children.begin)] : first_rank(trie, child, levels);
  };
  int32_t child = children.begin;
  while (entry < end && child < children.end) {
    // the last child that begins at the entry or before it: the steps double, then halve
    int32_t step = 1;
    while (child + step < children.end && begin_of(child + step) <= *entry) {
      child += step;
      step *= 2;
    }
    for (; step > 0; step /= 2) {
      if (child + step < children.end && begin_of(child + step) <= *entry) child += step;
    }
    const int32_t next_rank = begin_of(child + 1);
    const int32_t* const next = std::find_if(entry, end, [=](int32_t rank) { return rank >= next_rank; });
    const double mass = prior.sums[next - ranks] - prior.sums[entry - ranks];
    if (mass > 0) out.push_back({child, mass});
    entry = next;
    ++child;
  }
}

// The children with mass of a user's beams.
class MassedChildren {
 public:
  void clear() {
    children_.clear();
    first_.assign(1, 0);
  }

  // Adds the next beam, given all children of its node.
  template <class Code>
  void add_beam(const TrieView<Code>& trie, const RequestPrior& prior, Range children) {
    append_child_masses(trie, prior, children, ranks_, children_);
    first_.push_back(children_.size());
  }

  std::span<MassedChild> of(int64_t beam) noexcept {
    const auto at = static_cast<size_t>(beam);
    return {children_.data() + first_[at], children_.data() + first_[at + 1]};
  }

  bool contains(int64_t beam, int32_t node) noexcept {
    const std::span<MassedChild> children = of(beam);
    const auto at =
        std::lower_bound(children.begin(), children.end(), node,
                         [](const MassedChild& child, int32_t other) { return child.node < other; });
    return at != children.end() && at->node == node;
  }

 private:
  std::vector<MassedChild> children_;
  std::vector<size_t> first_;   // of each beam, then the number of all
  std::vector<int32_t> ranks_;  // scratch
};

}  // namespace cemg
