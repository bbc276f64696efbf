"""Latency of one recommendation batch: our engine and its peers, in one run, each in a process of its own.

    python bench/latency.py                    # four to five minutes on two CPU cores
    python bench/latency.py --full             # the whole grid; some two hours on two CPU cores
    python bench/latency.py --full --resume    # what is left of it
    python bench/latency.py --profile runs/profile --models tiger

Weights are random (seed 0): their beams are near-uniform, which costs as much as trained ones. A peer that
is not installed, cannot serve a cell or is not asked there is listed with the reason, and so are we.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch
from cells import ITEMS, MODELS, Cell, floor_ms, read_bytes
from engines import ANSWER, ENGINES, as_request
from harness import (
    NOT_ASKED,
    Report,
    Times,
    apart,
    arguments,
    copy_bandwidth,
    gemm_rate,
    in_columns,
    last_cache,
    machine,
    start,
)

PATIENCE_S = 120.0  # a search that takes longer ends the engine's part in this cell
PREPARE_S = 300.0  # reading libraries, building the model and the catalog
LONG_MS = 10e3  # of a first search on a CPU: what it warms up is little of it, and it is a sample
MOST_LOGIT = 8  # of the random models here
TOO_LONG = "over "  # begins the reason of an engine that was stopped
NOTHING = "nothing: no constrained peer ran"
ALIKE = ("engines", "full", "normalize", "dtype", "rounds", "seconds", "threads")  # of a run that goes on


class Worker:
    """An engine in a process of its own; started anew after it was stopped."""

    def __init__(self, engine: str, threads: int) -> None:
        self.engine, self.threads = engine, threads
        self.process: subprocess.Popen[str] | None = None
        self.lines: Queue[str | None] = Queue()

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        """The answer, or {"skip": reason} where the process fails or takes longer than ``patience`` s."""
        if self.process is None:
            self._start()
        process = self.process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self.lines.get(timeout=patience)
        except BrokenPipeError:
            line = None
        except Empty:
            self.stop()
            return {"skip": f"{TOO_LONG}{patience:.0f} s"}
        if line is None:
            code = process.wait()
            self.stop()
            return {"skip": f"its process ended with code {code}"}
        return json.loads(line)

    def _start(self) -> None:
        script = Path(__file__).with_name("engines.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), self.engine, str(self.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.lines = Queue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ANSWER):
                lines.put(line[len(ANSWER) :])
        lines.put(None)

    def stop(self) -> None:
        """End the process; the next request starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def models_of(options: argparse.Namespace, on_gpu: bool) -> list[str]:
    """Those asked for, or the grid's: flashrec's own family on a GPU alone, where flashrec runs."""
    if options.models:
        return options.models
    left_out = {"mmgrec", *(() if options.full else ("t5-base",)), *(() if on_gpu else ("qwen3-0.6b",))}
    return [name for name in MODELS if name not in left_out]


def default_grid(models: list[str]) -> Iterator[Cell]:
    """What five minutes on two cores hold."""
    for model in models:
        small = model in ("tiger", "decoder-4")
        if model == "smollm2-135m":
            yield Cell(model, 1, 10)
        elif model != "t5-base":
            yield Cell(model, 1, 50)
            yield Cell(model, 8, 50)
        if small:
            for items in (10**4, 10**5, 10**6, 10**7):
                yield Cell(model, 1, 50, items=items)


def full_grid(models: list[str], on_gpu: bool) -> Iterator[Cell]:
    """Every model, batch, width, history and catalog size, one thing varied at a time from B = 1, W = 50."""
    for model in models:
        base = Cell(model, 1, 50)
        yield base
        yield from (replace(base, batch=batch, beams=beams) for batch in (1, 8, 16, 64)
                    for beams in (10, 20, 50) if (batch, beams) != (1, 50))  # fmt: skip
        yield from (replace(base, history=history) for history in (10, 50))
        sizes = (10**4, 10**5, 10**6, 10**7, *((10**8,) if on_gpu else ()))
        yield from (replace(base, items=items) for items in sizes)


RQ3 = "RQ3 "  # begins the label of a cell of this table
CONSTRAINED, FREE = "transformers + dict trie", "transformers, unconstrained"
PUBLISHED = {"CEMG": CONSTRAINED, "LETTER": CONSTRAINED, "TIGER": FREE, "MMGRec": FREE}  # the method's search
SAME_SEARCH = (CONSTRAINED, "transformers + our processor", "vLLM + our trie")  # their scores equal ours
GENERATE = (CONSTRAINED, "transformers + our processor", FREE)  # of like cost


def rq3_grid() -> Iterator[Cell]:
    """The methods of the paper's RQ3 by the shape of their decoding.

    CEMG and LETTER: 4 codes of 256 under a trie, the same shape. TIGER: 3 codes and one that tells equal ones
    apart, beams free. MMGRec: 3 codes of 128 and one that tells equal ones apart, a smaller model, 10 beams,
    free. Prompts hold 20 items in each; a free beam may name no item at all.
    """
    for batch in (1, 8):
        for method in ("CEMG", "LETTER", "TIGER"):
            yield Cell("tiger", batch, 20, label=f"{RQ3}{method}: ")
        yield Cell("mmgrec", batch, 10, codes=128, label=f"{RQ3}MMGRec: ")


def not_asked(cell: Cell, peer: str, full: bool) -> str:
    """Why a peer is left out of this cell; empty where it is asked.

    RQ3 has the search that each method is published with. Of catalogs apart from the default size, --full
    asks the peers that search one; to the others its size is nothing.
    """
    if cell.label:
        published = PUBLISHED[cell.label.removeprefix(RQ3).removesuffix(": ")]
        return "" if peer == published else f"{NOT_ASKED}not the method's published search"
    if cell.items == ITEMS or (full and "unconstrained" not in peer):
        return ""
    return NOT_ASKED + ("it knows no catalog" if "unconstrained" in peer else "--full asks it")


def rq3_table(report: Report) -> str:
    """The methods as published, on ``transformers``, and the same shapes on our engine."""
    lines = [
        f"{'RQ3, one batch':34}{'published search':>30}{'its ms':>10}{'its illegal':>13}{'CEMG engine':>13}"
    ]
    for row in report.rows:
        if row["case"].startswith(RQ3) and not row["status"].startswith(NOT_ASKED):
            method, illegal = row["case"][len(RQ3) :], row.get("peer_illegal", "")
            theirs = "skipped" if row["peer_p50_ms"] is None else f"{row['peer_p50_ms']:.1f}"
            ours = "skipped" if row["p50_ms"] is None else f"{row['p50_ms']:.1f}"
            lines.append(f"{method:34}{row['peer']:>30}{theirs:>10}{illegal:>13}{ours:>13}")
    lines.append("LETTER's shape is CEMG's own at 4 codes of 256: the difference between them is noise.")
    return "\n".join(lines)


def cell_table(report: Report) -> str:
    """Our engine, a line a cell; percentiles above the median from 100 samples on."""
    head = ("case", "p50 ms", "p95", "p99", "users/s", "floor ms", "encoder", "decoder", "selection", "other",
            "MiB", "illegal")  # fmt: skip
    lines = [head]
    for row in {row["case"]: row for row in report.rows}.values():
        if row["p50_ms"] is None:
            lines.append((row["case"], row["status"], *[""] * (len(head) - 2)))
            continue
        high = [f"{row[name]:.1f}" if name in row else "-" for name in ("p95_ms", "p99_ms")]
        parts = [f"{row['parts'].get(name, 0):.0%}" for name in head[6:10]]
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append((row["case"], f"{row['p50_ms']:.1f}", *high, f"{row['users_per_second']:.0f}",
                      f"{row['floor_ms']:.1f}", *parts, memory, str(row["illegal"])))  # fmt: skip
    return in_columns(lines)


def run_cell(cell: Cell, workers: dict[str, Worker], rounds: int, seconds: float) -> dict[str, Any]:
    """Prepare every engine, then let them take turns. Times, reasons, equality, illegal items, memory."""
    times: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    first: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        slow = [other for other in GENERATE if reasons.get(other, "").startswith(TOO_LONG)]
        if name in GENERATE and slow:
            reasons[name] = f"{NOT_ASKED}{slow[0]}, the same generate(), took {reasons[slow[0]]}"
            continue
        found = worker.ask(as_request(cell), PREPARE_S)
        if "skip" not in found:
            found = worker.ask({"do": "first"}, PATIENCE_S)
        if "skip" in found:
            reasons[name] = found["skip"]
        else:
            first[name] = found
            times[name] = [found["ms"]] if found["ms"] > LONG_MS and cell.device == "cpu" else []
    for _ in range(rounds):
        for name in [name for name in times if name not in reasons]:
            if times[name] and sum(times[name]) > seconds * 1e3:
                continue
            found = workers[name].ask({"do": "sample"}, PATIENCE_S)
            if "skip" in found:
                reasons[name] = found["skip"]
            else:
                times[name].append(found["ms"])
    memory = {
        name: workers[name].ask({"do": "memory"}, 30).get("mib") for name in times if name not in reasons
    }
    taken = {name: Times(tuple(samples)) for name, samples in times.items() if samples}
    return {"times": taken, "reasons": reasons, "first": first, "memory": memory}


def tolerance(cell: Cell) -> float:
    """How far two engines' scores of one list may lie apart.

    float32: 1e-4. Narrower: each of a score's ``levels`` logits is rounded once by each engine, and what
    comes before it differs by as much; a logit is taken to be no larger than MOST_LOGIT.
    """
    if cell.dtype == "float32":
        return 1e-4
    return 2 * cell.levels * MOST_LOGIT * torch.finfo(getattr(torch, cell.dtype)).eps


def compare(cell: Cell, first: dict[str, dict[str, Any]]) -> str:
    """What our lists were compared with, and how closely; raises SystemExit where they differ.

    Scores in order, and the codes of each beam whose score lies apart from its neighbours' by more than both
    could err.
    """
    allowed, equal = tolerance(cell), []
    for peer in SAME_SEARCH:
        if peer not in first or "cemg" not in first:
            continue
        mine, other = (torch.tensor(first[name]["scores"]) for name in ("cemg", peer))
        codes, others = (torch.tensor(first[name]["codes"]) for name in ("cemg", peer))
        (mine, order), (other, places) = mine.sort(descending=True), other.sort(descending=True)
        worst = float((mine - other).abs().max())
        alone = apart(mine, 2 * allowed)
        same = (rows_of(codes, order) == rows_of(others, places)).all(2)
        other_codes = int((~same & alone).sum())
        if worst > allowed or other_codes:
            raise SystemExit(
                f"our lists differ from {peer}'s: scores by {worst:.1e}, {other_codes} codes, ties aside; "
                "run pytest tests/decoding"
            )
        equal.append(f"{peer} (worst {worst:.0e})")
    return f"{', '.join(equal)}: scores within {allowed:.0e}, codes" if equal else NOTHING


def rows_of(codes: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``codes`` [B, W, levels] in the ``order`` [B, W] of each user."""
    return codes.gather(1, order[..., None].expand_as(codes))


def latency_plot(report: Report, path: Path) -> None:
    """Two panels: medians a cell and engine, and our latency over the catalog's size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report.rows if not row["case"].startswith(RQ3) and row["p50_ms"] is not None]
    sized = [row for row in rows if " N1e" in row["case"]]
    cells = list(dict.fromkeys(row["case"] for row in rows if " N1e" not in row["case"]))
    names: dict[str, dict[str, float]] = {"CEMG (constrained)": {}}
    for row in rows:
        names["CEMG (constrained)"][row["case"]] = row["p50_ms"]
        if row["peer_p50_ms"] is not None and row not in sized:
            names.setdefault(row["peer"], {})[row["case"]] = row["peer_p50_ms"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(3, 1), layout="constrained")
    width = 0.85 / len(names)
    for i, (name, medians) in enumerate(names.items()):
        shown = [cell for cell in cells if cell in medians]
        places = [cells.index(cell) - 0.425 + (i + 0.5) * width for cell in shown]
        left.bar(places, [medians[cell] for cell in shown], width, label=name)
    floors = {row["case"]: row["floor_ms"] for row in rows}
    for i, cell in enumerate(cells):
        left.hlines(floors[cell], i - 0.45, i + 0.45, colors="black", linestyles="dashed",
                    label="floor of this machine" if i == 0 else None)  # fmt: skip
    left.set(yscale="log", ylabel="milliseconds a batch, median")
    left.set_xticks(range(len(cells)), cells, rotation=12)
    left.set_ylim(top=12 * max(max(medians.values(), default=1.0) for medians in names.values()))
    left.legend(fontsize=7, ncols=2, loc="upper left")
    for model in dict.fromkeys(row["case"].split()[0] for row in sized):
        own = {row["case"]: row["p50_ms"] for row in sized if row["case"].startswith(model)}
        right.plot([float(case.split(" N")[1]) for case in own], list(own.values()), "o-", label=model)
    right.set(xscale="log", xlabel="items in the catalog", ylabel="CEMG, milliseconds", ylim=(0, None))
    if sized:
        right.legend(fontsize=7)
    figure.suptitle(f"One batch of recommendations, random weights; {machine(report.device)['cpu']}, "
                    f"{torch.get_num_threads()} threads", fontsize=10)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=100, seconds=0.7)
    parser.set_defaults(json=Path("runs/latency.json"), plot=Path("runs/latency.png"))
    parser.add_argument("--full", action="store_true", help="the whole grid, T5-base included")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cells that --json has, measure the rest"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, help="only these")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="only these, and always cemg")
    parser.add_argument("--cells", default="", help='only cells whose name has this pattern, as "B1 W50$"')
    parser.add_argument("--normalize", choices=("vocab", "level", "valid"), default="vocab")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--profile", type=Path, help="write a Chrome trace a cell into this folder")
    options = parser.parse_args()
    device = start(options)
    models = models_of(options, device.type == "cuda")
    cells = full_grid(models, device.type == "cuda") if options.full else default_grid(models)
    cells = [*cells, *([] if options.models else rq3_grid())]
    cells = [replace(cell, normalize=options.normalize, device=options.device, dtype=options.dtype)
             for cell in cells if re.search(options.cells, cell.name())]  # fmt: skip
    report = Report("latency", options, device)
    done = report.take_up(ALIKE) if options.resume else set()
    names = ["cemg", *(name for name in options.engines or ENGINES if name != "cemg")]
    dtypes = {torch.float32, getattr(torch, options.dtype)}  # a CPU may be slow at the narrower one
    flops, bandwidth = max(gemm_rate(device, dtype) for dtype in dtypes), copy_bandwidth(device)
    cache = last_cache(device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"matrix product {flops / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s; random weights")
    workers = {name: Worker(name, torch.get_num_threads()) for name in names}
    try:
        for number, cell in enumerate(cells, 1):
            if cell.name() not in done:
                print(f"{number} of {len(cells)}: {cell.name()} ...", flush=True)
                floor, nbytes = floor_ms(cell, flops, bandwidth, cache), read_bytes(cell, cache)
                one_cell(cell, workers, report, floor, nbytes)
    except KeyboardInterrupt:
        print("interrupted: --resume goes on; what was measured so far follows")
    finally:
        for worker in workers.values():
            worker.stop()
    print(report.table())
    print(f"\nThe engine itself\n{cell_table(report)}")
    if not options.models:
        print(rq3_table(report))
    latency_plot(report, options.plot)
    print(f"{time.monotonic() - report.begun:.0f} s; rows in {options.json}, plot in {options.plot}")


def one_cell(cell: Cell, workers: dict[str, Worker], report: Report, floor: float, nbytes: int) -> None:
    """Measure a cell and add its rows: one a peer, whether it ran, could not, or was not asked."""
    options = report.options
    left_out = {name: not_asked(cell, name, options.full) for name in workers if name != "cemg"}
    asked = {name: worker for name, worker in workers.items() if not left_out.get(name)}
    found = run_cell(cell, asked, options.rounds, options.seconds)
    peers: dict[str, Times | str] = {
        name: reason or found["reasons"].get(name) or found["times"].get(name, "nothing measured")
        for name, reason in left_out.items()
    }
    more: dict[str, Any] = {
        "normalize": cell.normalize,
        "dtype": cell.dtype,
        "weights": "random",
        "exact": True,
    }
    mine = found["times"].get("cemg") or found["reasons"].get("cemg", "nothing measured")
    if isinstance(mine, Times):
        parts = workers["cemg"].ask({"do": "parts"}, PATIENCE_S).get("parts", {})
        more |= {"users_per_second": cell.batch / mine.p50 * 1e3, "parts": parts}
        more |= {"illegal": found["first"]["cemg"]["illegal"], "peak_mib": found["memory"].get("cemg")}
        shares = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
        print(f"  {mine.p50:.1f} ms, floor {floor:.1f} ms; {shares}")
    else:
        print(f"  cemg: {mine}")
    if options.profile and isinstance(mine, Times):
        options.profile.mkdir(parents=True, exist_ok=True)
        path = options.profile / f"{cell.name().replace(' ', '-')}.json"
        workers["cemg"].ask({"do": "trace", "path": str(path.resolve())}, PATIENCE_S)
    equal = compare(cell, found["first"])
    for row in report.add(cell.name(), "cemg", mine, peers, equal, floor, nbytes, **more):
        if row["peer"] in found["times"]:
            row["peer_times"] = found["times"][row["peer"]].row()
            row["peer_illegal"] = found["first"][row["peer"]]["illegal"]
            row["peer_peak_mib"] = found["memory"].get(row["peer"])
    report.write()


if __name__ == "__main__":
    main()
