"""MMGRec and LlamaRec learn a planted pattern, resume exactly, and do not read test items."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cemg.baselines import graph_ids, loop
from cemg.baselines.graph_ids import GraphIdsConfig, quantize
from cemg.baselines.mmgrec import MMGRec, MMGRecConfig, children_of
from cemg.baselines.registry import Fitted, Job, fit
from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.evaluation import evaluate
from cemg.features import Features

MMGREC: dict[str, Any] = {
    "dim": 32, "modal_dim": 4, "graph_epochs": 20, "graph_batch": 256, "graph_rate": 0.03, "levels": 2,
    "codes": 8, "latent": 4, "tokenizer_epochs": 20, "layers": 1, "inner": 32, "dropout": 0.0, "beams": 20,
    "frozen": False, "learning_rate": 1e-2, "batch_size": 64, "epochs": 8, "schedule": "constant",
}  # fmt: skip


@pytest.fixture
def features(ring: Dataset, monkeypatch: pytest.MonkeyPatch) -> dict[str, Features]:
    """Texts of all items but two, images of a few."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, missing in (("text", 2), ("image", 20)):
        present = torch.arange(ring.num_items) >= missing
        values = torch.randn(ring.num_items, 12, generator=generator) * present[:, None]
        found[name] = Features(values, present)
    monkeypatch.setattr(graph_ids, "item_features", lambda job: found)
    return found


def trained(name: str, data: Dataset, folder: Path, **changes: Any) -> Fitted:
    settings = {"mmgrec": MMGREC}[name] | changes
    budget = settings.pop("budget", None)
    return fit(name, Job(data, folder, seed=1, budget=budget, settings=settings))


def with_other_test_items(data: Dataset) -> Dataset:
    changed = [np.append(s[:-1], (s[-1] + 7) % data.num_items) for s in data.sequences]
    return dataclasses.replace(data, sequences=[s.astype(np.int32) for s in changed])


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    model: Any = fitted.rank
    return dict(model.state_dict())


def same(one: Fitted, other: Fitted) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_mmgrec_learns_what_follows_the_items_of_a_set(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    fitted = trained("mmgrec", ring, tmp_path)
    found = evaluate(fitted.rank, ring.split(), progress=False)
    assert found.metrics_history_removed["HR@5"] > 0.7  # 0.2 at random
    lists = fitted.rank(ring.split().histories("test")[:7], 50)
    assert lists.shape == (7, 20)
    assert all(len({*row}) == 20 and min(row) >= 0 for row in lists.tolist())  # the trie has only items
    free = trained("mmgrec", ring, tmp_path / "free", trie=False, epochs=2)
    assert evaluate(free.rank, ring.split(), progress=False).short_lists > 0  # some beams are no items


def test_the_order_of_a_set_does_not_matter(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    fitted = trained("mmgrec", ring, tmp_path, epochs=1)
    model: Any = fitted.rank
    one, other = model.logits([np.array([3, 8, 5])]), model.logits([np.array([5, 3, 8])])
    found = one > -1e5
    assert torch.equal(found, other > -1e5) and torch.allclose(one[found], other[found], atol=1e-4)


def test_an_interrupted_mmgrec_gives_the_same_weights(
    ring: Dataset, features: dict[str, Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained("mmgrec", ring, tmp_path / "whole", epochs=3, dropout=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_print_epoch", lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained("mmgrec", ring, tmp_path / "parts", epochs=3, dropout=0.1)
    torch.rand(7)
    monkeypatch.setattr(graph_ids, "train_graph", None)  # the graph and the IDs are not trained again
    assert same(whole, trained("mmgrec", ring, tmp_path / "parts", epochs=3, dropout=0.1))
    with pytest.raises(UserError, match="belongs to another run"):
        trained("mmgrec", ring, tmp_path / "parts", epochs=3, graph_layers=1)


def test_mmgrec_does_not_read_the_test_items(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    one, two = (trained("mmgrec", data, tmp_path / name, epochs=1) for name, data in
                (("one", ring), ("two", with_other_test_items(ring))))  # fmt: skip
    assert same(one, two)


def test_the_budget_of_mmgrec_is_also_that_of_its_graph(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    fitted = trained("mmgrec", ring, tmp_path, budget=1e-6)
    assert "budget" in fitted.config["stopped"] and fitted.config["epochs_run"] == 1


def test_items_with_the_same_codes_are_told_apart_the_most_popular_first() -> None:
    vectors = torch.randn(6, 64).repeat_interleave(4, dim=0)  # four items each with the same vector
    counts = np.tile([5, 9, 1, 7], 6)
    codes = quantize(vectors, counts, GraphIdsConfig(codes=8, tokenizer_epochs=2), device="cpu")
    assert len(codes.unique(dim=0)) == 24
    assert codes[:, -1].view(6, 4)[0].argsort().tolist() == [1, 3, 0, 2]
    (first, *_, last) = children_of(codes)
    assert first.shape[0] == 2 and (last[:-1] >= 0).sum() == 24  # each leaf is an item


def test_the_cached_keys_of_a_search_give_the_states_of_a_whole_pass() -> None:
    torch.manual_seed(0)
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(3))
    config = MMGRecConfig(dim=8, modal_dim=2, heads=2, layers=2, levels=2)
    model = MMGRec(torch.randn(27, 8), codes, config).eval()
    memory, mask = model.encode(torch.tensor([[4, 7, 0], [1, 2, 9]]), torch.tensor([2, 3]))
    tokens = torch.tensor([[[9, 1, 4]], [[9, 0, 5]]])  # BOS and two codes
    whole, _ = model.states(tokens, memory, mask)
    past, parts = None, []
    for at in range(3):
        part, past = model.states(tokens[:, :, at : at + 1], memory, mask, past)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beams": 10}, "beams must be 20 or more"),
        ({"heads": 5}, "not divisible by heads"),
        ({"modal_dim": 40}, "must be more than 2"),
        ({"levels": 0}, "levels must be 1 or more"),
    ],
)
def test_wrong_settings_of_mmgrec(
    changes: dict[str, int], message: str, ring: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trained("mmgrec", ring, tmp_path, **changes)


def test_mmgrec_needs_texts_or_images(ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no item has a text or an image"):
        trained("mmgrec", ring, tmp_path)
