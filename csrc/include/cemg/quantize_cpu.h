// Residual quantization on the CPU. Scores stay in registers; where the two best are too close for float32,
// the code is chosen in float64. N rows, M levels, K codes per level, D dimensions.
#pragma once

#include <cstdint>

namespace cemg {

struct Codebooks {
  int64_t levels, size, dim;
  const float* vectors;  // [M, K, D]
};

// x [N, D] -> codes [N, M], quantized [N, D], as defined in cemg_kernels/quantize/residual.py.
void residual_quantize(const float* x, int64_t rows, const Codebooks& books, int64_t* codes,
                       float* quantized);

}  // namespace cemg
