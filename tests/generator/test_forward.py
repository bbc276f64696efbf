"""The fast forward pass of a Llama equals the Hugging Face module's: predictions, gradients, dropout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cemg import precision
from cemg.generator import BackboneConfig, GeneratorConfig, Prompter, Vocabulary, build_backbone
from cemg.generator.forward import PlainForward, forward_of
from cemg.generator.fused import add_with_dropout
from cemg.generator.llama import LlamaForward
from cemg.generator.losses import CodeLoss, Predictions
from cemg.generator.samples import Batch, Samples
from cemg.tokenizer import Catalog

LEVELS, SIZE, ITEMS = 3, 8, 40
CODES = torch.cartesian_prod(*[torch.arange(SIZE)] * LEVELS)[:: SIZE**LEVELS // ITEMS][:ITEMS]
CATALOG = Catalog.from_codes(CODES, SIZE)
Trained = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]  # logits, states, loss, gradients


def llama(dropout: float = 0.0, **values: object) -> tuple[torch.nn.Module, Vocabulary]:
    torch.manual_seed(0)
    shape: dict[str, object] = {"layers": 2, "dim": 48, "heads": 3, "dropout": dropout} | values
    config = BackboneConfig(kind="scratch", **{"architecture": "llama"} | shape)  # type: ignore[arg-type]
    model, vocabulary = build_backbone(config, LEVELS, SIZE, history_items=6)
    return model.train(), vocabulary


def batch_of(vocabulary: Vocabulary, lengths: tuple[int, ...] = (1, 4, 7, 12)) -> Batch:
    prompter = Prompter(vocabulary, CODES, history_items=6, seq2seq=False)
    samples = Samples(prompter, [np.arange(n, dtype=np.int32) + n for n in lengths])
    return samples.batch(range(len(samples)))


def trained(
    model: torch.nn.Module, vocabulary: Vocabulary, forward: Callable[[Batch], Predictions], loss: str
) -> Trained:
    batch = batch_of(vocabulary)
    code_loss = CodeLoss(vocabulary.tokens(CODES), CATALOG.trie, vocabulary, GeneratorConfig(loss=loss))
    made = forward(batch)
    value = code_loss(made, batch.targets)
    model.zero_grad()
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return made.logits().detach(), made.states.detach(), value.detach(), gradients


@pytest.mark.parametrize("loss", ["vocab", "valid"])
@pytest.mark.parametrize("shape", [{}, {"heads": 1, "dim": 16, "layers": 1}, {"ff": 24}, {"tied": False}])
def test_the_fast_forward_of_a_llama_equals_the_modules(shape, loss):
    model, vocabulary = llama(**shape)
    with torch.no_grad():  # norms start at 1, and a norm applied twice would not show
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    fast = forward_of(model, vocabulary, "float32")
    assert isinstance(fast, LlamaForward)
    mine = trained(model, vocabulary, fast, loss)
    theirs = trained(model, vocabulary, PlainForward(model, vocabulary, "float32"), loss)
    for own, other in zip(mine[:3], theirs[:3], strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    assert mine[3].keys() == theirs[3].keys()
    for name, gradient in mine[3].items():
        torch.testing.assert_close(gradient, theirs[3][name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bfloat16_rounds_the_loss_and_gradients_of_float32(architecture, monkeypatch):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda kind: True)
    model, vocabulary = llama(architecture=architecture)
    exact = trained(model, vocabulary, forward_of(model, vocabulary, "float32"), "valid")
    rounded = trained(model, vocabulary, forward_of(model, vocabulary, "bfloat16"), "valid")
    assert rounded[2].item() == pytest.approx(exact[2].item(), rel=1e-3)
    assert not torch.equal(rounded[2], exact[2])
    for name, gradient in exact[3].items():  # a few roundings of 2 ** -9 on the way
        assert rounded[3][name].dtype == torch.float32
        assert (rounded[3][name] - gradient).norm() < 0.04 * gradient.norm(), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bfloat16_is_float32_without_native_support(architecture, monkeypatch, capsys):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda kind: False)
    precision._print_note.cache_clear()
    model, vocabulary = llama(architecture=architecture)
    exact = trained(model, vocabulary, forward_of(model, vocabulary, "float32"), "valid")
    asked = trained(model, vocabulary, forward_of(model, vocabulary, "bfloat16"), "valid")
    assert torch.equal(asked[2], exact[2])
    assert capsys.readouterr().err.count("no native bfloat16 support; using float32") == 1


def test_dropout_keeps_the_mean_and_follows_the_seed():
    x, y = torch.zeros(400, 500), torch.ones(400, 500, requires_grad=True)
    torch.manual_seed(3)
    out = add_with_dropout(x, y, 0.2)
    assert sorted(out.unique().tolist()) == [0.0, 1.25]
    assert abs((out == 0).float().mean().item() - 0.2) < 4 * (0.2 * 0.8 / out.numel()) ** 0.5
    out.sum().backward()
    assert torch.equal(y.grad, out)
    torch.manual_seed(3)
    assert torch.equal(add_with_dropout(x, y, 0.2), out)
    assert not torch.equal(add_with_dropout(x, y, 0.2), out)


def test_dropout_acts_in_training_alone_and_where_the_module_has_it():
    model, vocabulary = llama(dropout=0.3)
    forward, batch = LlamaForward(model, vocabulary, torch.float32), batch_of(vocabulary)
    first, again = (forward(batch).states.detach() for _ in range(2))
    assert not torch.equal(first, again)
    model.eval()
    plain = PlainForward(model, vocabulary, "float32")
    torch.testing.assert_close(forward(batch).states, plain(batch).states, atol=1e-5, rtol=1e-5)


def test_other_models_take_the_modules_own_forward():
    model, vocabulary = llama()
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(48, 128, bias=False))
    assert isinstance(forward_of(model, vocabulary, "float32"), LlamaForward) is False
