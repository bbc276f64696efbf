#include "cemg/trie_filter.h"

#include <algorithm>
#include <vector>

namespace cemg {
namespace {

constexpr int64_t kParallelWords = 1 << 10;
constexpr int64_t kParallelRanks = 1 << 8;

// The bits of word `word` from node `begin` on up to `end`.
constexpr uint64_t bits_within(int64_t word, int64_t begin, int64_t end) noexcept {
  uint64_t bits = ~uint64_t{0};
  if (begin > word * 64) bits &= ~uint64_t{0} << (begin - word * 64);
  if (end < (word + 1) * 64) bits &= ~uint64_t{0} >> ((word + 1) * 64 - end);
  return bits;
}

bool any_open(const uint64_t* open, Range nodes) noexcept {
  const int64_t first = nodes.begin / 64, last = (nodes.end - 1) / 64;
  if (first == last) return (open[first] & bits_within(first, nodes.begin, nodes.end)) != 0;
  if ((open[first] >> (nodes.begin % 64)) != 0) return true;
  for (int64_t word = first + 1; word < last; ++word) {
    if (open[word] != 0) return true;
  }
  return (open[last] & bits_within(last, nodes.begin, nodes.end)) != 0;
}

int64_t count_open(const uint64_t* open, Range nodes) noexcept {
  int64_t count = 0;
  const int64_t last = (nodes.end - 1) / 64;
  for (int64_t word = nodes.begin / 64; word <= last; ++word) {
    count += popcount(open[word] & bits_within(word, nodes.begin, nodes.end));
  }
  return count;
}

// The inner nodes begin ... end - 1, whose children are done.
template <class Code>
void open_level(const TrieView<Code>& trie, int64_t begin, int64_t end, uint64_t* open) noexcept {
  const int64_t first = begin / 64, last = (end - 1) / 64;
#pragma omp parallel for if (last - first >= kParallelWords)
  for (int64_t word = first; word <= last; ++word) {
    static_assert(PackedAscending::kBlock == 64);
    int32_t child[PackedAscending::kBlock + 1];  // the first ones of the word's nodes
    read_block(trie.first_child, word, trie.num_inner + 1, child);
    const int64_t stop = std::min(end, (word + 1) * 64) - word * 64;
    uint64_t bits = 0;
    for (int64_t i = std::max(begin - word * 64, int64_t{0}); i < stop; ++i) {
      bits |= static_cast<uint64_t>(any_open(open, {child[i], child[i + 1]})) << i;
    }
    open[word] = (open[word] & ~bits_within(word, begin, end)) | bits;
  }
}

// One request's nodes: of each level in turn, those whose open children are all closed.
template <class Code>
void close_of(const TrieView<Code>& trie, const RowFilter& filter, const int32_t* excluded, int64_t most,
              std::vector<int32_t>& closed) {
  closed.clear();
  for (int64_t i = 0; i < most && excluded[i] != kNoNode; ++i) {
    const int32_t leaf = trie.num_inner + excluded[i];
    if (filter.allows(leaf)) closed.push_back(leaf);
  }
  size_t begin = 0;  // of the level below
  while (begin < closed.size() && closed[begin] != kRoot) {
    const size_t end = closed.size();
    for (size_t i = begin; i < end;) {
      const int32_t parent = trie.parent(closed[i]);
      const Range children = trie.children(parent);
      const size_t first = i;
      while (i < end && closed[i] < children.end) ++i;
      const int64_t left =
          filter.open == nullptr ? children.end - children.begin : count_open(filter.open, children);
      if (left == static_cast<int64_t>(i - first)) closed.push_back(parent);
    }
    begin = end;
  }
  std::sort(closed.begin(), closed.end());
}

}  // namespace

template <class Code>
void open_inner(TrieView<Code> trie, uint64_t* open) noexcept {
  std::vector<int64_t> begins;  // of the levels above the leaves
  for (int64_t node = 0; node < trie.num_inner; node = trie.children(static_cast<int32_t>(node)).begin) {
    begins.push_back(node);
  }
  int64_t end = trie.num_inner;
  for (auto begin = begins.rbegin(); begin != begins.rend(); end = *begin++) {
    open_level(trie, *begin, end, open);
  }
}

template <class Code>
int64_t close_nodes(TrieView<Code> trie, FilterView filter, const int32_t* excluded, int64_t requests,
                    int64_t most, int64_t levels, int32_t* closed) {
  const int64_t room = most * levels + 1;
  std::fill(closed, closed + requests * room, kNoNode);
  int64_t longest = 0;
#pragma omp parallel for reduction(max : longest) if (requests * most >= kParallelRanks)
  for (int64_t request = 0; request < requests; ++request) {
    std::vector<int32_t> found;
    close_of(trie, filter.of(request), excluded + request * most, most, found);
    std::copy(found.begin(), found.end(), closed + request * room);
    longest = std::max(longest, static_cast<int64_t>(found.size()));
  }
  return longest;
}

#define CEMG_INSTANTIATE(Code)                                                                        \
  template void open_inner(TrieView<Code>, uint64_t*) noexcept;                                       \
  template int64_t close_nodes(TrieView<Code>, FilterView, const int32_t*, int64_t, int64_t, int64_t, \
                               int32_t*);
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
