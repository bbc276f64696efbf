"""What ``import cemg.decoding`` loads."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = (
    "cemg.generator", "cemg.graph", "cemg.pipeline", "cemg.report", "cemg.tokenizer.training", "matplotlib",
    "tensorboard", "vllm",
)  # fmt: skip


def test_importing_the_decoder_loads_no_trainer_no_plots_and_no_vllm():
    code = f"import sys, cemg.decoding; print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
