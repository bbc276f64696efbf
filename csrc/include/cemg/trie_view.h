// The trie as flat arrays, and every lookup on them: one source for host and device.
//
// Nodes are numbered level by level from the root, node 0, and siblings in the order of their codes.
// Therefore the children of a node are consecutive, and edge c - 1 leads to node c. The last `num_items`
// nodes are the leaves, which are the items sorted by their codes: a leaf's index among the leaves is the
// item's rank.
#pragma once

#include "cemg/packed_ascending.h"

namespace cemg {

inline constexpr int32_t kRoot = 0;
inline constexpr int32_t kNone = -1;
inline constexpr int32_t kNoNode = 0x7fffffff;  // pads short lists of nodes

// The filter of one row. A node is open if the bitmap has its bit set and the list does not contain it.
// Bitmap and list cover the nodes of every level, so whether an allowed item is left below a node needs no
// walk.
struct RowFilter {
  const uint64_t* open = nullptr;   // [words] one bit per node; null: all nodes are open
  const int32_t* closed = nullptr;  // [max_closed], ascending, padded with kNoNode
  int32_t max_closed = 0;

  // Whether every node is open, so that allows() need not be called.
  CEMG_HD bool allows_all() const noexcept { return open == nullptr && max_closed == 0; }

  // The index in the list of the first node that is `node` or higher.
  CEMG_HD int32_t first_closed(int32_t node) const noexcept {
    int32_t low = 0;
    int32_t high = max_closed;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (closed[middle] < node) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Whether an allowed item is at or below `node`, which is not kNone.
  CEMG_HD bool allows(int32_t node) const noexcept {
    if (open != nullptr && ((open[node >> 6] >> (node & 63)) & 1) == 0) return false;
    if (max_closed == 0) return true;
    const int32_t index = first_closed(node);
    return index == max_closed || closed[index] != node;
  }
};

// The filters of a batch. Row r belongs to request r / rows_per_request, which has one of the bitmaps and a
// list of closed nodes. By default every item is allowed.
struct FilterView {
  const uint64_t* open = nullptr;      // [filters, words]; null: no bitmaps
  const int32_t* filter_of = nullptr;  // [requests], -1: no bitmap; null: all requests have the first
  const int32_t* closed = nullptr;     // [requests, max_closed] as in RowFilter; null: no lists
  int64_t words = 0;
  int64_t max_closed = 0;
  int64_t rows_per_request = 1;

  CEMG_HD RowFilter of(int64_t row) const noexcept {
    if (filter_of == nullptr && closed == nullptr) return {open, nullptr, 0};
    const int64_t request = row / rows_per_request;
    const int64_t filter = filter_of == nullptr ? 0 : filter_of[request];
    RowFilter row_filter;
    if (open != nullptr && filter >= 0) row_filter.open = open + filter * words;
    if (closed != nullptr) {
      row_filter.closed = closed + request * max_closed;
      row_filter.max_closed = static_cast<int32_t>(max_closed);
    }
    return row_filter;
  }
};

template <class Code>
struct TrieView {    // borrowed, trivially copyable, passed to kernels by value
  const Code* code;  // [num_nodes - 1], code[c - 1] leads to node c; ascending among siblings
  PackedAscending
      first_child;    // num_inner + 1 numbers: the children of node n end where those of n + 1 begin
  int32_t num_inner;  // nodes with children; the number of the first leaf
  int32_t num_nodes;
  int32_t codebook_size;

  CEMG_HD bool is_node(int32_t node) const noexcept { return node >= 0 && node < num_nodes; }

  CEMG_HD Range children(int32_t node) const noexcept {
    if (node < 0 || node >= num_inner) return {0, 0};
    return first_child.pair(node);
  }

  // The child of `node` along `code_value`, or kNone: by index if the node has all codes, else by binary
  // search.
  CEMG_HD int32_t advance(int32_t node, int64_t code_value) const noexcept {
    if (code_value < 0 || code_value >= codebook_size) return kNone;
    const Range range = children(node);
    if (range.end - range.begin == codebook_size) return range.begin + static_cast<int32_t>(code_value);
    const auto value = static_cast<int32_t>(code_value);
    // at most `value` children have a lower code, and at most codebook_size - value an equal or higher one
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

  // The parent of a node other than the root.
  CEMG_HD int32_t parent(int32_t node) const noexcept { return first_child.last_at_most(node, num_inner); }

  // The ranks below a node. Both ends descend one level at a time, so they stay on the same level.
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
