// What the bindings share. Only files in this folder know Python. Addresses and sizes come in as integers;
// the caller owns all memory and has checked dtypes, shapes and devices. The GIL is released around work.
#pragma once

#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "cemg/trie_prior.h"
#include "cemg/trie_view.h"

namespace cemg::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// cemg_kernels._native.TrieView: a view of either width of codes.
struct AnyTrieView {
  std::variant<TrieView<uint8_t>, TrieView<int16_t>> view;
};

using OptionalFilter = std::optional<FilterView>;  // None: every item is allowed

using OptionalPrior = std::optional<PriorView>;

inline FilterView filter_or_all(const OptionalFilter& filter) {
  return filter.value_or(FilterView{});
}

// Throws if a user's beams have more candidates than beam_step() can number.
void check_beams(int64_t beams, int64_t codebook_size);

void bind_trie(py::module_& module);
void bind_steps(py::module_& module);
void bind_decoder(py::module_& module);
void bind_search(py::module_& module);

}  // namespace cemg::bindings
