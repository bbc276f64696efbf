#include "cemg/trie_cpu.h"

#include <algorithm>

#include "cemg/trie_cells.h"

namespace cemg {
namespace {

constexpr int64_t kParallelRows = 512;  // with fewer rows, waking threads costs more than it saves

}  // namespace

template <class Code>
void lookup(TrieView<Code> trie, FilterView filter, const int64_t* prefixes, int64_t rows, int64_t length,
            int32_t* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) lookup_row(trie, filter, prefixes, length, row, out);
}

template <class Code>
void advance(TrieView<Code> trie, FilterView filter, const int32_t* nodes, const int64_t* codes, int64_t rows,
             int32_t* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) advance_row(trie, filter, nodes, codes, row, out);
}

template <class Code>
void keep(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, int32_t* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) keep_row(trie, filter, nodes, row, out);
}

template <class Code>
void children(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, int32_t* out_codes,
              int32_t* out_nodes) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) children_row(trie, filter, nodes, row, out_codes, out_nodes);
}

template <class Code>
void mask(TrieView<Code> trie, FilterView filter, const int32_t* nodes, int64_t rows, bool* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) {
    bool* const out_row = out + row * trie.codebook_size;
    std::fill(out_row, out_row + trie.codebook_size, false);
    const Range range = trie.children(nodes[row]);
    const RowFilter row_filter = filter.of(row);
    for (int32_t child = range.begin; child < range.end; ++child) {
      out_row[trie.code[child - 1]] = row_filter.allows(child);
    }
  }
}

template <class Code>
void interval(TrieView<Code> trie, const int32_t* nodes, int64_t rows, int32_t* out) noexcept {
#pragma omp parallel for if (rows >= kParallelRows)
  for (int64_t row = 0; row < rows; ++row) interval_row(trie, nodes, row, out);
}

#define CEMG_INSTANTIATE(Code)                                                                              \
  template void lookup(TrieView<Code>, FilterView, const int64_t*, int64_t, int64_t, int32_t*) noexcept;    \
  template void advance(TrieView<Code>, FilterView, const int32_t*, const int64_t*, int64_t,                \
                        int32_t*) noexcept;                                                                 \
  template void keep(TrieView<Code>, FilterView, const int32_t*, int64_t, int32_t*) noexcept;               \
  template void children(TrieView<Code>, FilterView, const int32_t*, int64_t, int32_t*, int32_t*) noexcept; \
  template void mask(TrieView<Code>, FilterView, const int32_t*, int64_t, bool*) noexcept;                  \
  template void interval(TrieView<Code>, const int32_t*, int64_t, int32_t*) noexcept;
CEMG_INSTANTIATE(uint8_t)
CEMG_INSTANTIATE(int16_t)
#undef CEMG_INSTANTIATE

}  // namespace cemg
