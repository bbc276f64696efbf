// Checks the C++ trie; the test builds it with sanitizers. Random tries are compared with the sorted rows of
// codes. Prints how many tries it checked.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cemg/trie_build.h"
#include "cemg/trie_cells.h"
#include "cemg/trie_check.h"
#include "cemg/trie_cpu.h"
#include "cemg/trie_filter.h"
#include "cemg/trie_step.h"
#include "random_tries.h"

namespace {

// The arrays do not depend on the number of chunks and on the type of the codes.
template <class Code>
void check_same(const OwnedTrie<Code>& trie, const OwnedTrie<Code>& other) {
  require(trie.code == other.code && trie.first_child == other.first_child && trie.rows == other.rows,
          "the arrays are the same for any number of chunks and any type of code");
}

template <class Code>
void check_paths(const OwnedTrie<Code>& trie, const std::vector<Row>& rows, int levels) {
  const int64_t items = static_cast<int64_t>(rows.size());
  std::vector<int64_t> prefixes;
  for (const Row& row : rows) prefixes.insert(prefixes.end(), row.begin(), row.end());
  std::vector<int32_t> leaves(items);
  cemg::lookup(trie.view, cemg::FilterView{}, prefixes.data(), items, levels, leaves.data());
  for (int64_t row = 0; row < items; ++row) {
    require(trie.rows[leaves[row] - trie.view.num_inner] == row, "every item is found at its leaf");
  }
}

template <class Code>
void check_masks(const OwnedTrie<Code>& trie, const Bitmap& bitmap) {
  const int32_t size = trie.view.codebook_size;
  std::vector<int32_t> nodes;
  for (int32_t node = -2; node < trie.view.num_nodes + 2; ++node) nodes.push_back(node);
  const int64_t count = static_cast<int64_t>(nodes.size());
  std::vector<char> allowed(count * size);
  std::vector<int32_t> codes(count * size), found(count * size), ranks(count * 2);
  cemg::FilterView filter;
  filter.open = bitmap.open.data();
  cemg::mask(trie.view, filter, nodes.data(), count, reinterpret_cast<bool*>(allowed.data()));
  cemg::children(trie.view, filter, nodes.data(), count, codes.data(), found.data());
  cemg::interval(trie.view, nodes.data(), count, ranks.data());
  std::vector<char> cells(count * size);  // in another order, as on a GPU
  for (int64_t cell = count * size - 1; cell >= 0; --cell) {
    cemg::mask_cell(trie.view, filter, nodes.data(), cell, reinterpret_cast<bool*>(cells.data()));
  }
  require(cells == allowed, "the mask by cells, as on a GPU, equals the mask of the CPU");
  for (int64_t i = 0; i < count; ++i) {
    int64_t seen = 0;
    for (int32_t k = 0; k < size; ++k) {
      const cemg::Range below = trie.view.interval(trie.view.advance(nodes[i], k));
      bool any = false;
      for (int32_t rank = below.begin; rank < below.end; ++rank) any |= bitmap.has(rank);
      require(static_cast<bool>(allowed[i * size + k]) == any,
              "a code is allowed exactly if an allowed item is below");
      if (any) require(codes[i * size + seen++] == k, "children are the allowed codes in order");
    }
  }
}

// Three requests over two bitmaps with two rows each. The excluded ranks of a request are close together, so
// that they close inner nodes. Checks every node.
template <class Code>
void check_requests(std::mt19937& random, const OwnedTrie<Code>& trie, const Bitmap& first, int levels) {
  const int32_t items = static_cast<int32_t>(trie.rows.size());
  const Bitmap second = draw_bitmap(random, trie);
  std::vector<uint64_t> open = first.open;
  open.insert(open.end(), second.open.begin(), second.open.end());
  constexpr int64_t kMaxExcluded = 9;
  const std::vector<int32_t> filter_of = {1, -1, 0};
  std::vector<std::set<int32_t>> left_out(3);
  std::vector<int32_t> excluded(3 * kMaxExcluded, cemg::kNoNode);
  for (size_t request = 0; request < 3; ++request) {
    const int32_t from =
        static_cast<int32_t>(random() % items);  // neighbours, so that they close inner nodes
    for (int i = 0; i < kMaxExcluded; ++i)
      left_out[request].insert((from + static_cast<int32_t>(random() % 9)) % items);
    std::copy(left_out[request].begin(), left_out[request].end(), excluded.begin() + request * kMaxExcluded);
  }
  cemg::FilterView filter;
  filter.open = open.data();
  filter.filter_of = filter_of.data();
  filter.words = static_cast<int64_t>(first.open.size());
  std::vector<int32_t> closed(3 * (kMaxExcluded * levels + 1));
  cemg::close_nodes(trie.view, filter, excluded.data(), 3, kMaxExcluded, levels, closed.data());
  filter.closed = closed.data();
  filter.max_closed = kMaxExcluded * levels + 1;
  filter.rows_per_request = 2;
  for (int32_t node = 0; node < trie.view.num_nodes; ++node) {
    const std::vector<int32_t> nodes(6, node);
    std::vector<int32_t> kept(6);
    cemg::keep(trie.view, filter, nodes.data(), 6, kept.data());
    const cemg::Range below = trie.view.interval(node);
    for (size_t row = 0; row < 6; ++row) {
      bool any = false;
      for (int32_t rank = below.begin; rank < below.end; ++rank) {
        const int32_t which = filter_of[row / 2];
        const bool open = which < 0 || (which == 0 ? first : second).has(rank);
        any |= open && !left_out[row / 2].contains(rank);
      }
      require((kept[row] == node) == any, "a node is kept exactly if its request allows an item below");
    }
  }
}

// A word of the packed first children with a changed offset or number, or a random word.
template <class Code>
uint64_t draw_word(std::mt19937& random, const OwnedTrie<Code>& good) {
  const uint64_t word = good.first_child[random() % good.first_child.size()];
  const uint64_t bitmap = uint64_t{random()} << 32 | random();
  return random() % 3 == 0 ? bitmap : word + (uint64_t{1} << (random() % 64));
}

// The check works on any values, and the arrays that it accepts can be walked.
template <class Code>
void check_trie_problem(std::mt19937& random, const OwnedTrie<Code>& good, int levels, int size) {
  const auto problem = [&](const OwnedTrie<Code>& trie) {
    return cemg::trie_problem<Code>(trie.code, trie.first_child, trie.rows, levels, size);
  };
  require(problem(good) == nullptr, "a built trie has no problem");
  for (int round = 0; round < 40; ++round) {
    OwnedTrie<Code> bad = good;
    for (int wrong = 0; wrong < 1 + round % 3; ++wrong) {
      const auto value =
          static_cast<int32_t>(random() % 3 == 0 ? random() : random() % (good.rows.size() + 2));
      const unsigned which = random() % 3;
      if (which == 0) bad.code[random() % bad.code.size()] = static_cast<Code>(value);
      if (which == 1) bad.first_child[random() % bad.first_child.size()] = draw_word(random, good);
      if (which == 2) bad.rows[random() % bad.rows.size()] = value;
    }
    if (round % 10 == 9) bad.first_child.pop_back();
    if (round % 10 == 8) bad.rows.clear();
    if (problem(bad) != nullptr) continue;
    bad.view.code = bad.code.data();
    bad.view.first_child = {bad.first_child.data()};
    for (int32_t node = 0; node < bad.view.num_nodes; ++node) {
      const cemg::Range ranks = bad.view.interval(node);
      require(ranks.begin < ranks.end && ranks.end <= static_cast<int32_t>(bad.rows.size()),
              "each node of an accepted trie has items below");
    }
  }
}

// Numbers with small and large gaps, so that blocks of both kinds alternate.
void check_packed(std::mt19937& random) {
  for (int count = 1; count < 400; ++count) {
    std::vector<int32_t> numbers(1, static_cast<int32_t>(random() % 3));
    while (static_cast<int>(numbers.size()) < count) {
      const uint32_t most = numbers.size() / 64 % 2 == 0 ? 2 : 900;
      numbers.push_back(numbers.back() + 1 + static_cast<int32_t>(random() % most));
    }
    const auto words = cemg::pack_ascending(numbers);
    require(cemg::unpack_ascending(words, count) == numbers, "unpacking returns the packed numbers");
    require(cemg::unpack_ascending(words, count + 1).empty(), "unpacking too many numbers fails");
    const cemg::PackedAscending packed{words.data()};
    std::vector<int32_t> block(65);
    for (int32_t n = 0; n < count; ++n) {
      require(packed[n] == numbers[n], "a packed number is read by its index");
      require(packed.last_at_most(numbers[n], count) == n, "the index of a number is found");
      if (n + 1 == count) continue;
      const cemg::Range pair = packed.pair(n);
      require(pair.begin == numbers[n] && pair.end == numbers[n + 1], "a pair is a number and the next one");
      require(packed.last_at_most(numbers[n + 1] - 1, count) == n,
              "a value between two numbers belongs to the lower one");
      const int32_t size = packed.read_block(n / 64, count, block.data());
      require(n % 64 < size && block[n % 64] == numbers[n], "a block has its numbers in order");
    }
    const auto largest = unsigned{0x7fffffff};
    auto bad = words;
    bad[random() % bad.size()] ^= uint64_t{1} << (random() % 64);
    const auto found = cemg::unpack_ascending(bad, count);
    for (const int32_t number : found)
      require(static_cast<unsigned>(number) <= largest, "invalid words give no negative numbers");
  }
}

void check_ids() {
  const auto wrong = [](std::vector<int64_t> ids) { return cemg::first_invalid_id(ids); };
  constexpr int64_t kFar = int64_t{1} << 62;
  require(wrong({}) == -1 && wrong({0, 5, 3}) == -1 && wrong({kFar, 0, 1}) == -1,
          "distinct ids are accepted");
  require(wrong({1, -1}) == 1 && wrong({4, 2, 4}) == 2 && wrong({kFar, 0, kFar}) == 2,
          "the first invalid id is found");
}

template <class Code>
void check_trie(std::mt19937& random, int items, int levels, int size) {
  const std::vector<Row> rows = draw_rows(random, items, levels, size);
  const OwnedTrie<Code> trie = build<Code>(rows, levels, size, 1);
  check_same(trie, build<Code>(rows, levels, size, 3));
  check_same(trie, build<Code, int64_t>(rows, levels, size, 64));
  check_same(trie, build<Code, int16_t>(rows, levels, size, 0));
  check_paths(trie, rows, levels);
  const Bitmap bitmap = draw_bitmap(random, trie);
  check_masks(trie, bitmap);
  check_requests(random, trie, bitmap, levels);
  check_trie_problem(random, trie, levels, size);
}

// One user's beam step from the root and its children, compared with a sort of all candidates.
template <class Code>
void check_step(std::mt19937& random, int items, int size, int64_t width) {
  const OwnedTrie<Code> trie = build<Code>(draw_rows(random, items, 2, size), 2, size, 1);
  const cemg::Range below = trie.view.children(cemg::kRoot);
  const int64_t beams = below.end;
  std::vector<int32_t> nodes(static_cast<size_t>(beams));
  std::iota(nodes.begin(), nodes.end(), 0);
  std::vector<float> logits(static_cast<size_t>(beams * size)), scores(nodes.size()), total(nodes.size(), 9);
  for (float& logit : logits)
    logit = static_cast<float>(random() % 64) / 8;  // exact in float, with many ties
  for (float& score : scores) score = -static_cast<float>(random() % 4);
  std::vector<std::array<float, 3>> expected;  // -score, parent, code
  for (int64_t beam = 0; beam < beams; ++beam) {
    const cemg::Range range = trie.view.children(nodes[beam]);
    for (int32_t child = range.begin; child < range.end; ++child) {
      const Code code = trie.code[child - 1];
      expected.push_back({9 - logits[beam * size + code] - scores[beam], static_cast<float>(beam),
                          static_cast<float>(code)});
    }
  }
  std::sort(expected.begin(), expected.end());
  std::vector<float> found(width), pruned(1);
  std::vector<int64_t> parents(width), codes(width);
  std::vector<int32_t> grown(width);
  cemg::beam_step(trie.view, cemg::FilterView{}, {logits.data(), total.data(), cemg::Normalize::kVocab},
                  scores.data(), nodes.data(), 1, beams, width,
                  {found.data(), parents.data(), codes.data(), grown.data(), pruned.data()});
  for (int64_t i = 0; i < std::min<int64_t>(width, expected.size()); ++i) {
    const auto [cost, parent, code] = expected[i];
    require(-found[i] == cost && parents[i] == parent && codes[i] == code,
            "a step keeps the best candidates in order");
    require(grown[i] == trie.view.advance(nodes[parents[i]], codes[i]),
            "a step returns the nodes of the chosen codes");
  }
}

void check_refusals() {
  using Kind = cemg::BuildError::Kind;
  const auto kind = [](std::vector<int32_t> codes, int32_t levels, int32_t size) {
    const auto built = cemg::TrieBuilder::sort<int32_t>(codes, levels, size);
    require(std::holds_alternative<cemg::BuildError>(built), "invalid codes are rejected");
    return std::get<cemg::BuildError>(built).kind;
  };
  require(kind({}, 2, 4) == Kind::kShape, "there must be an item");
  require(kind({1, 2, 3}, 2, 4) == Kind::kShape, "each item must have all codes");
  require(kind({1}, 0, 4) == Kind::kShape, "there must be a level");
  require(kind({1}, 1, 0) == Kind::kCodebookSize, "the codebook size must be 1 or more");
  require(kind({1}, 1, 1 << 20) == Kind::kCodebookSize, "the codebook size has a maximum");
  require(kind({0, 4}, 1, 4) == Kind::kCodeOutOfRange, "a code must be below the codebook size");
  require(kind({0, -1}, 1, 4) == Kind::kCodeOutOfRange, "a code must not be negative");
  const std::vector<int32_t> twice = {1, 2, 0, 1, 1, 2};
  for (int64_t chunks : {1, 2, 3}) {
    const auto built = cemg::TrieBuilder::sort<int32_t>(twice, 2, 4, chunks);
    const auto& pairs = std::get<cemg::TrieBuilder>(built).duplicates();
    require(pairs.size() == 1 && pairs[0] == cemg::TrieBuilder::Duplicate(0, 2),
            "duplicate rows are returned");
  }
}

}  // namespace

int main() {
  std::mt19937 random(7);
  int tries = 0;
  for (int round = 0; round < 30; ++round) {
    for (int items : {1, 2, 50, 700}) {
      check_trie<uint8_t>(random, items, 1 + round % 4, 1 + static_cast<int>(random() % 9));
      check_trie<int16_t>(random, items / 10 + 1, 1 + round % 8, 4096);
      tries += 2;
    }
  }
  for (int64_t width : {1, 40, 3000}) {
    check_step<uint8_t>(random, 5000, 100, width);  // sparse and dense nodes
    check_step<uint8_t>(random, 9000, 100, width);
    check_step<int16_t>(random, 9000, 300, width);
    check_step<int16_t>(random, 40000, 150, width);
  }
  check_refusals();
  check_ids();
  check_packed(random);
  std::printf("%d tries\n", tries);
  return 0;
}
