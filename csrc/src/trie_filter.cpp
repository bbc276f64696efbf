#include "cemg/trie_filter.h"

#include <algorithm>
#include <vector>

#include "cemg/trie_cells.h"

namespace cemg {
namespace {

constexpr int64_t kParallelWords = 1 << 10;
constexpr int64_t kParallelRanks = 1 << 8;

// Sets the bits of the inner nodes begin ... end - 1, one level whose children's bits are set. The last word
// may also hold bits of these children, which the threads read, so it is written last.
template <class Code>
void open_level(const TrieView<Code>& trie, int64_t begin, int64_t end, uint64_t* open) noexcept {
  const int64_t first = begin / 64, last = (end - 1) / 64;
#pragma omp parallel for if (last - first >= kParallelWords)
  for (int64_t word = first; word < last; ++word) open_word(trie, begin, end, word, open);
  open_word(trie, begin, end, last, open);
}

}  // namespace

template <class Code>
void open_inner(TrieView<Code> trie, uint64_t* open) noexcept {
  std::vector<int64_t> level_begins;  // without the leaves
  for (int64_t node = 0; node < trie.num_inner; node = trie.children(static_cast<int32_t>(node)).begin) {
    level_begins.push_back(node);
  }
  int64_t end = trie.num_inner;
  for (auto begin = level_begins.rbegin(); begin != level_begins.rend(); end = *begin++) {
    open_level(trie, *begin, end, open);
  }
}

template <class Code>
int64_t close_nodes(TrieView<Code> trie, FilterView filter, const int32_t* excluded, int64_t requests,
                    int64_t max_excluded, int64_t levels, int32_t* closed) noexcept {
  int64_t longest = 0;
#pragma omp parallel for reduction(max : longest) if (requests * max_excluded >= kParallelRanks)
  for (int64_t request = 0; request < requests; ++request) {
    longest = std::max(longest, close_row(trie, filter, excluded, max_excluded, levels, request, closed));
  }
  return longest;
}

#define CEMG_INSTANTIATE(Code)                                                                        \
  template void open_inner(TrieView<Code>, uint64_t*) noexcept;                                       \
  template int64_t close_nodes(TrieView<Code>, FilterView, const int32_t*, int64_t, int64_t, int64_t, \
                               int32_t*) noexcept;
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
