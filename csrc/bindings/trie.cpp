// The trie: building, checking, lookups and filters.
#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cemg/trie_build.h"
#include "cemg/trie_check.h"
#include "cemg/trie_cpu.h"
#include "cemg/trie_filter.h"

namespace cemg::bindings {
namespace {

[[noreturn]] void throw_code_bytes(int code_bytes, const char* supported) {
  throw std::invalid_argument(std::string("codes must have ") + supported + " bytes, got " +
                              std::to_string(code_bytes) + "; build the trie with Trie.from_codes");
}

template <class Code>
AnyTrieView view_of(Address code, Address first_child, int32_t num_inner, int32_t num_nodes,
                    int32_t codebook_size) {
  return {TrieView<Code>{
      at<const Code>(code), {at<const uint64_t>(first_child)}, num_inner, num_nodes, codebook_size}};
}

AnyTrieView make_view(Address code, int code_bytes, Address first_child, int32_t num_inner, int32_t num_nodes,
                      int32_t codebook_size) {
  if (code_bytes == 1) return view_of<uint8_t>(code, first_child, num_inner, num_nodes, codebook_size);
  if (code_bytes == 2) return view_of<int16_t>(code, first_child, num_inner, num_nodes, codebook_size);
  throw_code_bytes(code_bytes, "1 or 2");
}

FilterView make_filter(Address open, Address filter_of, Address closed, int64_t words, int64_t max_closed,
                       int64_t rows_per_request) {
  return {
      at<const uint64_t>(open), at<const int32_t>(filter_of), at<const int32_t>(closed), words, max_closed,
      rows_per_request};
}

PriorView make_prior(Address ranks, Address sums, Address weight, int64_t size) {
  return {at<const int32_t>(ranks), at<const double>(sums), at<const double>(weight), size};
}

bool build_prior(Address items, Address mass, Address counts, Address known, Address rank_of,
                 int64_t num_items, int32_t num_inner, const OptionalFilter& filter, int64_t requests,
                 int64_t size, Address ranks, Address sums, Address weight) {
  const PriorSource source = {at<const int64_t>(items),
                              at<const double>(mass),
                              at<const int64_t>(counts),
                              at<const int64_t>(known),
                              at<const int32_t>(rank_of),
                              num_items,
                              num_inner};
  return cemg::build_prior(source, filter_or_all(filter), requests, size, at<int32_t>(ranks),
                           at<double>(sums), at<double>(weight));
}

[[noreturn]] void throw_build_error(const BuildError& error) {
  using Kind = BuildError::Kind;
  const std::string value = std::to_string(error.value);
  switch (error.kind) {
    case Kind::kShape:
      throw std::invalid_argument("codes must be [N, levels] with N >= 1 and 1 to " +
                                  std::to_string(kMaxLevels) + " levels, got " + value + " levels");
    case Kind::kCodebookSize:
      throw std::invalid_argument("codebook_size must be 1 to " + std::to_string(kMaxCodebookSize) +
                                  ", got " + value);
    case Kind::kCodeOutOfRange:
      throw std::invalid_argument("row " + std::to_string(error.row) + " has code " + value +
                                  " outside the codebook; codes count from 0");
    case Kind::kTooManyItems:
    case Kind::kTooManyNodes:
      throw std::invalid_argument("a trie of " + value +
                                  " items has more nodes than int32 can count; split the catalog");
  }
  throw std::invalid_argument("unknown build error");
}

template <class Code>
TrieBuilder sort_codes_of(Address codes, int64_t rows, int32_t levels, int32_t codebook_size) {
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(levels);
  const std::span<const Code> span(at<const Code>(codes), count);
  auto built = TrieBuilder::sort<Code>(span, levels, codebook_size);
  if (const auto* error = std::get_if<BuildError>(&built)) throw_build_error(*error);
  return std::get<TrieBuilder>(std::move(built));
}

TrieBuilder sort_codes(Address codes, int code_bytes, int64_t rows, int32_t levels, int32_t codebook_size) {
  if (rows < 0 || levels < 0) {
    throw std::invalid_argument("rows and levels must not be negative; pass codes.shape");
  }
  if (code_bytes == 1) return sort_codes_of<uint8_t>(codes, rows, levels, codebook_size);
  if (code_bytes == 2) return sort_codes_of<int16_t>(codes, rows, levels, codebook_size);
  if (code_bytes == 4) return sort_codes_of<int32_t>(codes, rows, levels, codebook_size);
  if (code_bytes == 8) return sort_codes_of<int64_t>(codes, rows, levels, codebook_size);
  throw_code_bytes(code_bytes, "1, 2, 4 or 8");
}

// cemg_kernels._native.PackedWords: C++ memory that Python copies into a tensor of its own.
struct PackedWords {
  std::vector<uint64_t> words;
};

PackedWords write_arrays(const TrieBuilder& builder, Address code, int code_bytes, Address rows) {
  if (!builder.duplicates().empty()) {
    throw std::invalid_argument("there is no trie of codes with duplicates");
  }
  if (code_bytes == 1) return {builder.write(at<uint8_t>(code), at<int32_t>(rows))};
  if (code_bytes == 2) return {builder.write(at<int16_t>(code), at<int32_t>(rows))};
  throw_code_bytes(code_bytes, "1 or 2");
}

template <class Code>
const char* problem_of(Address code, Address first_child, Address rows, int64_t num_edges, int64_t num_words,
                       int64_t num_items, int32_t levels, int32_t codebook_size) {
  return cemg::trie_problem<Code>({at<const Code>(code), static_cast<size_t>(num_edges)},
                                  {at<const uint64_t>(first_child), static_cast<size_t>(num_words)},
                                  {at<const int32_t>(rows), static_cast<size_t>(num_items)}, levels,
                                  codebook_size);
}

std::string trie_problem(Address code, int code_bytes, Address first_child, Address rows, int64_t num_edges,
                         int64_t num_words, int64_t num_items, int32_t levels, int32_t codebook_size) {
  const auto problem = code_bytes == 1 ? problem_of<uint8_t> : problem_of<int16_t>;
  const char* const text =
      problem(code, first_child, rows, num_edges, num_words, num_items, levels, codebook_size);
  return text == nullptr ? "" : text;
}

int64_t first_invalid_id(Address ids, int64_t num_items) {
  return cemg::first_invalid_id({at<const int64_t>(ids), static_cast<size_t>(num_items)});
}

// The operations take their arguments in the order of the kernels of trie_cuda.cu.
void lookup(const AnyTrieView& trie, const OptionalFilter& filter, Address prefixes, int64_t length,
            Address out, int64_t rows) {
  std::visit(
      [&](auto view) {
        cemg::lookup(view, filter_or_all(filter), at<int64_t>(prefixes), rows, length, at<int32_t>(out));
      },
      trie.view);
}

void advance(const AnyTrieView& trie, const OptionalFilter& filter, Address nodes, Address codes, Address out,
             int64_t rows) {
  std::visit(
      [&](auto view) {
        cemg::advance(view, filter_or_all(filter), at<int32_t>(nodes), at<int64_t>(codes), rows,
                      at<int32_t>(out));
      },
      trie.view);
}

void keep(const AnyTrieView& trie, const OptionalFilter& filter, Address nodes, Address out, int64_t rows) {
  std::visit(
      [&](auto view) { cemg::keep(view, filter_or_all(filter), at<int32_t>(nodes), rows, at<int32_t>(out)); },
      trie.view);
}

void children(const AnyTrieView& trie, const OptionalFilter& filter, Address nodes, Address out_codes,
              Address out_nodes, int64_t rows) {
  std::visit(
      [&](auto view) {
        cemg::children(view, filter_or_all(filter), at<int32_t>(nodes), rows, at<int32_t>(out_codes),
                       at<int32_t>(out_nodes));
      },
      trie.view);
}

void mask(const AnyTrieView& trie, const OptionalFilter& filter, Address nodes, Address out, int64_t rows) {
  std::visit(
      [&](auto view) { cemg::mask(view, filter_or_all(filter), at<int32_t>(nodes), rows, at<bool>(out)); },
      trie.view);
}

void interval(const AnyTrieView& trie, const OptionalFilter&, Address nodes, Address out, int64_t rows) {
  std::visit([&](auto view) { cemg::interval(view, at<int32_t>(nodes), rows, at<int32_t>(out)); }, trie.view);
}

void open_inner(const AnyTrieView& trie, Address open) {
  std::visit([&](auto view) { cemg::open_inner(view, at<uint64_t>(open)); }, trie.view);
}

int64_t close_nodes(const AnyTrieView& trie, const OptionalFilter& filter, Address excluded, int64_t requests,
                    int64_t max_excluded, int64_t levels, Address closed) {
  return std::visit(
      [&](auto view) {
        return cemg::close_nodes(view, filter_or_all(filter), at<const int32_t>(excluded), requests,
                                 max_excluded, levels, at<int32_t>(closed));
      },
      trie.view);
}

void bind_builder(py::module_& module) {
  module.def("trie_problem", &trie_problem, ReleaseGil(), py::kw_only(), py::arg("code"),
             py::arg("code_bytes"), py::arg("first_child"), py::arg("rows"), py::arg("num_edges"),
             py::arg("num_words"), py::arg("num_items"), py::arg("levels"), py::arg("codebook_size"));
  module.def("first_invalid_id", &first_invalid_id, ReleaseGil(), py::arg("ids"), py::arg("num_items"));
  py::class_<TrieBuilder>(module, "TrieBuilder")
      .def(py::init(&sort_codes), ReleaseGil(), py::kw_only(), py::arg("codes"), py::arg("code_bytes"),
           py::arg("rows"), py::arg("levels"), py::arg("codebook_size"))
      .def_property_readonly("num_nodes", &TrieBuilder::num_nodes)
      .def_property_readonly("num_inner", &TrieBuilder::num_inner)
      .def_property_readonly("duplicates", &TrieBuilder::duplicates)
      .def("write", &write_arrays, ReleaseGil(), py::kw_only(), py::arg("code"), py::arg("code_bytes"),
           py::arg("rows"));
  py::class_<PackedWords>(module, "PackedWords")
      .def_property_readonly("size", [](const PackedWords& packed) { return packed.words.size(); })
      .def(
          "copy_to",
          [](const PackedWords& packed, Address out) {
            std::copy(packed.words.begin(), packed.words.end(), at<uint64_t>(out));
          },
          ReleaseGil(), py::arg("out"));
}

void bind_view(py::module_& module) {
  py::class_<FilterView>(module, "FilterView")
      .def(py::init(&make_filter), py::kw_only(), py::arg("open") = 0, py::arg("filter_of") = 0,
           py::arg("closed") = 0, py::arg("words") = 0, py::arg("max_closed") = 0,
           py::arg("rows_per_request") = 1);
  py::class_<PriorView>(module, "PriorView")
      .def(py::init(&make_prior), py::kw_only(), py::arg("ranks"), py::arg("sums"), py::arg("weight"),
           py::arg("size"));
  module.def("build_prior", &build_prior, ReleaseGil(), py::kw_only(), py::arg("items"), py::arg("mass"),
             py::arg("counts"), py::arg("known"), py::arg("rank_of"), py::arg("num_items"),
             py::arg("num_inner"), py::arg("filter"), py::arg("requests"), py::arg("size"), py::arg("ranks"),
             py::arg("sums"), py::arg("weight"));
  py::class_<AnyTrieView>(module, "TrieView")
      .def(py::init(&make_view), py::kw_only(), py::arg("code"), py::arg("code_bytes"),
           py::arg("first_child"), py::arg("num_inner"), py::arg("num_nodes"), py::arg("codebook_size"))
      .def("lookup", &lookup, ReleaseGil(), py::arg("filter"), py::arg("prefixes"), py::arg("length"),
           py::arg("out"), py::arg("rows"))
      .def("advance", &advance, ReleaseGil(), py::arg("filter"), py::arg("nodes"), py::arg("codes"),
           py::arg("out"), py::arg("rows"))
      .def("keep", &keep, ReleaseGil(), py::arg("filter"), py::arg("nodes"), py::arg("out"), py::arg("rows"))
      .def("children", &children, ReleaseGil(), py::arg("filter"), py::arg("nodes"), py::arg("out_codes"),
           py::arg("out_nodes"), py::arg("rows"))
      .def("mask", &mask, ReleaseGil(), py::arg("filter"), py::arg("nodes"), py::arg("out"), py::arg("rows"))
      .def("interval", &interval, ReleaseGil(), py::arg("filter"), py::arg("nodes"), py::arg("out"),
           py::arg("rows"))
      .def("open_inner", &open_inner, ReleaseGil(), py::arg("open"))
      .def("close_nodes", &close_nodes, ReleaseGil(), py::arg("filter"), py::kw_only(), py::arg("excluded"),
           py::arg("requests"), py::arg("max_excluded"), py::arg("levels"), py::arg("closed"));
}

}  // namespace

void bind_trie(py::module_& module) {
  module.attr("MAX_LEVELS") = kMaxLevels;
  module.attr("MAX_CODEBOOK_SIZE") = kMaxCodebookSize;
  module.attr("MAX_NODES") = kMaxNodes;
  module.attr("NO_NODE") = kNoNode;
  bind_builder(module);
  bind_view(module);
}

}  // namespace cemg::bindings
