"""Latency of one batch of recommendations: our engine and its peers, each in a process of its own.

    python bench/latency.py                    # four to five minutes on two CPU cores
    python bench/latency.py --full             # the whole grid: about two hours on two CPU cores
    python bench/latency.py --full --resume    # the rest of an interrupted run
    python bench/latency.py --profile runs/profile --models tiger
    python bench/latency.py --memory           # what an item memory costs a search: a minute or two

Weights are random (seed 0). Their beams are nearly uniform; a search with trained weights costs the same. An
engine that is not installed, cannot serve a cell or is left out gets a row with the reason; so does ours.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch
from cells import ITEMS, MODELS, Cell, floor_ms, read_bytes
from engines import ENGINES, REPLY, prepare_request
from harness import (
    NOT_RUN,
    Report,
    Times,
    apply_options,
    copy_bandwidth,
    format_columns,
    gemm_rate,
    last_level_cache,
    machine,
    make_parser,
    separated,
)
from memory_cost import memory_grid, run_memory

SEARCH_TIMEOUT_S = 120.0  # an engine whose search takes longer is stopped and skips the cell
PREPARE_TIMEOUT_S = 300.0  # for imports, the model and the catalog
LONG_MS = 10e3  # a first search on a CPU that takes longer counts as a sample: its warm-up is a small part
MAX_LOGIT = 8  # of the random models here
TOO_LONG = "over "  # begins the reason of an engine that was stopped
NOT_COMPARED = "nothing: no constrained peer ran"
RESUME_OPTIONS = ("engines", "full", "normalize", "dtype", "rounds", "seconds", "threads")  # must not change


class Worker:
    """An engine in a process of its own; it restarts after it was stopped."""

    def __init__(self, engine: str, threads: int) -> None:
        self.engine, self.threads = engine, threads
        self.process: subprocess.Popen[str] | None = None
        self.lines: Queue[str | None] = Queue()

    def request(self, content: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply, or {"skip": reason} if the process fails or needs more than ``timeout`` seconds."""
        if self.process is None:
            self._start()
        process = self.process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(content) + "\n")
            process.stdin.flush()
            line = self.lines.get(timeout=timeout)
        except BrokenPipeError:
            line = None
        except Empty:
            self.stop()
            return {"skip": f"{TOO_LONG}{timeout:.0f} s"}
        if line is None:
            code = process.wait()
            self.stop()
            return {"skip": f"its process ended with code {code}"}
        reply: dict[str, Any] = json.loads(line)
        return reply

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
            if line.startswith(REPLY):
                lines.put(line[len(REPLY) :])
        lines.put(None)

    def stop(self) -> None:
        """Ends the process; the next request starts another one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def models_of(options: argparse.Namespace, on_gpu: bool) -> list[str]:
    """The models of --models, or those of the grid; Qwen3 is for flashrec, which runs on a GPU only."""
    if options.models:
        return list(options.models)
    left_out = {"mmgrec", *(() if options.full else ("t5-base",)), *(() if on_gpu else ("qwen3-0.6b",))}
    return [name for name in MODELS if name not in left_out]


def default_grid(models: list[str]) -> Iterator[Cell]:
    """Cells that take about five minutes on two cores."""
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
    """For every model, one thing varied at a time from B = 1 and W = 50: batch and beams, history, items."""
    for model in models:
        base = Cell(model, 1, 50)
        yield base
        yield from (replace(base, batch=batch, beams=beams) for batch in (1, 8, 16, 64)
                    for beams in (10, 20, 50) if (batch, beams) != (1, 50))  # fmt: skip
        yield from (replace(base, history=history) for history in (10, 50))
        sizes = (10**4, 10**5, 10**6, 10**7, *((10**8,) if on_gpu else ()))
        yield from (replace(base, items=items) for items in sizes)


RQ3 = "RQ3 "  # begins the label of a cell of this table
DICT_TRIE, UNCONSTRAINED = "transformers + dict trie", "transformers, unconstrained"
PUBLISHED = {  # the search that each method was published with
    "CEMG": DICT_TRIE, "LETTER": DICT_TRIE, "TIGER": UNCONSTRAINED, "MMGRec": UNCONSTRAINED,
}  # fmt: skip
SAME_SEARCH = (DICT_TRIE, "transformers + our processor", "vLLM + our trie")  # their scores equal ours
GENERATE = (DICT_TRIE, "transformers + our processor", UNCONSTRAINED)  # these cost about the same


def rq3_grid() -> Iterator[Cell]:
    """The methods of RQ3 in the paper, by the shape of their search. Prompts hold 20 items.

    CEMG and LETTER: 4 codes of 256 under a trie, the same shape. TIGER: 3 codes and one to separate equal
    semantic IDs, unconstrained. MMGRec: 3 codes of 128 and one to separate equal semantic IDs, a smaller
    model, 10 beams, unconstrained. An unconstrained beam may not be an item.
    """
    for batch in (1, 8):
        for method in ("CEMG", "LETTER", "TIGER"):
            yield Cell("tiger", batch, 20, label=f"{RQ3}{method}: ")
        yield Cell("mmgrec", batch, 10, codes=128, label=f"{RQ3}MMGRec: ")


def skip_reason(cell: Cell, peer: str, full: bool) -> str:
    """Why a peer is left out of this cell; empty if it runs.

    In RQ3, each method runs with its published search. The catalog size matters only to peers that use the
    catalog, and they run at sizes besides the default one only with --full.
    """
    if cell.label:
        published = PUBLISHED[cell.label.removeprefix(RQ3).removesuffix(": ")]
        return "" if peer == published else f"{NOT_RUN}not the published search of the method"
    if cell.items == ITEMS or (full and "unconstrained" not in peer):
        return ""
    return NOT_RUN + ("it does not use the catalog" if "unconstrained" in peer else "needs --full")


def rq3_table(report: Report) -> str:
    """The methods with their published search, on ``transformers``, and the same shapes on our engine."""
    lines = [
        f"{'RQ3, one batch':34}{'published search':>30}{'its ms':>10}{'its illegal':>13}{'CEMG engine':>13}"
    ]
    for row in report.rows:
        if row["case"].startswith(RQ3) and not row["status"].startswith(NOT_RUN):
            method, illegal = row["case"][len(RQ3) :], row.get("peer_illegal", "")
            theirs = "skipped" if row["peer_p50_ms"] is None else f"{row['peer_p50_ms']:.1f}"
            ours = "skipped" if row["p50_ms"] is None else f"{row['p50_ms']:.1f}"
            lines.append(f"{method:34}{row['peer']:>30}{theirs:>10}{illegal:>13}{ours:>13}")
    lines.append("LETTER and CEMG have the same shape, 4 codes of 256: any difference between them is noise.")
    return "\n".join(lines)


def cell_table(report: Report) -> str:
    """Our engine, one line per cell; p95 and p99 need at least 100 samples."""
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
    return format_columns(lines)


def run_cell(cell: Cell, workers: dict[str, Worker], rounds: int, seconds: float) -> dict[str, Any]:
    """Prepares every engine, then times them in turns.

    Returns, by engine: "times", "reasons" of those that were skipped, the "first" results with the number of
    illegal items, and the peak "memory".
    """
    times: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    first: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        slow = [other for other in GENERATE if reasons.get(other, "").startswith(TOO_LONG)]
        if name in GENERATE and slow:
            reasons[name] = f"{NOT_RUN}{slow[0]}, the same generate(), took {reasons[slow[0]]}"
            continue
        reply = worker.request(prepare_request(cell), PREPARE_TIMEOUT_S)
        if "skip" not in reply:
            reply = worker.request({"do": "first"}, SEARCH_TIMEOUT_S)
        if "skip" in reply:
            reasons[name] = reply["skip"]
        else:
            first[name] = reply
            times[name] = [reply["ms"]] if reply["ms"] > LONG_MS and cell.device == "cpu" else []
    for _ in range(rounds):
        for name in [name for name in times if name not in reasons]:
            if times[name] and sum(times[name]) > seconds * 1e3:
                continue
            reply = workers[name].request({"do": "sample"}, SEARCH_TIMEOUT_S)
            if "skip" in reply:
                reasons[name] = reply["skip"]
            else:
                times[name].append(reply["ms"])
    memory = {
        name: workers[name].request({"do": "memory"}, 30).get("mib") for name in times if name not in reasons
    }
    taken = {name: Times(tuple(samples)) for name, samples in times.items() if samples}
    return {"times": taken, "reasons": reasons, "first": first, "memory": memory}


def tolerance(cell: Cell) -> float:
    """The largest difference of two engines' scores for the same list.

    float32: 1e-4. Narrower types: each engine rounds each of the ``levels`` logits of a score once, and the
    hidden states before it cause an error of the same size. Logits are at most MAX_LOGIT.
    """
    if cell.dtype == "float32":
        return 1e-4
    dtype: torch.dtype = getattr(torch, cell.dtype)
    return 2 * cell.levels * MAX_LOGIT * torch.finfo(dtype).eps


def compare(cell: Cell, first: dict[str, dict[str, Any]]) -> str:
    """Compares our lists with those of the peers that run the same search; returns with which, how closely.

    The scores in order, and the codes of each beam whose score differs from its neighbors' by more than both
    engines may err. Raises SystemExit if the lists differ.
    """
    allowed, equal = tolerance(cell), []
    for peer in SAME_SEARCH:
        if peer not in first or "cemg" not in first:
            continue
        ours, theirs = (torch.tensor(first[name]["scores"]) for name in ("cemg", peer))
        codes, their_codes = (torch.tensor(first[name]["codes"]) for name in ("cemg", peer))
        (ours, order), (theirs, their_order) = ours.sort(descending=True), theirs.sort(descending=True)
        worst = float((ours - theirs).abs().max())
        same = (reordered(codes, order) == reordered(their_codes, their_order)).all(2)
        different = int((~same & separated(ours, 2 * allowed)).sum())
        if worst > allowed or different:
            raise SystemExit(
                f"our lists differ from those of {peer}: scores by {worst:.1e}, {different} codes apart from "
                "ties; run pytest tests/decoding"
            )
        equal.append(f"{peer} (worst {worst:.0e})")
    return f"{', '.join(equal)}: scores within {allowed:.0e}, codes" if equal else NOT_COMPARED


def reordered(codes: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``codes`` [B, W, levels] in the ``order`` [B, W] of each user."""
    return codes.gather(1, order[..., None].expand_as(codes))


def latency_plot(all_rows: list[dict[str, Any]], path: Path, *, cpu: str, threads: int) -> None:
    """Draws two panels: medians per cell and engine, and our latency by catalog size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in all_rows if not row["case"].startswith(RQ3) and row["p50_ms"] is not None]
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
        positions = [cells.index(cell) - 0.425 + (i + 0.5) * width for cell in shown]
        left.bar(positions, [medians[cell] for cell in shown], width, label=name)
    floors = {row["case"]: row["floor_ms"] for row in rows}
    for i, cell in enumerate(cells):
        left.hlines(floors[cell], i - 0.45, i + 0.45, colors="black", linestyles="dashed",
                    label="floor of this machine" if i == 0 else "")  # fmt: skip
    left.set(yscale="log", ylabel="milliseconds per batch, median")
    left.set_xticks(range(len(cells)), cells, rotation=12)
    left.set_ylim(top=12 * max(max(medians.values(), default=1.0) for medians in names.values()))
    left.legend(fontsize=7, ncols=2, loc="upper left")
    for model in dict.fromkeys(row["case"].split()[0] for row in sized):
        medians = {row["case"]: row["p50_ms"] for row in sized if row["case"].startswith(model)}
        sizes = [float(case.split(" N")[1]) for case in medians]
        right.plot(sizes, list(medians.values()), "o-", label=model)
    right.set(xscale="log", xlabel="items in the catalog", ylabel="CEMG, milliseconds", ylim=(0, None))
    if sized:
        right.legend(fontsize=7)
    figure.suptitle(f"One batch of recommendations, random weights; {cpu}, "
                    f"{threads} threads", fontsize=10)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    options = parse_options()
    device = apply_options(options)
    models = models_of(options, device.type == "cuda")
    if options.memory:
        cells = memory_grid(options.models or ["tiger"])
        run_memory(Report("memory", options, device), chosen_cells(cells, options))
        return
    grid = full_grid(models, device.type == "cuda") if options.full else default_grid(models)
    grid = chain(grid, () if options.models else rq3_grid())
    cells = chosen_cells(grid, options)
    report = Report("latency", options, device)
    done = report.resume(RESUME_OPTIONS) if options.resume else set()
    names = ["cemg", *(name for name in options.engines or ENGINES if name != "cemg")]
    dtypes = {torch.float32, getattr(torch, options.dtype)}  # a CPU may be slow at the narrower one
    flops, bandwidth = max(gemm_rate(device, dtype) for dtype in dtypes), copy_bandwidth(device)
    cache = last_level_cache(device)
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
        print("interrupted; --resume continues. The results so far:")
    finally:
        for worker in workers.values():
            worker.stop()
    print(report.table())
    print(f"\nOur engine\n{cell_table(report)}")
    if not options.models:
        print(rq3_table(report))
    facts = machine(report.device)
    latency_plot(report.rows, options.plot, cpu=facts["cpu"], threads=facts["threads"])
    print(f"{time.monotonic() - report.begun:.0f} s; rows in {options.json}, plot in {options.plot}")


def chosen_cells(grid: Iterable[Cell], options: argparse.Namespace) -> list[Cell]:
    """The cells of a grid that the options choose, as they are to run."""
    return [replace(cell, normalize=options.normalize, device=options.device, dtype=options.dtype)
            for cell in grid if re.search(options.cells, cell.name())]  # fmt: skip


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=100, seconds=0.7)
    parser.set_defaults(plot=Path("runs/latency.png"))
    parser.add_argument(
        "--memory", action="store_true", help="compare searches with an item memory with searches alone"
    )
    parser.add_argument("--full", action="store_true", help="run the whole grid, including T5-base")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cells in the --json file and measure the rest"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, help="run these models only")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="run cemg and these engines only")
    parser.add_argument(
        "--cells", default="", help='run only cells whose name matches this pattern, e.g. "B1 W50$"'
    )
    parser.add_argument("--normalize", choices=("vocab", "level", "valid"), default="vocab")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--profile", type=Path, help="folder to write one Chrome trace per cell to")
    options = parser.parse_args()
    options.json = options.json or Path(f"runs/latency{'-memory' if options.memory else ''}.json")
    return options


def one_cell(cell: Cell, workers: dict[str, Worker], report: Report, floor: float, nbytes: int) -> None:
    """Measures a cell and adds its rows: one per peer, whether it ran, failed or was left out."""
    options = report.options
    left_out = {name: skip_reason(cell, name, options.full) for name in workers if name != "cemg"}
    running = {name: worker for name, worker in workers.items() if not left_out.get(name)}
    results = run_cell(cell, running, options.rounds, options.seconds)
    peers: dict[str, Times | str] = {
        name: reason or results["reasons"].get(name) or results["times"].get(name, "nothing measured")
        for name, reason in left_out.items()
    }
    extra: dict[str, Any] = {
        "normalize": cell.normalize, "dtype": cell.dtype, "weights": "random", "exact": True
    }  # fmt: skip
    ours = results["times"].get("cemg") or results["reasons"].get("cemg", "nothing measured")
    if isinstance(ours, Times):
        parts = workers["cemg"].request({"do": "parts"}, SEARCH_TIMEOUT_S).get("parts", {})
        extra |= {"users_per_second": cell.batch / ours.p50 * 1e3, "parts": parts}
        extra |= {"illegal": results["first"]["cemg"]["illegal"], "peak_mib": results["memory"].get("cemg")}
        shares = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
        print(f"  {ours.p50:.1f} ms, floor {floor:.1f} ms; {shares}")
    else:
        print(f"  cemg: {ours}")
    if options.profile and isinstance(ours, Times):
        options.profile.mkdir(parents=True, exist_ok=True)
        path = options.profile / f"{cell.name().replace(' ', '-')}.json"
        workers["cemg"].request({"do": "trace", "path": str(path.resolve())}, SEARCH_TIMEOUT_S)
    equal = compare(cell, results["first"])
    for row in report.add(cell.name(), "cemg", ours, peers, equal, floor, nbytes, **extra):
        if row["peer"] in results["times"]:
            row["peer_times"] = results["times"][row["peer"]].row()
            row["peer_illegal"] = results["first"][row["peer"]]["illegal"]
            row["peer_peak_mib"] = results["memory"].get(row["peer"])
    report.write()


if __name__ == "__main__":
    main()
