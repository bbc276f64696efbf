// The only file that knows Python: addresses and sizes come in as integers, the GIL is released around work.
// The caller owns all memory and has checked dtypes, shapes and devices (cemg_kernels/trie/ops.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "cemg/propagate_cpu.h"
#include "cemg/quantize_cpu.h"
#include "cemg/search_cpu.h"
#include "cemg/trie_build.h"
#include "cemg/trie_check.h"
#include "cemg/trie_cpu.h"
#include "cemg/trie_filter.h"
#include "cemg/trie_step.h"
#if defined(CEMG_CUDA)
#include "cemg/trie_cuda.h"
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using AnyTrie = std::variant<cemg::TrieView<uint8_t>, cemg::TrieView<int16_t>>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Code>
AnyTrie view_as(Address code, Address first_child, int32_t num_inner, int32_t num_nodes, int32_t size) {
  return cemg::TrieView<Code>{
      at<const Code>(code), {at<const uint64_t>(first_child)}, num_inner, num_nodes, size};
}

AnyTrie make_view(Address code, int code_bytes, Address first_child, int32_t num_inner, int32_t num_nodes,
                  int32_t size) {
  if (code_bytes == 1) return view_as<uint8_t>(code, first_child, num_inner, num_nodes, size);
  if (code_bytes == 2) return view_as<int16_t>(code, first_child, num_inner, num_nodes, size);
  throw std::invalid_argument("codes take 1 or 2 bytes, got " + std::to_string(code_bytes) +
                              "; build the trie with Trie.from_codes");
}

struct View {
  AnyTrie trie;
};

// Addresses of open, filter_of and closed, then words, most_closed and rows_per_request.
using Filter = std::optional<std::array<int64_t, 6>>;  // None: everything is allowed

cemg::FilterView filter_at(const Filter& filter) {
  if (!filter) return {};
  const auto& f = *filter;
  return {at<const uint64_t>(static_cast<Address>(f[0])),
          at<const int32_t>(static_cast<Address>(f[1])),
          at<const int32_t>(static_cast<Address>(f[2])),
          f[3],
          f[4],
          f[5]};
}

[[noreturn]] void refuse(const cemg::BuildError& error) {
  using Kind = cemg::BuildError::Kind;
  const std::string value = std::to_string(error.value);
  switch (error.kind) {
    case Kind::kShape:
      throw std::invalid_argument("codes must be [N, levels] with N >= 1 and 1 to 255 levels, got " + value +
                                  " levels");
    case Kind::kCodebookSize:
      throw std::invalid_argument("codebook_size must be 1 to 32768, got " + value);
    case Kind::kCodeOutOfRange:
      throw std::invalid_argument("row " + std::to_string(error.row) + " has code " + value +
                                  " outside the codebook; codes count from 0");
    case Kind::kTooManyItems:
    case Kind::kTooManyNodes:
      throw std::invalid_argument(value + " items need more nodes than int32 counts; split the catalog");
  }
  throw std::invalid_argument("unknown build error");
}

template <class Code>
cemg::TrieBuilder sort_as(Address codes, int64_t rows, int32_t levels, int32_t codebook_size) {
  const size_t cells = static_cast<size_t>(rows) * static_cast<size_t>(levels);
  const std::span<const Code> all(at<const Code>(codes), cells);
  auto built = cemg::TrieBuilder::sort<Code>(all, levels, codebook_size);
  if (const auto* error = std::get_if<cemg::BuildError>(&built)) refuse(*error);
  return std::get<cemg::TrieBuilder>(std::move(built));
}

cemg::TrieBuilder sort_codes(Address codes, int code_bytes, int64_t rows, int32_t levels,
                             int32_t codebook_size) {
  if (rows < 0 || levels < 0) throw std::invalid_argument("negative sizes; pass codes.shape");
  if (code_bytes == 1) return sort_as<uint8_t>(codes, rows, levels, codebook_size);
  if (code_bytes == 2) return sort_as<int16_t>(codes, rows, levels, codebook_size);
  if (code_bytes == 4) return sort_as<int32_t>(codes, rows, levels, codebook_size);
  if (code_bytes == 8) return sort_as<int64_t>(codes, rows, levels, codebook_size);
  throw std::invalid_argument("codes take 1, 2, 4 or 8 bytes, got " + std::to_string(code_bytes));
}

struct Words {
  std::vector<uint64_t> words;
};

// Writes the codes and the rows; the first children, packed, come back.
Words write_arrays(const cemg::TrieBuilder& built, Address code, int code_bytes, Address rows) {
  if (!built.duplicates().empty()) throw std::invalid_argument("codes with duplicates have no trie");
  if (code_bytes == 1) return {built.write(at<uint8_t>(code), at<int32_t>(rows))};
  if (code_bytes == 2) return {built.write(at<int16_t>(code), at<int32_t>(rows))};
  throw std::invalid_argument("codes take 1 or 2 bytes, got " + std::to_string(code_bytes));
}

void copy_words(const Words& packed, Address out) {
  std::copy(packed.words.begin(), packed.words.end(), at<uint64_t>(out));
}

template <class Code>
const char* problem_as(Address code, Address first_child, Address rows, const std::array<int64_t, 3>& sizes,
                       int32_t levels, int32_t codebook_size) {
  const auto [edges, words, items] = sizes;
  return cemg::trie_problem<Code>({at<const Code>(code), static_cast<size_t>(edges)},
                                  {at<const uint64_t>(first_child), static_cast<size_t>(words)},
                                  {at<const int32_t>(rows), static_cast<size_t>(items)}, levels,
                                  codebook_size);
}

// sizes: the numbers of codes, words and rows.
std::string trie_problem(Address code, int code_bytes, Address first_child, Address rows,
                         const std::array<int64_t, 3>& sizes, int32_t levels, int32_t codebook_size) {
  const char* const problem =
      code_bytes == 1 ? problem_as<uint8_t>(code, first_child, rows, sizes, levels, codebook_size)
                      : problem_as<int16_t>(code, first_child, rows, sizes, levels, codebook_size);
  return problem == nullptr ? "" : problem;
}

int64_t wrong_id(Address ids, int64_t items) {
  return cemg::wrong_id({at<const int64_t>(ids), static_cast<size_t>(items)});
}

// The operations take what the kernels of trie_cuda.cu take: the filter, the operands, then the rows.
void lookup(const View& view, const Filter& fields, Address prefixes, int64_t length, Address out,
            int64_t rows) {
  const auto filter = filter_at(fields);
  std::visit(
      [&](auto trie) { cemg::lookup(trie, filter, at<int64_t>(prefixes), rows, length, at<int32_t>(out)); },
      view.trie);
}

void advance(const View& view, const Filter& fields, Address nodes, Address codes, Address out,
             int64_t rows) {
  const auto filter = filter_at(fields);
  std::visit(
      [&](auto trie) {
        cemg::advance(trie, filter, at<int32_t>(nodes), at<int64_t>(codes), rows, at<int32_t>(out));
      },
      view.trie);
}

void keep(const View& view, const Filter& fields, Address nodes, Address out, int64_t rows) {
  const auto filter = filter_at(fields);
  std::visit([&](auto trie) { cemg::keep(trie, filter, at<int32_t>(nodes), rows, at<int32_t>(out)); },
             view.trie);
}

void children(const View& view, const Filter& fields, Address nodes, Address out_codes, Address out_nodes,
              int64_t rows) {
  const auto filter = filter_at(fields);
  std::visit(
      [&](auto trie) {
        cemg::children(trie, filter, at<int32_t>(nodes), rows, at<int32_t>(out_codes),
                       at<int32_t>(out_nodes));
      },
      view.trie);
}

void mask(const View& view, const Filter& fields, Address nodes, Address out, int64_t rows) {
  const auto filter = filter_at(fields);
  std::visit([&](auto trie) { cemg::mask(trie, filter, at<int32_t>(nodes), rows, at<bool>(out)); },
             view.trie);
}

void open_inner(const View& view, Address open) {
  std::visit([&](auto trie) { cemg::open_inner(trie, at<uint64_t>(open)); }, view.trie);
}

// shape: requests, excluded ranks a request, levels.
int64_t close_nodes(const View& view, const Filter& fields, Address excluded,
                    const std::array<int64_t, 3>& shape, Address closed) {
  const auto filter = filter_at(fields);
  const auto [requests, most, levels] = shape;
  return std::visit(
      [&](auto trie) {
        return cemg::close_nodes(trie, filter, at<const int32_t>(excluded), requests, most, levels,
                                 at<int32_t>(closed));
      },
      view.trie);
}

void interval(const View& view, const Filter&, Address nodes, Address out, int64_t rows) {
  std::visit([&](auto trie) { cemg::interval(trie, at<int32_t>(nodes), rows, at<int32_t>(out)); }, view.trie);
}

cemg::StepLogits step_logits(Address logits, Address logsumexp, int normalize) {
  return {at<const float>(logits), at<const float>(logsumexp), static_cast<cemg::Normalize>(normalize)};
}

void softmax(const View& view, const Filter& fields, Address logits, Address logsumexp, int normalize,
             Address nodes, int64_t rows, Address out) {
  const auto filter = filter_at(fields);
  const auto step = step_logits(logits, logsumexp, normalize);
  std::visit([&](auto trie) { cemg::softmax(trie, filter, step, at<int32_t>(nodes), rows, at<float>(out)); },
             view.trie);
}

void check_beams(int64_t beams, int64_t size) {
  if (beams <= cemg::kMostCandidates / size) return;
  throw std::invalid_argument(std::to_string(beams) + " beams of " + std::to_string(size) +
                              " codes are more than 2^32");
}

void beam_step(const View& view, const Filter& fields, Address logits, Address logsumexp, int normalize,
               Address scores, Address nodes, const std::array<int64_t, 3>& shape, Address next_scores,
               Address parents, Address codes, Address next_nodes, Address pruned) {
  const auto filter = filter_at(fields);
  const auto step = step_logits(logits, logsumexp, normalize);
  const cemg::NextBeams beams = {at<float>(next_scores), at<int64_t>(parents), at<int64_t>(codes),
                                 at<int32_t>(next_nodes), at<float>(pruned)};
  std::visit(
      [&](auto trie) {
        check_beams(shape[1], trie.codebook_size);
        cemg::beam_step(trie, filter, step, at<const float>(scores), at<const int32_t>(nodes), shape[0],
                        shape[1], shape[2], beams);
      },
      view.trie);
}

void lightgcn_propagate(int64_t vertices, const std::array<Address, 3>& graph, Address x, int64_t dim,
                        int64_t layers, Address out, Address room) {
  cemg::lightgcn_propagate(
      {vertices, at<const int64_t>(graph[0]), at<const int64_t>(graph[1]), at<const float>(graph[2])},
      at<const float>(x), dim, layers, at<float>(out), at<float>(room));
}

void residual_quantize(Address x, int64_t rows, const std::array<int64_t, 3>& shape, Address codebooks,
                       Address codes, Address quantized) {
  cemg::residual_quantize(at<const float>(x), rows,
                          {shape[0], shape[1], shape[2], at<const float>(codebooks)}, at<int64_t>(codes),
                          at<float>(quantized));
}

using LinearFields = std::tuple<int64_t, int64_t, Address, Address>;  // in, out, panels, bias
using NormFields = std::tuple<Address, Address, float>;               // weight, bias, eps
using PlaceFields = std::array<Address, 4>;                           // embedding, cosine, sine, bias

cemg::Linear linear_at(const LinearFields& fields) {
  const auto& [in, out, panels, bias] = fields;
  return {in, out, at<const float>(panels), at<const float>(bias)};
}

cemg::Norm norm_at(const NormFields& fields) {
  const auto& [weight, bias, eps] = fields;
  return {at<const float>(weight), at<const float>(bias), eps};
}

cemg::Places places_at(const PlaceFields& fields) {
  return {at<const float>(fields[0]), at<const float>(fields[1]), at<const float>(fields[2]),
          at<const float>(fields[3])};
}

// sizes: width, heads, key-value heads and their size.
cemg::Transformer make_transformer(const std::array<int64_t, 4>& sizes, float scale, Address embedding,
                                   int64_t vocabulary, const NormFields& last, float last_scale) {
  return {sizes[0],   sizes[1], sizes[2],      sizes[3],  scale, at<const float>(embedding),
          vocabulary, {},       norm_at(last), last_scale};
}

// norms: of the layer, of queries, keys, cross-attention and feed-forward. linears: qkv, out, the queries,
// keys and values, and output of cross-attention, gate, up and down.
void add_layer(cemg::Transformer& model, const std::array<NormFields, 5>& norms,
               const std::array<LinearFields, 8>& linears, int activation) {
  model.layers.push_back({norm_at(norms[0]), linear_at(linears[0]), norm_at(norms[1]), norm_at(norms[2]),
                          linear_at(linears[1]), norm_at(norms[3]), linear_at(linears[2]),
                          linear_at(linears[3]), linear_at(linears[4]), norm_at(norms[4]),
                          linear_at(linears[5]), linear_at(linears[6]), linear_at(linears[7]),
                          static_cast<cemg::Activation>(activation)});
}

// wanted: the columns' layer, that of the whole vocabulary (or one of no outputs), logits, total.
using WantedFields = std::tuple<LinearFields, LinearFields, Address, Address>;

cemg::Wanted wanted_at(const WantedFields& fields) {
  const auto& [columns, all, logits, total] = fields;
  return {linear_at(columns), linear_at(all), at<float>(logits), at<float>(total)};
}

// Throws where a prompt holds no token or one that the model does not know.
cemg::Prompts prompts_at(const cemg::BeamSearch& search, Address tokens, Address mask,
                         const std::array<int64_t, 2>& shape) {
  const cemg::Prompts prompts{at<const int64_t>(tokens), at<const int64_t>(mask), shape[0], shape[1]};
  if (prompts.batch < 1) throw std::invalid_argument("there is no prompt");
  if (const int64_t empty = search.empty_prompt(prompts); empty >= 0) {
    throw std::invalid_argument("prompt " + std::to_string(empty) + " holds no token");
  }
  if (const int64_t wrong = search.wrong_token(prompts); wrong >= 0) {
    throw std::invalid_argument("prompt " + std::to_string(wrong / shape[1]) + " has token " +
                                std::to_string(prompts.tokens[wrong]) + " outside the model's vocabulary");
  }
  return prompts;
}

void check_token(const cemg::BeamSearch& search, int64_t token) {
  if (search.knows(token)) return;
  throw std::invalid_argument("token " + std::to_string(token) + " lies outside the decoder's vocabulary");
}

void check_codes(const cemg::BeamSearch& search, const cemg::Question& question, int64_t size) {
  const int64_t codes = question.levels() * size;
  if (question.tokens == nullptr) {
    check_token(search, question.first_token);
    check_token(search, question.first_token + codes - 1);
    return;
  }
  for (int64_t code = 0; code < codes; ++code) check_token(search, question.tokens[code]);
}

void start_search(cemg::BeamSearch& search, Address tokens, Address mask, const std::array<int64_t, 2>& shape,
                  const PlaceFields& places, int64_t start_token, const PlaceFields& own_places,
                  const WantedFields& wanted) {
  check_token(search, start_token);
  search.start(prompts_at(search, tokens, mask, shape), places_at(places), start_token, places_at(own_places),
               wanted_at(wanted));
}

void step_search(cemg::BeamSearch& search, Address tokens, Address parents, Address asked, int64_t beams,
                 const PlaceFields& places, const WantedFields& wanted) {
  if (search.steps() >= cemg::kMostSteps) {
    throw std::invalid_argument("a search has no more than " + std::to_string(cemg::kMostSteps) + " steps");
  }
  if (search.batch() < 1) throw std::invalid_argument("a search begins with its prompts: call start");
  const cemg::Grown grown{at<const int64_t>(tokens), at<const int64_t>(parents), at<const uint8_t>(asked),
                          beams};
  if (const int64_t orphan = search.orphan(grown); orphan >= 0) {
    throw std::invalid_argument("beam " + std::to_string(orphan % beams) + " of user " +
                                std::to_string(orphan / beams) + " grew from no beam that was asked for");
  }
  if (const int64_t wrong = search.stranger(grown); wrong >= 0) check_token(search, grown.tokens[wrong]);
  search.step(grown, places_at(places), wanted_at(wanted));
}

// numbers: normalize, width, first token, start token, and where there is one the address of the table of
// tokens. level_fields: of each, the places of its step and the columns of its codes. out: scores, leaves,
// codes and what was pruned.
using SpentFields = std::tuple<double, double, double, int64_t>;  // prompt, model, selection; rows

SpentFields run_search(cemg::BeamSearch& search, const View& view, const Filter& fields,
                       const std::array<Address, 2>& tokens_and_mask, const std::array<int64_t, 2>& shape,
                       const PlaceFields& prompt_places,
                       const std::vector<std::pair<PlaceFields, LinearFields>>& level_fields,
                       const LinearFields& all, const std::vector<int64_t>& numbers,
                       const std::array<Address, 4>& out) {
  const auto levels = static_cast<int64_t>(level_fields.size());
  if (numbers.size() < 4 || numbers[1] < 1 || levels < 1 || levels > cemg::kMostSteps) {
    throw std::invalid_argument("a search has a beam or more and 1 to " + std::to_string(cemg::kMostSteps) +
                                " levels");
  }
  check_token(search, numbers[3]);
  const auto prompts = prompts_at(search, tokens_and_mask[0], tokens_and_mask[1], shape);
  cemg::Question question{static_cast<cemg::Normalize>(numbers[0]),
                          numbers[1],
                          numbers[2],
                          numbers[3],
                          places_at(prompt_places),
                          {},
                          {},
                          linear_at(all)};
  for (const auto& [places, columns] : level_fields) {
    question.own_places.push_back(places_at(places));
    question.columns.push_back(linear_at(columns));
  }
  if (numbers.size() > 4) question.tokens = at<const int64_t>(static_cast<Address>(numbers[4]));
  const cemg::Found found{at<float>(out[0]), at<int32_t>(out[1]), at<int64_t>(out[2]), at<float>(out[3])};
  return std::visit(
      [&](auto trie) -> SpentFields {
        check_beams(question.width, trie.codebook_size);
        check_codes(search, question, trie.codebook_size);
        for (const cemg::Linear& columns : question.columns) {
          if (columns.out != trie.codebook_size) throw std::invalid_argument("a level has a column a code");
        }
        const auto spent = search.search(prompts, trie, filter_at(fields), question, found);
        return {spent.prompt, spent.model, spent.selection, spent.rows};
      },
      view.trie);
}

// Of the calling thread's parallel regions.
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
  if (!error.empty()) throw std::runtime_error("CUDA, launching " + name + ": " + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "The trie in C++: raw addresses in, raw addresses out. Use cemg_kernels.Trie.";
  module.def("build_info", &build_info);
  module.def("use_one_thread", &use_one_thread);
#if defined(CEMG_CUDA)
  module.def("launch_trie_kernel", &launch_trie_kernel, release());
#endif
  module.def("lightgcn_propagate", &lightgcn_propagate, release());
  module.def("residual_quantize", &residual_quantize, release());
  module.def("trie_problem", &trie_problem, release());
  module.def("wrong_id", &wrong_id, release());
  py::class_<cemg::TrieBuilder>(module, "TrieBuilder")
      .def(py::init(&sort_codes), py::arg("codes"), py::arg("code_bytes"), py::arg("rows"), py::arg("levels"),
           py::arg("codebook_size"), release())
      .def_property_readonly("num_nodes", &cemg::TrieBuilder::num_nodes)
      .def_property_readonly("num_inner", &cemg::TrieBuilder::num_inner)
      .def_property_readonly("duplicates", &cemg::TrieBuilder::duplicates)
      .def("write", &write_arrays, py::arg("code"), py::arg("code_bytes"), py::arg("rows"), release());
  py::class_<Words>(module, "Words")
      .def_property_readonly("size", [](const Words& packed) { return packed.words.size(); })
      .def("copy_to", &copy_words, release());
  py::class_<View>(module, "TrieView")
      .def(py::init([](Address code, int code_bytes, Address first_child, int32_t num_inner,
                       int32_t num_nodes, int32_t codebook_size) {
             return View{make_view(code, code_bytes, first_child, num_inner, num_nodes, codebook_size)};
           }),
           py::arg("code"), py::arg("code_bytes"), py::arg("first_child"), py::arg("num_inner"),
           py::arg("num_nodes"), py::arg("codebook_size"))
      .def("lookup", &lookup, release())
      .def("advance", &advance, release())
      .def("keep", &keep, release())
      .def("children", &children, release())
      .def("mask", &mask, release())
      .def("interval", &interval, release())
      .def("open_inner", &open_inner, release())
      .def("close_nodes", &close_nodes, release())
      .def("softmax", &softmax, release())
      .def("beam_step", &beam_step, release());
  py::class_<cemg::Transformer>(module, "Transformer")
      .def(py::init(&make_transformer), py::arg("sizes"), py::arg("scale"), py::arg("embedding"),
           py::arg("vocabulary"), py::arg("last"), py::arg("last_scale"))
      .def("add_layer", &add_layer)
      .def("set_code_table", [](cemg::Transformer& model, Address table, int64_t first, int64_t count) {
        model.code_table = at<const float>(table);
        model.first_code = first;
        model.num_codes = count;
      });
  py::class_<cemg::BeamSearch>(module, "BeamSearch")
      .def(py::init<const cemg::Transformer*, const cemg::Transformer&, int64_t>(), py::keep_alive<1, 2>(),
           py::keep_alive<1, 3>())
      .def_property_readonly("nbytes", &cemg::BeamSearch::nbytes)
      .def_property_readonly("threads", &cemg::BeamSearch::threads)
      .def("note_laps", &cemg::BeamSearch::note_laps)
      .def("laps",
           [](const cemg::BeamSearch& search) {
             std::vector<std::pair<std::string, double>> laps;
             for (const cemg::Lap& lap : search.laps()) laps.emplace_back(lap.part, lap.end);
             return laps;
           })
      .def("start", &start_search, release())
      .def("step", &step_search, release())
      .def("search", &run_search, release())
      .def("rewind", &cemg::BeamSearch::rewind, release());
}
