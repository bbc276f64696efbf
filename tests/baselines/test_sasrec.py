"""SASRec: causality, both losses, learning, and trainings that are interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg.baselines import Sasrec, SasrecConfig, SasrecRanker, train_sasrec
from cemg.baselines.sasrec_training import draw_negatives, loss_of
from cemg.baselines.sequences import training_batches
from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.evaluation import evaluate

ITEMS = 30
SMALL = SasrecConfig(
    dim=16,
    inner=32,
    blocks=1,
    dropout=0.1,
    max_length=12,
    batch_size=32,
    epochs=3,
    learning_rate=1e-2,
    valid_users=100,
    products="float32",
)


@pytest.fixture(scope="module")
def ring() -> Dataset:
    """Item i + 1 follows item i, around a ring: the last item determines the next."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(ITEMS, size=200), rng.integers(5, 10, size=200)
    sequences = [((s + np.arange(n)) % ITEMS).astype(np.int32) for s, n in zip(starts, lengths, strict=True)]
    return Dataset(
        name="ring",
        user_ids=[str(i) for i in range(200)],
        item_ids=[str(i) for i in range(ITEMS)],
        sequences=sequences,
        titles=[""] * ITEMS,
        texts=[None] * ITEMS,
        images=[None] * ITEMS,
        tie_rule="as written",
    )


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_sasrec_learns_a_planted_next_item_rule(ring: Dataset, loss: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, loss=loss, epochs=20)
    ranker = train_sasrec(ring, config, folder=tmp_path, progress=False)
    found = evaluate(ranker, ring.split(), cutoffs=(1, 5), progress=False).metrics
    assert found["HR@5"] > 0.95  # chance is 5 / 30
    assert loss == "bce" or found["HR@1"] > 0.9  # BCE learns which items are near long before their order


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_state_depends_neither_on_later_items_nor_on_padding(norm_first: bool) -> None:
    torch.manual_seed(0)
    model = Sasrec(ITEMS, dataclasses.replace(SMALL, norm_first=norm_first, blocks=2)).eval()
    items = torch.tensor([[3, 4, 5, 6]])
    changed = torch.tensor([[3, 4, 9, 0, 0, 0]])
    torch.testing.assert_close(model(items)[:, :2], model(changed)[:, :2], rtol=0, atol=1e-5)  # float32 sums
    assert not torch.allclose(model(items)[:, 2], model(changed)[:, 2], atol=1e-3)


def test_a_list_has_no_duplicates_and_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    ranker = SasrecRanker(Sasrec(ITEMS, SMALL).eval(), SMALL)
    histories = [np.arange(n, dtype=np.int32) for n in (1, 4, 25)]
    lists = ranker(histories, 99)
    assert lists.shape == (3, ITEMS)
    assert all(sorted(row) == list(range(ITEMS)) for row in lists.tolist())
    assert lists[1].tolist() == ranker(histories[1:2], 99)[0].tolist()


def test_only_the_newest_items_of_a_long_history_are_used() -> None:
    torch.manual_seed(0)
    ranker = SasrecRanker(Sasrec(ITEMS, SMALL).eval(), SMALL)
    newest = np.arange(SMALL.max_length)
    assert torch.equal(ranker([np.append([29, 28], newest)], 5), ranker([newest], 5))


def test_an_empty_history_is_refused() -> None:
    ranker = SasrecRanker(Sasrec(ITEMS, SMALL).eval(), SMALL)
    with pytest.raises(UserError, match="empty history"):
        ranker([np.array([], dtype=np.int32)], 5)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_the_initial_loss_is_that_of_chance_and_its_gradients_are_finite(ring: Dataset, loss: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, loss=loss, dropout=0.0)
    model = Sasrec(ITEMS, config)
    batch = next(training_batches(ring.split().train, 64, max_length=12, rng=np.random.default_rng(0)))
    value = loss_of(model, batch, config=config, generator=torch.Generator().manual_seed(0))
    chance = {"ce": np.log(ITEMS), "bce": 2 * np.log(2)}[loss]
    assert float(value.detach()) == pytest.approx(
        chance, abs=0.1
    )  # embeddings start at 0.02, so logits are near 0
    value.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_negatives_are_not_in_the_sequence_of_the_user() -> None:
    sequences = [np.arange(5), np.arange(10, 13)]
    (batch,) = training_batches(sequences, 2, max_length=12, rng=np.random.default_rng(0))
    users = batch.valid.nonzero()[:, 0]
    for seed in range(20):
        negatives = draw_negatives(batch, 100, generator=torch.Generator().manual_seed(seed))
        for user, negative in zip(users.tolist(), negatives.tolist(), strict=True):
            known = torch.cat([batch.inputs[user], batch.targets[user]])[batch.valid[user].repeat(2)]
            assert negative not in known.tolist()


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_a_training_interrupted_after_an_epoch_resumes_to_the_same_weights(
    ring: Dataset, loss: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(SMALL, loss=loss)
    whole = train_sasrec(ring, config, folder=tmp_path / "whole", progress=False)
    train_sasrec(ring, dataclasses.replace(config, epochs=1), folder=tmp_path / "parts", progress=False)
    torch.rand(7)  # changes the state of the global generator
    parts = train_sasrec(ring, config, folder=tmp_path / "parts", progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    logs = [json.loads((tmp_path / n / "log.json").read_text()) for n in ("whole", "parts")]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


def test_training_does_not_change_the_global_generator(ring: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train_sasrec(ring, dataclasses.replace(SMALL, epochs=1), folder=tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_partial_checkpoint_file_is_ignored(ring: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=1)
    whole = train_sasrec(ring, config, folder=tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    (tmp_path / "torn" / "checkpoint.partial").write_bytes(b"half")
    torn = train_sasrec(ring, config, folder=tmp_path / "torn", progress=False)
    assert torch.equal(whole.model.items.weight, torn.model.items.weight)


def test_training_stops_after_patience_and_keeps_the_best_weights(ring: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=60, patience=2, learning_rate=3e-2)
    ranker = train_sasrec(ring, config, folder=tmp_path, progress=False)
    log = json.loads((tmp_path / "log.json").read_text())
    scores = [row["valid_NDCG@10"] for row in log]
    assert len(log) < 60 and len(log) - 1 - int(np.argmax(scores)) == 2
    found = evaluate(ranker, ring.split(), part="valid", users=np.arange(200), progress=False)
    assert found.metrics["NDCG@10"] > scores[0]


def test_a_folder_of_other_settings_or_another_split_is_refused(ring: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=1)
    train_sasrec(ring, config, folder=tmp_path, progress=False)
    with pytest.raises(UserError, match="another run") as caught:
        train_sasrec(ring, dataclasses.replace(config, dim=8), folder=tmp_path, progress=False)
    assert "dim 16, this run 8" in str(caught.value)
    other = dataclasses.replace(ring, sequences=[s[:-1] for s in ring.sequences])
    with pytest.raises(UserError, match="targets_sha256"):
        train_sasrec(other, config, folder=tmp_path, progress=False)


def test_a_saved_ranker_gives_the_same_lists(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ranker = SasrecRanker(Sasrec(ITEMS, SMALL).eval(), SMALL)
    ranker.save(tmp_path)
    loaded = SasrecRanker.load(tmp_path)
    assert loaded.config == SMALL and torch.equal(loaded([np.arange(5)], 9), ranker([np.arange(5)], 9))
    with pytest.raises(UserError, match="has no trained SASRec"):
        SasrecRanker.load(tmp_path / "none")


def test_data_without_training_items_are_refused(ring: Dataset, tmp_path: Path) -> None:
    short = dataclasses.replace(ring, sequences=[s[:3] for s in ring.sequences])
    with pytest.raises(UserError, match="two training items"):
        train_sasrec(short, SMALL, folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": "mse"}, "loss must be one of"),
        ({"products": "float16"}, "products must be one of"),
        ({"heads": 3}, "not divisible by heads 3"),
        ({"heads": 0}, "heads must be 1 or more"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"epochs": 0}, "epochs must be 1 or more"),
    ],
)
def test_an_invalid_setting_is_refused_and_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
