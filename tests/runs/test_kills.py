"""Kills real commands more than a hundred times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.parametrize(
    "name",
    [
        "the first graph",
        "the first tokenizer",
        "the first memory",
        pytest.param("the first gate", marks=pytest.mark.slow),
        pytest.param("another memory", marks=pytest.mark.slow),
        "another gate",
    ],
)
def test_killing_a_training_inside_a_stage_loses_nothing(tiny_run, tmp_path, name):
    ended = subprocess.run(
        [sys.executable, SCRIPT, "stage", name, tiny_run, tmp_path / "runs"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("killed at step") == 2


@pytest.mark.slow
def test_killing_a_training_a_retraining_or_an_addition_loses_nothing(tmp_path, tiny_settings, feature_cache):
    """Takes twenty minutes on one core."""
    settings = [*tiny_settings, "generator.epochs=3", "tokenizer.epochs=10"]
    about = tmp_path / "about.json"
    about.write_text(json.dumps({"settings": settings, "cache": str(feature_cache)}))
    ended = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "runs", about, "105"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout
