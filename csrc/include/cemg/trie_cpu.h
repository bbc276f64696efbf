// The trie's batched operations on the CPU: OpenMP loops over the view that allocate nothing.
// R rows, K codes per level. kNone, a leaf and a number outside the trie have no children; kNone stays kNone.
#pragma once

#include <cstdint>

#include "cemg/trie_view.h"

namespace cemg {

// The nodes that prefixes lead to from the root: prefixes [R, length] -> nodes [R].
template <class Code>
void lookup(TrieView<Code> trie, FilterView filter, const int64_t* prefixes, int64_t rows, int64_t length,
            int32_t* out) noexcept;

// The child along a code: nodes [R], codes [R] -> nodes [R].
template <class Code>
void advance(TrieView<Code> trie, FilterView filter, const int32_t* nodes, const int64_t* codes, int64_t rows,
             int32_t* out) noexcept;

// The nodes themselves, or kNone if the filter allows nothing below: nodes [R] -> nodes [R].
template <class Code>
void keep(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, int32_t* out) noexcept;

// Codes and nodes of the children, [R, K] each, ascending, then -1.
template <class Code>
void children(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, int32_t* out_codes,
              int32_t* out_nodes) noexcept;

// Which codes continue a node: [R, K].
template <class Code>
void mask(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, bool* out) noexcept;

// The ranks below a node: [R, 2], half open.
template <class Code>
void interval(TrieView<Code> trie, const int32_t* nodes, int64_t rows, int32_t* out) noexcept;

}  // namespace cemg
