"""The path of a model: a fast one only if every module is a plain one, else the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cemg.decoding import Decoder, TransformersDecoder
from cemg.errors import UserError
from cemg.generator import BackboneConfig, build_backbone

from .conftest import START, Bench, random_catalog
from .models.fast_models import SHAPES, build, with_adapters

BEAMS = 20
OWN = "the model's own forward"


def check(model: Any, same_lists: Callable[..., None], path: str = OWN) -> str:
    """Asserts that lists equal those of ``generate()`` and that the path starts with ``path``; returns it."""
    catalog = random_catalog(60, 1)
    decoder = Decoder(model, catalog, START)
    assert decoder.path.startswith(path), decoder.path
    prompts = Bench(model, catalog).prompts([5, 3])
    same_lists(
        decoder.decode(*prompts, BEAMS), TransformersDecoder(model, catalog, START).decode(*prompts, BEAMS)
    )
    return decoder.path


class Rounded(nn.Linear):
    """Stands for a quantized layer: another class and forward than nn.Linear's, but a similar weight."""

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.abs().max() / 7
        return nn.functional.linear(input, (self.weight / scale).round() * scale, self.bias)


def round_weights(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.__class__ = Rounded


def hook_the_head(model: Any) -> None:
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: out.tanh() * 3)


def hook_before_a_layer(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))


def replace_a_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = MethodType(lambda self, x: type(self).forward(self, x) * 2, mlp)


def normalize_a_weight(model: Any) -> None:
    layer = nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def double_a_norm(model: Any) -> None:
    class Doubled(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    model.model.norm.__class__ = Doubled


def drop_a_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm = nn.Identity()


def half_scores(module: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, *args, scaling=scaling / 2, **kwargs)


def replace_the_attention(model: Any) -> None:
    AttentionInterface.register("half_scores", half_scores)
    AttentionMaskInterface.register("half_scores", sdpa_mask)
    model.config._attn_implementation = "half_scores"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (round_weights, "layers.1.mlp.up_proj is not a plain layer"),
        (hook_the_head, "a hook on lm_head"),
        (hook_before_a_layer, "a hook on model.layers.0.mlp"),
        (replace_a_forward, "the forward of model.layers.0.mlp is replaced"),
        (normalize_a_weight, "ParametrizedLinear"),
        (double_a_norm, "model.norm is not a plain layer"),
        (drop_a_norm, "Identity"),
        (replace_the_attention, "half_scores"),
    ],
)
def test_a_changed_module_runs_on_the_models_own_forward(change, reason, same_lists):
    model = build(*SHAPES["llama, as many key heads"])
    plain = Decoder(model, random_catalog(60, 1), START)
    assert plain.path.startswith("fast")
    change(model)
    assert reason in check(model, same_lists)
    with pytest.raises(UserError, match="does not serve this model"):
        Decoder(model, random_catalog(60, 1), START, backend="native")


class Quieter(transformers.T5ForConditionalGeneration):
    """A T5 with its own forward, which scales the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 3
        return out


def test_a_subclass_of_a_known_model_runs_on_its_own_forward(same_lists):
    model = build(*SHAPES["t5 tied"])
    model.__class__ = Quieter
    assert "Quieter" in check(model, same_lists)


def test_weights_of_an_unknown_class_run_on_the_models_own_forward():
    class Marked(nn.Parameter):
        """Stands for the classes that torchao and bitsandbytes use instead of nn.Parameter."""

    model: Any = build(*SHAPES["gpt2"])
    model.transformer.h[0].mlp.c_fc.weight = Marked(model.transformer.h[0].mlp.c_fc.weight.data)
    assert "c_fc.weight is a Marked" in Decoder(model, random_catalog(60, 1), START).path
    model = build(*SHAPES["gpt2"])
    model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight.data.double())
    with pytest.raises(UserError, match=r"ln_f.weight is torch.float64"):
        Decoder(model, random_catalog(60, 1), START, backend="torch")


@pytest.mark.parametrize("settings", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_model_quantized_by_bitsandbytes_returns_the_lists_of_generate(settings, same_lists, tmp_path):
    pytest.importorskip("bitsandbytes")
    kind, shape = SHAPES["llama, as many key heads"]
    build(kind, shape | {"hidden_size": 64, "intermediate_size": 128}).save_pretrained(tmp_path)
    options = settings | ({"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in settings else {})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(**options), device_map="cpu"
    )
    assert "bitsandbytes.nn.modules.Linear" in check(model, same_lists)


def test_hooks_that_change_nothing_keep_the_fast_path(same_lists):
    """transformers leaves hooks after hidden states were requested, and for gradient checkpointing."""
    model = build(*SHAPES["llama, as many key heads"])
    model(torch.tensor([[5, 6]]), output_hidden_states=True, output_attentions=True)
    model.enable_input_require_grads()
    assert any(module._forward_hooks for module in model.modules())
    check(model, same_lists, path="fast")


def test_dropout_of_a_llama_from_scratch_keeps_the_fast_path(same_lists):
    torch.manual_seed(0)
    config = BackboneConfig(architecture="llama", layers=2, dim=32, heads=2, dropout=0.5)
    model, vocabulary = build_backbone(config, 3, 6, history_items=6)
    assert vocabulary.code_token_start == START
    model.config.initializer_range = 0.2
    check(model.eval(), same_lists, path="fast")


def test_a_model_cut_to_fewer_layers_runs_only_those(same_lists):
    model = build(*SHAPES["llama, as many key heads"])
    model.config.num_hidden_layers = 1
    check(model, same_lists, path="fast")


@pytest.mark.parametrize("shape", ["t5 tied", "gpt2", "qwen2, biases of three projections"])
def test_the_fast_path_applies_lora_with_a_bias(shape, same_lists):
    """Also if the base layer has no bias, and if only some of a layer's projections have one."""
    adapted = with_adapters(build(*SHAPES[shape]), lora_bias=True)
    check(adapted, same_lists, path="fast")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": list(range(START, START + 18))},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    ],
)
def test_adapters_of_each_kind_return_the_lists_of_generate(options, same_lists):
    adapted = with_adapters(build(*SHAPES["qwen3, normed heads"]), **options)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    embedded = "embed_tokens" in options["target_modules"] or "trainable_token_indices" in options
    check(adapted, same_lists, path=OWN if embedded or options.get("use_dora") else "fast")


def test_adapters_without_pefts_wrapper_are_applied(same_lists):
    """As transformers' own ``load_adapter`` adds them."""
    from peft import LoraConfig, inject_adapter_in_model

    model = build(*SHAPES["llama, as many key heads"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    check(model.eval(), same_lists, path="fast")


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"n_inner": 40, "layer_norm_epsilon": 0.1}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"activation_function": "quick_gelu"}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("llama with biases", {"rms_norm_eps": 0.1, "hidden_act": "gelu"}),
        ("llama with biases", {"head_dim": 4}),
        ("llama with biases", {"tie_word_embeddings": True}),
        ("llama with biases", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama with biases", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                   "original_max_position_embeddings": 16}}),
        ("llama with biases", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                                                   "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
                                                   "original_max_position_embeddings": 16}}),
        ("llama with biases", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                   "partial_rotary_factor": 0.5}}),
        ("qwen3, normed heads", {"attention_bias": True, "head_dim": 4}),
        ("t5 tied", {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 4,
                     "relative_attention_max_distance": 5, "layer_norm_epsilon": 0.1}),
        ("t5 tied", {"tie_word_embeddings": False}),
        ("mt5", {"feed_forward_proj": "relu", "tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_every_path_follows_the_settings_that_change_the_computation(shape, settings, same_lists):
    kind, plain = SHAPES[shape]
    model = build(kind, plain | settings)
    check(model, same_lists, path="")
    model.config._attn_implementation = "eager"  # where GPT-2 reorders, and Llama reads other code
    check(model, same_lists, path="")
