"""Kills real commands more than a hundred times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killing_a_training_a_retraining_or_an_addition_loses_nothing(
    tmp_path, tiny_settings, feature_cache
):
    """Takes twenty minutes on one core."""
    settings = [*tiny_settings, "generator.epochs=3", "tokenizer.epochs=10"]
    about = tmp_path / "about.json"
    about.write_text(json.dumps({"settings": settings, "cache": str(feature_cache)}))
    script = Path(__file__).with_name("kills.py")
    ended = subprocess.run(
        [sys.executable, script, tmp_path / "runs", about, "105"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout
