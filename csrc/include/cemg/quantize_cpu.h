// Residual quantization on the CPU: scores stay in registers, the two best are kept, near ties are decided in
// float64. N rows, M levels, K codes a level, D dimensions.
#pragma once

#include <cstdint>

namespace cemg {

struct Codebooks {
  int64_t levels, size, dim;
  const float* vectors;  // [M, K, D]
};

// x [N, D] -> codes [N, M], quantized [N, D]: the contract of cemg_kernels/quantize/residual.py.
void residual_quantize(const float* x, int64_t rows, const Codebooks& books, int64_t* codes,
                       float* quantized);

}  // namespace cemg
