#include "cemg/trie_build.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <numeric>

namespace cemg {
namespace {

constexpr int32_t kMaxLevels = 255;  // depth_ holds a byte
constexpr int64_t kMaxNodes = std::numeric_limits<int32_t>::max();

struct Keyed {
  uint64_t key;
  int32_t row;
};

std::variant<int32_t, BuildError> check(std::span<const int32_t> codes, int32_t levels, int32_t size) {
  using Kind = BuildError::Kind;
  if (levels < 1 || levels > kMaxLevels) return BuildError{Kind::kShape, 0, levels};
  if (codes.empty() || codes.size() % levels != 0) return BuildError{Kind::kShape, 0, levels};
  if (size < 1 || size > TrieBuilder::kMaxCodebookSize) return BuildError{Kind::kCodebookSize, 0, size};
  const int64_t items = static_cast<int64_t>(codes.size()) / levels;
  if (items >= kMaxNodes) return BuildError{Kind::kTooManyItems, 0, items};
  const auto outside = [size](int32_t code) { return code < 0 || code >= size; };
  const auto found = std::find_if(codes.begin(), codes.end(), outside);
  if (found == codes.end()) return static_cast<int32_t>(items);
  return BuildError{Kind::kCodeOutOfRange, (found - codes.begin()) / levels, *found};
}

// One pass of a radix sort by the 11 bits at `shift`: stable, so rows stay ascending among equal keys.
void radix_pass(const std::vector<Keyed>& from, std::vector<Keyed>& to, int shift) {
  constexpr size_t kDigits = 2048;
  std::array<size_t, kDigits> place{};
  const auto digit = [shift](const Keyed& item) { return (item.key >> shift) % kDigits; };
  for (const Keyed& item : from) ++place[digit(item)];
  std::exclusive_scan(place.begin(), place.end(), place.begin(), size_t{0});
  for (const Keyed& item : from) to[place[digit(item)]++] = item;
}

// Sorts by packed keys of `levels` * `bits` <= 64 bits.
std::vector<int32_t> order_by_key(std::span<const int32_t> codes, int32_t levels, int bits) {
  const int64_t items = static_cast<int64_t>(codes.size()) / levels;
  std::vector<Keyed> keyed(items);
  std::vector<Keyed> other(items);
#pragma omp parallel for
  for (int64_t row = 0; row < items; ++row) {
    uint64_t key = 0;
    for (int32_t m = 0; m < levels; ++m) key = (key << bits) | static_cast<uint64_t>(codes[row * levels + m]);
    keyed[row] = {key, static_cast<int32_t>(row)};
  }
  for (int shift = 0; shift < levels * bits; shift += 11) {
    radix_pass(keyed, other, shift);
    keyed.swap(other);
  }
  std::vector<int32_t> order(items);
  for (int64_t rank = 0; rank < items; ++rank) order[rank] = keyed[rank].row;
  return order;
}

// Keys too wide for one word: compare code by code.
std::vector<int32_t> order_by_codes(std::span<const int32_t> codes, int32_t levels) {
  std::vector<int32_t> order(codes.size() / levels);
  std::iota(order.begin(), order.end(), 0);
  const auto row = [&](int32_t r) { return codes.subspan(static_cast<size_t>(r) * levels, levels); };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return std::ranges::lexicographical_compare(row(a), row(b));
  });
  return order;
}

std::vector<int32_t> order_rows(std::span<const int32_t> codes, int32_t levels, int32_t size) {
  const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint32_t>(size - 1))));
  return levels * bits <= 64 ? order_by_key(codes, levels, bits) : order_by_codes(codes, levels);
}

std::vector<uint16_t> gather(std::span<const int32_t> codes, const std::vector<int32_t>& order,
                             int32_t levels) {
  std::vector<uint16_t> sorted(codes.size());
  const int64_t items = static_cast<int64_t>(order.size());
#pragma omp parallel for
  for (int64_t rank = 0; rank < items; ++rank) {
    const size_t from = static_cast<size_t>(order[rank]) * levels;
    for (int32_t m = 0; m < levels; ++m) sorted[rank * levels + m] = static_cast<uint16_t>(codes[from + m]);
  }
  return sorted;
}

std::vector<uint8_t> shared_depth(const std::vector<uint16_t>& sorted, int32_t levels) {
  const int64_t items = static_cast<int64_t>(sorted.size()) / levels;
  std::vector<uint8_t> depth(items, 0);
#pragma omp parallel for
  for (int64_t rank = 1; rank < items; ++rank) {
    const uint16_t* here = sorted.data() + rank * levels;
    depth[rank] = static_cast<uint8_t>(std::mismatch(here, here + levels, here - levels).first - here);
  }
  return depth;
}

// The number of each level's first node, or nothing where int32 cannot hold them.
std::vector<int32_t> level_begins(const std::vector<uint8_t>& depth, int32_t levels) {
  std::vector<int64_t> at_depth(levels + 1, 0);
  for (uint8_t d : depth) ++at_depth[d];
  std::vector<int32_t> begin = {0, 1};
  int64_t nodes_here = 0;
  int64_t total = 1;
  for (int32_t m = 0; m < levels; ++m) {
    nodes_here += at_depth[m];  // a rank starts a node on level m + 1 when it shares at most m codes
    total += nodes_here;
    if (total > kMaxNodes) return {};
    begin.push_back(static_cast<int32_t>(total));
  }
  return begin;
}

}  // namespace

std::variant<TrieBuilder, BuildError> TrieBuilder::sort(std::span<const int32_t> codes, int32_t levels,
                                                        int32_t codebook_size) {
  const auto checked = check(codes, levels, codebook_size);
  if (const auto* error = std::get_if<BuildError>(&checked)) return *error;
  TrieBuilder built;
  built.levels_ = levels;
  built.order_ = order_rows(codes, levels, codebook_size);
  built.sorted_ = gather(codes, built.order_, levels);
  built.depth_ = shared_depth(built.sorted_, levels);
  for (size_t rank = 1; rank < built.depth_.size(); ++rank) {
    if (built.depth_[rank] != levels) continue;
    built.duplicates_.emplace_back(built.order_[rank - 1], built.order_[rank]);
  }
  built.level_begin_ = level_begins(built.depth_, levels);
  if (built.level_begin_.empty()) {
    return BuildError{BuildError::Kind::kTooManyNodes, 0, std::get<int32_t>(checked)};
  }
  return built;
}

template <class Code>
void TrieBuilder::write(Code* code, int32_t* first_child, int32_t* rows) const noexcept {
  std::copy(order_.begin(), order_.end(), rows);
  std::array<int32_t, kMaxLevels + 2> next{};  // the number the next node of each level gets
  std::copy(level_begin_.begin(), level_begin_.end(), next.begin());
  first_child[0] = 1;
  for (size_t rank = 0; rank < depth_.size(); ++rank) {
    const uint16_t* codes = sorted_.data() + rank * levels_;
    for (int32_t level = depth_[rank] + 1; level <= levels_; ++level) {
      const int32_t node = next[level]++;
      code[node - 1] = static_cast<Code>(codes[level - 1]);
      if (level < levels_) first_child[node] = next[level + 1];
    }
  }
  first_child[num_inner()] = num_nodes();
}

template void TrieBuilder::write(uint8_t*, int32_t*, int32_t*) const noexcept;
template void TrieBuilder::write(int16_t*, int32_t*, int32_t*) const noexcept;

}  // namespace cemg
