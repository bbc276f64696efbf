"""Histories with one token per item: training predicts what a search with the same weights computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from cemg.decoding import Decoder
from cemg.generator import BackboneConfig, GeneratorConfig, Prompter, Vocabulary, build_backbone
from cemg.generator.branches import ItemInputs
from cemg.generator.forward import PlainForward, forward_of
from cemg.generator.item_tokens import ItemVectors, add_item_embedding, keep_items, with_item_tokens
from cemg.generator.llama import LlamaForward
from cemg.generator.losses import CodeLoss, ItemLoss, Predictions
from cemg.generator.samples import Batch, Samples
from cemg.tokenizer import Catalog

LEVELS, SIZE, ITEMS = 3, 8, 40
CODES = torch.cartesian_prod(*[torch.arange(SIZE)] * LEVELS)[:: SIZE**LEVELS // ITEMS][:ITEMS]
CATALOG = Catalog.from_codes(CODES, SIZE)
TRAIN = [np.arange(n, dtype=np.int32) + n for n in (1, 4, 7, 12)]
KINDS = {"llama": ("scratch", "llama"), "gpt2": ("scratch", "gpt2"), "t5": ("t5", "gpt2")}


class Made:
    """A small model with embeddings of items, and what its training needs."""

    def __init__(self, kind: str, loss: str = "valid", dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        name, architecture = KINDS[kind]
        config = BackboneConfig(
            kind=name, architecture=architecture, layers=2, dim=48, heads=3, head_dim=16, dropout=dropout
        )  # type: ignore[arg-type]
        model, vocabulary = build_backbone(config, LEVELS, SIZE, history_items=6)
        add_item_embedding(model, ITEMS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        self.model: PreTrainedModel = model.eval()
        self.vocabulary = replace(vocabulary, items=ITEMS)
        self.tokens = vocabulary.tokens(CODES)
        self.prompter = Prompter(
            self.vocabulary, CODES, history_items=6, seq2seq=model.config.is_encoder_decoder
        )
        self.loss = CodeLoss(self.tokens, CATALOG.trie, self.vocabulary, GeneratorConfig(loss=loss))
        self.vectors = ItemVectors(self.model, self.tokens)
        self.inputs = ItemInputs(self.vectors, self.loss.depths, self.prompter.opening)

    def batch(self) -> Batch:
        samples = Samples(self.prompter, TRAIN)
        return samples.batch(range(len(samples)))

    def served(self) -> PreTrainedModel:
        return with_item_tokens(self.model, self.tokens)


def histories_of(batch: Batch, samples: Samples) -> list[np.ndarray]:
    """The items before each target of a batch of all samples."""
    found = []
    for user, begin, target, end in samples.spans:
        found += [samples.train[user][begin:at] for at in range(target, end)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_training_predicts_what_the_served_model_computes(kind):
    made = Made(kind, loss="vocab")
    batch = made.batch()
    predictions = forward_of(made.model, made.vocabulary, "float32", made.inputs)(batch)
    served, found = made.served(), []
    samples = Samples(made.prompter, TRAIN)
    for history, item in zip(histories_of(batch, samples), batch.targets.tolist(), strict=True):
        prompt, codes = made.prompter.prompt(history), made.tokens[item]
        if kind == "t5":
            start = torch.tensor([served.config.decoder_start_token_id])
            ids = torch.cat((start, codes[:-1]))[None]
            logits = served(input_ids=prompt[None], decoder_input_ids=ids).logits[0]
        else:
            logits = served(input_ids=torch.cat((prompt, codes[:-1]))[None]).logits[0, -LEVELS:]
        found.append(logits[:, : made.vocabulary.item_token_start])
    torch.testing.assert_close(predictions.logits(), torch.stack(found), atol=2e-5, rtol=1e-4)


def gradients(made: Made, predictions: Predictions, batch: Batch) -> dict[str, torch.Tensor]:
    made.model.zero_grad()
    torch.manual_seed(1)
    loss = made.loss(predictions, batch.targets) + ItemLoss(made.vectors)(predictions, batch.targets)
    loss.backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["vocab", "valid"])
def test_the_fast_forward_of_a_llama_equals_the_modules(loss):
    made = Made("llama", loss)
    batch = made.batch()
    fast = forward_of(made.model, made.vocabulary, "float32", made.inputs)
    assert isinstance(fast, LlamaForward)
    mine = gradients(made, fast(batch), batch)
    theirs = gradients(made, PlainForward(made.model, made.vocabulary, "float32", made.inputs)(batch), batch)
    assert mine.keys() == theirs.keys() and mine["item_embedding.weight"].any()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_codes_without_an_alternative_are_not_read_in_training():
    lone = Made("llama", "valid")
    _, branches = lone.inputs(lone.batch())
    _, whole = Made("llama", "vocab").inputs(lone.batch())
    assert branches.tokens.shape[1] < whole.tokens.shape[1]
    depths = [
        max([1] + [n + 1 for n in range(LEVELS) if (CODES[:, :n] == codes[:n]).all(1).sum() > 1 + (
            (CODES[:, : n + 1] == codes[: n + 1]).all(1).sum() - 1)])
        for codes in CODES
    ]  # fmt: skip
    assert lone.loss.depths.tolist() == depths


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_reads_the_tokens_of_items(kind):
    made = Made(kind)
    served = made.served()
    prompts = made.prompter.batch([np.array([3, 1, 39]), np.array([7])])
    assert prompts[0].max() == made.vocabulary.item_token_start + 39
    fast, plain = (
        Decoder(served, CATALOG, made.vocabulary.code_token_start, "valid", backend=backend).decode(
            *prompts, beams=10
        )
        for backend in (None, "reference")
    )
    assert torch.equal(fast.items, plain.items)
    torch.testing.assert_close(fast.scores, plain.scores, atol=1e-4, rtol=0)


def test_an_item_that_was_added_later_is_read_by_its_codes_and_is_ranked():
    made = Made("llama")
    added = torch.tensor([[7, 7, 1], [0, 0, 7]])
    catalog = CATALOG.extended(added, [ITEMS, ITEMS + 1])
    served = with_item_tokens(made.model, made.vocabulary.tokens(catalog.codes))
    start = made.vocabulary.item_token_start
    table = served.get_input_embeddings().weight
    assert len(table) == start + ITEMS + 2
    assert torch.equal(table[:start], made.model.get_input_embeddings().weight)
    torch.testing.assert_close(table[start + ITEMS], table[made.vocabulary.tokens(added[0])].sum(0))
    assert torch.equal(table[start : start + ITEMS], made.vectors(torch.arange(ITEMS)))
    vocabulary = replace(made.vocabulary, items=ITEMS + 2)
    prompter = Prompter(vocabulary, catalog.codes, history_items=6, seq2seq=False)
    decoder = Decoder(served, catalog, vocabulary.code_token_start, "valid")
    found = decoder.decode(*prompter.batch([np.array([3, ITEMS + 1])]), beams=len(catalog))
    assert sorted(found.items[0].tolist()) == list(range(ITEMS + 2))
    assert found.scores[0].exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_removed_items_lose_their_tokens_in_an_export():
    made = Made("llama")
    kept = [row for row in range(ITEMS) if row not in (0, 17)]
    start = made.vocabulary.item_token_start
    smaller = keep_items(made.served(), start, kept)
    assert smaller.get_input_embeddings().num_embeddings == start + len(kept)
    assert torch.equal(
        smaller.get_input_embeddings().weight[start:],
        made.served().get_input_embeddings().weight[start:][kept],
    )


@pytest.mark.parametrize("negatives", [1000, ITEMS - 7])
def test_the_item_loss_is_a_softmax_over_all_items_or_an_estimate_of_it(monkeypatch, negatives):
    monkeypatch.setattr("cemg.generator.losses.NEGATIVES", negatives)
    made = Made("llama")
    batch = made.batch()
    predictions = forward_of(made.model, made.vocabulary, "float32", made.inputs)(batch)
    table = made.vectors(torch.arange(ITEMS))
    logits = predictions.states[:, 0] @ table.t()
    losses = []
    for seed in range(200 if negatives < ITEMS else 1):
        torch.manual_seed(seed)
        losses.append(ItemLoss(made.vectors)(predictions, batch.targets).item())
    assert np.mean(losses) == pytest.approx(F.cross_entropy(logits, batch.targets).item(), rel=0.02)
    assert (np.std(losses) > 0) == (negatives < ITEMS)


def test_a_vocabulary_without_tokens_of_items_is_written_as_before():
    plain = Vocabulary(LEVELS, SIZE, 3, 0, 1, 2)
    assert "items" not in plain.to_dict()
    assert replace(plain, items=5).to_dict()["items"] == 5 and replace(plain, items=5).size == plain.size + 5
