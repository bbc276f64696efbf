"""The models of cornac are trained on our split and rank our items."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from cemg.baselines.registry import Job, fit
from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.evaluation import evaluate

SETTINGS = {
    "cornac-gru4rec": {"layers": 32, "n_epochs": 8, "n_sample": 16, "dropout_p_embed": 0.0, "batch_size": 32},
    "cornac-sasrec": {
        "embedding_dim": 32,
        "n_epochs": 12,
        "n_sample": 16,
        "dropout": 0.0,
        "learning_rate": 1e-2,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_next_item_of_a_ring_is_learned_without_the_test_items(
    name: str, ring: Dataset, tmp_path: Path
) -> None:
    pytest.importorskip("cornac")
    fitted = fit(name, Job(ring, tmp_path, settings=SETTINGS[name]))
    found = evaluate(fitted.rank, ring.split(), progress=False)
    assert found.metrics["HR@5"] > 0.8  # 5 of the items at random
    assert fitted.config["model"] == name and fitted.config["train_seconds"] > 0
    other = dataclasses.replace(ring, sequences=[np.append(s[:-1], s[0]) for s in ring.sequences])
    again = fit(name, Job(other, tmp_path, settings=SETTINGS[name]))
    histories = ring.split().histories("test")[:20]
    assert again.rank(histories, 10).tolist() == fitted.rank(histories, 10).tolist()


def test_a_budget_and_a_missing_library_are_refused(
    ring: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="cornac's SASRec cannot stop at a budget"):
        fit("cornac-sasrec", Job(ring, tmp_path, budget=1.0))
    monkeypatch.setitem(sys.modules, "cornac.models", None)
    with pytest.raises(UserError, match="cornac is not installed") as caught:
        fit("cornac-sasrec", Job(ring, tmp_path))
    assert "cornac]" in str(caught.value)
