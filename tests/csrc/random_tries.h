// Random tries and filters, for the tests of the trie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <variant>
#include <vector>

#include "cemg/trie_build.h"
#include "cemg/trie_filter.h"
#include "cemg/trie_view.h"

inline void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

using Row = std::vector<int32_t>;

inline std::vector<int32_t> flatten(const std::vector<Row>& rows) {
  std::vector<int32_t> flat;
  for (const Row& row : rows) flat.insert(flat.end(), row.begin(), row.end());
  return flat;
}

inline std::vector<Row> draw_rows(std::mt19937& random, int items, int levels, int size) {
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
struct OwnedTrie {
  std::vector<Code> code;
  std::vector<uint64_t> first_child;
  std::vector<int32_t> rows;
  cemg::TrieView<Code> view;
};

template <class Code, class Input = int32_t>
OwnedTrie<Code> build(const std::vector<Row>& rows, int levels, int size, int64_t chunks) {
  const std::vector<int32_t> wide = flatten(rows);
  const std::vector<Input> flat(wide.begin(), wide.end());
  auto built = cemg::TrieBuilder::sort<Input>(flat, levels, size, chunks);
  require(std::holds_alternative<cemg::TrieBuilder>(built), "valid codes give a trie");
  const auto& builder = std::get<cemg::TrieBuilder>(built);
  require(builder.duplicates().empty(), "distinct rows have no duplicates");
  OwnedTrie<Code> trie;
  trie.code.resize(builder.num_nodes() - 1);
  trie.rows.resize(rows.size());
  trie.first_child = builder.write(trie.code.data(), trie.rows.data());
  trie.view = {trie.code.data(), {trie.first_child.data()}, builder.num_inner(), builder.num_nodes(), size};
  return trie;
}

// A random third of the items by rank, and the open nodes of their filter.
struct Bitmap {
  std::vector<char> ranks;
  std::vector<uint64_t> open;

  bool has(int32_t rank) const { return ranks[rank]; }
};

template <class Code>
Bitmap draw_bitmap(std::mt19937& random, const OwnedTrie<Code>& trie) {
  Bitmap bitmap = {std::vector<char>(trie.rows.size()), std::vector<uint64_t>(trie.view.num_nodes / 64 + 1)};
  for (size_t rank = 0; rank < bitmap.ranks.size(); ++rank) {
    const size_t node = trie.view.num_inner + rank;
    bitmap.ranks[rank] = random() % 3 == 0;
    if (bitmap.ranks[rank]) bitmap.open[node / 64] |= uint64_t{1} << (node % 64);
  }
  cemg::open_inner(trie.view, bitmap.open.data());
  return bitmap;
}
