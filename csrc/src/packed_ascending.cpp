#include "cemg/packed_ascending.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace cemg {
namespace {

constexpr int64_t kBlock = PackedAscending::kBlock;
constexpr int64_t kMostBits = int64_t{64} * PackedAscending::kMostWords;
constexpr int64_t kEnd = PackedAscending::kMostWords - 1;  // words of zeros
constexpr int64_t kParallelBlocks = 1 << 10;

int64_t blocks_of(int64_t count) noexcept {
  return (count + kBlock - 1) / kBlock;
}

// What a block takes beside its first word: `bits`, whether those are bits.
struct Room {
  int64_t words;
  bool bits;
};

Room room_of(std::span<const int32_t> block) noexcept {
  const int64_t span = int64_t{block.back()} - block.front() + 1;
  if (span <= kMostBits) return {(span + 63) / 64, true};
  return {(static_cast<int64_t>(block.size()) + 1) / 2, false};
}

std::span<const int32_t> block_at(std::span<const int32_t> numbers, int64_t block) noexcept {
  const auto begin = static_cast<size_t>(block * kBlock);
  return numbers.subspan(begin, std::min(numbers.size() - begin, static_cast<size_t>(kBlock)));
}

void write_block(std::span<const int32_t> block, const Room& room, int64_t place, uint64_t& head,
                 uint64_t* out) noexcept {
  const auto low = static_cast<uint64_t>(block.front());
  const auto where = static_cast<uint32_t>(room.bits ? place : ~place);
  head = uint64_t{where} << 32 | low;
  for (size_t i = 0; i < block.size(); ++i) {
    const auto number = static_cast<uint64_t>(block[i]);
    if (room.bits) {
      out[(number - low) / 64] |= uint64_t{1} << ((number - low) % 64);
    } else {
      out[i / 2] |= number << (i % 2 * 32);
    }
  }
}

// Reads a block of words with any values; false where they hold none such.
bool read_any(std::span<const uint64_t> words, int64_t block, int64_t count, int32_t* out) noexcept {
  const uint64_t head = words[block];
  const auto place = static_cast<int32_t>(head >> 32);
  const int64_t size = std::min(kBlock, count - block * kBlock), all = static_cast<int64_t>(words.size());
  const int64_t end = place < 0 ? ~place + (size + 1) / 2 : place + int64_t{PackedAscending::kMostWords};
  if (end > all) return false;
  const PackedAscending packed{words.data()};
  return packed.read_block(static_cast<int32_t>(block), static_cast<int32_t>(count), out) == size;
}

}  // namespace

std::vector<uint64_t> pack_ascending(std::span<const int32_t> numbers) {
  const int64_t blocks = blocks_of(static_cast<int64_t>(numbers.size()));
  std::vector<int64_t> place(static_cast<size_t>(blocks) + 1, blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    place[block + 1] = place[block] + room_of(block_at(numbers, block)).words;
  }
  std::vector<uint64_t> words(static_cast<size_t>(place.back() + kEnd));
#pragma omp parallel for if (blocks >= kParallelBlocks)
  for (int64_t block = 0; block < blocks; ++block) {
    const auto own = block_at(numbers, block);
    write_block(own, room_of(own), place[block], words[block], words.data() + place[block]);
  }
  return words;
}

std::vector<int32_t> unpack_ascending(std::span<const uint64_t> words, int64_t count) {
  const int64_t blocks = blocks_of(count);
  if (count < 1 || count > std::numeric_limits<int32_t>::max() || blocks > static_cast<int64_t>(words.size()))
    return {};
  std::vector<int32_t> numbers(static_cast<size_t>(count));
  bool wrong = false;
#pragma omp parallel for reduction(|| : wrong) if (blocks >= kParallelBlocks)
  for (int64_t block = 0; block < blocks; ++block) {
    wrong = wrong || !read_any(words, block, count, numbers.data() + block * kBlock);
  }
  if (wrong || numbers.front() < 0) return {};
  if (std::adjacent_find(numbers.begin(), numbers.end(), std::greater_equal<>()) != numbers.end()) return {};
  const auto again = pack_ascending(numbers);
  return std::equal(again.begin(), again.end(), words.begin(), words.end()) ? numbers
                                                                            : std::vector<int32_t>();
}

}  // namespace cemg
