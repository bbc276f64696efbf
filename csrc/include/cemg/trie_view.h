// The trie as flat arrays, and every lookup on them: one source for host and device.
//
// Nodes are numbered level by level, the root 0, siblings in the order of their codes. So the children of
// a node are consecutive, the edge into node c is edge c - 1, and the leaves, the last `num_items` nodes,
// are the items in sorted order: a leaf's place among the leaves is the item's rank.
#pragma once

#include "cemg/packed_ascending.h"

namespace cemg {

inline constexpr int32_t kRoot = 0;
inline constexpr int32_t kNone = -1;
inline constexpr int32_t kNoNode = 0x7fffffff;  // fills a short list of nodes

// What one row may reach: a node is open where the bitmap says so and the list does not hold it. Both speak
// of nodes on every level, so that no walk is needed to see whether an item is left below.
struct RowFilter {
  const uint64_t* open = nullptr;   // [words] a bit a node, null: all nodes are open
  const int32_t* closed = nullptr;  // [most_closed], ascending, then kNoNode
  int32_t most_closed = 0;

  // Nothing is left out, so that no node need be asked about.
  CEMG_HD bool everything() const noexcept { return open == nullptr && most_closed == 0; }

  // Where in the list the nodes from this one on begin.
  CEMG_HD int32_t first_closed(int32_t node) const noexcept {
    int32_t low = 0;
    int32_t high = most_closed;
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

  // Whether a node, none of them kNone, leads to an item that is allowed.
  CEMG_HD bool allows(int32_t node) const noexcept {
    if (open != nullptr && ((open[node >> 6] >> (node & 63)) & 1) == 0) return false;
    if (most_closed == 0) return true;
    const int32_t place = first_closed(node);
    return place == most_closed || closed[place] != node;
  }
};

// The filters of a batch: row r belongs to request r / rows_per_request, which obeys one of the bitmaps and
// has a list of closed nodes. All null: every item is allowed.
struct FilterView {
  const uint64_t* open = nullptr;      // [filters, words], null: no bitmaps
  const int32_t* filter_of = nullptr;  // [requests], -1: no bitmap; null: all requests obey the first
  const int32_t* closed = nullptr;     // [requests, most_closed] as in RowFilter; null where there are none
  int64_t words = 0;
  int64_t most_closed = 0;
  int64_t rows_per_request = 1;

  CEMG_HD RowFilter of(int64_t row) const noexcept {
    if (filter_of == nullptr && closed == nullptr) return {open, nullptr, 0};
    const int64_t request = row / rows_per_request;
    const int64_t filter = filter_of == nullptr ? 0 : filter_of[request];
    RowFilter found;
    if (open != nullptr && filter >= 0) found.open = open + filter * words;
    if (closed != nullptr) {
      found.closed = closed + request * most_closed;
      found.most_closed = static_cast<int32_t>(most_closed);
    }
    return found;
  }
};

template <class Code>
struct TrieView {               // borrowed, trivially copyable, passed to kernels by value
  const Code* code;             // [num_nodes - 1], code[c - 1] leads to node c; ascending among siblings
  PackedAscending first_child;  // num_inner + 1 of them: that of n + 1 ends the children of n
  int32_t num_inner;            // nodes with children; the first leaf's number
  int32_t num_nodes;
  int32_t codebook_size;

  CEMG_HD bool is_node(int32_t node) const noexcept { return node >= 0 && node < num_nodes; }

  CEMG_HD Range children(int32_t node) const noexcept {
    if (node < 0 || node >= num_inner) return {0, 0};
    return first_child.pair(node);
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

  // The inner node that a node other than the root hangs from.
  CEMG_HD int32_t parent(int32_t node) const noexcept { return first_child.last_at_most(node, num_inner); }

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
