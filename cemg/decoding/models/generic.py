"""The model's own forward under a tree mask, for decoder-only models with plain attention.

All beams of a user are further positions of one sequence. A 4-D mask lets a beam attend to the prompt and its
ancestors, so there is one prefill and one copy of the prompt's KV cache per user.

B users, W beams, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from cemg.decoding.models.eval_mode import EvalModeState
from cemg.decoding.models.rows import RowsState, forward_arguments, plain
from cemg.decoding.protocol import DecoderPlan, DecoderState, Logits, LogitsRequest, Unsupported

WINDOWS = ("sliding_window", "attention_chunk_size")  # settings that limit how far back a layer attends
ATTENTION = ("attention", "full_attention", "global", "sliding_attention", "chunked_attention")


class GenericPlan(DecoderPlan):
    """A decoder-only model that applies a 4-D mask and ``position_ids``.

    A model with a sliding window runs one row per beam if a sequence does not fit in the window.

    Raises:
        Unsupported: For models that certainly do not apply them: encoder-decoders, ALiBi, recurrent and
            state-space layers, and attention with a mask of its own.
    """

    uses_model_forward = True

    def __init__(self, model: PreTrainedModel) -> None:
        names = forward_arguments(model)
        reason = _refusal(model, names)
        if reason is not None:
            raise Unsupported(reason)
        self.model = model
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24
        self.only_last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        text: Any = model.config.get_text_config(decoder=True)
        windows = [getattr(text, name, None) for name in WINDOWS]
        self.window = min((size for size in windows if size), default=None)

    def describe(self) -> str:
        return "the model's own forward"

    def new_state(self) -> DecoderState:
        tree = TreeMaskState(self)
        state = tree if self.window is None else WindowedState(self, self.window, tree)
        return EvalModeState(self.model, state)


def _refusal(model: PreTrainedModel, names: set[str]) -> str | None:
    """Why the tree mask cannot be exact for this model; None if no reason is known."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = {
        kind
        for name in ("layer_types", "layers_block_type", "attention_layers")
        for kind in getattr(config, name, None) or ()
    }
    other = sorted(kinds - set(ATTENTION))
    if model.config.is_encoder_decoder:
        return "an encoder-decoder"
    if getattr(config, "alibi", False) or config.model_type in ("mpt", "bloom"):
        return "ALiBi positions, which depend on the place in the cache"
    if getattr(plain(model), "_is_stateful", False):
        return "layers with a recurrent state"
    if other:
        return f"layers of the type {', '.join(other)}"
    if not {"position_ids", "attention_mask"} <= names:
        return "a forward without position_ids or attention_mask"
    return None


class TreeMaskState:
    """The cache of the prompts and of all beams, and the ancestors of each beam."""

    def __init__(self, plan: GenericPlan) -> None:
        self.plan = plan
        # dynamic, so that every layer keeps all positions; the masks of ``decode_step`` do the rest
        self.cache: Cache = DynamicCache()

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        logits = self._forward(input_ids, attention_mask, positions, **self.plan.only_last)
        self.prompt = attention_mask.bool()  # [B, S]
        self.position = attention_mask.sum(1)  # [B] position of the next token
        self.ancestors: Tensor | None = (
            None  # [B, W, fed] bool: the tokens of earlier steps that a beam extends
        )
        return Logits.of(logits[:, -1:], request)

    def reset_to_prefill(self) -> None:
        if self.ancestors is not None:
            self.cache.crop(-self.ancestors.shape[2])
        self.position, self.ancestors = self.prompt.sum(1), None

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        batch, beams = tokens.shape
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        if self.ancestors is None:  # the first step: all beams extend the prompt
            self.ancestors = itself
        else:
            index = parents.long().clamp_min(0)[:, :, None].expand(-1, -1, self.ancestors.shape[2])
            self.ancestors = torch.cat((self.ancestors.gather(1, index), itself), dim=2)
        prompt = self.prompt[:, None].expand(-1, beams, -1)
        visible = torch.cat((prompt, self.ancestors), dim=2)  # [B, W, S + steps·W]
        dtype = self.plan.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        mask = mask.masked_fill(~visible, torch.finfo(dtype).min)
        logits = self._forward(tokens, mask[:, None], self.position[:, None].expand(-1, beams))
        self.position = self.position + 1
        return Logits.of(logits, request)

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, **more: int) -> Tensor:
        """Logits [B, n, V] after ``tokens`` at ``positions``, both [B, n]."""
        logits: Tensor = self.plan.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True,
            **{self.plan.cache_name: self.cache}, **more,
        ).logits  # fmt: skip
        return logits


class WindowedState:
    """The tree mask while all sequences fit in the model's window, then one row per beam.

    Past the window, layers attend to different ranges, so only the model's own masks are correct.
    """

    def __init__(self, plan: GenericPlan, window: int, tree: TreeMaskState) -> None:
        self.plan, self.window, self.tree = plan, window, tree
        self.state: TreeMaskState | RowsState = tree
        self.steps: list[tuple[Tensor, Tensor]] = []  # tokens and parents of each step so far

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        self.prompts = input_ids, attention_mask
        if input_ids.shape[1] > self.window:
            self.state = RowsState(self.plan.model, cached=True)
        return self.state.prefill(input_ids, attention_mask, request, num_tokens)

    def reset_to_prefill(self) -> None:
        self.steps = []
        self.state.reset_to_prefill()

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        length = self.prompts[0].shape[1] + len(self.steps) + 1
        if self.state is self.tree and length > self.window:
            self.state = RowsState(self.plan.model, cached=True)
            self.state.prefill(*self.prompts, request)
            for step in self.steps:
                self.state.decode_step(*step, request)
        self.steps.append((tokens, parents))
        return self.state.decode_step(tokens, parents, request)
