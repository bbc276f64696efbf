"""Runs every benchmark with tiny sizes: ``python bench/smoke.py``, or ``make bench``.

Each script must end without an error, and each case must have a time of our backend and results that were
compared. Times are not judged. The run takes about a minute on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RUN_SETTINGS = (  # of the run that fast_kernels.py trains again
    "data.synthetic_users=40", "data.synthetic_items=50", "text.max_tokens=8", "image.weights=random",
    "image.backbone=shufflenet_v2_x0_5", "pca.dim=8", "graph.dim=8", "graph.epochs=2", "tokenizer.levels=3",
    "tokenizer.codebook_size=8", "tokenizer.dim=16", "tokenizer.latent=8", "tokenizer.hidden=[32]",
    "tokenizer.epochs=10", "backbone.layers=1", "backbone.dim=16", "backbone.heads=2", "generator.epochs=2",
    "generator.batch_size=8", "generator.history_items=6", "decoding.beams=10",
)  # fmt: skip
SCRIPTS = {
    "quantize": ("--items", "2000", "--sizes", "16"),
    "propagate": ("--scale", "0.01"),
    "generator_step": ("--items", "500", "--batch", "4", "--lengths", "3"),
    "trie_build": ("--items", "1000", "--codes", "16"),
    "memory": ("--items", "1000"),
    "store": ("--events", "2000"),
    "trie_step": ("--items", "1000", "--sizes", "16", "--users", "1", "2"),
    "latency": (
        "--models", "mmgrec", "--cells", "B1 W10$", "--full", "--engines", "transformers + our processor"
    ),
    "latency --memory": ("--models", "mmgrec", "--cells", "B1 W50$"),
    "fast_kernels": (),
}  # fmt: skip


def run(*command: str) -> None:
    """Runs a Python script; on an error, prints its output and raises CalledProcessError."""
    result = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)  # fmt: skip
    if result.returncode:
        print(result.stdout)
        result.check_returncode()


def train_tiny_run(folder: Path) -> None:
    settings = [part for setting in RUN_SETTINGS for part in ("--set", setting)]
    run("-c", "from cemg.commands.train import main; main()", "--run", str(folder), *settings)


def check_rows(path: Path) -> int:
    """The number of rows. AssertionError if a case has no time of ours or was not compared."""
    rows = json.loads(path.read_text())["rows"]
    assert rows, f"{path.stem} has no rows"
    for row in rows:
        assert row["p50_ms"] is not None, f"{row['case']}: {row['status']}"
        assert row["equal_to"] and not row["equal_to"].startswith("nothing"), f"{row['case']}: not compared"
    return len(rows)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="cemg-bench-") as temporary:
        folder = Path(temporary)
        for name, options in SCRIPTS.items():
            script, *flags = name.split()
            begun, rows = time.monotonic(), folder / f"{name.replace(' --', '-')}.json"
            files = ("--json", str(rows), "--plot", str(rows.with_suffix(".png")))
            if name == "fast_kernels":
                train_tiny_run(folder / "run")
                options = ("--run", str(folder / "run"))
            run(str(HERE / f"{script}.py"), *flags, *options, *files, "--rounds", "2", "--seconds", "0.1")
            print(f"{name}: {check_rows(rows)} rows, {time.monotonic() - begun:.0f} s", flush=True)
        run(str(HERE / "targets.py"), *map(str, sorted(folder.glob("*.json"))))
    if find_spec("pytest_benchmark"):
        run(
            "-m",
            "pytest",
            "-q",
            "--benchmark-disable",
            "-k",
            "Beauty or 256-10000-",
            str(HERE / "test_ops.py"),
        )
    else:
        print("test_ops: not run, pytest-benchmark is not installed")


if __name__ == "__main__":
    main()
