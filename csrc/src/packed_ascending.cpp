#include "cemg/packed_ascending.h"

#include <algorithm>
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

// Adds the `size` numbers of a block of words with any values; false where they hold none such.
bool append_block(std::span<const uint64_t> words, uint64_t head, int64_t size, std::vector<int32_t>& out) {
  const auto first = static_cast<int32_t>(head & 0xffffffff), place = static_cast<int32_t>(head >> 32);
  const int64_t begin = place < 0 ? ~place : place, all = static_cast<int64_t>(words.size());
  const int64_t end = place < 0 ? begin + (size + 1) / 2 : begin + PackedAscending::kMostWords;
  if (first < 0 || end > all) return false;
  if (place < 0) {
    for (int64_t i = 0; i < size; ++i) {
      out.push_back(static_cast<int32_t>((words[begin + i / 2] >> (i % 2 * 32)) & 0xffffffff));
    }
    return true;
  }
  for (int64_t word = begin; word < end && size > 0; ++word) {
    for (uint64_t left = words[word]; left != 0 && size > 0; left &= left - 1, --size) {
      const int64_t number = first + (word - begin) * 64 + std::countr_zero(left);
      if (number > std::numeric_limits<int32_t>::max()) return false;
      out.push_back(static_cast<int32_t>(number));
    }
  }
  return size == 0;
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

int64_t read_block(PackedAscending packed, int64_t block, int64_t count, int32_t* out) noexcept {
  const uint64_t head = packed.words[block];
  const auto first = static_cast<int32_t>(head & 0xffffffff), place = static_cast<int32_t>(head >> 32);
  const int64_t size = std::min(kBlock, count - block * kBlock);
  if (place < 0) {
    for (int64_t i = 0; i < size; ++i) {
      out[i] = static_cast<int32_t>((packed.words[~place + i / 2] >> (i % 2 * 32)) & 0xffffffff);
    }
  } else {
    const uint64_t* bits = packed.words + place;
    int64_t found = 0;
    for (int32_t begin = first; found < size; begin += 64) {
      for (uint64_t left = *bits++; left != 0 && found < size; left &= left - 1) {
        out[found++] = begin + std::countr_zero(left);
      }
    }
  }
  if ((block + 1) * kBlock >= count) return size;
  out[size] = static_cast<int32_t>(packed.words[block + 1] & 0xffffffff);
  return size + 1;
}

std::vector<int32_t> unpack_ascending(std::span<const uint64_t> words, int64_t count) {
  const int64_t blocks = blocks_of(count);
  if (count < 1 || blocks > static_cast<int64_t>(words.size())) return {};
  std::vector<int32_t> numbers;
  numbers.reserve(static_cast<size_t>(count));
  for (int64_t block = 0; block < blocks; ++block) {
    if (!append_block(words, words[block], std::min(kBlock, count - block * kBlock), numbers)) return {};
  }
  if (std::adjacent_find(numbers.begin(), numbers.end(), std::greater_equal<>()) != numbers.end()) return {};
  const auto again = pack_ascending(numbers);
  return std::equal(again.begin(), again.end(), words.begin(), words.end()) ? numbers
                                                                            : std::vector<int32_t>();
}

}  // namespace cemg
