"""The forward pass of a training step through the Hugging Face model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.generator.losses import FullPredictions, Predictions
from cemg.generator.samples import Batch
from cemg.generator.vocabulary import Vocabulary


def predict(model: PreTrainedModel, batch: Batch, vocabulary: Vocabulary) -> Predictions:
    """Predictions at the positions of the targets' codes."""
    if model.config.is_encoder_decoder:
        return _predict_seq2seq(model, batch, vocabulary)
    out = model(input_ids=batch.input_ids, use_cache=False, output_hidden_states=True)  # causal: no mask
    first = len(vocabulary.instruction)  # position of the last token before the codes

    def targets(rows: Tensor) -> Tensor:
        by_item = rows[:, first:-1].unflatten(1, (-1, vocabulary.levels))  # [B, T, L, ·]
        return by_item[batch.is_target]

    return FullPredictions(targets(out.logits), targets(out.hidden_states[-1]), vocabulary)


def _predict_seq2seq(model: PreTrainedModel, batch: Batch, vocabulary: Vocabulary) -> Predictions:
    inputs = torch.roll(batch.target_tokens, 1, 1)  # the start token, then all but the last code
    inputs[:, 0] = model.config.decoder_start_token_id
    out = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, decoder_input_ids=inputs,
        use_cache=False, output_hidden_states=True,
    )  # fmt: skip
    return FullPredictions(out.logits, out.decoder_hidden_states[-1], vocabulary)
