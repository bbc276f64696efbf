"""The forward pass of a training step: that of the Hugging Face model, or a faster one with equal results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from cemg.errors import UserError
from cemg.generator.branches import ItemInputs
from cemg.generator.llama import LlamaForward
from cemg.generator.losses import FullPredictions, Predictions
from cemg.generator.samples import Batch
from cemg.generator.vocabulary import Vocabulary
from cemg.precision import product_dtype


def forward_of(
    model: PreTrainedModel, vocabulary: Vocabulary, dtype: str, inputs: ItemInputs | None = None, *,
    plain: bool = False, checkpointed: bool = False,
) -> Callable[[Batch], Predictions]:  # fmt: skip
    """Returns the fastest forward pass for a model on its device.

    Args:
        model: The model, on its device.
        vocabulary: The tokens of the codes.
        dtype: "float32" or "bfloat16" (mixed precision).
        inputs: Makes the inputs of histories with one token per item; None for tokens of codes.
        plain: Whether the model's own forward pass is used in any case.
        checkpointed: Whether the activations within a layer are computed again in the backward pass.

    Raises:
        UserError: The model cannot compute them again.
    """
    if not plain and LlamaForward.supports(model):
        products = product_dtype(dtype, model.device)
        return LlamaForward(model, vocabulary, products, inputs, checkpointed=checkpointed)
    if checkpointed:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"{type(model).__name__} has no gradient checkpointing",
                fix="--set generator.gradient_checkpointing=false",
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PlainForward(model, vocabulary, dtype, inputs)


class PlainForward:
    """Predictions of any Hugging Face model, with autocast for bfloat16."""

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, dtype: str, inputs: ItemInputs | None = None
    ) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.bfloat16 = product_dtype(dtype, model.device) is torch.bfloat16
        self.inputs = inputs

    def __call__(self, batch: Batch) -> Predictions:
        run = self._seq2seq if self.model.config.is_encoder_decoder else self._causal
        if self.inputs is not None and run == self._causal:
            run = self._branches
        if not self.bfloat16:
            return run(batch)
        device = self.model.device.type
        # on a CPU, the fused attention's bfloat16 backward takes ten times as long as matrix products
        attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
        with torch.autocast(device, torch.bfloat16), attention:
            return run(batch)

    def _causal(self, batch: Batch) -> Predictions:
        ids = batch.input_ids[:, :-1]  # the last token predicts nothing; the causal mask hides the padding
        out = self.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        first = len(self.vocabulary.instruction)  # position of the last token before the codes

        def targets(rows: Tensor) -> Tensor:
            by_item: Tensor = rows[:, first:].unflatten(1, (-1, self.vocabulary.levels))
            return by_item[batch.is_target]  # [n, L, ·]

        return FullPredictions(targets(out.logits), targets(out.hidden_states[-1]), self.vocabulary)

    def _branches(self, batch: Batch) -> Predictions:
        assert self.inputs is not None
        x, branches = self.inputs(batch)
        rate = getattr(self.model.get_input_embeddings(), "share", 0.0)  # of a layer that is not called
        out = self.model(
            inputs_embeds=F.dropout(x, rate, self.model.training), position_ids=branches.positions,
            attention_mask=torch.where(branches.reads, 0.0, torch.finfo(x.dtype).min)[:, None],
            use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        rows, hidden = (part.flatten(0, 1)[branches.states] for part in (out.logits, out.hidden_states[-1]))
        return FullPredictions(rows, hidden, self.vocabulary)

    def _seq2seq(self, batch: Batch) -> Predictions:
        inputs = torch.roll(batch.target_tokens, 1, 1)  # the start token, then all but the last code
        inputs[:, 0] = self.model.config.decoder_start_token_id
        read: dict[str, Tensor] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.inputs is not None:
            x, mask = self.inputs.of_encoder(batch, self.vocabulary.eos)
            read = {"inputs_embeds": x, "attention_mask": mask}
        out = self.model(**read, decoder_input_ids=inputs, use_cache=False, output_hidden_states=True)
        return FullPredictions(out.logits, out.decoder_hidden_states[-1], self.vocabulary)
