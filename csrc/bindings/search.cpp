// The decoder and the beam search. Everything that comes from Python is checked here.
#include <utility>
#include <vector>

#include "bindings.h"
#include "cemg/search_cpu.h"

namespace cemg::bindings {
namespace {

void check_token(const BeamSearch& search, int64_t token) {
  if (search.in_vocabulary(token)) return;
  throw std::invalid_argument("token " + std::to_string(token) + " is outside the decoder's vocabulary");
}

void check_prompts(const BeamSearch& search, const Prompts& prompts) {
  if (prompts.batch < 1) throw std::invalid_argument("there is no prompt");
  if (const int64_t empty = search.first_empty_prompt(prompts); empty >= 0) {
    throw std::invalid_argument("prompt " + std::to_string(empty) + " has no tokens");
  }
  if (const int64_t invalid = search.first_invalid_token(prompts); invalid >= 0) {
    throw std::invalid_argument("prompt " + std::to_string(invalid / prompts.length) + " has token " +
                                std::to_string(prompts.tokens[invalid]) + " outside the model's vocabulary");
  }
}

void check_codes(const BeamSearch& search, const SearchRequest& request, int64_t codebook_size) {
  const int64_t codes = request.levels() * codebook_size;
  for (const Linear& columns : request.level_columns) {
    if (columns.out_features == codebook_size) continue;
    throw std::invalid_argument(
        "each level needs one column of the head per code: " + std::to_string(codebook_size) + ", got " +
        std::to_string(columns.out_features));
  }
  if (request.code_tokens == nullptr) {
    check_token(search, request.first_token);
    check_token(search, request.first_token + codes - 1);
    return;
  }
  for (int64_t code = 0; code < codes; ++code) check_token(search, request.code_tokens[code]);
}

void prefill(BeamSearch& search, const Prompts& prompts, const PositionTables& prompt_positions,
             int64_t start_token, const PositionTables& start_positions, const LogitsRequest& request) {
  check_token(search, start_token);
  check_prompts(search, prompts);
  search.prefill(prompts, prompt_positions, start_token, start_positions, request);
}

void decode_step(BeamSearch& search, const BeamInput& input, const PositionTables& positions,
                 const LogitsRequest& request) {
  if (search.num_steps() >= kMaxSteps) {
    throw std::invalid_argument("a search has at most " + std::to_string(kMaxSteps) + " steps");
  }
  if (search.batch() < 1) throw std::invalid_argument("there are no prompts yet; call prefill first");
  if (const int64_t beam = search.first_invalid_parent(input); beam >= 0) {
    throw std::invalid_argument("beam " + std::to_string(beam % input.beams) + " of user " +
                                std::to_string(beam / input.beams) +
                                ": its parent was not an active beam of the step before");
  }
  if (const int64_t beam = search.first_invalid_beam_token(input); beam >= 0) {
    check_token(search, input.tokens[beam]);
  }
  search.decode_step(input, positions, request);
}

SearchTimings run_search(BeamSearch& search, const Prompts& prompts, const AnyTrieView& trie,
                         const OptionalFilter& filter, const SearchRequest& request,
                         const SearchResult& result) {
  const int64_t levels = request.levels();
  if (request.beam_width < 1 || levels < 1 || levels > kMaxSteps) {
    throw std::invalid_argument("a search needs at least 1 beam and 1 to " + std::to_string(kMaxSteps) +
                                " levels, got " + std::to_string(request.beam_width) + " beams and " +
                                std::to_string(levels) + " levels");
  }
  if (request.step_positions.size() != request.level_columns.size()) {
    throw std::invalid_argument("step_positions and level_columns must have one entry per level");
  }
  check_token(search, request.start_token);
  check_prompts(search, prompts);
  return std::visit(
      [&](auto view) {
        check_beams(request.beam_width, view.codebook_size);
        check_codes(search, request, view.codebook_size);
        return search.search(prompts, view, filter_or_all(filter), request, result);
      },
      trie.view);
}

SearchRequest make_request(Normalize normalize, int64_t beam_width, int64_t first_token, int64_t start_token,
                           const PositionTables& prompt_positions, std::vector<PositionTables> step_positions,
                           std::vector<Linear> level_columns, const Linear& vocabulary, Address code_tokens,
                           const OptionalPrior& prior) {
  return {normalize,
          beam_width,
          first_token,
          start_token,
          prompt_positions,
          std::move(step_positions),
          std::move(level_columns),
          vocabulary,
          at<const int64_t>(code_tokens),
          prior};
}

void bind_request(py::module_& module) {
  py::class_<SearchRequest>(module, "SearchRequest")
      .def(py::init(&make_request), py::kw_only(), py::arg("normalize"), py::arg("beam_width"),
           py::arg("first_token"), py::arg("start_token"), py::arg("prompt_positions"),
           py::arg("step_positions"), py::arg("level_columns"), py::arg_v("vocabulary", Linear{}, "Linear()"),
           py::arg("code_tokens") = 0, py::arg("prior") = py::none());
  py::class_<SearchResult>(module, "SearchResult")
      .def(py::init([](Address scores, Address leaves, Address codes, Address pruned) {
             return SearchResult{at<float>(scores), at<int32_t>(leaves), at<int64_t>(codes),
                                 at<float>(pruned)};
           }),
           py::kw_only(), py::arg("scores"), py::arg("leaves"), py::arg("codes"), py::arg("pruned"));
  py::class_<SearchTimings>(module, "SearchTimings")
      .def_readonly("prefill", &SearchTimings::prefill)
      .def_readonly("decode_steps", &SearchTimings::decode_steps)
      .def_readonly("selection", &SearchTimings::selection)
      .def_readonly("rows", &SearchTimings::rows);
}

}  // namespace

void bind_search(py::module_& module) {
  bind_request(module);
  module.attr("MAX_STEPS") = kMaxSteps;
  py::class_<BeamSearch>(module, "BeamSearch")
      .def(py::init<const Transformer*, const Transformer&, int64_t>(), py::keep_alive<1, 2>(),
           py::keep_alive<1, 3>(), py::arg("encoder"), py::arg("decoder"), py::arg("threads"))
      .def_property_readonly("nbytes", &BeamSearch::nbytes)
      .def_property_readonly("threads", &BeamSearch::threads)
      .def_property_readonly("profile_events", &BeamSearch::profile_events, py::return_value_policy::copy)
      .def("set_profiling", &BeamSearch::set_profiling, py::arg("enabled"))
      .def("prefill", &prefill, ReleaseGil(), py::arg("prompts"), py::arg("prompt_positions"),
           py::arg("start_token"), py::arg("start_positions"), py::arg("request"))
      .def("decode_step", &decode_step, ReleaseGil(), py::arg("input"), py::arg("positions"),
           py::arg("request"))
      .def("search", &run_search, ReleaseGil(), py::arg("prompts"), py::arg("trie"), py::arg("filter"),
           py::arg("request"), py::arg("result"))
      .def("reset_to_prefill", &BeamSearch::reset_to_prefill, ReleaseGil());
}

}  // namespace cemg::bindings
