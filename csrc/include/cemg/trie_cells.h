// One row, or one cell, of each batched trie operation, called by the CPU's loops and by the CUDA kernels.
// R rows, K codes per level.
#pragma once

#include "cemg/trie_view.h"

namespace cemg {

CEMG_HD inline int32_t allowed_or_none(const RowFilter& filter, int32_t node) noexcept {
  return node != kNone && filter.allows(node) ? node : kNone;
}

// prefixes [R, length] -> out [R].
template <class Code>
CEMG_HD void lookup_row(const TrieView<Code>& trie, const FilterView& filter, const int64_t* prefixes,
                        int64_t length, int64_t row, int32_t* out) noexcept {
  int32_t node = kRoot;
  for (int64_t m = 0; m < length; ++m) node = trie.advance(node, prefixes[row * length + m]);
  out[row] = allowed_or_none(filter.of(row), node);
}

// nodes [R] -> out [R], kNone where the filter allows nothing below.
template <class Code>
CEMG_HD void keep_row(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes, int64_t row,
                      int32_t* out) noexcept {
  out[row] = trie.is_node(nodes[row]) ? allowed_or_none(filter.of(row), nodes[row]) : kNone;
}

// nodes [R], codes [R] -> out [R].
template <class Code>
CEMG_HD void advance_row(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes,
                         const int64_t* codes, int64_t row, int32_t* out) noexcept {
  out[row] = allowed_or_none(filter.of(row), trie.advance(nodes[row], codes[row]));
}

// nodes [R] -> codes and nodes of the children, [R, K] each, ascending, then -1.
template <class Code>
CEMG_HD void children_row(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes,
                          int64_t row, int32_t* out_codes, int32_t* out_nodes) noexcept {
  int32_t* const codes = out_codes + row * trie.codebook_size;
  int32_t* const children = out_nodes + row * trie.codebook_size;
  const Range range = trie.children(nodes[row]);
  const RowFilter row_filter = filter.of(row);
  int32_t count = 0;
  for (int32_t child = range.begin; child < range.end; ++child) {
    if (!row_filter.allows(child)) continue;
    codes[count] = static_cast<int32_t>(trie.code[child - 1]);
    children[count++] = child;
  }
  for (; count < trie.codebook_size; ++count) codes[count] = children[count] = kNone;
}

// Cell row * K + code of out [R, K]: whether the code continues the node. It searches for the child, so that
// cells may be computed in any order; the CPU walks the children instead.
template <class Code>
CEMG_HD void mask_cell(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes,
                       int64_t cell, bool* out) noexcept {
  const int64_t row = cell / trie.codebook_size;
  const int32_t child = trie.advance(nodes[row], cell % trie.codebook_size);
  out[cell] = allowed_or_none(filter.of(row), child) != kNone;
}

// nodes [R] -> the ranks below, [R, 2], half open.
template <class Code>
CEMG_HD void interval_row(const TrieView<Code>& trie, const int32_t* nodes, int64_t row,
                          int32_t* out) noexcept {
  const Range ranks = trie.interval(nodes[row]);
  out[2 * row] = ranks.begin;
  out[2 * row + 1] = ranks.end;
}

// A mask of the bits in word `word` that belong to nodes `begin` ... `end` - 1.
CEMG_HD inline uint64_t bits_within(int64_t word, int64_t begin, int64_t end) noexcept {
  uint64_t bits = ~uint64_t{0};
  if (begin > word * 64) bits &= ~uint64_t{0} << (begin - word * 64);
  if (end < (word + 1) * 64) bits &= ~uint64_t{0} >> ((word + 1) * 64 - end);
  return bits;
}

CEMG_HD inline bool any_open(const uint64_t* open, Range nodes) noexcept {
  const int64_t first = nodes.begin / 64, last = (nodes.end - 1) / 64;
  if (first == last) return (open[first] & bits_within(first, nodes.begin, nodes.end)) != 0;
  if ((open[first] >> (nodes.begin % 64)) != 0) return true;
  for (int64_t word = first + 1; word < last; ++word) {
    if (open[word] != 0) return true;
  }
  return (open[last] & bits_within(last, nodes.begin, nodes.end)) != 0;
}

CEMG_HD inline int32_t count_open(const uint64_t* open, Range nodes) noexcept {
  int32_t count = 0;
  const int64_t last = (nodes.end - 1) / 64;
  for (int64_t word = nodes.begin / 64; word <= last; ++word) {
    count += popcount(open[word] & bits_within(word, nodes.begin, nodes.end));
  }
  return count;
}

// Sets the bits of word `word` of `open` that belong to begin ... end - 1, the inner nodes of one level. The
// bits of the next level must be set already.
template <class Code>
CEMG_HD void open_word(const TrieView<Code>& trie, int64_t begin, int64_t end, int64_t word,
                       uint64_t* open) noexcept {
  static_assert(PackedAscending::kBlock == 64);
  int32_t child[PackedAscending::kBlock + 1];  // the first children of the word's nodes and of the next node
  const auto block = static_cast<int32_t>(word);
  const int32_t count = trie.first_child.read_block(block, trie.num_inner + 1, child);
  if (count == PackedAscending::kBlock && (block + 1) * int64_t{64} <= trie.num_inner) {
    child[count] = trie.first_child[(block + 1) * 64];
  }
  const int64_t first = begin > word * 64 ? begin - word * 64 : 0;
  const int64_t last = end < (word + 1) * 64 ? end - word * 64 : 64;
  uint64_t bits = 0;
  for (int64_t i = first; i < last; ++i) {
    bits |= static_cast<uint64_t>(any_open(open, {child[i], child[i + 1]})) << i;
  }
  open[word] = (open[word] & ~bits_within(word, begin, end)) | bits;
}

// Computes the closed nodes of request `row`: those that its bitmap leaves open, but below which all open
// items are excluded. excluded [R, max_excluded]: ranks, ascending and distinct, padded with kNoNode. Writes
// to closed [R, max_excluded * levels + 1], ascending, padded with kNoNode, and returns how many there are.
// The list is filled from its end: first the leaves, then each level above.
template <class Code>
CEMG_HD int64_t close_row(const TrieView<Code>& trie, const FilterView& filter, const int32_t* excluded,
                          int64_t max_excluded, int64_t levels, int64_t row, int32_t* closed) noexcept {
  const int64_t size = max_excluded * levels + 1;
  const RowFilter row_filter = filter.of(row);
  int32_t* const out = closed + row * size;
  int64_t begin = size;  // of the closed nodes so far
  for (int64_t i = max_excluded - 1; i >= 0; --i) {
    const int32_t rank = excluded[row * max_excluded + i];
    if (rank != kNoNode && row_filter.allows(trie.num_inner + rank)) out[--begin] = trie.num_inner + rank;
  }
  int64_t end = size;  // of the closed nodes of the level below
  while (begin < end && out[begin] != kRoot) {
    const int64_t first = begin;
    for (int64_t i = end - 1; i >= first;) {
      const int32_t parent = trie.parent(out[i]);
      const Range children = trie.children(parent);
      const int64_t last = i;
      while (i >= first && out[i] >= children.begin) --i;
      const int64_t open_children =
          row_filter.open == nullptr ? children.end - children.begin : count_open(row_filter.open, children);
      if (open_children == last - i) out[--begin] = parent;
    }
    end = first;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = begin + i < size ? out[begin + i] : kNoNode;
  return size - begin;
}

}  // namespace cemg
