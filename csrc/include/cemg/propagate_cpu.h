// LightGCN propagation on the CPU in float32, as defined in cemg_kernels/graph/propagate.py.
#pragma once

#include <cstdint>

namespace cemg {

struct GraphView {  // borrowed
  int64_t vertices;
  const int64_t* row_ptr;        // [vertices + 1]
  const int64_t* neighbours;     // those of vertex v are at row_ptr[v] ... row_ptr[v + 1] - 1
  const float* inv_sqrt_degree;  // [vertices]
};

// x [vertices, dim] -> out [vertices, dim], the mean of x and the outputs of `layers` rounds. `scratch` has
// the size of `out`.
void lightgcn_propagate(const GraphView& graph, const float* x, int64_t dim, int64_t layers, float* out,
                        float* scratch) noexcept;

}  // namespace cemg
