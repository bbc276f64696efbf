// LightGCN propagation on the CPU in float32: cemg_kernels/graph/propagate.py says what it computes.
#pragma once

#include <cstdint>

namespace cemg {

// Neighbours of vertex v: neighbours[row_ptr[v] ... row_ptr[v + 1]); inv_sqrt_degree [vertices].
struct GraphView {
  int64_t vertices;
  const int64_t* row_ptr;
  const int64_t* neighbours;
  const float* inv_sqrt_degree;
};

// x [vertices, dim] -> out, the mean of `layers` rounds and x itself. `room` holds as much as `out`.
void lightgcn_propagate(const GraphView& graph, const float* x, int64_t dim, int64_t layers, float* out,
                        float* room) noexcept;

}  // namespace cemg
