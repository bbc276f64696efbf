// A query of the item memory, as defined in cemg/memory/memory.py: the scores of the items that the rows of a
// history connect with it.
#pragma once

#include <cstdint>

namespace cemg {

// A sparse matrix in compressed rows, borrowed. Row r has the entries starts[r] ... starts[r + 1] - 1.
struct SparseRows {
  const int64_t* starts = nullptr;  // [rows + 1]
  const int32_t* items = nullptr;
  const float* values = nullptr;
  int64_t rows = 0;
  int64_t top = 0;  // a query reads the first `top` entries of a row

  // The number of entries of a row that a query reads; 0 beyond the last row.
  int64_t length(int64_t row) const noexcept {
    if (row >= rows) return 0;
    const int64_t entries = starts[row + 1] - starts[row];
    return entries < top ? entries : top;
  }
};

// The n rows of a history, and what each row's entries are multiplied by.
struct MemoryQuery {
  const int64_t* history;            // [n] within the rows of the factors
  const double* transition_weights;  // [n]
  const double* similar_weights;     // [n]; null: the similarity is not read
  const double* repeat_weights;      // [n] the term of the row itself; null: none
  int64_t size;                      // n
  const double* factors;             // [N] of the items that transitions lead to
};

// Writes the distinct items with scores above 0, ascending, and their scores; returns their number, which is
// at most that of all terms. Terms of an item are added in the order of the history: transitions, then
// similarity, then repeats.
int64_t memory_scores(const SparseRows& transitions, const SparseRows& similar, const MemoryQuery& query,
                      int32_t* items, double* scores);

}  // namespace cemg
