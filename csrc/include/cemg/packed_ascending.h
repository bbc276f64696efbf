// Packed ascending numbers, which the trie uses for its nodes' first children: one source for host and
// device.
//
// The numbers are split into blocks of 64. The packed form starts with one head word per block; the data of
// the blocks follow. A head holds the block's first number in its lower half and an offset into the words in
// its upper half. If the block spans at most 512, its data are bits: bit i is set if the block contains its
// first number plus i. Otherwise the offset is stored inverted, so it is negative, and the data are the
// numbers themselves, two per word. Seven zero words follow the last block, so that kMaxWords words may be
// read from any offset.
#pragma once

#if !defined(__CUDACC_RTC__)  // CuPy's compiler has no standard headers; trie_cuda.cu defines the types
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

// The index of the lowest set bit; the word is not 0.
CEMG_HD inline int32_t lowest_bit(uint64_t word) noexcept {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return std::countr_zero(word);
#endif
}

// The index of set bit number n, counted from 0; the word has more than n.
CEMG_HD inline int32_t nth_bit(uint64_t word, int32_t n) noexcept {
  constexpr uint64_t kEachByte = 0x0101010101010101, kHighBits = 0x8080808080808080;
  uint64_t sums = word - ((word >> 1) & 0x5555555555555555);
  sums = (sums & 0x3333333333333333) + ((sums >> 2) & 0x3333333333333333);
  sums = ((sums + (sums >> 4)) & 0x0f0f0f0f0f0f0f0f) * kEachByte;  // byte i: the bits set in bytes 0 to i
  const uint64_t passed = ((static_cast<uint64_t>(n) * kEachByte | kHighBits) - sums) & kHighBits;
  const int32_t shift = static_cast<int32_t>(((passed >> 7) * kEachByte) >> 56) * 8;  // of the bit's byte
  int32_t left = n - static_cast<int32_t>(((sums << 8) >> shift) & 0xff);
  uint64_t byte = (word >> shift) & 0xff;
  for (; left > 0; --left) byte &= byte - 1;
  return shift + lowest_bit(byte);
}

struct PackedAscending {  // borrowed
  static constexpr int32_t kBlock = 64;
  static constexpr int32_t kMaxWords = 8;  // of the bits of a block

  const uint64_t* words;

  // Number n.
  CEMG_HD int32_t operator[](int32_t n) const noexcept {
    const Head head = head_of(n);
    const int32_t i = n % kBlock;
    if (i == 0) return head.first;
    if (head.offset < 0) return listed(head, i);
    const Bit bit = bit_of(head, i);
    return bit.begin + bit.index;
  }

  // Numbers n and n + 1.
  CEMG_HD Range pair(int32_t n) const noexcept {
    const Head head = head_of(n);
    const int32_t i = n % kBlock;
    if (i == kBlock - 1) return {(*this)[n], (*this)[n + 1]};
    if (head.offset < 0) return {listed(head, i), listed(head, i + 1)};
    Bit bit = bit_of(head, i);
    const int32_t number = bit.begin + bit.index;
    uint64_t higher_bits = *bit.word & (~uint64_t{1} << bit.index);
    while (higher_bits == 0) {
      higher_bits = *++bit.word;
      bit.begin += 64;
    }
    return {number, bit.begin + lowest_bit(higher_bits)};
  }

  // Writes the numbers of a block to out [kBlock] and returns how many it wrote. `count` numbers are packed
  // in all. Of invalid words, it may write fewer than the block should hold.
  CEMG_HD int32_t read_block(int32_t block, int32_t count, int32_t* out) const noexcept {
    const Head head = head_of(block * kBlock);
    const int32_t left = count - block * kBlock, size = left < kBlock ? left : kBlock;
    if (head.offset < 0) {
      for (int32_t i = 0; i < size; ++i) out[i] = listed(head, i);
      return size;
    }
    int32_t written = 0;
    for (int32_t word = 0; word < kMaxWords && written < size; ++word) {
      uint64_t bits = words[head.offset + word];
      for (; bits != 0 && written < size; bits &= bits - 1) {
        out[written++] =
            static_cast<int32_t>(static_cast<uint32_t>(head.first) + static_cast<uint32_t>(word * 64) +
                                 static_cast<uint32_t>(lowest_bit(bits)));
      }
    }
    return written;
  }

  // The index of the last of the first `count` numbers that is at most `value`; number 0 must be.
  CEMG_HD int32_t last_at_most(int32_t value, int32_t count) const noexcept {
    int32_t low = 0, high = (count - 1) / kBlock;
    while (low < high) {
      const int32_t middle = low + (high - low + 1) / 2;
      if (head_of(middle * kBlock).first <= value) {
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
  struct Head {
    int32_t first;
    int32_t offset;
  };

  struct Bit {
    const uint64_t* word;
    int32_t begin;  // the number that the word's lowest bit stands for
    int32_t index;  // in the word
  };

  CEMG_HD Bit bit_of(const Head& head, int32_t i) const noexcept {
    const uint64_t* word = words + head.offset;
    int32_t begin = head.first;
    for (int32_t bits = popcount(*word); i >= bits; bits = popcount(*++word)) {
      i -= bits;
      begin += 64;
    }
    return {word, begin, nth_bit(*word, i)};
  }

  CEMG_HD Head head_of(int32_t n) const noexcept {
    const uint64_t word = words[n / kBlock];
    return {static_cast<int32_t>(word & 0xffffffff), static_cast<int32_t>(word >> 32)};
  }

  CEMG_HD int32_t listed(const Head& head, int32_t i) const noexcept {
    return static_cast<int32_t>((words[~head.offset + i / 2] >> (i % 2 * 32)) & 0xffffffff);
  }
};

#if !defined(__CUDACC_RTC__)
// Packs numbers that are 0 or more and strictly ascend. Equal numbers give equal words.
std::vector<uint64_t> pack_ascending(std::span<const int32_t> numbers);

// The `count` numbers that pack_ascending() packed into `words`; empty if the words are anything else.
std::vector<int32_t> unpack_ascending(std::span<const uint64_t> words, int64_t count);
#endif

}  // namespace cemg
