#include "cemg/trie_prior.h"

#include <numeric>

namespace cemg {
namespace {

constexpr int64_t kParallelEntries = 1 << 14;  // entries that are worth waking threads for
constexpr int64_t kAhead = 16;                 // entries; the ranks of a large catalog are not in a cache
constexpr double kUnit = 0x1p-52;              // sums of multiples up to 2 are exact

// The rank of an item, or -1.
int32_t rank_of(const PriorSource& source, int64_t item) noexcept {
  int64_t position = item;
  if (source.known != nullptr) {
    const int64_t* const end = source.known + source.num_items;
    position = std::lower_bound(source.known, end, item) - source.known;
    if (position == source.num_items || source.known[position] != item) return -1;
  }
  return position < 0 || position >= source.num_items ? -1 : source.rank_of[position];
}

void prefetch_rank(const PriorSource& source, int64_t item) noexcept {
  if (source.known == nullptr && item >= 0 && item < source.num_items) {
    __builtin_prefetch(source.rank_of + item);
  }
}

// One request, whose entries begin at `first`.
bool build_request(const PriorSource& source, const RowFilter& filter, int64_t first, int64_t count,
                   int64_t size, int32_t* ranks, double* sums, double* weight) {
  thread_local std::vector<uint64_t> keys;  // a rank, then the index of its entry
  thread_local std::vector<double> mass;    // 0 if the filter forbids the item
  keys.resize(static_cast<size_t>(count));
  mass.resize(static_cast<size_t>(count));
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch_rank(source, source.items[first + i + kAhead]);
    const int32_t rank = rank_of(source, source.items[first + i]);
    if (rank < 0) return false;
    const auto at = static_cast<size_t>(i);
    keys[at] = uint64_t{static_cast<uint32_t>(rank)} << 32 | static_cast<uint64_t>(i);
    mass[at] = filter.allows(source.num_inner + rank) ? source.mass[first + i] : 0;
    total += mass[at];
  }
  std::sort(keys.begin(), keys.end());
  const double divisor = total > 0 ? total : 1;
  double units = 0;
  sums[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t key = keys[static_cast<size_t>(i)];
    ranks[i] = static_cast<int32_t>(key >> 32);
    if (i > 0 && ranks[i] == ranks[i - 1]) return false;
    const double own = mass[static_cast<size_t>(key & 0xffffffff)];
    // the quotient of a tiny mass may be 0
    units += std::max(std::ceil(own / divisor * (1 / kUnit)), own > 0 ? 1.0 : 0.0);
    sums[i + 1] = units * kUnit;
  }
  std::fill(ranks + count, ranks + size, static_cast<int32_t>(source.num_items));
  std::fill(sums + count + 1, sums + size + 1, units * kUnit);
  if (!(total > 0)) *weight = 0;
  return true;
}

}  // namespace

bool build_prior(const PriorSource& source, FilterView filter, int64_t requests, int64_t size, int32_t* ranks,
                 double* sums, double* weight) {
  std::vector<int64_t> first(static_cast<size_t>(requests) + 1);
  std::partial_sum(source.counts, source.counts + requests, first.begin() + 1);
  int valid = 1;
#pragma omp parallel for reduction(&& : valid) if (first.back() >= kParallelEntries)
  for (int64_t request = 0; request < requests; ++request) {
    valid = valid && build_request(source, filter.of(request), first[static_cast<size_t>(request)],
                                   source.counts[request], size, ranks + request * size,
                                   sums + request * (size + 1), weight + request);
  }
  return valid != 0;
}

}  // namespace cemg
