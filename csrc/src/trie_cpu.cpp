#include "cemg/trie_cpu.h"

#include <algorithm>

namespace cemg {
namespace {

constexpr int64_t kParallelRows = 512;  // below this, waking the other cores costs more than it saves

template <class Code>
int32_t allowed_child(const TrieView<Code>& trie, const FilterView& filter, int32_t node, int64_t code) {
  const int32_t child = trie.advance(node, code);
  return child != kNone && filter.allows(trie.interval(child)) ? child : kNone;
}

}  // namespace

template <class Code>
void lookup(TrieView<Code> trie, FilterView filter, const int64_t* prefixes, int64_t rows, int64_t length,
            int32_t* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) {
    int32_t node = kRoot;
    for (int64_t m = 0; m < length; ++m) node = trie.advance(node, prefixes[row * length + m]);
    out[row] = filter.allows(trie.interval(node)) ? node : kNone;
  }
}

template <class Code>
void advance(TrieView<Code> trie, FilterView filter, const int32_t* nodes, const int64_t* codes, int64_t rows,
             int32_t* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) out[row] = allowed_child(trie, filter, nodes[row], codes[row]);
}

template <class Code>
void children(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, int32_t* out_codes,
              int32_t* out_nodes) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) {
    int32_t* const codes = out_codes + row * trie.codebook_size;
    int32_t* const found = out_nodes + row * trie.codebook_size;
    const Range range = trie.children(nodes[row]);
    int32_t count = 0;
    for (int32_t child = range.begin; child < range.end; ++child) {
      if (!filter.allows(trie.interval(child))) continue;
      codes[count] = trie.code[child - 1];
      found[count++] = child;
    }
    std::fill(codes + count, codes + trie.codebook_size, kNone);
    std::fill(found + count, found + trie.codebook_size, kNone);
  }
}

template <class Code>
void mask(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, bool* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) {
    bool* const allowed = out + row * trie.codebook_size;
    std::fill(allowed, allowed + trie.codebook_size, false);
    const Range range = trie.children(nodes[row]);
    for (int32_t child = range.begin; child < range.end; ++child) {
      allowed[trie.code[child - 1]] = filter.allows(trie.interval(child));
    }
  }
}

template <class Code>
void interval(TrieView<Code> trie, const int32_t* nodes, int64_t rows, int32_t* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) {
    const Range ranks = trie.interval(nodes[row]);
    out[2 * row] = ranks.begin;
    out[2 * row + 1] = ranks.end;
  }
}

#define CEMG_INSTANTIATE(Code)                                                                              \
  template void lookup(TrieView<Code>, FilterView, const int64_t*, int64_t, int64_t, int32_t*) noexcept;    \
  template void advance(TrieView<Code>, FilterView, const int32_t*, const int64_t*, int64_t,                \
                        int32_t*) noexcept;                                                                 \
  template void children(TrieView<Code>, FilterView, const int32_t*, int64_t, int32_t*, int32_t*) noexcept; \
  template void mask(TrieView<Code>, FilterView, const int32_t*, int64_t, bool*) noexcept;                  \
  template void interval(TrieView<Code>, const int32_t*, int64_t, int32_t*) noexcept;
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
