#include "cemg/propagate_cpu.h"

#include <algorithm>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kCacheLine = 16;          // floats
constexpr int64_t kPrefetchDistance = 48;   // neighbours
constexpr int64_t kChunks = 64;             // parts of the graph with equally many edges
constexpr int64_t kParallelWork = 1 << 15;  // additions that are worth waking threads for

// One round for one vertex: out = (x + scale * the sum of rows[neighbour]) * factor. x and out are the
// vertex's rows. Prefetching may run into the neighbours of the next vertices, up to neighbours[last].
struct VertexRound {
  const float* rows;
  int64_t dim;
  const int64_t* neighbours;
  int64_t count, last;
  const float* x;
  float scale, factor;
  float* out;
  bool wide;  // whether to use vectors of kWide floats
};

// Computes the columns of N vectors: N - 1 from `column` on, and the last from `tail` on. Their sums stay in
// registers.
template <int kWidth, int N>
[[gnu::always_inline]] inline void round_columns(const VertexRound& round, int64_t column,
                                                 int64_t tail) noexcept {
  using Vector = typename VectorOf<kWidth>::Type;
  const auto at = [&](int n) { return n + 1 < N ? column + n * kWidth : tail; };
  Vector total[N] = {};
  for (int64_t e = 0; e < round.count; ++e) {
    const int64_t later = round.neighbours[std::min(e + kPrefetchDistance, round.last)];
    const float* const later_row = round.rows + later * round.dim + column;
    for (int64_t i = 0; i < N * kWidth; i += kCacheLine) __builtin_prefetch(later_row + i);
    const float* const row = round.rows + round.neighbours[e] * round.dim;
    for (int n = 0; n < N; ++n) total[n] += *reinterpret_cast<const Vector*>(row + at(n));
  }
  for (int n = 0; n < N; ++n) {
    const Vector x = *reinterpret_cast<const Vector*>(round.x + at(n));
    *reinterpret_cast<Vector*>(round.out + at(n)) = (x + round.scale * total[n]) * round.factor;
  }
}

// Computes all columns, at least one vector of them: up to 64 per pass, then the rest in one more pass, whose
// last vector may overlap the one before.
template <int kWidth>
[[gnu::always_inline]] inline void round_in_vectors(const VertexRound& round) noexcept {
  constexpr int64_t kColumns = std::min<int64_t>(8 * kWidth, 64);
  int64_t column = 0;
  for (; column + kColumns <= round.dim; column += kColumns) {
    round_columns<kWidth, kColumns / kWidth>(round, column, column + kColumns - kWidth);
  }
  const int64_t tail = round.dim - kWidth;
  switch ((round.dim - column + kWidth - 1) / kWidth) {
#define CEMG_VECTORS(N) \
  case N:               \
    return round_columns<kWidth, N>(round, column, tail)
    CEMG_VECTORS(1);
    CEMG_VECTORS(2);
    CEMG_VECTORS(3);
    CEMG_VECTORS(4);
    CEMG_VECTORS(5);
    CEMG_VECTORS(6);
    CEMG_VECTORS(7);
    CEMG_VECTORS(8);
#undef CEMG_VECTORS
  }
}

CEMG_CLONES void round_of_vertex(const VertexRound& round) noexcept {
  if (round.wide) return round_in_vectors<kWide>(round);
  if (round.dim >= kNarrow) return round_in_vectors<kNarrow>(round);
  for (int64_t column = 0; column < round.dim; ++column) {
    float total = 0;
    for (int64_t e = 0; e < round.count; ++e) total += round.rows[round.neighbours[e] * round.dim + column];
    round.out[column] = (round.x[column] + round.scale * total) * round.factor;
  }
}

// Calls work(first, last) on parts of the vertices that have equally many edges.
template <class Work>
void parallel_for_vertices(const GraphView& graph, [[maybe_unused]] int64_t dim, Work work) noexcept {
  const int64_t edges = graph.row_ptr[graph.vertices];
  const auto begin_of = [&](int64_t chunk) {
    if (chunk == kChunks) return graph.vertices;
    const int64_t target = chunk * (edges + graph.vertices) / kChunks;  // a vertex counts as an edge
    int64_t low = 0, high = graph.vertices;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (graph.row_ptr[middle] + middle < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
#pragma omp parallel for schedule(dynamic, 1) if (edges * dim >= kParallelWork)
  for (int64_t chunk = 0; chunk < kChunks; ++chunk) work(begin_of(chunk), begin_of(chunk + 1));
}

}  // namespace

// y <- x + A_hat y, `layers` times, with A_hat y = s * (A (s * y)). Each round writes s * y, which the next
// one reads, so that edges need no values; the last round divides by layers + 1 instead.
void lightgcn_propagate(const GraphView& graph, const float* x, int64_t dim, int64_t layers, float* out,
                        float* scratch) noexcept {
  const float mean = 1.0f / static_cast<float>(layers + 1);
  const bool wide = has_wide_vectors() && dim >= kWide;
  float* scaled = layers % 2 == 1 ? scratch : out;  // the buffers alternate, and the last round writes out
  float* next = layers % 2 == 1 ? out : scratch;
  parallel_for_vertices(graph, dim, [&](int64_t first, int64_t last) {
    for (int64_t v = first; v < last; ++v) {
      const float factor = layers > 0 ? graph.inv_sqrt_degree[v] : 1.0f;
      float* const row = scaled + v * dim;
      for (int64_t d = 0; d < dim; ++d) row[d] = x[v * dim + d] * factor;
    }
  });
  for (int64_t layer = 0; layer < layers; ++layer) {
    const bool final = layer + 1 == layers;
    parallel_for_vertices(graph, dim, [&](int64_t first, int64_t last) {
      for (int64_t v = first; v < last; ++v) {
        const float scale = graph.inv_sqrt_degree[v];
        const int64_t begin = graph.row_ptr[v];
        round_of_vertex({scaled, dim, graph.neighbours + begin, graph.row_ptr[v + 1] - begin,
                         graph.row_ptr[graph.vertices] - 1 - begin, x + v * dim, scale, final ? mean : scale,
                         next + v * dim, wide});
      }
    });
    std::swap(scaled, next);
  }
}

}  // namespace cemg
