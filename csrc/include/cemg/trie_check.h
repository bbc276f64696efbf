// Whether arrays that came from outside, such as a file, are a trie that every walk may trust.
#pragma once

#include <cstdint>
#include <span>

namespace cemg {

// What makes these arrays no trie of `levels` levels and codes below `codebook_size`, in words; null where
// they are one. code [T - 1], first_child [words], rows [N], with any values.
template <class Code>
const char* trie_problem(std::span<const Code> code, std::span<const uint64_t> first_child,
                         std::span<const int32_t> rows, int32_t levels, int32_t codebook_size);

// What makes these item ids wrong: -1 where they are distinct and none is negative; else the place of one
// that is negative or stands earlier as well.
int64_t wrong_id(std::span<const int64_t> ids);

}  // namespace cemg
