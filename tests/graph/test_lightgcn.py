"""LightGCN finds planted communities, knows training items only, and repeats exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cemg.errors import UserError
from cemg.graph import GraphConfig, lightgcn
from cemg.graph.lightgcn import train_lightgcn
from cemg.storage.checkpoint import Checkpoint
from cemg_kernels import BipartiteGraph, lightgcn_propagate

USERS, ITEMS, HALF = 60, 24, 10  # items 0 … 9 and 10 … 19 are the communities; 20 … 23 are never bought
QUICK = GraphConfig(dim=8, layers=2, epochs=30, batch_size=256, learning_rate=0.02, seed=3)


def two_communities(seed: int = 0) -> list[np.ndarray]:
    """Even users buy five of items 0 … 9, odd users five of items 10 … 19."""
    rng = np.random.default_rng(seed)
    return [rng.choice(HALF, 5, replace=False) + HALF * (u % 2) for u in range(USERS)]


@pytest.fixture(scope="module")
def learned():
    return train_lightgcn(two_communities(), ITEMS, config=QUICK)


def test_items_of_a_planted_community_are_closer_than_items_of_the_other(learned):
    unit = F.normalize(learned.values[: 2 * HALF], dim=1)
    cosine = unit @ unit.T
    own = torch.arange(2 * HALF) < HALF
    same = (own[:, None] == own) & ~torch.eye(2 * HALF, dtype=torch.bool)
    other = own[:, None] != own
    assert cosine[same].min() > cosine[other].max()


def test_items_without_a_training_interaction_are_absent_and_zero(learned):
    assert learned.present.tolist() == [True] * (2 * HALF) + [False] * (ITEMS - 2 * HALF)
    assert not learned.values[2 * HALF :].any()
    assert learned.values[: 2 * HALF].any(dim=1).all()


def test_the_values_are_float32_with_one_row_per_item(learned):
    assert learned.values.shape == (ITEMS, QUICK.dim) and learned.values.dtype == torch.float32
    assert learned.present.shape == (ITEMS,) and learned.present.dtype == torch.bool


def test_the_same_seed_gives_the_same_values_and_another_seed_others(learned):
    again = train_lightgcn(two_communities(), ITEMS, config=QUICK)
    assert torch.equal(again.values, learned.values)
    other = train_lightgcn(two_communities(), ITEMS, config=dataclasses.replace(QUICK, seed=4))
    assert not torch.equal(other.values, learned.values)


def test_the_global_random_state_is_neither_used_nor_changed(learned):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = train_lightgcn(two_communities(), ITEMS, config=QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.values, learned.values)


def test_a_first_step_logs_the_loss_of_the_starting_table():
    config = dataclasses.replace(QUICK, epochs=1, batch_size=10_000, layers=0)
    logged: list[dict[str, float]] = []
    train_lightgcn([np.array([0])], 1, config=config, log=lambda step, values: logged.append(values))
    # One user, one item: the item drawn is the item bought, so BPR is log 2 whatever the table.
    table = torch.empty(2, QUICK.dim).normal_(0, 0.1, generator=torch.Generator().manual_seed(QUICK.seed))
    l2 = table[0].square().sum() + 2 * table[1].square().sum()
    assert logged[0]["graph/bpr"] == pytest.approx(np.log(2), rel=1e-6)
    assert logged[0]["graph/l2"] == pytest.approx(float(l2), rel=1e-6)


def test_every_epoch_is_logged_and_the_ranking_loss_falls_below_chance():
    logged: dict[int, dict[str, float]] = {}
    train_lightgcn(
        two_communities(), ITEMS, config=QUICK, log=lambda step, values: logged.update({step: values})
    )
    assert sorted(logged) == list(range(QUICK.epochs))
    assert all(set(values) == {"graph/bpr", "graph/l2"} for values in logged.values())
    assert logged[0]["graph/bpr"] == pytest.approx(np.log(2), abs=0.05)
    assert logged[QUICK.epochs - 1]["graph/bpr"] < 0.6 * np.log(2)


def test_the_embedding_is_the_mean_of_the_propagated_layers():
    users, items = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    graph = BipartiteGraph.from_edges(users, items, 2, 2)
    x = torch.eye(4, dtype=torch.float64)
    root = 0.5**0.5  # degrees: user 0 and item 1 have two edges, user 1 and item 0 have one
    a_hat = torch.tensor(
        [[0, 0, root, 0.5], [0, 0, 0, root], [root, 0, 0, 0], [0.5, root, 0, 0]], dtype=torch.float64
    )
    wanted = (x + a_hat + a_hat @ a_hat) / 3
    # 0.5 ** 0.5 is kept as float32 by the graph: two factors of 2**-24 each
    torch.testing.assert_close(lightgcn_propagate(graph, x, 2), wanted, rtol=0, atol=2 * 2**-23)


class Dying:
    """A training with a checkpoint after each step, or after ``seconds``, that dies in a step."""

    def __init__(self, folder: Path, *, die_at: int = -1, seconds: float = 0.0, identity: str = "") -> None:
        self.checkpoint = Checkpoint(folder, stage="graph", identity=identity, seconds=seconds)
        self.die_at, self.steps, self.logged = die_at, 0, dict[int, dict[str, float]]()

    def run(self, monkeypatch: pytest.MonkeyPatch) -> lightgcn.Collaborative:
        step = lightgcn._step

        def counted(*arguments):
            if self.steps == self.die_at:
                raise KeyboardInterrupt
            self.steps += 1
            return step(*arguments)

        config = dataclasses.replace(QUICK, epochs=4, batch_size=100)  # of three steps each
        with monkeypatch.context() as patch:
            patch.setattr(lightgcn, "_step", counted)
            return train_lightgcn(
                two_communities(), ITEMS, config=config, checkpoint=self.checkpoint,
                log=lambda epoch, values: self.logged.update({epoch: values}),
            )  # fmt: skip


@pytest.mark.parametrize("die_at", [1, 3, 5, 8, 11])
def test_a_training_that_died_ends_with_the_values_and_losses_of_one_that_did_not(
    tmp_path, monkeypatch, die_at
):
    whole = Dying(tmp_path / "whole", seconds=1e9)
    expected = whole.run(monkeypatch)
    assert whole.steps == 12 and not whole.checkpoint.exists()
    torn = Dying(tmp_path / "torn", die_at=die_at)
    with pytest.raises(KeyboardInterrupt):
        torn.run(monkeypatch)
    middle = Dying(tmp_path / "torn", die_at=0)  # dies before another step
    with pytest.raises(KeyboardInterrupt):
        middle.run(monkeypatch)
    resumed = Dying(tmp_path / "torn")
    found = resumed.run(monkeypatch)
    assert resumed.steps == 12 - die_at
    assert torn.logged | resumed.logged == whole.logged
    assert torch.equal(found.values, expected.values) and torch.equal(found.present, expected.present)


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_not_resumed(tmp_path, monkeypatch, capsys):
    expected = Dying(tmp_path / "whole", seconds=1e9).run(monkeypatch)
    for identity, damage in (("other", False), ("", True)):
        torn = Dying(tmp_path / "torn", die_at=5)
        with pytest.raises(KeyboardInterrupt):
            torn.run(monkeypatch)
        if damage:
            content = bytearray(torn.checkpoint.path.read_bytes())
            content[-5] ^= 1
            torn.checkpoint.path.write_bytes(content)
        again = Dying(tmp_path / "torn", identity=identity, seconds=1e9)
        assert torch.equal(again.run(monkeypatch).values, expected.values) and again.steps == 12
        said = "is damaged (its tensors do not have the sha256" if damage else "belongs to another training"
        assert said in capsys.readouterr().err and not torn.checkpoint.exists()


@pytest.mark.parametrize("train", [[], [np.array([], dtype=np.int32)] * 3])
def test_a_training_set_without_interactions_is_refused(train):
    with pytest.raises(UserError, match="no training interaction"):
        train_lightgcn(train, 5, config=QUICK)


@pytest.mark.parametrize(
    "name, value",
    [("dim", 0), ("epochs", 0), ("batch_size", 0), ("layers", -1), ("learning_rate", 0.0), ("l2", -1.0)],
)
def test_a_setting_out_of_range_is_refused_by_its_name_and_value(name, value):
    with pytest.raises(UserError, match=rf"graph\.{name} .* got {value}"):
        GraphConfig(**{name: value})
