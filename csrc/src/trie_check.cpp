#include "cemg/trie_check.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cemg/packed_ascending.h"

namespace cemg {
namespace {

constexpr int64_t kMaxBitsPerId = 64;  // ids that need a larger bit set are sorted instead

// Bits, initially 0.
class BitSet {
 public:
  explicit BitSet(int64_t count) : words_(static_cast<size_t>(count + 63) / 64) {}

  // Sets a bit and returns its value from before.
  bool test_and_set(int64_t index) {
    uint64_t& word = words_[static_cast<size_t>(index) / 64];
    const uint64_t bit = uint64_t{1} << (index % 64);
    const bool before = (word & bit) != 0;
    word |= bit;
    return before;
  }

 private:
  std::vector<uint64_t> words_;
};

template <class Code>
bool in_codebook(std::span<const Code> code, int32_t codebook_size) {
  bool outside = false;
  const auto edges = static_cast<int64_t>(code.size());
#pragma omp parallel for reduction(|| : outside)
  for (int64_t edge = 0; edge < edges; ++edge) {
    outside = outside || code[edge] < 0 || static_cast<int32_t>(code[edge]) >= codebook_size;
  }
  return !outside;
}

template <class Code>
bool siblings_ascend(std::span<const Code> code, std::span<const int32_t> first_child) {
  bool descends = false;
  const auto inner = static_cast<int64_t>(first_child.size()) - 1;
#pragma omp parallel for reduction(|| : descends)
  for (int64_t node = 0; node < inner; ++node) {
    for (int32_t child = first_child[node] + 1; child < first_child[node + 1]; ++child) {
      descends = descends || code[child - 1] <= code[child - 2];
    }
  }
  return !descends;
}

bool is_permutation(std::span<const int32_t> rows) {
  const auto items = static_cast<int64_t>(rows.size());
  BitSet seen(items);
  return std::none_of(rows.begin(), rows.end(),
                      [&](int32_t row) { return row < 0 || row >= items || seen.test_and_set(row); });
}

// Whether the level `levels` below the root begins with the first leaf.
bool ends_on_level(std::span<const int32_t> first_child, int32_t levels) {
  const auto inner = static_cast<int64_t>(first_child.size()) - 1;
  int64_t begin = 0;
  for (int32_t level = 0; level < levels; ++level) {
    if (begin >= inner) return false;
    begin = first_child[begin];
  }
  return begin == inner;
}

}  // namespace

template <class Code>
const char* trie_problem(std::span<const Code> code, std::span<const uint64_t> packed,
                         std::span<const int32_t> rows, int32_t levels, int32_t codebook_size) {
  const auto nodes = static_cast<int64_t>(code.size()) + 1;
  const auto inner = nodes - static_cast<int64_t>(rows.size());
  if (inner < 1 || rows.empty()) return "the number of items is 0, or not less than the number of nodes";
  const std::vector<int32_t> first_child = unpack_ascending(packed, inner + 1);
  if (first_child.empty()) return "first_child does not hold packed ascending numbers";
  if (first_child.front() != 1 || first_child.back() != nodes) {
    return "first_child does not ascend from 1 to the number of nodes";
  }
  if (!in_codebook(code, codebook_size)) return "a code is outside the codebook";
  if (!siblings_ascend<Code>(code, first_child)) return "the codes of some siblings do not ascend";
  if (!ends_on_level(first_child, levels)) return "the items are not all on the last level";
  if (!is_permutation(rows)) return "rows is not a permutation of the items";
  return nullptr;
}

template const char* trie_problem(std::span<const uint8_t>, std::span<const uint64_t>,
                                  std::span<const int32_t>, int32_t, int32_t);
template const char* trie_problem(std::span<const int16_t>, std::span<const uint64_t>,
                                  std::span<const int32_t>, int32_t, int32_t);

int64_t first_invalid_id(std::span<const int64_t> ids) {
  const auto items = static_cast<int64_t>(ids.size());
  int64_t highest = -1;
  for (int64_t i = 0; i < items; ++i) {
    if (ids[i] < 0) return i;
    highest = std::max(highest, ids[i]);
  }
  if (highest / kMaxBitsPerId < items) {
    BitSet seen(highest + 1);
    for (int64_t i = 0; i < items; ++i) {
      if (seen.test_and_set(ids[i])) return i;
    }
    return -1;
  }
  std::vector<int32_t> order(ids.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return ids[a] < ids[b] || (ids[a] == ids[b] && a < b); });
  for (size_t i = 1; i < order.size(); ++i) {
    if (ids[order[i]] == ids[order[i - 1]]) return order[i];
  }
  return -1;
}

}  // namespace cemg
