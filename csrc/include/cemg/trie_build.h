// Builds the flat arrays of trie_view.h from unsorted codes. Errors are values.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <variant>
#include <vector>

namespace cemg {

struct BuildError {
  enum class Kind { kShape, kCodebookSize, kCodeOutOfRange, kTooManyItems, kTooManyNodes };
  Kind kind;
  int64_t row;    // of the offending item, where there is one
  int64_t value;  // what was found
};

// How a row of codes is packed into 64-bit words, so that words compare as rows do.
struct KeyLayout {
  int32_t levels;
  int32_t bits;      // of one code
  int32_t per_word;  // codes in a word; the last word may hold fewer

  int32_t words() const noexcept { return (levels + per_word - 1) / per_word; }
  int32_t begin(int32_t word) const noexcept { return word * per_word; }  // its first level
  int32_t end(int32_t word) const noexcept {
    return begin(word) + per_word < levels ? begin(word) + per_word : levels;
  }
};

// The codes, sorted: knows the sizes of the arrays, then writes them where the caller wants them.
class TrieBuilder {
 public:
  static constexpr int32_t kMaxCodebookSize = 32768;  // a code fits int16
  using Duplicate = std::pair<int32_t, int32_t>;      // two rows with equal codes

  // codes [N, levels], row by row, of uint8, int16, int32 or int64. Rows with equal codes are kept in
  // `duplicates`, no error here. The work is cut into `chunks` that the cores share, 0: as many as pay.
  template <class Code>
  static std::variant<TrieBuilder, BuildError> sort(std::span<const Code> codes, int32_t levels,
                                                    int32_t codebook_size, int64_t chunks = 0);

  const std::vector<Duplicate>& duplicates() const noexcept { return duplicates_; }
  int32_t num_nodes() const noexcept { return level_begin_.back(); }
  int32_t num_inner() const noexcept { return level_begin_[level_begin_.size() - 2]; }

  // code [num_nodes - 1], rows [N]: the row that has each rank. Returns the num_inner + 1 first children,
  // packed. Needs codes without duplicates.
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
  std::vector<uint8_t> depth_;        // [N], leading codes shared with the rank before
  std::vector<int32_t> level_begin_;  // [levels + 2], the number of each level's first node
  Counts node_begin_;                 // the number that each chunk's first node of each level gets
  std::vector<Duplicate> duplicates_;
};

}  // namespace cemg
