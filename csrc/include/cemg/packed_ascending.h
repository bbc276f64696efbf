// Numbers that ascend, packed, as the trie keeps its nodes' first children: one source for host and device.
//
// Blocks of 64 numbers. There is a word for each block, then what these point to. A block's word holds its
// first number, and in its upper half a place among all words. From there on, where the block spans no more
// than 512, stands a bit for each number from the first on, set for those of the block. Otherwise the place
// is inverted, so negative, and the block's numbers stand there, two in a word. Seven words of zeros end it
// all, so that eight may be read wherever bits begin.
#pragma once

#if !defined(__CUDACC_RTC__)  // CuPy's compiler has no standard headers; trie_cuda.cu names the types
#include <bit>
#include <cstdint>
#include <span>
#include <vector>
#endif

#if defined(__CUDACC__)
#define CEMG_HD __host__ __device__
#else
#define CEMG_HD
#endif

namespace cemg {

struct Range {  // half open
  int32_t begin;
  int32_t end;
};

CEMG_HD inline int32_t popcount(uint64_t word) noexcept {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return std::popcount(word);
#endif
}

CEMG_HD inline int32_t lowest_bit(uint64_t word) noexcept {  // of a word that has one
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return std::countr_zero(word);
#endif
}

// The place of the bit that `before` others of the word are below; the word has as many.
CEMG_HD inline int32_t nth_bit(uint64_t word, int32_t before) noexcept {
  constexpr uint64_t kEach = 0x0101010101010101, kHigh = 0x8080808080808080;
  uint64_t sums = word - ((word >> 1) & 0x5555555555555555);
  sums = (sums & 0x3333333333333333) + ((sums >> 2) & 0x3333333333333333);
  sums = ((sums + (sums >> 4)) & 0x0f0f0f0f0f0f0f0f) * kEach;  // of each byte and those below
  const uint64_t passed = ((static_cast<uint64_t>(before) * kEach | kHigh) - sums) & kHigh;
  const int32_t place = static_cast<int32_t>(((passed >> 7) * kEach) >> 56) * 8;
  int32_t left = before - static_cast<int32_t>(((sums << 8) >> place) & 0xff);
  uint64_t byte = (word >> place) & 0xff;
  for (; left > 0; --left) byte &= byte - 1;
  return place + lowest_bit(byte);
}

struct PackedAscending {  // borrowed
  static constexpr int32_t kBlock = 64;
  static constexpr int32_t kMostWords = 8;  // of bits

  const uint64_t* words;

  // Number n.
  CEMG_HD int32_t operator[](int32_t n) const noexcept {
    const Block block = block_of(n);
    const int32_t i = n % kBlock;
    if (i == 0) return block.first;
    if (block.place < 0) return listed(block, i);
    const Bit bit = bit_of(block, i);
    return bit.begin + bit.place;
  }

  // Numbers n and n + 1.
  CEMG_HD Range pair(int32_t n) const noexcept {
    const Block block = block_of(n);
    const int32_t i = n % kBlock;
    if (i == kBlock - 1) return {(*this)[n], (*this)[n + 1]};
    if (block.place < 0) return {listed(block, i), listed(block, i + 1)};
    Bit bit = bit_of(block, i);
    const int32_t found = bit.begin + bit.place;
    uint64_t rest = *bit.word & (~uint64_t{1} << bit.place);
    while (rest == 0) {
      rest = *++bit.word;
      bit.begin += 64;
    }
    return {found, bit.begin + lowest_bit(rest)};
  }

  // The numbers of one block, of `count` in all, to out [kBlock]; how many they are, fewer than there should
  // be where the bits are not those of a block.
  CEMG_HD int32_t read_block(int32_t block, int32_t count, int32_t* out) const noexcept {
    const Block head = block_of(block * kBlock);
    const int32_t left = count - block * kBlock, size = left < kBlock ? left : kBlock;
    if (head.place < 0) {
      for (int32_t i = 0; i < size; ++i) out[i] = listed(head, i);
      return size;
    }
    int32_t found = 0;
    for (int32_t word = 0; word < kMostWords && found < size; ++word) {
      uint64_t bits = words[head.place + word];
      for (; bits != 0 && found < size; bits &= bits - 1) {
        out[found++] =
            static_cast<int32_t>(static_cast<uint32_t>(head.first) + static_cast<uint32_t>(word * 64) +
                                 static_cast<uint32_t>(lowest_bit(bits)));
      }
    }
    return found;
  }

  // The last of the first `count` numbers that is no higher than `value`, as the first is.
  CEMG_HD int32_t last_at_most(int32_t value, int32_t count) const noexcept {
    int32_t low = 0, high = (count - 1) / kBlock;
    while (low < high) {
      const int32_t middle = low + (high - low + 1) / 2;
      if (block_of(middle * kBlock).first <= value) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    low *= kBlock;
    high = count - 1 < low + kBlock - 1 ? count - 1 : low + kBlock - 1;
    while (low < high) {
      const int32_t middle = low + (high - low + 1) / 2;
      if ((*this)[middle] <= value) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

 private:
  struct Block {
    int32_t first;
    int32_t place;
  };

  struct Bit {
    const uint64_t* word;
    int32_t begin;  // the number of the word's lowest bit
    int32_t place;  // in the word
  };

  CEMG_HD Bit bit_of(const Block& block, int32_t i) const noexcept {
    const uint64_t* word = words + block.place;
    int32_t begin = block.first;
    for (int32_t here = popcount(*word); i >= here; here = popcount(*++word)) {
      i -= here;
      begin += 64;
    }
    return {word, begin, nth_bit(*word, i)};
  }

  CEMG_HD Block block_of(int32_t n) const noexcept {
    const uint64_t word = words[n / kBlock];
    return {static_cast<int32_t>(word & 0xffffffff), static_cast<int32_t>(word >> 32)};
  }

  CEMG_HD int32_t listed(const Block& block, int32_t i) const noexcept {
    return static_cast<int32_t>((words[~block.place + i / 2] >> (i % 2 * 32)) & 0xffffffff);
  }
};

#if !defined(__CUDACC_RTC__)
// numbers, each from 0 on and above the one before, packed; one way to pack them.
std::vector<uint64_t> pack_ascending(std::span<const int32_t> numbers);

// The `count` numbers that `words` pack; empty where they do not.
std::vector<int32_t> unpack_ascending(std::span<const uint64_t> words, int64_t count);
#endif

}  // namespace cemg
