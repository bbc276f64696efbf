// From allowed items to open nodes, on the CPU.
#pragma once

#include <cstdint>

#include "cemg/trie_view.h"

namespace cemg {

// open [words of 64 nodes]: the leaves' bits are set already; sets those of the nodes above, each where a
// child of its own is open. No bit beyond num_nodes may be set.
template <class Code>
void open_inner(TrieView<Code> trie, uint64_t* open) noexcept;

// `close_row` of each request; `filter` has bitmaps or none, no lists, and a row is a request. Returns how
// many the longest list holds.
template <class Code>
int64_t close_nodes(TrieView<Code> trie, FilterView filter, const int32_t* excluded, int64_t requests,
                    int64_t most, int64_t levels, int32_t* closed) noexcept;

}  // namespace cemg
