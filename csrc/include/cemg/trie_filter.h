// Computes open and closed nodes from allowed and excluded items, on the CPU.
#pragma once

#include <cstdint>

#include "cemg/trie_view.h"

namespace cemg {

// Sets the bits of the inner nodes in open [words of 64 nodes], given the bits of the leaves: a node is open
// if one of its children is. No bit from num_nodes on may be set.
template <class Code>
void open_inner(TrieView<Code> trie, uint64_t* open) noexcept;

// Runs close_row() for each request. `filter` may have bitmaps but no lists, and one row per request. Returns
// the length of the longest list.
template <class Code>
int64_t close_nodes(TrieView<Code> trie, FilterView filter, const int32_t* excluded, int64_t requests,
                    int64_t max_excluded, int64_t levels, int32_t* closed) noexcept;

}  // namespace cemg
