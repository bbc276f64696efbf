// Checks arrays that come from outside, such as a file, before they are used.
#pragma once

#include <cstdint>
#include <span>

namespace cemg {

// Why these arrays are not a trie of `levels` levels with codes below `codebook_size`; null if they are one,
// and then every walk stays inside them. code [T - 1], first_child [words] and rows [N] may hold any values.
template <class Code>
const char* trie_problem(std::span<const Code> code, std::span<const uint64_t> first_child,
                         std::span<const int32_t> rows, int32_t levels, int32_t codebook_size);

// The index of the first item id that is negative or repeats an earlier one; -1 if there is none.
int64_t first_invalid_id(std::span<const int64_t> ids);

}  // namespace cemg
