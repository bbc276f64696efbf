"""Training of SASRec and BSARec: losses, learning, and trainings that are interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg.baselines import loop, train_dense
from cemg.baselines.dense import draw_negatives, held_out_users, loss_of, training_samples
from cemg.baselines.samples import Samples
from cemg.data.dataset import Dataset
from cemg.dense import DenseConfig, SequenceEncoder
from cemg.errors import UserError
from cemg.evaluation import evaluate

ITEMS = 30
SMALL = DenseConfig(
    dim=16,
    inner=32,
    blocks=1,
    dropout=0.1,
    max_length=12,
    batch_size=32,
    epochs=3,
    learning_rate=1e-2,
    products="float32",
)


LEARNERS = [
    {"loss": "ce", "samples": "positions"},
    {"loss": "ce", "samples": "prefixes"},
    {"loss": "ce", "negatives": 10},
    {"loss": "bce", "samples": "positions"},
    {"loss": "bce", "samples": "prefixes"},
    {"model": "bsarec"},
]


@pytest.mark.parametrize("change", LEARNERS, ids=str)
def test_a_planted_next_item_rule_is_learned(
    ring: Dataset, change: dict[str, object], tmp_path: Path
) -> None:
    config = dataclasses.replace(SMALL, epochs=20, **change)  # type: ignore[arg-type]
    ranker = train_dense(ring, config, folder=tmp_path, progress=False)
    found = evaluate(ranker, ring.split(), cutoffs=(1, 5), progress=False).metrics_history_removed
    assert found["HR@5"] > 0.95  # chance is 5 / 30
    assert config.loss == "bce" or found["HR@1"] > 0.9  # BCE learns which items are near before their order


@pytest.mark.parametrize("samples", ["positions", "prefixes"])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_the_initial_loss_is_that_of_chance_and_its_gradients_are_finite(
    ring: Dataset, loss: str, samples: str
) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, loss=loss, samples=samples, dropout=0.0, negatives=20)
    model = SequenceEncoder(ITEMS, config)
    batch = next(training_samples(ring.split(), config).batches(64, np.random.default_rng(0)))
    value = loss_of(model, batch, config=config, generator=torch.Generator().manual_seed(0))
    chance = {"ce": np.log(ITEMS), "bce": 2 * np.log(2)}[loss]
    # embeddings start at 0.02, so logits are near 0
    assert float(value.detach()) == pytest.approx(chance, abs=0.1)
    value.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("make", [Samples.positions, Samples.prefixes])
def test_negatives_are_not_in_the_sequence_of_the_user(make: Callable[..., Samples]) -> None:
    (batch,) = make([np.arange(5), np.arange(10, 13)], 12).batches(16, np.random.default_rng(0))
    users = batch.present.nonzero()[:, 0] if batch.every_position else torch.arange(len(batch.inputs))
    for seed in range(20):
        negatives = draw_negatives(batch, 100, generator=torch.Generator().manual_seed(seed))
        assert len(negatives) == len(batch.targets) == 6
        for user, target, negative in zip(users, batch.targets, negatives.tolist(), strict=True):
            assert negative not in [*batch.inputs[user, : batch.lengths[user]].tolist(), int(target)]


@pytest.mark.parametrize("loss, schedule", [("ce", "constant"), ("ce", "linear"), ("bce", "constant")])
def test_a_training_interrupted_after_an_epoch_resumes_to_the_same_weights(
    ring: Dataset, loss: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, loss=loss, schedule=schedule, negatives=20)
    whole = train_dense(ring, config, folder=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_print_epoch", lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_dense(ring, config, folder=tmp_path / "parts")
    torch.rand(7)  # changes the state of the global generator
    parts = train_dense(ring, config, folder=tmp_path / "parts", progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    logs = [json.loads((tmp_path / n / "log.json").read_text()) for n in ("whole", "parts")]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


def test_epochs_may_be_added_at_a_constant_rate_only(ring: Dataset, tmp_path: Path) -> None:
    constant = dataclasses.replace(SMALL, schedule="constant", epochs=1)
    train_dense(ring, constant, folder=tmp_path / "constant", progress=False)
    more = dataclasses.replace(constant, epochs=2)
    train_dense(ring, more, folder=tmp_path / "constant", progress=False)
    assert len(json.loads((tmp_path / "constant" / "log.json").read_text())) == 2
    linear = dataclasses.replace(SMALL, epochs=1)
    train_dense(ring, linear, folder=tmp_path / "linear", progress=False)
    with pytest.raises(UserError, match="epochs 1, this run 2"):
        train_dense(ring, dataclasses.replace(linear, epochs=2), folder=tmp_path / "linear", progress=False)


def test_each_user_is_held_out_by_one_fold_and_gives_it_no_sample(ring: Dataset) -> None:
    split = ring.split()
    configs = [dataclasses.replace(SMALL, folds=3, fold=f, seed=f) for f in range(3)]
    held_out = [held_out_users(split, c) for c in configs]
    assert sorted(np.concatenate(held_out).tolist()) == list(range(len(split.users)))
    assert len(held_out_users(split, SMALL)) == 0
    everyone = len(training_samples(split, SMALL).starts)
    for config, users in zip(configs, held_out, strict=True):
        left_out = sum(len(split.train[split.users[u]]) - 1 for u in users)
        assert len(training_samples(split, config).starts) == everyone - left_out > 0


def test_training_does_not_change_the_global_generator(ring: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train_dense(ring, dataclasses.replace(SMALL, epochs=1), folder=tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_partial_checkpoint_file_is_ignored(ring: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=1)
    whole = train_dense(ring, config, folder=tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    (tmp_path / "torn" / "checkpoint.partial").write_bytes(b"half")
    torn = train_dense(ring, config, folder=tmp_path / "torn", progress=False)
    assert torch.equal(whole.model.items.weight, torn.model.items.weight)


def test_training_stops_after_patience_and_keeps_the_best_weights(ring: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=60, patience=2, learning_rate=3e-2)
    ranker = train_dense(ring, config, folder=tmp_path, progress=False)
    log = json.loads((tmp_path / "log.json").read_text())
    scores = [row["valid_NDCG@10"] for row in log]
    assert len(log) < 60 and len(log) - 1 - int(np.argmax(scores)) == 2
    found = evaluate(ranker, ring.split(), part="valid", cutoffs=(10,), progress=False)
    assert found.metrics_history_removed["NDCG@10"] == pytest.approx(max(scores))


def test_a_folder_of_other_settings_or_another_split_is_refused(ring: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=1)
    train_dense(ring, config, folder=tmp_path, progress=False)
    with pytest.raises(UserError, match="another run") as caught:
        train_dense(ring, dataclasses.replace(config, dim=8), folder=tmp_path, progress=False)
    assert "dim 16, this run 8" in str(caught.value)
    other = dataclasses.replace(ring, sequences=[s[:-1] for s in ring.sequences])
    with pytest.raises(UserError, match="targets_sha256"):
        train_dense(other, config, folder=tmp_path, progress=False)


def test_data_without_training_items_are_refused(ring: Dataset, tmp_path: Path) -> None:
    short = dataclasses.replace(ring, sequences=[s[:3] for s in ring.sequences])
    with pytest.raises(UserError, match="two training items"):
        train_dense(short, SMALL, folder=tmp_path, progress=False)
