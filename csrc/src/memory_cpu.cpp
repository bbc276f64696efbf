#include "cemg/memory_cpu.h"

#include <array>
#include <utility>
#include <vector>

namespace cemg {
namespace {

constexpr int kDigit = 11;  // bits per pass of the radix sort
constexpr uint32_t kDigitMask = (1u << kDigit) - 1;

struct Term {
  uint32_t item;
  double value;
};

// Sorts by item and keeps the order of equal items. `scratch` is as long as `terms`.
void sort_by_item(std::vector<Term>& terms, std::vector<Term>& scratch) {
  uint32_t used = 0;
  for (const Term& term : terms) used |= term.item;
  for (int shift = 0; shift < 32 && used >> shift != 0; shift += kDigit) {
    std::array<uint32_t, kDigitMask + 1> next{};
    for (const Term& term : terms) ++next[term.item >> shift & kDigitMask];
    uint32_t sum = 0;
    for (uint32_t& count : next) sum += std::exchange(count, sum);
    for (const Term& term : terms) scratch[next[term.item >> shift & kDigitMask]++] = term;
    terms.swap(scratch);
  }
}

void append_terms(const SparseRows& matrix, int64_t row, double weight, const double* factors,
                  std::vector<Term>& terms) {
  const int64_t length = matrix.length(row);
  if (length == 0) return;
  const int32_t* const items = matrix.items + matrix.starts[row];
  const float* const values = matrix.values + matrix.starts[row];
  for (int64_t i = 0; i < length; ++i) {
    const double value = weight * static_cast<double>(values[i]);
    terms.push_back(
        {static_cast<uint32_t>(items[i]), factors == nullptr ? value : value * factors[items[i]]});
  }
}

}  // namespace

int64_t memory_scores(const SparseRows& transitions, const SparseRows& similar, const MemoryQuery& query,
                      int32_t* items, double* scores) {
  thread_local std::vector<Term> terms;
  thread_local std::vector<Term> scratch;
  terms.clear();
  for (int64_t i = 0; i < query.size; ++i) {
    append_terms(transitions, query.history[i], query.transition_weights[i], query.factors, terms);
  }
  if (query.similar_weights != nullptr) {
    for (int64_t i = 0; i < query.size; ++i) {
      append_terms(similar, query.history[i], query.similar_weights[i], nullptr, terms);
    }
  }
  if (query.repeat_weights != nullptr) {
    for (int64_t i = 0; i < query.size; ++i) {
      terms.push_back({static_cast<uint32_t>(query.history[i]), query.repeat_weights[i]});
    }
  }
  scratch.resize(terms.size());
  sort_by_item(terms, scratch);
  int64_t count = 0;
  for (auto term = terms.begin(); term != terms.end();) {
    const uint32_t item = term->item;
    double sum = 0;
    for (; term != terms.end() && term->item == item; ++term) sum += term->value;
    if (!(sum > 0)) continue;
    items[count] = static_cast<int32_t>(item);
    scores[count++] = sum;
  }
  return count;
}

}  // namespace cemg
