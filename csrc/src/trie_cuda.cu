// CUDA kernels that loop over the cells of trie_cells.h. nvcc builds them into the module. If there was no
// nvcc, CuPy compiles this file at first use (cemg_kernels/trie/cuda_launch.py), without the launcher below.
// Every argument is a pointer or an int64_t, so that one launcher serves all kernels.
#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#endif

#include "cemg/trie_cells.h"

#define CEMG_TRIE(Code)                                                                             \
  const Code *code, const uint64_t *first_child, int64_t num_inner, int64_t num_nodes,              \
      int64_t codebook_size, const uint64_t *open, const int32_t *filter_of, const int32_t *closed, \
      int64_t words, int64_t max_closed, int64_t rows_per_request
#define CEMG_VIEW(Code)                                                 \
  const cemg::TrieView<Code> trie{code,                                 \
                                  {first_child},                        \
                                  static_cast<int32_t>(num_inner),      \
                                  static_cast<int32_t>(num_nodes),      \
                                  static_cast<int32_t>(codebook_size)}; \
  [[maybe_unused]] const cemg::FilterView filter {                      \
    open, filter_of, closed, words, max_closed, rows_per_request        \
  }
#define CEMG_EACH(i, count)                                                                  \
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < (count); \
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)

#define CEMG_KERNELS(Code, suffix)                                                                          \
  extern "C" __global__ void lookup_##suffix(CEMG_TRIE(Code), const int64_t* prefixes, int64_t length,      \
                                             int32_t* out, int64_t count) {                                 \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(row, count) cemg::lookup_row(trie, filter, prefixes, length, row, out);                       \
  }                                                                                                         \
  extern "C" __global__ void advance_##suffix(CEMG_TRIE(Code), const int32_t* nodes, const int64_t* codes,  \
                                              int32_t* out, int64_t count) {                                \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(row, count) cemg::advance_row(trie, filter, nodes, codes, row, out);                          \
  }                                                                                                         \
  extern "C" __global__ void keep_##suffix(CEMG_TRIE(Code), const int32_t* nodes, int32_t* out,             \
                                           int64_t count) {                                                 \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(row, count) cemg::keep_row(trie, filter, nodes, row, out);                                    \
  }                                                                                                         \
  extern "C" __global__ void children_##suffix(CEMG_TRIE(Code), const int32_t* nodes, int32_t* out_codes,   \
                                               int32_t* out_nodes, int64_t count) {                         \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(row, count) cemg::children_row(trie, filter, nodes, row, out_codes, out_nodes);               \
  }                                                                                                         \
  extern "C" __global__ void mask_##suffix(CEMG_TRIE(Code), const int32_t* nodes, bool* out,                \
                                           int64_t count) {                                                 \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(cell, count) cemg::mask_cell(trie, filter, nodes, cell, out);                                 \
  }                                                                                                         \
  extern "C" __global__ void interval_##suffix(CEMG_TRIE(Code), const int32_t* nodes, int32_t* out,         \
                                               int64_t count) {                                             \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(row, count) cemg::interval_row(trie, nodes, row, out);                                        \
  }                                                                                                         \
  extern "C" __global__ void open_level_##suffix(CEMG_TRIE(Code), int64_t begin, int64_t end,               \
                                                 uint64_t* opened, int64_t count) {                         \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(word, count) cemg::open_word(trie, begin, end, begin / 64 + word, opened);                    \
  }                                                                                                         \
  extern "C" __global__ void close_##suffix(CEMG_TRIE(Code), const int32_t* excluded, int64_t max_excluded, \
                                            int64_t levels, int32_t* out, int64_t count) {                  \
    CEMG_VIEW(Code);                                                                                        \
    CEMG_EACH(row, count) cemg::close_row(trie, filter, excluded, max_excluded, levels, row, out);          \
  }

CEMG_KERNELS(uint8_t, u8)
CEMG_KERNELS(int16_t, i16)

#if !defined(__CUDACC_RTC__)
#include <algorithm>
#include <map>

#include "cemg/trie_cuda.h"

namespace cemg {
namespace {

constexpr int64_t kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // fills the largest GPU; each thread loops over the rest

#define CEMG_NAMED(op, suffix) {#op "_" #suffix, reinterpret_cast<const void*>(&op##_##suffix)}
const std::map<std::string, const void*>& kernels() {
  static const std::map<std::string, const void*> by_name = {
      CEMG_NAMED(lookup, u8),     CEMG_NAMED(lookup, i16),     CEMG_NAMED(advance, u8),
      CEMG_NAMED(advance, i16),   CEMG_NAMED(children, u8),    CEMG_NAMED(children, i16),
      CEMG_NAMED(mask, u8),       CEMG_NAMED(mask, i16),       CEMG_NAMED(interval, u8),
      CEMG_NAMED(interval, i16),  CEMG_NAMED(keep, u8),        CEMG_NAMED(keep, i16),
      CEMG_NAMED(open_level, u8), CEMG_NAMED(open_level, i16), CEMG_NAMED(close, u8),
      CEMG_NAMED(close, i16),
  };
  return by_name;
}

}  // namespace

std::string launch_trie_kernel(const std::string& name, std::vector<uint64_t> arguments, int64_t count,
                               int device, uint64_t stream) {
  const auto kernel = kernels().find(name);
  if (kernel == kernels().end()) return "there is no kernel named " + name;
  if (count == 0) return "";
  arguments.push_back(static_cast<uint64_t>(count));
  std::vector<void*> pointers;
  for (uint64_t& argument : arguments) pointers.push_back(&argument);
  int previous_device = 0;
  cudaError_t error = cudaGetDevice(&previous_device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto blocks = static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMaxBlocks));
  error = cudaLaunchKernel(kernel->second, dim3(blocks), dim3(static_cast<unsigned>(kThreads)),
                           pointers.data(), 0, reinterpret_cast<cudaStream_t>(stream));
  const cudaError_t restored = cudaSetDevice(previous_device);
  if (error == cudaSuccess) error = restored;
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace cemg
#endif
