// The module cemg_kernels._native, and its operations that need no trie and no model.
#include <utility>
#include <vector>

#include "bindings.h"
#include "cemg/gemm_cpu.h"
#include "cemg/memory_cpu.h"
#include "cemg/propagate_cpu.h"
#include "cemg/quantize_cpu.h"
#if defined(CEMG_CUDA)
#include "cemg/trie_cuda.h"
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

// setup.py defines it: a hash of _native.pyi, by which Python recognizes a module built for another version.
#if !defined(CEMG_INTERFACE)
#define CEMG_INTERFACE ""
#endif

namespace cemg::bindings {
namespace {

void lightgcn_propagate(Address row_ptr, Address neighbours, Address inv_sqrt_degree, int64_t vertices,
                        Address x, int64_t dim, int64_t layers, Address out, Address scratch) {
  const GraphView graph{vertices, at<const int64_t>(row_ptr), at<const int64_t>(neighbours),
                        at<const float>(inv_sqrt_degree)};
  cemg::lightgcn_propagate(graph, at<const float>(x), dim, layers, at<float>(out), at<float>(scratch));
}

void residual_quantize(Address x, int64_t rows, Address codebooks, int64_t levels, int64_t codebook_size,
                       int64_t dim, Address codes, Address quantized) {
  cemg::residual_quantize(at<const float>(x), rows, {levels, codebook_size, dim, at<const float>(codebooks)},
                          at<int64_t>(codes), at<float>(quantized));
}

SparseRows make_sparse_rows(Address starts, Address items, Address values, int64_t rows, int64_t top) {
  return {at<const int64_t>(starts), at<const int32_t>(items), at<const float>(values), rows, top};
}

int64_t memory_scores(const SparseRows& transitions, const SparseRows& similar, Address history,
                      Address transition_weights, Address similar_weights, Address repeat_weights,
                      int64_t size, Address factors, Address items, Address scores) {
  const MemoryQuery query = {at<const int64_t>(history),
                             at<const double>(transition_weights),
                             at<const double>(similar_weights),
                             at<const double>(repeat_weights),
                             size,
                             at<const double>(factors)};
  return cemg::memory_scores(transitions, similar, query, at<int32_t>(items), at<double>(scores));
}

// For the parallel regions of the calling thread.
void use_one_thread() {
#if defined(_OPENMP)
  omp_set_num_threads(1);
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(_OPENMP)
  info["openmp"] = true;
  info["threads"] = omp_get_max_threads();
#else
  info["openmp"] = false;
  info["threads"] = 1;
#endif
#if defined(CEMG_CUDA)
  info["cuda"] = CEMG_CUDA;
#else
  info["cuda"] = "";
#endif
  return info;
}

#if defined(CEMG_CUDA)
void launch_trie_kernel(const std::string& name, std::vector<uint64_t> arguments, int64_t count, int device,
                        uint64_t stream) {
  const std::string error = cemg::launch_trie_kernel(name, std::move(arguments), count, device, stream);
  if (!error.empty()) throw std::runtime_error("CUDA failed to launch " + name + ": " + error);
}
#endif

void bind_operations(py::module_& module) {
  module.def("build_info", &build_info);
  module.def("use_one_thread", &use_one_thread);
#if defined(CEMG_CUDA)
  module.def("launch_trie_kernel", &launch_trie_kernel, ReleaseGil(), py::arg("name"), py::arg("arguments"),
             py::arg("count"), py::arg("device"), py::arg("stream"));
#endif
  module.def("lightgcn_propagate", &lightgcn_propagate, ReleaseGil(), py::kw_only(), py::arg("row_ptr"),
             py::arg("neighbours"), py::arg("inv_sqrt_degree"), py::arg("vertices"), py::arg("x"),
             py::arg("dim"), py::arg("layers"), py::arg("out"), py::arg("scratch"));
  module.def("residual_quantize", &residual_quantize, ReleaseGil(), py::kw_only(), py::arg("x"),
             py::arg("rows"), py::arg("codebooks"), py::arg("levels"), py::arg("codebook_size"),
             py::arg("dim"), py::arg("codes"), py::arg("quantized"));
  py::class_<SparseRows>(module, "SparseRows")
      .def(py::init(&make_sparse_rows), py::kw_only(), py::arg("starts"), py::arg("items"), py::arg("values"),
           py::arg("rows"), py::arg("top"));
  module.def("memory_scores", &memory_scores, ReleaseGil(), py::arg("transitions"), py::arg("similar"),
             py::kw_only(), py::arg("history"), py::arg("transition_weights"), py::arg("similar_weights"),
             py::arg("repeat_weights"), py::arg("size"), py::arg("factors"), py::arg("items"),
             py::arg("scores"));
}

}  // namespace
}  // namespace cemg::bindings

PYBIND11_MODULE(_native, module) {
  using namespace cemg::bindings;
  module.doc() =
      "The C++ backend of cemg_kernels. Tensors are passed as addresses; use the functions of cemg_kernels.";
  module.attr("INTERFACE") = CEMG_INTERFACE;
  module.attr("PANEL") = cemg::kPanel;
  bind_operations(module);
  bind_trie(module);
  bind_steps(module);
  bind_decoder(module);
  bind_search(module);
}
