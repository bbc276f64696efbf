"""When a checkpoint is due. What is in it, and how it continues: the tests of each training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cemg.storage import checkpoint, files
from cemg.storage.checkpoint import COST, Checkpoint


@pytest.mark.parametrize("cost, between", [(0.5, 60), (9, 9 * COST)])
def test_the_time_between_checkpoints_grows_with_the_time_of_writing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, between: float
) -> None:
    now = [100.0]

    def write(*_: object, **__: object) -> None:
        now[0] += cost

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(files, "save_tensors", write)
    saved = Checkpoint(tmp_path, stage="graph", identity="", seconds=60)
    each_step = Checkpoint(tmp_path, stage="graph", identity="", seconds=0)
    now[0] += 59
    assert not saved.due() and each_step.due()
    now[0] += 2
    assert saved.due()
    for one in (saved, each_step):
        one.save({"table": torch.zeros(2)}, "{}")
    now[0] += between - cost  # of the second one
    assert not saved.due() and each_step.due()
    now[0] += 1
    assert saved.due()
