// Launches the trie's batched operations on a GPU. Only present if nvcc built them (CEMG_CUDA).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cemg {

// Launches kernel `name` of trie_cuda.cu over `count` rows or cells on a stream of `device`. `arguments` are
// the kernel's arguments in order, without the count, 64 bits each. Returns CUDA's error message, empty on
// success.
std::string launch_trie_kernel(const std::string& name, std::vector<uint64_t> arguments, int64_t count,
                               int device, uint64_t stream);

}  // namespace cemg
