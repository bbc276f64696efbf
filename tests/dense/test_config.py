"""Settings of the sequence models: what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from cemg.dense import DenseConfig
from cemg.errors import UserError


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": "mse"}, "loss must be one of"),
        ({"products": "float16"}, "products must be one of"),
        ({"heads": 3}, "not divisible by heads 3"),
        ({"heads": 0}, "heads must be 1 or more"),
        ({"model": "gru"}, "model must be one of sasrec, bsarec"),
        ({"select": "MRR"}, "select must be one of"),
        ({"negatives": -1}, "negatives must be 0 or more"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"inner_dropout": -0.1}, "inner_dropout must be in"),
        ({"folds": 2, "fold": 2}, "fold must be in 0 … 1"),
        ({"model": "bsarec", "samples": "positions"}, "samples=prefixes"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"epochs": 0}, "epochs must be 1 or more"),
    ],
)
def test_an_invalid_setting_is_refused_and_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(DenseConfig(), **change)  # type: ignore[arg-type]
