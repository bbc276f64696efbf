"""``cemg-train --fast-kernels`` against ``--no-fast-kernels``: the same codes and losses, and how soon.

    python bench/fast_kernels.py --run RUN [--device cuda] [--json PATH] [--plot PATH]

RUN is a run that ``cemg-train`` finished. Both trainings begin with copies of its data, features and graph,
in RUN-fast and RUN-plain, and go on where an interrupted benchmark left them. Exits with 1 where an item's
codes differ, or one of the first 100 losses of the generator by more than 1e-4.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from harness import Report, Times, arguments, start

from cemg.tokenizer import Catalog

GIVEN, CONFIG = ("data", "features", "graph"), "config.yaml"
LOSSES, TOLERANCE = 100, 1e-4
STAGES = ("tokenizer", "catalog", "generator", "evaluation")
RESULT = "test.json"
WAYS = {"fast": "--fast-kernels", "plain": "--no-fast-kernels"}


def train(run: Path, way: str, device: str) -> Path:
    """A copy of what is given, trained to its end; its folder."""
    folder = run.with_name(f"{run.name}-{way}")
    if not (folder / CONFIG).exists():
        for name in GIVEN:
            shutil.copytree(run / name, folder / name, dirs_exist_ok=True)
        shutil.copy2(run / CONFIG, folder / CONFIG)
    command = "from cemg.commands.train import main; main()"
    options = ["--run", str(folder), WAYS[way], "--device", device, "--result", str(folder / RESULT)]
    subprocess.run([sys.executable, "-c", command, *options], check=True)
    return folder


def losses(folder: Path) -> list[float]:
    """The generator's first ones."""
    lines = map(json.loads, (folder / "generator" / "log.jsonl").read_text().splitlines())
    found = {line["step"]: line["generator/loss"] for line in lines if "generator/loss" in line}
    return [found[step] for step in sorted(found)[:LOSSES]]


def seconds(folder: Path) -> dict[str, float]:
    """Of each stage that was trained, and of all together."""
    taken = json.loads((folder / RESULT).read_text())["config"]["stage_seconds"]
    own = {stage: float(taken[stage]) for stage in STAGES}
    return {**own, "all of these": sum(own.values())}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a finished run of cemg-train")
    options = parser.parse_args()
    for name in (*GIVEN, CONFIG):
        if not (options.run / name).exists():
            raise SystemExit(f"{options.run} has no {name}: name a finished run, or make one by cemg-train")
    report = Report("cemg-train", options, start(options))
    fast, plain = (train(options.run, way, options.device) for way in WAYS)
    differing = int((Catalog.load(fast / "catalog").codes != Catalog.load(plain / "catalog").codes).sum())
    pairs = list(zip(losses(fast), losses(plain), strict=True))
    apart = max(abs(one - other) for one, other in pairs)
    scores = [json.loads((folder / RESULT).read_text())["metrics"]["HR@10"] for folder in (fast, plain)]
    ours, theirs = seconds(fast), seconds(plain)
    equal = f"{differing} codes differ, {len(pairs)} losses by at most {apart:.1e}"
    for stage, own in ours.items():
        report.add(f"{options.run.name}, {stage}", "fast kernels", Times((own * 1e3,)),
                   {"references": Times((theirs[stage] * 1e3,))}, equal,
                   hr_at_10=dict(zip(WAYS, scores, strict=True)))  # fmt: skip
    report.write()
    report.finish()
    print(f"{equal}; HR@10 {scores[0]:.4f} and {scores[1]:.4f}")
    if differing or apart > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
