// One row, or one cell, of each batched trie operation: what a CPU loop and a CUDA grid both run.
// R rows, K codes a level.
#pragma once

#include "cemg/trie_view.h"

namespace cemg {

CEMG_HD inline int32_t if_allowed(const RowFilter& filter, int32_t node) noexcept {
  return node != kNone && filter.allows(node) ? node : kNone;
}

// prefixes [R, length] -> out [R].
template <class Code>
CEMG_HD void lookup_row(const TrieView<Code>& trie, const FilterView& filter, const int64_t* prefixes,
                        int64_t length, int64_t row, int32_t* out) noexcept {
  int32_t node = kRoot;
  for (int64_t m = 0; m < length; ++m) node = trie.advance(node, prefixes[row * length + m]);
  out[row] = if_allowed(filter.of(row), node);
}

// nodes [R] -> out [R], none where the filter leaves nothing below.
template <class Code>
CEMG_HD void keep_row(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes, int64_t row,
                      int32_t* out) noexcept {
  out[row] = trie.is_node(nodes[row]) ? if_allowed(filter.of(row), nodes[row]) : kNone;
}

// nodes [R], codes [R] -> out [R].
template <class Code>
CEMG_HD void advance_row(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes,
                         const int64_t* codes, int64_t row, int32_t* out) noexcept {
  out[row] = if_allowed(filter.of(row), trie.advance(nodes[row], codes[row]));
}

// nodes [R] -> codes and nodes of the children, [R, K] each, ascending, then -1.
template <class Code>
CEMG_HD void children_row(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes,
                          int64_t row, int32_t* out_codes, int32_t* out_nodes) noexcept {
  int32_t* const codes = out_codes + row * trie.codebook_size;
  int32_t* const found = out_nodes + row * trie.codebook_size;
  const Range range = trie.children(nodes[row]);
  const RowFilter mine = filter.of(row);
  int32_t count = 0;
  for (int32_t child = range.begin; child < range.end; ++child) {
    if (!mine.allows(child)) continue;
    codes[count] = static_cast<int32_t>(trie.code[child - 1]);
    found[count++] = child;
  }
  for (; count < trie.codebook_size; ++count) codes[count] = found[count] = kNone;
}

// Cell row * K + code of out [R, K]: whether the code continues the node. Searches, so that cells may run in
// any order; the CPU walks the children instead.
template <class Code>
CEMG_HD void mask_cell(const TrieView<Code>& trie, const FilterView& filter, const int32_t* nodes,
                       int64_t cell, bool* out) noexcept {
  const int64_t row = cell / trie.codebook_size;
  const int32_t child = trie.advance(nodes[row], cell % trie.codebook_size);
  out[cell] = if_allowed(filter.of(row), child) != kNone;
}

// nodes [R] -> the ranks below, [R, 2], half open.
template <class Code>
CEMG_HD void interval_row(const TrieView<Code>& trie, const int32_t* nodes, int64_t row,
                          int32_t* out) noexcept {
  const Range ranks = trie.interval(nodes[row]);
  out[2 * row] = ranks.begin;
  out[2 * row + 1] = ranks.end;
}

}  // namespace cemg
