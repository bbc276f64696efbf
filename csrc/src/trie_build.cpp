#include "cemg/trie_build.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <numeric>

#include "cemg/packed_ascending.h"

namespace cemg {
namespace {

constexpr int64_t kChunkItems = 1 << 15, kMaxChunks = 64;
constexpr int kDigitBits = 11;
constexpr size_t kDigits = size_t{1} << kDigitBits;

struct IndexRange {
  int64_t begin, end;
};

// Calls work(chunk, range of its items) for each of `chunks` equal parts of `items`, on all cores.
template <class Work>
void parallel_for_chunks(int64_t items, int64_t chunks, Work work) {
#pragma omp parallel for schedule(dynamic, 1) if (chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    work(chunk, IndexRange{items * chunk / chunks, items * (chunk + 1) / chunks});
  }
}

// A stable radix sort of keys, and of the row numbers that belong to them unless these are empty, by bits
// [begin, end) of the keys.
class RadixSorter {
 public:
  RadixSorter(std::vector<uint64_t>& keys, std::vector<int32_t>& rows, int64_t chunks)
      : keys_(keys), rows_(rows), chunks_(chunks), sorted_keys_(keys.size()), sorted_rows_(rows.size()) {}

  void sort(int begin, int end) {
    for (int shift = begin; shift < end; shift += kDigitBits) {
      rows_.empty() ? pass<false>(shift, end) : pass<true>(shift, end);
    }
  }

 private:
  using Positions = std::array<uint32_t, kDigits>;

  template <bool kRows>
  void pass(int shift, int end) {
    const auto items = static_cast<int64_t>(keys_.size());
    const uint64_t mask = (uint64_t{1} << std::min(kDigitBits, end - shift)) - 1;
    const auto digit = [shift, mask](uint64_t key) { return (key >> shift) & mask; };
    std::vector<Positions> positions(static_cast<size_t>(chunks_), Positions{});
    parallel_for_chunks(items, chunks_, [&](int64_t chunk, IndexRange part) {
      Positions& count = positions[chunk];
      for (int64_t i = part.begin; i < part.end; ++i) ++count[digit(keys_[i])];
    });
    if (scan(positions)) return;
    parallel_for_chunks(items, chunks_, [&](int64_t chunk, IndexRange part) {
      Positions& next = positions[chunk];
      for (int64_t i = part.begin; i < part.end; ++i) {
        const uint32_t position = next[digit(keys_[i])]++;
        sorted_keys_[position] = keys_[i];
        if constexpr (kRows) sorted_rows_[position] = rows_[i];
      }
    });
    keys_.swap(sorted_keys_);
    rows_.swap(sorted_rows_);
  }

  // Replaces counts by positions: by digit, and within a digit by chunk. Returns whether all items have the
  // same digit.
  bool scan(std::vector<Positions>& positions) const {
    uint32_t next = 0;
    bool single = false;
    for (size_t digit = 0; digit < kDigits; ++digit) {
      const uint32_t begin = next;
      for (Positions& chunk : positions) next += std::exchange(chunk[digit], next);
      single |= next - begin == keys_.size();
    }
    return single;
  }

  std::vector<uint64_t>& keys_;
  std::vector<int32_t>& rows_;
  int64_t chunks_;
  std::vector<uint64_t> sorted_keys_;
  std::vector<int32_t> sorted_rows_;
};

template <class Code>
std::variant<int32_t, BuildError> check(std::span<const Code> codes, int32_t levels, int32_t size,
                                        int64_t chunks) {
  using Kind = BuildError::Kind;
  if (levels < 1 || levels > kMaxLevels) return BuildError{Kind::kShape, 0, levels};
  if (codes.empty() || codes.size() % levels != 0) return BuildError{Kind::kShape, 0, levels};
  if (size < 1 || size > kMaxCodebookSize) return BuildError{Kind::kCodebookSize, 0, size};
  const int64_t items = static_cast<int64_t>(codes.size()) / levels;
  if (items >= kMaxNodes) return BuildError{Kind::kTooManyItems, 0, items};
  const auto outside = [size](Code code) { return code < 0 || static_cast<int64_t>(code) >= size; };
  std::atomic<bool> valid = true;
  parallel_for_chunks(static_cast<int64_t>(codes.size()), chunks, [&](int64_t, IndexRange part) {
    bool any_outside = false;  // no early exit, so that the loop vectorizes
    for (int64_t i = part.begin; i < part.end; ++i) any_outside |= outside(codes[i]);
    if (any_outside) valid = false;
  });
  if (valid) return static_cast<int32_t>(items);
  const auto code = std::find_if(codes.begin(), codes.end(), outside);
  return BuildError{Kind::kCodeOutOfRange, (code - codes.begin()) / levels, static_cast<int64_t>(*code)};
}

KeyLayout layout_of(int32_t levels, int32_t size) {
  const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint32_t>(size - 1))));
  return {levels, bits, 64 / bits};
}

template <class Code>
uint64_t pack(const Code* row, const KeyLayout& layout, int32_t word) noexcept {
  uint64_t key = 0;
  for (int32_t m = layout.begin(word); m < layout.end(word); ++m) {
    key = (key << layout.bits) | static_cast<uint64_t>(row[m]);
  }
  return key;
}

// Writes one word of the packed codes of each row in `order` to keys [N].
template <class Code>
void pack_all(std::span<const Code> codes, const KeyLayout& layout, int32_t word,
              const std::vector<int32_t>& order, int64_t chunks, uint64_t* keys) {
  parallel_for_chunks(static_cast<int64_t>(order.size()), chunks, [&](int64_t, IndexRange part) {
    for (int64_t rank = part.begin; rank < part.end; ++rank) {
      keys[rank] = pack(codes.data() + static_cast<size_t>(order[rank]) * layout.levels, layout, word);
    }
  });
}

// Sorts rows whose packed codes and row number fit one word: joins the two, sorts, and splits them again.
// Writes keys [N] and order [N].
template <class Code>
void sort_joined(std::span<const Code> codes, const KeyLayout& layout, int row_bits, int64_t chunks,
                 std::vector<uint64_t>& keys, std::vector<int32_t>& order) {
  const auto rows = static_cast<int64_t>(keys.size());
  parallel_for_chunks(rows, chunks, [&](int64_t, IndexRange part) {
    for (int64_t row = part.begin; row < part.end; ++row) {
      const uint64_t key = pack(codes.data() + static_cast<size_t>(row) * layout.levels, layout, 0);
      keys[row] = (key << row_bits) | static_cast<uint64_t>(row);
    }
  });
  RadixSorter(keys, order, chunks).sort(row_bits, row_bits + layout.levels * layout.bits);
  order.resize(rows);
  parallel_for_chunks(rows, chunks, [&](int64_t, IndexRange part) {
    for (int64_t rank = part.begin; rank < part.end; ++rank) {
      order[rank] = static_cast<int32_t>(keys[rank] & ((uint64_t{1} << row_bits) - 1));
      keys[rank] >>= row_bits;
    }
  });
}

// Writes the rows in the order of their codes to `order`, which must be empty, and the first word of each to
// keys [N].
template <class Code>
void sort_rows(std::span<const Code> codes, const KeyLayout& layout, int64_t chunks,
               std::vector<uint64_t>& keys, std::vector<int32_t>& order) {
  const int row_bits = static_cast<int>(std::bit_width(keys.size() - 1));
  if (layout.levels * layout.bits + row_bits <= 64) {  // half the memory traffic
    return sort_joined(codes, layout, row_bits, chunks, keys, order);
  }
  order.resize(keys.size());
  std::iota(order.begin(), order.end(), 0);
  for (int32_t word = layout.words() - 1; word >= 0; --word) {  // a stable sort: the first word comes last
    pack_all(codes, layout, word, order, chunks, keys.data());
    RadixSorter(keys, order, chunks).sort(0, (layout.end(word) - layout.begin(word)) * layout.bits);
  }
}

}  // namespace

template <class Code>
std::variant<TrieBuilder, BuildError> TrieBuilder::sort(std::span<const Code> codes, int32_t levels,
                                                        int32_t codebook_size, int64_t chunks) {
  const int64_t rows = levels > 0 ? static_cast<int64_t>(codes.size()) / levels : 0;
  if (chunks <= 0) chunks = std::clamp<int64_t>(rows / kChunkItems, 1, kMaxChunks);
  const auto checked = check(codes, levels, codebook_size, chunks);
  if (const auto* error = std::get_if<BuildError>(&checked)) return *error;
  TrieBuilder built;
  built.chunks_ = chunks;
  const KeyLayout layout = built.layout_ = layout_of(levels, codebook_size);
  built.keys_.resize(rows);
  sort_rows(codes, layout, chunks, built.keys_, built.order_);
  built.keys_.resize(static_cast<size_t>(rows) * layout.words());
  for (int32_t word = 1; word < layout.words(); ++word) {
    pack_all(codes, layout, word, built.order_, chunks, built.keys_.data() + word * rows);
  }
  const Counts at_depth = built.find_depths();
  built.find_duplicates(at_depth);
  if (!built.count_levels(at_depth)) return BuildError{BuildError::Kind::kTooManyNodes, 0, rows};
  return built;
}

// Writes depth_, and returns how many ranks of each chunk have each depth.
TrieBuilder::Counts TrieBuilder::find_depths() {
  const int64_t items = num_items();
  depth_.resize(items);
  std::array<int32_t, 64> code_of;  // the code that a bit of a word belongs to, counted from the last
  for (int bit = 0; bit < 64; ++bit) code_of[bit] = bit / layout_.bits;
  Counts at_depth(chunks_, std::vector<int32_t>(layout_.levels + 1));
  parallel_for_chunks(items, chunks_, [&](int64_t chunk, IndexRange part) {
    for (int64_t rank = part.begin; rank < part.end; ++rank) {
      int32_t depth = rank == 0 ? 0 : layout_.levels;
      for (int32_t word = 0; rank > 0 && word < layout_.words(); ++word) {
        const uint64_t* key = keys_.data() + word * items + rank;
        const uint64_t differ = key[0] ^ key[-1];
        if (differ == 0) continue;
        depth = layout_.end(word) - 1 - code_of[63 - std::countl_zero(differ)];
        break;
      }
      depth_[rank] = static_cast<uint8_t>(depth);
      ++at_depth[chunk][depth];
    }
  });
  return at_depth;
}

void TrieBuilder::find_duplicates(const Counts& at_depth) {
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
    if (at_depth[chunk][layout_.levels] == 0) continue;
    const int64_t end = num_items() * (chunk + 1) / chunks_;
    for (int64_t rank = num_items() * chunk / chunks_; rank < end; ++rank) {
      if (depth_[rank] == layout_.levels) duplicates_.emplace_back(order_[rank - 1], order_[rank]);
    }
  }
}

// Numbers the nodes: writes the first node of each level, and the first node of each chunk on each level.
// Returns false if the numbers do not fit int32.
bool TrieBuilder::count_levels(const Counts& at_depth) {
  node_begin_.assign(chunks_, std::vector<int32_t>(layout_.levels + 2));
  std::vector<int64_t> started(chunks_, 0);  // a rank starts a node on level m + 1 if it shares <= m codes
  int64_t next = 1;
  level_begin_ = {0, 1};
  for (int32_t m = 0; m < layout_.levels; ++m) {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      started[chunk] += at_depth[chunk][m];
      node_begin_[chunk][m + 1] = static_cast<int32_t>(std::min(next, kMaxNodes));
      next += started[chunk];
    }
    if (next > kMaxNodes) return false;
    level_begin_.push_back(static_cast<int32_t>(next));
  }
  return true;
}

template <class Code>
std::vector<uint64_t> TrieBuilder::write(Code* code, int32_t* rows) const {
  const int32_t levels = layout_.levels;
  const uint64_t code_mask = (uint64_t{1} << layout_.bits) - 1;
  std::array<const uint64_t*, kMaxLevels> word_of;  // the keys and the bits that hold a level's code
  std::array<int32_t, kMaxLevels> shift_of;
  for (int32_t m = 0; m < levels; ++m) {
    const int32_t word = m / layout_.per_word;
    word_of[m] = keys_.data() + word * num_items();
    shift_of[m] = (layout_.end(word) - 1 - m) * layout_.bits;
  }
  std::vector<int32_t> first_child(static_cast<size_t>(num_inner()) + 1);
  first_child[0] = 1;
  parallel_for_chunks(num_items(), chunks_, [&](int64_t chunk, IndexRange part) {
    std::vector<int32_t> next = node_begin_[chunk];  // the number of the next node on each level
    std::copy(order_.begin() + part.begin, order_.begin() + part.end, rows + part.begin);
    for (int64_t rank = part.begin; rank < part.end; ++rank) {
      for (int32_t m = depth_[rank]; m < levels; ++m) {
        const uint64_t key = word_of[m][rank] >> shift_of[m];
        const int32_t node = next[m + 1]++;
        code[node - 1] = static_cast<Code>(key & code_mask);
        if (m + 1 < levels) first_child[node] = next[m + 2];
      }
    }
  });
  first_child[num_inner()] = num_nodes();
  return pack_ascending(first_child);
}

#define CEMG_SORTS(Code)                                                                                    \
  template std::variant<TrieBuilder, BuildError> TrieBuilder::sort(std::span<const Code>, int32_t, int32_t, \
                                                                   int64_t);
CEMG_SORTS(uint8_t)
CEMG_SORTS(int16_t)
CEMG_SORTS(int32_t)
CEMG_SORTS(int64_t)
#undef CEMG_SORTS
template std::vector<uint64_t> TrieBuilder::write(uint8_t*, int32_t*) const;
template std::vector<uint64_t> TrieBuilder::write(int16_t*, int32_t*) const;

}  // namespace cemg
