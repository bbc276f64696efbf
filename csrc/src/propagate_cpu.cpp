#include "cemg/propagate_cpu.h"

#include <algorithm>

#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr int64_t kWidth = 16;              // floats of a vector
constexpr int64_t kAhead = 48;              // neighbours whose rows are fetched before their turn
constexpr int64_t kChunks = 64;             // parts of the graph, of equally many edges
constexpr int64_t kParallelWork = 1 << 15;  // additions worth the waking of a thread

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(alignof(float)), may_alias));

// One round for one vertex: out = (x + scale * the sum of rows[neighbour]) * factor, all but `rows` being its
// own row. `last`: what is fetched ahead may be the next vertex's, up to neighbours[last].
struct VertexRound {
  const float* rows;
  int64_t dim;
  const int64_t* neighbours;
  int64_t count, last;
  const float* x;
  float scale, factor;
  float* out;
};

// Columns [column, column + 16 * N), whose sums never leave the registers.
template <int N>
[[gnu::always_inline]] inline void round_columns(const VertexRound& round, int64_t column) noexcept {
  Vector total[N] = {};
  for (int64_t e = 0; e < round.count; ++e) {
    const int64_t later = round.neighbours[std::min(e + kAhead, round.last)];
    const float* const ahead = round.rows + later * round.dim + column;
    for (int64_t n = 0; n < N; ++n) __builtin_prefetch(ahead + n * kWidth);
    const float* const row = round.rows + round.neighbours[e] * round.dim + column;
    for (int n = 0; n < N; ++n) total[n] += *reinterpret_cast<const Vector*>(row + n * kWidth);
  }
  for (int n = 0; n < N; ++n) {
    const Vector x = *reinterpret_cast<const Vector*>(round.x + column + n * kWidth);
    *reinterpret_cast<Vector*>(round.out + column + n * kWidth) = (x + round.scale * total[n]) * round.factor;
  }
}

CEMG_CLONES void round_of_vertex(const VertexRound& round) noexcept {
  int64_t column = 0;
  for (; column + 4 * kWidth <= round.dim; column += 4 * kWidth) round_columns<4>(round, column);
  for (; column + 2 * kWidth <= round.dim; column += 2 * kWidth) round_columns<2>(round, column);
  for (; column + kWidth <= round.dim; column += kWidth) round_columns<1>(round, column);
  for (; column < round.dim; ++column) {
    float total = 0;
    for (int64_t e = 0; e < round.count; ++e) total += round.rows[round.neighbours[e] * round.dim + column];
    round.out[column] = (round.x[column] + round.scale * total) * round.factor;
  }
}

// Runs work(first, last) over parts of the vertices that have equally many edges.
template <class Work>
void in_parts(const GraphView& graph, int64_t dim, Work work) noexcept {
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

// y <- x + A_hat y, `layers` times, with A_hat y = s * (A (s * y)): what a round reads is s * y, written so
// by the round before, and the last one divides in its place. No edge has a value.
void lightgcn_propagate(const GraphView& graph, const float* x, int64_t dim, int64_t layers, float* out,
                        float* room) noexcept {
  const float mean = 1.0f / static_cast<float>(layers + 1);
  float* scaled = layers % 2 == 1 ? room : out;  // the rounds take turns, so that the last one writes out
  float* next = layers % 2 == 1 ? out : room;
  in_parts(graph, dim, [&](int64_t first, int64_t last) {
    for (int64_t v = first; v < last; ++v) {
      const float factor = layers > 0 ? graph.inv_sqrt_degree[v] : 1.0f;
      float* const to = scaled + v * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = x[v * dim + d] * factor;
    }
  });
  for (int64_t layer = 0; layer < layers; ++layer) {
    const bool final = layer + 1 == layers;
    in_parts(graph, dim, [&](int64_t first, int64_t last) {
      for (int64_t v = first; v < last; ++v) {
        const float scale = graph.inv_sqrt_degree[v];
        const int64_t begin = graph.row_ptr[v];
        round_of_vertex({scaled, dim, graph.neighbours + begin, graph.row_ptr[v + 1] - begin,
                         graph.row_ptr[graph.vertices] - 1 - begin, x + v * dim, scale, final ? mean : scale,
                         next + v * dim});
      }
    });
    std::swap(scaled, next);
  }
}

}  // namespace cemg
