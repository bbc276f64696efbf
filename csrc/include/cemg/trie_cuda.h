// The trie's batched operations on a GPU, by name. Present where nvcc built them (CEMG_CUDA).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cemg {

// Runs kernel `name` of trie_cuda.cu over `count` rows or cells on a stream of `device`; arguments are 64
// bits each, in the kernel's order without the count. Returns what CUDA says, empty where all is well.
std::string launch_trie_kernel(const std::string& name, std::vector<uint64_t> arguments, int64_t count,
                               int device, uint64_t stream);

}  // namespace cemg
