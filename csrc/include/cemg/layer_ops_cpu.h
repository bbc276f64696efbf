// Normalization and rotary embeddings of rows of hidden states.
#pragma once

#include <cstdint>
#include <vector>

#include "cemg/transformer_cpu.h"

namespace cemg {

// About how many operations of a matrix product take as long as one scalar operation of an element-wise loop;
// for the costs passed to ThreadPool::parallel_for.
inline constexpr int64_t kScalarCost = 32;

// out [rows, width] = scale * norm(x).
void norm_rows(const Norm& norm, RowsView<const float> x, int64_t rows, int64_t width, float scale,
               RowsView<float> out, ThreadPool& pool) noexcept;

// Whether a layer's queries and keys are normalized or rotated.
bool uses_rotary_or_head_norms(const TransformerLayer& layer, const PositionTables& tables) noexcept;

// Normalizes and rotates queries and keys in place, as the layer and the tables define. qkv holds one row of
// queries, keys and values per element of `positions`.
void apply_rotary(const Transformer& model, const TransformerLayer& layer, const PositionTables& tables,
                  const std::vector<int32_t>& positions, float* qkv, ThreadPool& pool) noexcept;

}  // namespace cemg
