"""Shared by all benchmarks: fair timing, the measured limits of the machine, JSON, tables and plots.

Contenders take turns, round by round, so noise on the machine affects all of them alike. Times are in
milliseconds. Percentiles above 80 need at least 100 samples. A row is one (case, backend, peer).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Work = Callable[[], object]
MIN_SAMPLE_S = 2e-4  # shorter work is repeated within a sample until it takes this long
NOT_INSTALLED = "not installed"
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux
CPUS = Path("/sys/devices/system/cpu")
NOT_RUN = "not run: "  # begins the status of a peer that is left out on purpose


@dataclass(frozen=True, slots=True)
class Times:
    """Samples of one contender, in milliseconds."""

    samples: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))

    @property
    def p50(self) -> float:
        return self.percentile(50)

    def row(self) -> dict[str, float]:
        """The percentiles in the form of a benchmark's row."""
        named = {f"p{percent}_ms": self.percentile(percent) for percent in (20, 50, 80)}
        if len(self.samples) >= 100:
            named |= {f"p{percent}_ms": self.percentile(percent) for percent in (95, 99)}
        return {**named, "samples": len(self.samples)}


def make_parser(docstring: str | None, *, rounds: int = 15, seconds: float = 20.0) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; ``docstring``: the script's own."""
    parser = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--plot", type=Path, help="file to write a plot to (.png or .svg)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help="samples per contender")
    parser.add_argument("--seconds", type=float, default=seconds, help="time limit per contender and case")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    return parser


def apply_options(options: argparse.Namespace) -> torch.device:
    """Applies the shared options and returns the device. Exits with a message if torch does not find it."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU; use --device cpu")
    return device


def measure(
    contenders: Mapping[str, Work], device: torch.device, rounds: int = 15, seconds: float = 20.0
) -> dict[str, Times]:
    """Times each contender ``rounds`` times in turns; fewer times if that takes more than ``seconds``.

    Each contender first runs twice without being measured. On a GPU the times are those of device events.
    """
    repeats: dict[str, int] = {}
    turns: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    for name, work in contenders.items():
        work()
        once = _sample(work, 1, device)
        repeats[name] = max(1, int(np.ceil(MIN_SAMPLE_S / max(once, 1e-9))))
        turns[name] = max(1, min(rounds, int(seconds / max(once, MIN_SAMPLE_S))))
        samples[name] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(max(turns.values(), default=0)):
            order = list(contenders)
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                if turns[name] > turn:
                    samples[name].append(_sample(contenders[name], repeats[name], device) * 1e3)
    finally:
        if collecting:
            gc.enable()
    return {name: Times(tuple(taken)) for name, taken in samples.items()}


def _sample(work: Work, repeats: int, device: torch.device) -> float:
    """Seconds per call, over ``repeats`` calls."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begun) / repeats


def separated(scores: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which of the scores [B, W], best first, are more than ``tolerance`` from both neighbors: bool [B, W].

    All correct lists agree at these places. The last score never counts: it may tie with a pruned one.
    """
    gap = (scores[:, :-1] - scores[:, 1:]) > tolerance
    ends = torch.ones_like(scores[:, :1], dtype=torch.bool)
    return torch.cat((ends, gap), 1) & torch.cat((gap, ~ends), 1)


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 0) -> float:
    """Floating-point operations per second of a square matrix product: the fastest of several runs.

    On a CPU, the faster of torch's product (MKL) and oneDNN's product with a packed weight.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products: dict[str, Work] = {"gemm": lambda: a @ b}
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        weight = torch.ops.mkldnn._reorder_linear_weight(b)
        products["packed"] = lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
    taken = measure(products, device, rounds=15, seconds=5)
    return 2 * size**3 / (min(min(times.samples) for times in taken.values()) / 1e3)


def copy_bandwidth(device: torch.device, megabytes: int = 0) -> float:
    """Bytes per second of a copy, both read and written bytes counted: the fastest of several runs."""
    megabytes = megabytes or (1024 if device.type == "cuda" else 256)
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    taken = measure({"copy": lambda: target.copy_(source)}, device, rounds=9, seconds=5)
    return 2 * source.nbytes / (min(taken["copy"].samples) / 1e3)


def last_level_cache(device: torch.device) -> float:
    """Bytes of the last-level cache, all its slices together.

    inf if the system does not report it: then no floor counts reads that the cache may have saved.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).L2_cache_size)
    slices = {}
    for index in CPUS.glob("cpu[0-9]*/cache/index3"):
        kibibytes = (index / "size").read_text().strip().removesuffix("K")
        slices[(index / "shared_cpu_list").read_text()] = float(kibibytes) * 2**10
    return sum(slices.values()) or float("inf")


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, cores, accelerator and versions of this run."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = NOT_INSTALLED
    return facts


def _cpu_name() -> str:
    """The name, family and model in /proc/cpuinfo: the name of a rented processor may be its brand alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in pairs}
    known = [f"{part} {facts[key]}" for part, key in (("family", "cpu family"), ("model", "model"))
             if key in facts]  # fmt: skip
    return ", ".join([facts.get("model name", platform.processor()), *known])


def commit() -> str:
    """The commit of this checkout or "unknown"; a "+" marks changes to more than text and results."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()  # fmt: skip
        results = [f":(top,exclude){folder}" for folder in ("bench/results", "docs", "*.md")]
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", ":(top)", *results],
                                 capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CEMG_COMMIT", "unknown")
    return head + ("+" if changed else "")


@dataclass(slots=True)
class Report:
    """The rows of one benchmark, written after each case, so an interrupted run keeps its rows."""

    op: str
    options: argparse.Namespace
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def case(
        self,
        name: str,
        ours: Mapping[str, Work],
        peers: Mapping[str, Work | str],
        equal_to: str,
        floor_ms: float | None = None,
        nbytes: int | None = None,
        **extra: Any,
    ) -> list[dict[str, Any]]:
        """Times our backends and the peers together, adds one row per pair and returns these rows.

        Args:
            name: Name of the case.
            ours: Our backends by name.
            peers: The peers by name; a string in place of a peer is the reason why it cannot run.
            equal_to: What the caller compared the outputs with before this call.
            floor_ms: The physical limit, in milliseconds.
            nbytes: Bytes that the operation has to move.
            extra: More fields of the rows.
        """
        print(f"{self.op} {name}", flush=True)
        runnable = {peer: work for peer, work in peers.items() if not isinstance(work, str)}
        taken = measure({**ours, **runnable}, self.device, self.options.rounds, self.options.seconds)
        results = {peer: work if isinstance(work, str) else taken[peer] for peer, work in peers.items()}
        rows = []
        for backend in ours:
            rows += self.add(name, backend, taken[backend], results, equal_to, floor_ms, nbytes, **extra)
        self.write()
        return rows

    def add(
        self,
        name: str,
        backend: str,
        times: Times | str,
        peers: Mapping[str, Times | str],
        equal_to: str,
        floor_ms: float | None = None,
        nbytes: int | None = None,
        **extra: Any,
    ) -> list[dict[str, Any]]:
        """Adds and returns the rows of one backend: one per peer, or one row if there are no peers.

        A string in place of times is the reason why there are none.
        """
        percentiles: dict[str, Any] = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"))
        percentiles |= {"samples": 0} if isinstance(times, str) else times.row()
        shared = {"op": self.op, "case": name, "backend": backend, "equal_to": equal_to, **percentiles,
                  "bytes": nbytes, "floor_ms": floor_ms, **extra}  # fmt: skip
        rows = []
        for peer, result in peers.items() or {"none": "no peer"}.items():
            row = {**shared, "peer": peer, "status": "ok", "peer_p50_ms": None, "ratio": None}
            if isinstance(result, str):
                row["status"] = result
            else:
                row["peer_p50_ms"] = result.p50
            if isinstance(times, str):
                row["status"] = f"ours skipped: {times}"
            elif isinstance(result, Times):
                row["ratio"] = result.p50 / times.p50
            rows.append(row)
        self.rows += rows
        return rows

    def metadata(self) -> dict[str, Any]:
        """The fields of the JSON file besides the rows."""
        options = {name: value for name, value in vars(self.options).items() if not isinstance(value, Path)}
        return {"op": self.op, "machine": machine(self.device), "commit": commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self.begun), "options": options}  # fmt: skip

    def write(self) -> None:
        """Writes the rows so far to the file of --json, atomically."""
        if not self.options.json:
            return
        content = self.metadata() | {"rows": self.rows}
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        partial = self.options.json.with_suffix(".part")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.options.json)

    def resume(self, options: Sequence[str]) -> set[str]:
        """Reads the rows of an interrupted run from the file of --json, if there is one.

        Returns the cases for which it has a time of ours. Exits with a message if the file is from another
        benchmark, machine or commit, from a commit with changes, or from another value of one of ``options``.
        """
        path = self.options.json
        if not path or not path.is_file():
            return set()
        before, now = json.loads(path.read_text()), self.metadata()
        differs = [name for name in ("op", "machine", "commit") if before.get(name) != now[name]]
        differs += [
            f"--{name}" for name in options if before.get("options", {}).get(name) != now["options"][name]
        ]
        if now["commit"].endswith("+") or now["commit"] == "unknown":
            differs.append("uncommitted code")
        if differs:
            raise SystemExit(f"{path} cannot be resumed; it differs in: {', '.join(differs)}. "
                             "Leave out --resume, or choose another --json")  # fmt: skip
        done = {row["case"] for row in before["rows"] if row["p50_ms"] is not None}
        self.rows += [row for row in before["rows"] if row["case"] in done]
        self.begun -= before["seconds"]
        return done

    def finish(self) -> None:
        """Prints the table, draws the plot and prints the path of the JSON file."""
        print(self.table())
        if self.options.plot:
            self.plot(self.options.plot)
        if self.options.json:
            print(f"rows in {self.options.json}")

    def table(self) -> str:
        """One line per row: our time, the peer's, their ratio, and our time over the floor.

        Peers that were left out for the same reason share a line.
        """
        head = ("case", "backend", "ms", "peer", "peer ms", "ratio", "x floor")
        lines = [head]
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            peer = "" if row["status"].startswith(NOT_RUN) else row["peer"]
            groups.setdefault((row["case"], row["backend"], row["status"], peer), []).append(row)
        for row, *others in groups.values():
            ours, floor, ratio = row["p50_ms"], row["floor_ms"], row["ratio"]
            theirs, peer = row["peer_p50_ms"], f"{len(others) + 1} peers" if others else row["peer"]
            lines.append((
                row["case"], row["backend"], row["status"] if ours is None else f"{ours:.3f}", peer,
                f"{theirs:.3f}" if theirs is not None else "" if ours is None else row["status"],
                f"{ratio:.2f}" if ratio else "", f"{ours / floor:.2f}" if ours and floor else "",
            ))  # fmt: skip
        return format_columns(lines)

    def plot(self, path: Path) -> None:
        """Draws median times as bars on a logarithmic axis, one group per case, and the floor as a line."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = [row for row in self.rows if row["p50_ms"] is not None]
        cases = list(dict.fromkeys(row["case"] for row in rows))
        names: dict[str, dict[str, float]] = {}
        for row in rows:
            names.setdefault(f"cemg {row['backend']}", {})[row["case"]] = row["p50_ms"]
            if row["peer_p50_ms"] is not None:
                names.setdefault(row["peer"], {})[row["case"]] = row["peer_p50_ms"]
        figure, axes = plt.subplots(figsize=(max(6.0, 1.8 * len(cases)), 4.2), layout="constrained")
        width = 0.8 / len(names)
        for i, (name, medians) in enumerate(names.items()):
            positions = [cases.index(case) + i * width - 0.4 + width / 2 for case in medians]
            axes.bar(positions, list(medians.values()), width, label=name)
        floors = {row["case"]: row["floor_ms"] for row in rows if row["floor_ms"]}
        for i, case in enumerate(cases):
            if case in floors:
                axes.hlines(floors[case], i - 0.42, i + 0.42, colors="black", linestyles="dashed",
                            label="floor" if case == next(iter(floors)) else "")  # fmt: skip
        axes.set(yscale="log", ylabel="milliseconds, median", title=f"{self.op} on {_title(self.device)}")
        axes.set_xticks(range(len(cases)), cases, rotation=15 if len(cases) > 3 else 0)
        axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def format_columns(lines: Sequence[Sequence[str]]) -> str:
    """The lines as text, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def _title(device: torch.device) -> str:
    facts = machine(device)
    return str(facts["device"]) if device.type == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"


def reset_peak_memory() -> None:
    """Starts a new measurement of ``peak_memory_mib``.

    Without it, the peak includes memory of the parent process, of earlier cells and of building a catalog.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def peak_memory_mib() -> float:
    """The peak since the reset, in MiB: torch's on the GPU if there is one, else that of the whole process,
    libraries and model included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if CLEAR_REFS.exists():
        status = CLEAR_REFS.with_name("status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def missing_packages(names: Sequence[str]) -> str:
    """Why a peer that needs these packages cannot run; empty if all are installed."""
    missing = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return f"{NOT_INSTALLED}: {', '.join(missing)}" if missing else ""


def build_peer(make: Callable[[], Any]) -> Any:
    """The peer that ``make`` returns, or the reason why it fails: a peer's package may raise anything."""
    try:
        return make()
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> str:
    """An error as the status of a row."""
    return f"failed: {(str(error) or type(error).__name__).splitlines()[0][:80]}"


def check_peers(peers: Mapping[str, Any], check: Callable[[Any], object]) -> dict[str, Any]:
    """The peers, with a reason in place of each one for which ``check`` raises; given reasons stay."""
    results = dict(peers)
    for name, peer in peers.items():
        if not isinstance(peer, str):
            try:
                check(peer)
            except Exception as error:
                results[name] = failure(error)
    return results
