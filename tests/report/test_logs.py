"""Logs of a training as curves over epochs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cemg.report.logs import averaged, curves_of, read_log, steps_per_epoch


def test_a_log_with_a_torn_line_and_a_repeated_step_reads_clean(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 1, "a": 3}\n{"step": 2, "a"')
    assert read_log(path) == [{"step": 0, "a": 1}, {"step": 1, "a": 3}]


def test_steps_become_epochs() -> None:
    """Two epochs of three steps, a validation after each; losses carry the step before it is counted."""
    log = [{"step": float(step), "generator/loss": 1.0} for step in range(6)]
    log += [{"step": 3.0, "generator/ndcg@10": 0.1}, {"step": 6.0, "generator/ndcg@10": 0.2}]
    per_epoch = steps_per_epoch(log, 2)
    assert per_epoch == 3
    curves = curves_of(log, ("generator/ndcg@10",), steps_per_epoch=per_epoch)
    assert curves == {"ndcg@10": [(1.0, 0.1), (2.0, 0.2)]}
    assert steps_per_epoch(log[:6], 2) == 3  # without a validation


def test_long_curves_are_averaged_in_groups_of_steps() -> None:
    curve = averaged([(float(step), float(step % 2)) for step in range(1000)], points=100)
    assert len(curve) == 100 and curve[0] == (4.5, 0.5) and curve[-1] == (994.5, 0.5)
    assert averaged(curve, points=100) == curve


def test_curves_follow_the_order_of_their_prefixes_under_short_labels() -> None:
    log = [{"step": 0.0, "b/dead_1": 1.0, "b/dead_0": 2.0, "b/share_text": 3.0, "b/loss": 4.0}]
    prefixes = ("b/loss", "b/share_", "b/dead_")
    assert list(curves_of(log, prefixes)) == ["loss", "text", "level 0", "level 1"]
    assert curves_of(log, ("c",)) == {} and steps_per_epoch([], 3) == pytest.approx(1 / 3)
