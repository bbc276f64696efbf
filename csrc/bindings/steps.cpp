// The trie's part of a decode step.
#include "bindings.h"
#include "cemg/trie_step.h"

namespace cemg::bindings {
namespace {

StepLogits step_logits(Address logits, Address logsumexp, Normalize normalize) {
  return {at<const float>(logits), at<const float>(logsumexp), normalize};
}

void softmax(const AnyTrieView& trie, const OptionalFilter& filter, Address logits, Address logsumexp,
             Normalize normalize, Address nodes, int64_t rows, Address out) {
  const StepLogits step = step_logits(logits, logsumexp, normalize);
  std::visit(
      [&](auto view) {
        cemg::softmax(view, filter_or_all(filter), step, at<const int32_t>(nodes), rows, at<float>(out));
      },
      trie.view);
}

void beam_step(const AnyTrieView& trie, const OptionalFilter& filter, Address logits, Address logsumexp,
               Normalize normalize, Address scores, Address nodes, int64_t users, int64_t beams,
               int64_t width, Address next_scores, Address parents, Address codes, Address next_nodes,
               Address pruned, const OptionalPrior& prior, Address generator, Address next_generator) {
  const StepLogits step = step_logits(logits, logsumexp, normalize);
  const NextBeams next = {at<float>(next_scores), at<int64_t>(parents), at<int64_t>(codes),
                          at<int32_t>(next_nodes), at<float>(pruned)};
  BeamPrior mixed{};
  if (prior) mixed = {*prior, at<const float>(generator), at<float>(next_generator)};
  std::visit(
      [&](auto view) {
        check_beams(beams, view.codebook_size);
        cemg::beam_step(view, filter_or_all(filter), step, at<const float>(scores), at<const int32_t>(nodes),
                        users, beams, width, next, prior ? &mixed : nullptr);
      },
      trie.view);
}

}  // namespace

void check_beams(int64_t beams, int64_t codebook_size) {
  if (beams <= kMaxCandidates / codebook_size) return;
  throw std::invalid_argument(std::to_string(beams) + " beams with " + std::to_string(codebook_size) +
                              " codes each are more than 2^32 candidates; use fewer beams");
}

void bind_steps(py::module_& module) {
  py::native_enum<Normalize>(module, "Normalize", "enum.Enum")
      .value("VOCAB", Normalize::kVocab)
      .value("LEVEL", Normalize::kLevel)
      .value("VALID", Normalize::kValid)
      .finalize();
  module.def("trie_softmax", &softmax, ReleaseGil(), py::arg("trie"), py::arg("filter"), py::arg("logits"),
             py::arg("logsumexp"), py::arg("normalize"), py::arg("nodes"), py::arg("rows"), py::arg("out"));
  module.def("trie_beam_step", &beam_step, ReleaseGil(), py::arg("trie"), py::arg("filter"),
             py::arg("logits"), py::arg("logsumexp"), py::arg("normalize"), py::arg("scores"),
             py::arg("nodes"), py::arg("users"), py::arg("beams"), py::arg("width"), py::arg("next_scores"),
             py::arg("parents"), py::arg("codes"), py::arg("next_nodes"), py::arg("pruned"),
             py::arg("prior") = py::none(), py::arg("generator") = 0, py::arg("next_generator") = 0);
}

}  // namespace cemg::bindings
