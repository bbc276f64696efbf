"""Each model of the registry learns a planted pattern, resumes exactly, respects the split and its budget."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cemg.baselines import loop
from cemg.baselines.registry import FITTED, MODELS, Fitted, Job, check_model, fit
from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.evaluation import evaluate

SEQUENCE = {
    "dim": 16, "max_length": 12, "batch_size": 32, "epochs": 12, "learning_rate": 1e-2, "dropout": 0.1,
    "schedule": "constant", "products": "float32",
}  # fmt: skip
COSINE = {name: value for name, value in SEQUENCE.items() if name != "products"} | {
    "inner": 32, "layers": 1, "heads": 2, "learning_rate": 5e-3, "batch_size": 8,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # small
    "popularity": {},
    "memory": {},
    "gru4rec": SEQUENCE | {"state": 32},
    "sasrec": SEQUENCE | {"inner": 32, "blocks": 1},
    "sasrec-bce": SEQUENCE | {"inner": 32, "blocks": 1},
    "bsarec": SEQUENCE | {"inner": 32, "blocks": 1},
    "llm-esr": SEQUENCE | {"inner": 32, "blocks": 1},
    "mmsrec": COSINE | {"epochs": 16},
    "missrec": COSINE,
}
TRAINED = [name for name in SETTINGS if MODELS[name].trains]
ELSEWHERE = {"mmgrec", "llamarec", *(name for name in FITTED if MODELS[name].asked)}  # in files of their own

pytestmark = pytest.mark.usefixtures("frozen_features")


def test_every_model_is_tested() -> None:
    assert {*SETTINGS} | ELSEWHERE == {*FITTED}


def trained(name: str, data: Dataset, folder: Path, **changes: Any) -> Fitted:
    budget = changes.pop("budget", None)
    return fit(name, Job(data, folder, seed=1, budget=budget, settings=SETTINGS[name] | changes))


def lists(fitted: Fitted, data: Dataset) -> list[list[int]]:
    histories = data.split().histories("valid")
    return [row.tolist() for row in fitted.rank(histories, 10)]


def test_gru4rec_learns_from_all_positions_of_a_pass(ring: Dataset, tmp_path: Path) -> None:
    fitted = trained("gru4rec", ring, tmp_path, samples="positions")
    assert evaluate(fitted.rank, ring.split(), progress=False).metrics_history_removed["HR@5"] > 0.9
    with pytest.raises(UserError, match="samples must be"):
        trained("gru4rec", ring, tmp_path, samples="all")


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_learns_what_follows_an_item(name: str, ring: Dataset, tmp_path: Path) -> None:
    fitted = trained(name, ring, tmp_path)
    found = evaluate(fitted.rank, ring.split(), progress=False)
    assert found.metrics_history_removed["HR@5"] > 0.9
    assert fitted.config["valid_NDCG@10"] == max(row["valid_NDCG@10"] for row in loop_log(tmp_path))


def loop_log(folder: Path) -> list[dict[str, float]]:
    log: list[dict[str, float]] = json.loads((folder / loop.LOG).read_text())
    return log


@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_training_gives_the_same_model(
    name: str, ring: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(name, ring, tmp_path / "whole", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_print_epoch", lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(name, ring, tmp_path / "parts", epochs=3)
    torch.rand(7)  # changes the state of the global generator
    parts = trained(name, ring, tmp_path / "parts", epochs=3)
    assert lists(whole, ring) == lists(parts, ring)
    losses = [[row["loss"] for row in loop_log(tmp_path / part)] for part in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_does_not_read_the_test_items(name: str, ring: Dataset, tmp_path: Path) -> None:
    few = {"epochs": 1} if MODELS[name].trains else {}
    other = dataclasses.replace(
        ring, sequences=[np.append(s[:-1], (s[-1] + 7) % ring.num_items) for s in ring.sequences]
    )
    one, two = (trained(name, data, tmp_path / data_name, **few) for data_name, data in
                (("one", ring), ("two", other)))  # fmt: skip
    assert lists(one, ring) == lists(two, other)


@pytest.mark.parametrize("name", TRAINED)
def test_a_budget_stops_a_training_within_an_epoch_and_says_so(
    name: str, ring: Dataset, tmp_path: Path
) -> None:
    fitted = trained(name, ring, tmp_path, budget=1e-6)
    (row,) = loop_log(tmp_path)
    assert 0 < row["share"] < 1 and "budget" in fitted.config["stopped"]
    assert len(lists(fitted, ring)) == 200
    more = trained(name, ring, tmp_path, epochs=2)  # begins that epoch again
    assert [row["share"] for row in loop_log(tmp_path)] == [1, 1] and "stopped" not in more.config


def test_a_budget_that_ends_with_an_epoch_is_named_too(ring: Dataset, tmp_path: Path) -> None:
    fitted = trained("sasrec", ring, tmp_path, budget=1e-6, batch_size=1_000_000)
    (row,) = loop_log(tmp_path)
    assert row["share"] == 1 and "budget" in fitted.config["stopped"]
    more = trained("sasrec", ring, tmp_path, epochs=2, batch_size=1_000_000)
    assert len(loop_log(tmp_path)) == 2 and "stopped" not in more.config


MY_MODEL = """
import torch
from cemg.baselines.registry import Fitted, Job

def fit(job: Job) -> Fitted:
    def rank(histories, top):
        return torch.stack([torch.arange(h[-1] + 1, h[-1] + 1 + top) % job.data.num_items for h in histories])
    return Fitted(rank, {"model": "next"})
"""


def test_a_python_file_is_a_model(ring: Dataset, tmp_path: Path) -> None:
    (tmp_path / "next.py").write_text(MY_MODEL)
    fitted = fit(str(tmp_path / "next.py"), Job(ring, tmp_path))
    found = evaluate(fitted.rank, ring.split(), cutoffs=(5,), progress=False, max_list=20)
    assert found.metrics["HR@5"] == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has no function fit"),
        ("import nothing_here", "cannot be imported"),
        ("def fit(job): return 1", "returned int"),
    ],
)
def test_a_file_that_is_no_model_is_refused(
    content: str, message: str, ring: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "wrong.py").write_text(content)
    with pytest.raises(UserError, match=message):
        fit(str(tmp_path / "wrong.py"), Job(ring, tmp_path))


def test_an_unknown_model_lists_those_that_exist() -> None:
    with pytest.raises(UserError, match="there is no model sasrc") as caught:
        check_model("sasrc")
    assert all(name in str(caught.value) for name in MODELS)


def test_a_configuration_of_cemg_train_is_not_fitted_here(ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tiger is a configuration of cemg-train") as caught:
        fit("tiger", Job(ring, tmp_path))
    assert "cemg-train --config tiger" in str(caught.value.fix)


def test_settings_of_a_job_are_typed_and_checked(ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown setting"):
        fit("popularity", Job(ring, tmp_path, settings={"epochs": 3}))
    with pytest.raises(UserError, match="is not a valid int"):
        fit("gru4rec", Job(ring, tmp_path, settings={"dim": "2.5"}))
