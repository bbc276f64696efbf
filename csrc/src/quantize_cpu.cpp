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

// The codebooks as the loops read them: kLanes codes side by side for each dimension.
struct Packed {
  int64_t blocks;                // of kLanes codes
  std::vector<float> vectors;    // [M, blocks, D, kLanes], zero past K
  std::vector<float> half_norm;  // [M, blocks, kLanes], infinite past K
  std::vector<double> longest;   // [M] the largest norm

  explicit Packed(const Codebooks& books)
      : blocks((books.size + kLanes - 1) / kLanes),
        vectors(static_cast<size_t>(books.levels * blocks * books.dim * kLanes), 0.0f),
        half_norm(static_cast<size_t>(books.levels * blocks * kLanes), kInfinity),
        longest(static_cast<size_t>(books.levels), 0.0) {
    for (int64_t m = 0; m < books.levels; ++m) {
      double most = 0;
      for (int64_t k = 0; k < books.size; ++k) {
        const float* const vector = books.vectors + (m * books.size + k) * books.dim;
        double square = 0;
        for (int64_t d = 0; d < books.dim; ++d) {
          const int64_t at = ((m * blocks + k / kLanes) * books.dim + d) * kLanes + k % kLanes;
          vectors[static_cast<size_t>(at)] = vector[d];
          square += static_cast<double>(vector[d]) * static_cast<double>(vector[d]);
        }
        half_norm[static_cast<size_t>(m * blocks * kLanes + k)] = static_cast<float>(square / 2);
        most = std::isnan(square) ? square : std::max(most, square);
        if (std::isnan(most)) break;
      }
      longest[static_cast<size_t>(m)] = std::sqrt(most);
    }
  }
};

static_assert(kPanel == kLanes);

// The two best scores of each row, lane by lane.
struct Best {
  float best[kMostRows][kLanes];
  float second[kMostRows][kLanes];
  int32_t code[kMostRows][kLanes];
};

// Scores |c|^2 / 2 - r.c of a block of codes from `first` on, given their products [rows, kLanes].
CEMG_CLONES void keep_best(const float* products, int64_t rows, const float* half_norm, int32_t first,
                           Best& out) noexcept {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const float score = half_norm[l] - products[r * kLanes + l];
      const float before = out.best[r][l];
      const bool better = score < before;
      const float runner_up = better ? before : score;
      out.second[r][l] = runner_up < out.second[r][l] ? runner_up : out.second[r][l];
      out.best[r][l] = better ? score : before;
      out.code[r][l] = better ? first + static_cast<int32_t>(l) : out.code[r][l];
    }
  }
}

// The best of all codes of a level for a tile of residuals [rows, dim].
void score_level(const float* residual, int64_t rows, int64_t dim, const float* vectors,
                 const float* half_norm, int64_t blocks, Best& out) noexcept {
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(out.best[r], out.best[r] + kLanes, kInfinity);
    std::fill(out.second[r], out.second[r] + kLanes, kInfinity);
    std::fill(out.code[r], out.code[r] + kLanes, 0);
  }
  float products[kMostRows * kLanes];
  for (int64_t block = 0; block < blocks; ++block) {
    multiply(rows, residual, dim, vectors + block * dim * kLanes, kLanes, dim, products);
    keep_best(products, rows, half_norm + block * kLanes, static_cast<int32_t>(block * kLanes), out);
  }
}

// The definition: the least float64 distance, ties to the lowest code; NaN counts as infinite.
int64_t nearest_exact(const float* residual, const Codebooks& books, int64_t level) {
  int64_t code = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < books.size; ++k) {
    const float* const vector = books.vectors + (level * books.size + k) * books.dim;
    double distance = 0;
    for (int64_t d = 0; d < books.dim; ++d) {
      const double off = static_cast<double>(residual[d]) - static_cast<double>(vector[d]);
      distance += off * off;
    }
    if (distance < least) {
      least = distance;
      code = k;
    }
  }
  return code;
}

// Twice the error bound E derived in cemg_kernels/quantize/residual.py, for float32 inputs kept as they are.
double doubt(const float* residual, int64_t dim, double longest) {
  double square = 0;
  for (int64_t d = 0; d < dim; ++d)
    square += static_cast<double>(residual[d]) * static_cast<double>(residual[d]);
  const double norm = std::sqrt(square), terms = static_cast<double>(dim + 8);
  const double size = norm * longest + longest * longest / 2;
  if (!(size <= kMayOverflow)) return std::numeric_limits<double>::infinity();
  const double both = norm + longest;
  return 2.002 * (terms * 0x1p-24 * size + terms * 0x1p-52 * both * both + terms * 0x1p-125);
}

int64_t decide(const Best& found, int64_t row, const float* residual, const Codebooks& books, int64_t level,
               double longest) {
  int64_t lane = 0;
  for (int64_t l = 1; l < kLanes; ++l) {
    if (found.best[row][l] < found.best[row][lane]) lane = l;
  }
  float second = found.second[row][lane];
  for (int64_t l = 0; l < kLanes; ++l) {
    if (l != lane) second = std::min(second, found.best[row][l]);
  }
  const double gap = static_cast<double>(second) - static_cast<double>(found.best[row][lane]);
  if (books.size == 1) return 0;
  return gap > doubt(residual, books.dim, longest) ? found.code[row][lane]
                                                   : nearest_exact(residual, books, level);
}

}  // namespace

void residual_quantize(const float* x, int64_t rows, const Codebooks& books, int64_t* codes,
                       float* quantized) {
  const Packed packed(books);
  const int64_t dim = books.dim;
  const RowBlocks tiles(rows);
#pragma omp parallel if (rows * books.levels * books.size * dim >= (1 << 18))
  {
    std::vector<float> residual(static_cast<size_t>(kMostRows * dim));
    Best best;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const auto [begin, end] = tiles.of(tile);
      const int64_t count = end - begin;
      std::copy(x + begin * dim, x + end * dim, residual.begin());
      std::fill(quantized + begin * dim, quantized + end * dim, 0.0f);
      for (int64_t m = 0; m < books.levels; ++m) {
        score_level(residual.data(), count, dim, packed.vectors.data() + m * packed.blocks * dim * kLanes,
                    packed.half_norm.data() + m * packed.blocks * kLanes, packed.blocks, best);
        for (int64_t r = 0; r < count; ++r) {
          float* const own = residual.data() + r * dim;
          const int64_t code = decide(best, r, own, books, m, packed.longest[static_cast<size_t>(m)]);
          codes[(begin + r) * books.levels + m] = code;
          const float* const vector = books.vectors + (m * books.size + code) * dim;
          float* const total = quantized + (begin + r) * dim;
          for (int64_t d = 0; d < dim; ++d) {
            own[d] -= vector[d];
            total[d] += vector[d];
          }
        }
      }
    }
  }
}

}  // namespace cemg
