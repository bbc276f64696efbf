#include "cemg/quantize_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cemg/gemm_cpu.h"
#include "cemg/row_math.h"

namespace cemg {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kMayOverflow = 1e38;  // a partial sum this large may not fit a float

// The codebooks in the layout of multiply(): kLanes codes are adjacent for each dimension.
struct PackedCodebooks {
  int64_t blocks;                // of kLanes codes
  std::vector<float> vectors;    // [M, blocks, D, kLanes], zero past K
  std::vector<float> half_norm;  // [M, blocks, kLanes], infinite past K
  std::vector<double> max_norm;  // [M]

  explicit PackedCodebooks(const Codebooks& books)
      : blocks((books.size + kLanes - 1) / kLanes),
        vectors(static_cast<size_t>(books.levels * blocks * books.dim * kLanes), 0.0f),
        half_norm(static_cast<size_t>(books.levels * blocks * kLanes), kInfinity),
        max_norm(static_cast<size_t>(books.levels), 0.0) {
    for (int64_t m = 0; m < books.levels; ++m) {
      double max_square = 0;
      for (int64_t k = 0; k < books.size; ++k) {
        const float* const vector = books.vectors + (m * books.size + k) * books.dim;
        double square = 0;
        for (int64_t d = 0; d < books.dim; ++d) {
          const int64_t index = ((m * blocks + k / kLanes) * books.dim + d) * kLanes + k % kLanes;
          vectors[static_cast<size_t>(index)] = vector[d];
          square += static_cast<double>(vector[d]) * static_cast<double>(vector[d]);
        }
        half_norm[static_cast<size_t>(m * blocks * kLanes + k)] = static_cast<float>(square / 2);
        max_square = std::isnan(square) ? square : std::max(max_square, square);
        if (std::isnan(max_square)) break;
      }
      max_norm[static_cast<size_t>(m)] = std::sqrt(max_square);
    }
  }
};

static_assert(kPanel == kLanes);

// The two best scores of each row in each lane, and the code of the best.
struct BestScores {
  float best[kMaxTileRows][kLanes];
  float second[kMaxTileRows][kLanes];
  int32_t code[kMaxTileRows][kLanes];
};

// Updates the best scores |c|^2 / 2 - r.c with a block of codes from `first` on, given products r.c
// [rows, kLanes].
CEMG_CLONES void update_best(const float* products, int64_t rows, const float* half_norm, int32_t first,
                             BestScores& out) noexcept {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const float score = half_norm[l] - products[r * kLanes + l];
      const float old_best = out.best[r][l];
      const bool better = score < old_best;
      const float runner_up = better ? old_best : score;
      out.second[r][l] = runner_up < out.second[r][l] ? runner_up : out.second[r][l];
      out.best[r][l] = better ? score : old_best;
      out.code[r][l] = better ? first + static_cast<int32_t>(l) : out.code[r][l];
    }
  }
}

// Scores all codes of a level for a tile of residuals [rows, dim].
void score_level(const float* residual, int64_t rows, int64_t dim, const float* vectors,
                 const float* half_norm, int64_t blocks, BestScores& out) noexcept {
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(out.best[r], out.best[r] + kLanes, kInfinity);
    std::fill(out.second[r], out.second[r] + kLanes, kInfinity);
    std::fill(out.code[r], out.code[r] + kLanes, 0);
  }
  float products[kMaxTileRows * kLanes];
  for (int64_t block = 0; block < blocks; ++block) {
    multiply(rows, residual, dim, vectors + block * dim * kLanes, kLanes, dim, products);
    update_best(products, rows, half_norm + block * kLanes, static_cast<int32_t>(block * kLanes), out);
  }
}

// The code with the smallest distance in float64; of equal distances the lowest code. NaN counts as infinite.
int64_t nearest_exact(const float* residual, const Codebooks& books, int64_t level) {
  int64_t code = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < books.size; ++k) {
    const float* const vector = books.vectors + (level * books.size + k) * books.dim;
    double distance = 0;
    for (int64_t d = 0; d < books.dim; ++d) {
      const double difference = static_cast<double>(residual[d]) - static_cast<double>(vector[d]);
      distance += difference * difference;
    }
    if (distance < least) {
      least = distance;
      code = k;
    }
  }
  return code;
}

// Twice the error bound E of a score that cemg_kernels/quantize/residual.py derives, for unchanged float32
// inputs.
double error_bound(const float* residual, int64_t dim, double max_norm) {
  double square = 0;
  for (int64_t d = 0; d < dim; ++d)
    square += static_cast<double>(residual[d]) * static_cast<double>(residual[d]);
  const double norm = std::sqrt(square), terms = static_cast<double>(dim + 8);
  const double size = norm * max_norm + max_norm * max_norm / 2;
  if (!(size <= kMayOverflow)) return std::numeric_limits<double>::infinity();
  const double both = norm + max_norm;
  return 2.002 * (terms * 0x1p-24 * size + terms * 0x1p-52 * both * both + terms * 0x1p-125);
}

// The nearest code: by the float32 scores if their gap exceeds the error bound, else in float64.
int64_t choose_code(const BestScores& scores, int64_t row, const float* residual, const Codebooks& books,
                    int64_t level, double max_norm) {
  int64_t lane = 0;
  for (int64_t l = 1; l < kLanes; ++l) {
    if (scores.best[row][l] < scores.best[row][lane]) lane = l;
  }
  float second = scores.second[row][lane];
  for (int64_t l = 0; l < kLanes; ++l) {
    if (l != lane) second = std::min(second, scores.best[row][l]);
  }
  const double gap = static_cast<double>(second) - static_cast<double>(scores.best[row][lane]);
  if (books.size == 1) return 0;
  if (gap > error_bound(residual, books.dim, max_norm)) return scores.code[row][lane];
  return nearest_exact(residual, books, level);
}

}  // namespace

void residual_quantize(const float* x, int64_t rows, const Codebooks& books, int64_t* codes,
                       float* quantized) {
  const PackedCodebooks packed(books);
  const int64_t dim = books.dim;
  const RowTiles tiles(rows);
#pragma omp parallel if (rows * books.levels * books.size * dim >= (1 << 18))
  {
    std::vector<float> residual(static_cast<size_t>(kMaxTileRows * dim));
    BestScores scores;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const auto [begin, end] = tiles.rows_of(tile);
      const int64_t count = end - begin;
      std::copy(x + begin * dim, x + end * dim, residual.begin());
      std::fill(quantized + begin * dim, quantized + end * dim, 0.0f);
      for (int64_t m = 0; m < books.levels; ++m) {
        score_level(residual.data(), count, dim, packed.vectors.data() + m * packed.blocks * dim * kLanes,
                    packed.half_norm.data() + m * packed.blocks * kLanes, packed.blocks, scores);
        for (int64_t r = 0; r < count; ++r) {
          float* const rest = residual.data() + r * dim;
          const int64_t code =
              choose_code(scores, r, rest, books, m, packed.max_norm[static_cast<size_t>(m)]);
          codes[(begin + r) * books.levels + m] = code;
          const float* const vector = books.vectors + (m * books.size + code) * dim;
          float* const total = quantized + (begin + r) * dim;
          for (int64_t d = 0; d < dim; ++d) {
            rest[d] -= vector[d];
            total[d] += vector[d];
          }
        }
      }
    }
  }
}

}  // namespace cemg
