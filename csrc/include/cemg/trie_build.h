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

// The codes, sorted: knows the sizes of the arrays, then writes them where the caller wants them.
class TrieBuilder {
 public:
  static constexpr int32_t kMaxCodebookSize = 32768;  // a code fits int16
  using Duplicate = std::pair<int32_t, int32_t>;      // two rows with equal codes

  // codes [N, levels], row by row. Rows with equal codes are kept in `duplicates`, no error here.
  static std::variant<TrieBuilder, BuildError> sort(std::span<const int32_t> codes, int32_t levels,
                                                    int32_t codebook_size);

  const std::vector<Duplicate>& duplicates() const noexcept { return duplicates_; }
  int32_t num_nodes() const noexcept { return level_begin_.back(); }
  int32_t num_inner() const noexcept { return level_begin_[level_begin_.size() - 2]; }

  // code [num_nodes - 1], first_child [num_inner + 1], rows [N]: the row that has each rank.
  // Needs codes without duplicates.
  template <class Code>
  void write(Code* code, int32_t* first_child, int32_t* rows) const noexcept;

 private:
  int32_t levels_ = 0;
  std::vector<int32_t> order_;        // [N], the row of each rank
  std::vector<uint16_t> sorted_;      // [N, levels]
  std::vector<uint8_t> depth_;        // [N], leading codes shared with the rank before
  std::vector<int32_t> level_begin_;  // [levels + 2], the number of each level's first node
  std::vector<Duplicate> duplicates_;
};

}  // namespace cemg
