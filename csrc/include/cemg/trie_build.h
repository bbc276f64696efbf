// Builds the flat arrays of trie_view.h from unsorted codes. Errors are returned as values.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <variant>
#include <vector>

namespace cemg {

inline constexpr int32_t kMaxLevels = 255;          // a depth fits one byte
inline constexpr int32_t kMaxCodebookSize = 32768;  // a code fits int16
inline constexpr int64_t kMaxNodes = 0x7fffffff;    // a node's number fits int32

struct BuildError {
  enum class Kind { kShape, kCodebookSize, kCodeOutOfRange, kTooManyItems, kTooManyNodes };
  Kind kind;
  int64_t row;    // of the invalid item, if the error is of one item
  int64_t value;  // the invalid value
};

// How a row of codes is packed into 64-bit words whose order is the order of the rows.
struct KeyLayout {
  int32_t levels;
  int32_t bits;      // of one code
  int32_t per_word;  // codes per word; the last word may hold fewer

  int32_t words() const noexcept { return (levels + per_word - 1) / per_word; }
  int32_t begin(int32_t word) const noexcept { return word * per_word; }  // its first level
  int32_t end(int32_t word) const noexcept {
    return begin(word) + per_word < levels ? begin(word) + per_word : levels;
  }
};

// The sorted codes. Reports the sizes of the trie's arrays, then writes them to memory of the caller.
class TrieBuilder {
 public:
  using Duplicate = std::pair<int32_t, int32_t>;  // two rows with equal codes

  // codes [N, levels], row by row, of uint8, int16, int32 or int64. Rows with equal codes are no error here;
  // duplicates() returns them. The work is split into `chunks` for the threads; 0 chooses a number that pays.
  template <class Code>
  static std::variant<TrieBuilder, BuildError> sort(std::span<const Code> codes, int32_t levels,
                                                    int32_t codebook_size, int64_t chunks = 0);

  const std::vector<Duplicate>& duplicates() const noexcept { return duplicates_; }
  int32_t num_nodes() const noexcept { return level_begin_.back(); }
  int32_t num_inner() const noexcept { return level_begin_[level_begin_.size() - 2]; }

  // Writes code [num_nodes - 1] and rows [N], the row of each rank. Returns the num_inner + 1 first children,
  // packed. There must be no duplicates.
  template <class Code>
  std::vector<uint64_t> write(Code* code, int32_t* rows) const;

 private:
  using Counts = std::vector<std::vector<int32_t>>;  // [chunks, levels + 1]

  int64_t num_items() const noexcept { return static_cast<int64_t>(order_.size()); }
  Counts find_depths();
  void find_duplicates(const Counts& at_depth);
  bool count_levels(const Counts& at_depth);

  KeyLayout layout_{};
  int64_t chunks_ = 1;
  std::vector<int32_t> order_;        // [N], the row of each rank
  std::vector<uint64_t> keys_;        // [words, N], the packed codes of each rank
  std::vector<uint8_t> depth_;        // [N], how many leading codes are those of the rank before
  std::vector<int32_t> level_begin_;  // [levels + 2], the number of each level's first node
  Counts node_begin_;                 // the number of each chunk's first node on each level
  std::vector<Duplicate> duplicates_;
};

}  // namespace cemg
