// The structs of the decoder: weights, positions, and what a step reads and writes.
#include <utility>
#include <vector>

#include "bindings.h"
#include "cemg/transformer_cpu.h"

namespace cemg::bindings {
namespace {

Linear make_linear(int64_t in_features, int64_t out_features, Address panels, Address bias) {
  return {in_features, out_features, at<const float>(panels), at<const float>(bias)};
}

Norm make_norm(Address weight, Address bias, float eps) {
  return {at<const float>(weight), at<const float>(bias), eps};
}

PositionTables make_positions(Address embedding, Address cosine, Address sine, Address bias) {
  return {at<const float>(embedding), at<const float>(cosine), at<const float>(sine), at<const float>(bias)};
}

Transformer make_transformer(int64_t hidden_size, int64_t heads, int64_t kv_heads, int64_t head_dim,
                             float attention_scale, Address embedding, int64_t vocabulary,
                             const Norm& final_norm, float final_scale) {
  return {hidden_size, heads,      kv_heads,    head_dim, attention_scale, at<const float>(embedding),
          vocabulary,  final_norm, final_scale, {}};
}

TransformerLayer make_layer(const Norm& attention_norm, const Linear& qkv, const Norm& query_norm,
                            const Norm& key_norm, const Linear& attention_out, const Norm& cross_norm,
                            const Linear& cross_query, const Linear& cross_key_value, const Linear& cross_out,
                            const Norm& feed_forward_norm, const Linear& gate, const Linear& up,
                            const Linear& down, Activation activation) {
  return {attention_norm, qkv,
          query_norm,     key_norm,
          attention_out,  cross_norm,
          cross_query,    cross_key_value,
          cross_out,      feed_forward_norm,
          gate,           up,
          down,           activation};
}

void set_code_table(Transformer& model, Address table, int64_t first_code, int64_t num_codes) {
  model.code_table = at<const float>(table);
  model.first_code = first_code;
  model.num_codes = num_codes;
}

void bind_weights(py::module_& module) {
  py::native_enum<Activation>(module, "Activation", "enum.Enum")
      .value("NONE", Activation::kNone)
      .value("RELU", Activation::kRelu)
      .value("SILU", Activation::kSilu)
      .value("GELU", Activation::kGelu)
      .value("GELU_TANH", Activation::kGeluTanh)
      .finalize();
  py::class_<Linear>(module, "Linear")
      .def(py::init(&make_linear), py::kw_only(), py::arg("in_features") = 0, py::arg("out_features") = 0,
           py::arg("panels") = 0, py::arg("bias") = 0);
  py::class_<Norm>(module, "Norm")
      .def(py::init(&make_norm), py::kw_only(), py::arg("weight") = 0, py::arg("bias") = 0,
           py::arg("eps") = 0.0f);
  py::class_<TransformerLayer>(module, "TransformerLayer")
      .def(py::init(&make_layer), py::kw_only(), py::arg("attention_norm"), py::arg("qkv"),
           py::arg_v("query_norm", Norm{}, "Norm()"), py::arg_v("key_norm", Norm{}, "Norm()"),
           py::arg("attention_out"), py::arg_v("cross_norm", Norm{}, "Norm()"),
           py::arg_v("cross_query", Linear{}, "Linear()"), py::arg_v("cross_key_value", Linear{}, "Linear()"),
           py::arg_v("cross_out", Linear{}, "Linear()"), py::arg("feed_forward_norm"),
           py::arg_v("gate", Linear{}, "Linear()"), py::arg("up"), py::arg("down"), py::arg("activation"));
  py::class_<Transformer>(module, "Transformer")
      .def(py::init(&make_transformer), py::kw_only(), py::arg("hidden_size"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("attention_scale"), py::arg("embedding"),
           py::arg("vocabulary"), py::arg("final_norm"), py::arg("final_scale"))
      .def(
          "add_layer",
          [](Transformer& model, const TransformerLayer& layer) { model.layers.push_back(layer); },
          py::arg("layer"))
      .def("set_code_table", &set_code_table, py::kw_only(), py::arg("table"), py::arg("first_code"),
           py::arg("num_codes"));
}

}  // namespace

void bind_decoder(py::module_& module) {
  bind_weights(module);
  py::class_<PositionTables>(module, "PositionTables")
      .def(py::init(&make_positions), py::kw_only(), py::arg("embedding") = 0, py::arg("cosine") = 0,
           py::arg("sine") = 0, py::arg("bias") = 0);
  py::class_<Prompts>(module, "Prompts")
      .def(py::init([](Address tokens, Address mask, int64_t batch, int64_t length) {
             return Prompts{at<const int64_t>(tokens), at<const int64_t>(mask), batch, length};
           }),
           py::kw_only(), py::arg("tokens"), py::arg("mask"), py::arg("batch"), py::arg("length"));
  py::class_<BeamInput>(module, "BeamInput")
      .def(py::init([](Address tokens, Address parents, Address active, int64_t beams) {
             return BeamInput{at<const int64_t>(tokens), at<const int64_t>(parents),
                              at<const uint8_t>(active), beams};
           }),
           py::kw_only(), py::arg("tokens"), py::arg("parents"), py::arg("active") = 0, py::arg("beams"));
  py::class_<LogitsRequest>(module, "LogitsRequest")
      .def(py::init([](const Linear& columns, const Linear& vocabulary, Address logits, Address logsumexp) {
             return LogitsRequest{columns, vocabulary, at<float>(logits), at<float>(logsumexp)};
           }),
           py::kw_only(), py::arg("columns"), py::arg_v("vocabulary", Linear{}, "Linear()"),
           py::arg("logits"), py::arg("logsumexp") = 0);
  py::class_<ProfileEvent>(module, "ProfileEvent")
      .def_property_readonly("name", [](const ProfileEvent& event) { return std::string(event.name); })
      .def_readonly("end", &ProfileEvent::end);
}

}  // namespace cemg::bindings
