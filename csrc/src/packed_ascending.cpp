#include "cemg/packed_ascending.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace cemg {
namespace {

constexpr int64_t kBlock = PackedAscending::kBlock;
constexpr int64_t kMaxBits = int64_t{64} * PackedAscending::kMaxWords;
constexpr int64_t kPadding = PackedAscending::kMaxWords - 1;  // zero words at the end
constexpr int64_t kParallelBlocks = 1 << 10;

int64_t blocks_of(int64_t count) noexcept {
  return (count + kBlock - 1) / kBlock;
}

// How a block's data are stored: as bits or as a list, in how many words.
struct BlockLayout {
  int64_t words;
  bool bits;
};

BlockLayout layout_of(std::span<const int32_t> block) noexcept {
  const int64_t span = int64_t{block.back()} - block.front() + 1;
  if (span <= kMaxBits) return {(span + 63) / 64, true};
  return {(static_cast<int64_t>(block.size()) + 1) / 2, false};
}

std::span<const int32_t> block_at(std::span<const int32_t> numbers, int64_t block) noexcept {
  const auto begin = static_cast<size_t>(block * kBlock);
  return numbers.subspan(begin, std::min(numbers.size() - begin, static_cast<size_t>(kBlock)));
}

void write_block(std::span<const int32_t> block, const BlockLayout& layout, int64_t offset, uint64_t& head,
                 uint64_t* out) noexcept {
  const auto first = static_cast<uint64_t>(block.front());
  const auto stored_offset = static_cast<uint32_t>(layout.bits ? offset : ~offset);
  head = uint64_t{stored_offset} << 32 | first;
  for (size_t i = 0; i < block.size(); ++i) {
    const auto number = static_cast<uint64_t>(block[i]);
    if (layout.bits) {
      out[(number - first) / 64] |= uint64_t{1} << ((number - first) % 64);
    } else {
      out[i / 2] |= number << (i % 2 * 32);
    }
  }
}

// Reads a block from words that may hold any values. Returns whether they hold a whole block.
bool read_unchecked(std::span<const uint64_t> words, int64_t block, int64_t count, int32_t* out) noexcept {
  const uint64_t head = words[block];
  const auto offset = static_cast<int32_t>(head >> 32);
  const int64_t size = std::min(kBlock, count - block * kBlock);
  const int64_t end = offset < 0 ? ~offset + (size + 1) / 2 : offset + int64_t{PackedAscending::kMaxWords};
  if (end > static_cast<int64_t>(words.size())) return false;
  const PackedAscending packed{words.data()};
  return packed.read_block(static_cast<int32_t>(block), static_cast<int32_t>(count), out) == size;
}

}  // namespace

std::vector<uint64_t> pack_ascending(std::span<const int32_t> numbers) {
  const int64_t blocks = blocks_of(static_cast<int64_t>(numbers.size()));
  std::vector<int64_t> offsets(static_cast<size_t>(blocks) + 1, blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    offsets[block + 1] = offsets[block] + layout_of(block_at(numbers, block)).words;
  }
  std::vector<uint64_t> words(static_cast<size_t>(offsets.back() + kPadding));
#pragma omp parallel for if (blocks >= kParallelBlocks)
  for (int64_t block = 0; block < blocks; ++block) {
    const auto part = block_at(numbers, block);
    write_block(part, layout_of(part), offsets[block], words[block], words.data() + offsets[block]);
  }
  return words;
}

std::vector<int32_t> unpack_ascending(std::span<const uint64_t> words, int64_t count) {
  const int64_t blocks = blocks_of(count);
  if (count < 1 || count > std::numeric_limits<int32_t>::max() || blocks > static_cast<int64_t>(words.size()))
    return {};
  std::vector<int32_t> numbers(static_cast<size_t>(count));
  bool invalid = false;
#pragma omp parallel for reduction(|| : invalid) if (blocks >= kParallelBlocks)
  for (int64_t block = 0; block < blocks; ++block) {
    invalid = invalid || !read_unchecked(words, block, count, numbers.data() + block * kBlock);
  }
  if (invalid || numbers.front() < 0) return {};
  if (std::adjacent_find(numbers.begin(), numbers.end(), std::greater_equal<>()) != numbers.end()) return {};
  const auto packed = pack_ascending(numbers);
  if (!std::equal(packed.begin(), packed.end(), words.begin(), words.end())) return {};
  return numbers;
}

}  // namespace cemg
