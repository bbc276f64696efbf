"""Checks which modules a fast path may read: plain modules of a known model, and LoRA over them.

A fast path multiplies with a module's weight and never calls its ``forward``. That is correct only if the
module is exactly of the expected class, and nothing is attached that changes its result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cemg.decoding.protocol import Unsupported

TORCH = {
    "torch.nn.modules.linear.Linear", "torch.nn.modules.sparse.Embedding", "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.container.ModuleList", "torch.nn.modules.normalization.LayerNorm",
    "transformers.pytorch_utils.Conv1D",
    "cemg.generator.dropout.DropoutLinear", "cemg.generator.dropout.DropoutEmbedding",
}  # fmt: skip
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
LORA = "peft.tuners.lora.layer.Linear"
SAVED = "peft.utils.other.ModulesToSaveWrapper"  # holds a fully trained copy of a layer
PEFT = {
    LORA, SAVED, "peft.tuners.lora.model.LoraModel", "peft.peft_model.PeftModel",
    "peft.peft_model.PeftModelForCausalLM", "peft.peft_model.PeftModelForSeq2SeqLM",
    "torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ParameterDict",
    "torch.nn.modules.linear.Identity",
}  # fmt: skip
IDLE_HOOKS = {  # of transformers: they collect hidden states, or make embeddings require gradients
    ("transformers.utils.output_capturing", "output_capturing_hook"),
    ("transformers.modeling_utils", "make_inputs_require_grads"),
}
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unwrapped(model: Any, classes: Iterable[str]) -> Any:
    """The model without PEFT's wrapper: one of ``classes`` of transformers, with plain modules only.

    Raises:
        Unsupported: For any other class; for a module of a class that the family does not have, or with a
            hook, a replaced ``forward`` or a weight that is quantized, sharded or on another device; and for
            adapters other than LoRA.
    """
    source = _without_adapters(model)
    home = type(source).__module__
    if type(source).__name__ not in classes or not home.startswith("transformers.models."):
        raise Unsupported(f"no fast path for the class {type(source).__name__} ({_class_of(source)})")
    attention = getattr(source.config, "_attn_implementation", None)
    if attention not in ATTENTION:
        raise Unsupported(f"the attention implementation {attention}")
    known = TORCH | PEFT if hasattr(model, "peft_config") else TORCH
    for name, module in model.named_modules():
        if _class_of(module) == LORA:
            _check_lora(module)
        if type(module).__module__ not in (home, *ACTIVATIONS) and _class_of(module) not in known:
            raise Unsupported(f"{name or 'the model'} is not a plain layer but {_class_of(module)}")
        _check_attachments(name or "the model", module)
        for parameter, weight in module.named_parameters(recurse=False):
            _check_weight(f"{name}.{parameter}", weight, source.device)
    return source


def _class_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _without_adapters(model: Any) -> Any:
    if not hasattr(model, "peft_config"):
        return model
    kinds = {str(config.peft_type.value) for config in model.peft_config.values()}
    if kinds != {"LORA"}:
        raise Unsupported(f"adapters of the kind {', '.join(sorted(kinds))}")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_attachments(name: str, module: nn.Module) -> None:
    replaced = vars(module).get("forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
        raise Unsupported(f"the forward of {name} is replaced")
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if (getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) not in IDLE_HOOKS:
            raise Unsupported(f"a hook on {name}")


def _check_weight(name: str, weight: Any, device: torch.device) -> None:
    if type(weight) is not nn.Parameter:
        raise Unsupported(f"{name} is a {type(weight).__name__}, not a plain weight")
    if weight.dtype not in DTYPES:
        raise Unsupported(f"{name} is {weight.dtype}")
    if weight.device != device:
        raise Unsupported(f"{name} is on {weight.device}, other weights on {device}")


def linear_of(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a linear layer, with LoRA merged.

    Raises:
        Unsupported: For adapters that are not added to the weight and bias.
    """
    kind = _class_of(module)
    if kind == SAVED:
        module = _saved(module)
    elif kind == LORA:
        return _with_lora(module)
    if not isinstance(module, (nn.Linear, nn.Embedding)) and not kind.endswith(".Conv1D"):
        raise Unsupported(f"a {kind} in the place of a linear layer")
    bias = getattr(module, "bias", None)
    return module.weight.detach(), None if bias is None else bias.detach()


def weight_of(module: Any) -> Tensor:
    """The weight of an embedding, or of a linear layer without a bias, with LoRA merged."""
    weight, bias = linear_of(module)
    if bias is not None:
        raise Unsupported("a bias where the model has none")
    return weight


def _saved(wrapper: Any) -> Any:
    """The copy that PEFT trained."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or len(active) != 1 or active[0] not in wrapper.modules_to_save:
        raise Unsupported("adapters that are switched off, or several at once")
    return wrapper.modules_to_save[active[0]]


def _check_lora(layer: Any) -> None:
    if any(layer.use_dora.values()) or layer.disable_adapters:
        raise Unsupported("adapters that are switched off, or scale the weight (DoRA)")
    for name, variant in getattr(layer, "lora_variant", {}).items():
        raise Unsupported(f"the adapter {name} is a {type(variant).__name__}, not plain LoRA")


def _with_lora(layer: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = linear_of(layer.get_base_layer())
    for name in () if layer.merged else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        weight = weight + layer.get_delta_weight(name).detach()
        added = layer.lora_B[name].bias
        if added is not None:
            added = added.detach() * layer.scaling[name]
            bias = added if bias is None else bias + added
    return weight, bias
