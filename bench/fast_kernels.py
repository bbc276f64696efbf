"""Training time with ``cemg-train --fast-kernels`` and ``--no-fast-kernels``, and whether results are equal.

    python bench/fast_kernels.py --run RUN [--device cuda] [--json PATH] [--plot PATH]

RUN is a finished run of ``cemg-train``. Both trainings start from copies of its data, features and graph, in
RUN-fast and RUN-plain; after an interruption they continue. Exits with 1 if an item's codes differ, or if one
of the first 100 losses of the generator differs by more than 1e-4.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from harness import Report, Times, apply_options, make_parser

from cemg.tokenizer import Catalog

COPIED, CONFIG = ("data", "features", "graph"), "config.yaml"
NUM_LOSSES, TOLERANCE = 100, 1e-4
STAGES = ("tokenizer", "catalog", "generator", "evaluation")
RESULT = "test.json"
OPTIONS = {"fast": "--fast-kernels", "plain": "--no-fast-kernels"}


def train(run: Path, kernels: str, device: str) -> Path:
    """Trains a copy of the run with "fast" or "plain" kernels; returns its folder."""
    folder = run.with_name(f"{run.name}-{kernels}")
    if not (folder / CONFIG).exists():
        for name in COPIED:
            shutil.copytree(run / name, folder / name, dirs_exist_ok=True)
        shutil.copy2(run / CONFIG, folder / CONFIG)
    command = "from cemg.commands.train import main; main()"
    options = ["--run", str(folder), OPTIONS[kernels], "--device", device, "--result", str(folder / RESULT)]
    subprocess.run([sys.executable, "-c", command, *options], check=True)
    return folder


def losses(folder: Path) -> list[float]:
    """The first losses of the generator."""
    lines = map(json.loads, (folder / "generator" / "log.jsonl").read_text().splitlines())
    by_step = {line["step"]: line["generator/loss"] for line in lines if "generator/loss" in line}
    return [by_step[step] for step in sorted(by_step)[:NUM_LOSSES]]


def seconds(folder: Path) -> dict[str, float]:
    """The seconds of each trained stage, and their sum."""
    taken = json.loads((folder / RESULT).read_text())["config"]["stage_seconds"]
    by_stage = {stage: float(taken[stage]) for stage in STAGES}
    return {**by_stage, "all of these": sum(by_stage.values())}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run of cemg-train")
    options = parser.parse_args()
    for name in (*COPIED, CONFIG):
        if not (options.run / name).exists():
            raise SystemExit(f"{options.run} has no {name}; pass a finished run: cemg-train --run RUN")
    report = Report("cemg-train", options, apply_options(options))
    fast, plain = (train(options.run, kernels, options.device) for kernels in OPTIONS)
    differing = int((Catalog.load(fast / "catalog").codes != Catalog.load(plain / "catalog").codes).sum())
    pairs = list(zip(losses(fast), losses(plain), strict=True))
    worst = max(abs(one - other) for one, other in pairs)
    scores = [json.loads((folder / RESULT).read_text())["metrics"]["HR@10"] for folder in (fast, plain)]
    ours, theirs = seconds(fast), seconds(plain)
    equal = f"{differing} codes differ, {len(pairs)} losses by at most {worst:.1e}"
    for stage, taken in ours.items():
        report.add(f"{options.run.name}, {stage}", "fast kernels", Times((taken * 1e3,)),
                   {"references": Times((theirs[stage] * 1e3,))}, equal,
                   hr_at_10=dict(zip(OPTIONS, scores, strict=True)))  # fmt: skip
    report.write()
    report.finish()
    print(f"{equal}; HR@10 {scores[0]:.4f} and {scores[1]:.4f}")
    if differing or worst > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
