// The trie as flat arrays, and every lookup on them: one source for host and device.
//
// Nodes are numbered level by level, the root 0, siblings in the order of their codes. So the children of
// a node are consecutive, the edge into node c is edge c - 1, and the leaves, the last `num_items` nodes,
// are the items in sorted order: a leaf's place among the leaves is the item's rank.
#pragma once

#if !defined(__CUDACC_RTC__)  // CuPy's compiler has no standard headers; trie_cuda.cu names the types
#include <bit>
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define CEMG_HD __host__ __device__
#else
#define CEMG_HD
#endif

namespace cemg {

inline constexpr int32_t kRoot = 0;
inline constexpr int32_t kNone = -1;
inline constexpr int32_t kNoRank = 0x7fffffff;  // fills a short list of ranks

struct Range {  // half open
  int32_t begin;
  int32_t end;
};

// What one row may reach: a bitmap over ranks with its counts, less a few ranks.
struct RowFilter {
  static constexpr int32_t kBlockWords = 8;

  const uint64_t* words = nullptr;    // [blocks * 8], null: every item is allowed
  const int32_t* before = nullptr;    // [blocks], allowed ranks before the block of 512 bits
  const int32_t* excluded = nullptr;  // [most_excluded], ascending, each allowed by `words`; then kNoRank
  int32_t most_excluded = 0;

  CEMG_HD static int32_t popcount(uint64_t word) noexcept {
#if defined(__CUDA_ARCH__)
    return __popcll(word);
#else
    return std::popcount(word);
#endif
  }

  // Nothing is left out, so that no interval need be asked about.
  CEMG_HD bool everything() const noexcept { return words == nullptr && most_excluded == 0; }

  // How many ranks below `rank` the bitmap allows.
  CEMG_HD int32_t rank(int32_t rank) const noexcept {
    if (rank == 0) return 0;
    const int32_t last = (rank - 1) >> 6;  // the word of the last rank counted
    const int32_t first = last / kBlockWords * kBlockWords;
    int32_t count = before[last / kBlockWords];
    for (int32_t w = first; w < last; ++w) count += popcount(words[w]);
    return count + popcount(words[last] & (~uint64_t{0} >> (63 - ((rank - 1) & 63))));
  }

  // How many ranks below `rank` are excluded.
  CEMG_HD int32_t excluded_below(int32_t rank) const noexcept {
    int32_t low = 0;
    int32_t high = most_excluded;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (excluded[middle] < rank) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Whether any rank of an interval is left.
  CEMG_HD bool allows(Range ranks) const noexcept {
    const int32_t open = words == nullptr ? ranks.end - ranks.begin : rank(ranks.end) - rank(ranks.begin);
    if (open > most_excluded || open == 0) return open > 0;
    return open > excluded_below(ranks.end) - excluded_below(ranks.begin);
  }
};

// The filters of a batch: row r belongs to request r / rows_per_request, which obeys one of the bitmaps and
// has a list of excluded ranks. All null: every item is allowed.
struct FilterView {
  const uint64_t* words = nullptr;     // [filters, blocks * 8], null: no bitmaps
  const int32_t* before = nullptr;     // [filters, blocks]
  const int32_t* filter_of = nullptr;  // [requests], -1: no bitmap; null: all requests obey the first
  const int32_t* excluded = nullptr;   // [requests, most_excluded] as in RowFilter; null where there are none
  int64_t blocks = 0;
  int64_t most_excluded = 0;
  int64_t rows_per_request = 1;

  CEMG_HD RowFilter of(int64_t row) const noexcept {
    if (filter_of == nullptr && excluded == nullptr) return {words, before, nullptr, 0};
    const int64_t request = row / rows_per_request;
    const int64_t filter = filter_of == nullptr ? 0 : filter_of[request];
    RowFilter found;
    if (words != nullptr && filter >= 0) {
      found.words = words + filter * blocks * RowFilter::kBlockWords;
      found.before = before + filter * blocks;
    }
    if (excluded != nullptr) {
      found.excluded = excluded + request * most_excluded;
      found.most_excluded = static_cast<int32_t>(most_excluded);
    }
    return found;
  }

  CEMG_HD bool allows(int64_t row, Range ranks) const noexcept { return of(row).allows(ranks); }
};

template <class Code>
struct TrieView {              // borrowed, trivially copyable, passed to kernels by value
  const Code* code;            // [num_nodes - 1], code[c - 1] leads to node c; ascending among siblings
  const int32_t* first_child;  // [num_inner + 1], first_child[n + 1] ends the children of n
  int32_t num_inner;           // nodes with children; the first leaf's number
  int32_t num_nodes;
  int32_t codebook_size;

  CEMG_HD bool is_node(int32_t node) const noexcept { return node >= 0 && node < num_nodes; }

  CEMG_HD Range children(int32_t node) const noexcept {
    if (node < 0 || node >= num_inner) return {0, 0};
    return {first_child[node], first_child[node + 1]};
  }

  // The child of `node` along `code_value`, or kNone. A full node is indexed, any other searched.
  CEMG_HD int32_t advance(int32_t node, int64_t code_value) const noexcept {
    if (code_value < 0 || code_value >= codebook_size) return kNone;
    const Range range = children(node);
    if (range.end - range.begin == codebook_size) return range.begin + static_cast<int32_t>(code_value);
    const auto value = static_cast<int32_t>(code_value);
    // no more than `value` codes lie below it, nor more than the others at or above it
    int32_t low =
        range.end - range.begin + value > codebook_size ? range.end + value - codebook_size : range.begin;
    int32_t high = range.end - range.begin > value ? range.begin + value : range.end;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (static_cast<int32_t>(code[middle - 1]) < value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < range.end && static_cast<int32_t>(code[low - 1]) == value ? low : kNone;
  }

  // The ranks below a node; the whole level moves one down at a time, so both ends stay on one level.
  CEMG_HD Range interval(int32_t node) const noexcept {
    if (!is_node(node)) return {0, 0};
    int32_t begin = node;
    int32_t end = node + 1;
    while (begin < num_inner) {
      begin = first_child[begin];
      end = first_child[end];
    }
    return {begin - num_inner, end - num_inner};
  }
};

}  // namespace cemg
