// The C++ trie under sanitizers: random tries against the sorted rows themselves. Prints what it checked.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "cemg/trie_build.h"
#include "cemg/trie_cells.h"
#include "cemg/trie_cpu.h"

namespace {

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

using Row = std::vector<int32_t>;

std::vector<int32_t> flatten(const std::vector<Row>& rows) {
  std::vector<int32_t> flat;
  for (const Row& row : rows) flat.insert(flat.end(), row.begin(), row.end());
  return flat;
}

std::vector<Row> draw_rows(std::mt19937& random, int items, int levels, int size) {
  std::set<Row> rows;
  std::uniform_int_distribution<int32_t> code(0, size - 1);
  for (int i = 0; i < items; ++i) {
    Row row(levels);
    std::generate(row.begin(), row.end(), [&] { return code(random); });
    rows.insert(row);
  }
  std::vector<Row> shuffled(rows.begin(), rows.end());
  std::shuffle(shuffled.begin(), shuffled.end(), random);
  return shuffled;
}

template <class Code>
struct Owned {
  std::vector<Code> code;
  std::vector<int32_t> first_child;
  std::vector<int32_t> rows;
  cemg::TrieView<Code> view;
};

template <class Code>
Owned<Code> build(const std::vector<Row>& rows, int levels, int size) {
  const std::vector<int32_t> flat = flatten(rows);
  auto built = cemg::TrieBuilder::sort(flat, levels, size);
  require(std::holds_alternative<cemg::TrieBuilder>(built), "valid codes build");
  const auto& builder = std::get<cemg::TrieBuilder>(built);
  require(builder.duplicates().empty(), "distinct rows have no duplicates");
  Owned<Code> trie;
  trie.code.resize(builder.num_nodes() - 1);
  trie.first_child.resize(builder.num_inner() + 1);
  trie.rows.resize(rows.size());
  builder.write(trie.code.data(), trie.first_child.data(), trie.rows.data());
  trie.view = {trie.code.data(), trie.first_child.data(), builder.num_inner(), builder.num_nodes(), size};
  return trie;
}

template <class Code>
void check_paths(const Owned<Code>& trie, const std::vector<Row>& rows, int levels) {
  const int64_t items = static_cast<int64_t>(rows.size());
  std::vector<int64_t> prefixes;
  for (const Row& row : rows) prefixes.insert(prefixes.end(), row.begin(), row.end());
  std::vector<int32_t> leaves(items);
  cemg::lookup(trie.view, cemg::FilterView{nullptr, nullptr}, prefixes.data(), items, levels, leaves.data());
  for (int64_t row = 0; row < items; ++row) {
    require(trie.rows[leaves[row] - trie.view.num_inner] == row, "every item is found at its leaf");
  }
}

template <class Code>
void check_masks(const Owned<Code>& trie, const std::vector<uint64_t>& words,
                 const std::vector<int32_t>& before) {
  const int32_t size = trie.view.codebook_size;
  std::vector<int32_t> nodes;
  for (int32_t node = -2; node < trie.view.num_nodes + 2; ++node) nodes.push_back(node);
  const int64_t count = static_cast<int64_t>(nodes.size());
  std::vector<char> allowed(count * size);
  std::vector<int32_t> codes(count * size), found(count * size), ranks(count * 2);
  const cemg::FilterView filter{words.data(), before.data()};
  cemg::mask(trie.view, filter, nodes.data(), count, reinterpret_cast<bool*>(allowed.data()));
  cemg::children(trie.view, filter, nodes.data(), count, codes.data(), found.data());
  cemg::interval(trie.view, nodes.data(), count, ranks.data());
  std::vector<char> cells(count * size);  // as a grid of threads would fill it
  for (int64_t cell = count * size - 1; cell >= 0; --cell) {
    cemg::mask_cell(trie.view, filter, nodes.data(), cell, reinterpret_cast<bool*>(cells.data()));
  }
  require(cells == allowed, "the cells of the GPU's mask equal the CPU's walk");
  for (int64_t i = 0; i < count; ++i) {
    int64_t seen = 0;
    for (int32_t k = 0; k < size; ++k) {
      const cemg::Range below = trie.view.interval(trie.view.advance(nodes[i], k));
      bool any = false;
      for (int32_t rank = below.begin; rank < below.end; ++rank) any |= (words[rank / 64] >> (rank % 64)) & 1;
      require(static_cast<bool>(allowed[i * size + k]) == any,
              "a code is legal iff an allowed item is below");
      if (any) require(codes[i * size + seen++] == k, "children are the legal codes in order");
    }
  }
}

template <class Code>
void check_trie(std::mt19937& random, int items, int levels, int size) {
  const std::vector<Row> rows = draw_rows(random, items, levels, size);
  const Owned<Code> trie = build<Code>(rows, levels, size);
  check_paths(trie, rows, levels);
  const size_t blocks = (rows.size() + 511) / 512;
  std::vector<uint64_t> words(blocks * 8, 0);
  std::vector<int32_t> before(blocks, 0);
  for (size_t rank = 0; rank < rows.size(); ++rank) {
    if (random() % 3 == 0) words[rank / 64] |= uint64_t{1} << (rank % 64);
  }
  for (size_t w = 0; w + 8 < words.size(); ++w) {
    before[w / 8 + 1] = before[w / 8 + 1] + cemg::FilterView::popcount(words[w]);
    if (w % 8 == 7) before[w / 8 + 1] += before[w / 8];
  }
  check_masks(trie, words, before);
}

void check_refusals() {
  using Kind = cemg::BuildError::Kind;
  const auto kind = [](std::vector<int32_t> codes, int32_t levels, int32_t size) {
    const auto built = cemg::TrieBuilder::sort(codes, levels, size);
    require(std::holds_alternative<cemg::BuildError>(built), "bad codes are refused");
    return std::get<cemg::BuildError>(built).kind;
  };
  require(kind({}, 2, 4) == Kind::kShape, "no items");
  require(kind({1, 2, 3}, 2, 4) == Kind::kShape, "half an item");
  require(kind({1}, 0, 4) == Kind::kShape, "no levels");
  require(kind({1}, 1, 0) == Kind::kCodebookSize, "no codes");
  require(kind({1}, 1, 1 << 20) == Kind::kCodebookSize, "too many codes");
  require(kind({0, 4}, 1, 4) == Kind::kCodeOutOfRange, "a code past the end");
  require(kind({0, -1}, 1, 4) == Kind::kCodeOutOfRange, "a negative code");
  const std::vector<int32_t> twice = {1, 2, 0, 1, 1, 2};
  const auto built = cemg::TrieBuilder::sort(twice, 2, 4);
  const auto& pairs = std::get<cemg::TrieBuilder>(built).duplicates();
  require(pairs.size() == 1 && pairs[0] == cemg::TrieBuilder::Duplicate(0, 2), "duplicates are named");
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
  check_refusals();
  std::printf("%d tries\n", tries);
  return 0;
}
