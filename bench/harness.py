"""What every benchmark shares: fair timing in one run, the machine's measured limits, JSON, table and plot.

Contenders take turns, round by round, so that a noisy machine is noisy to all of them. Times are
milliseconds; percentiles above 80 are given from 100 samples on. A row is one (case, backend, peer).
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
MIN_SAMPLE_S = 2e-4  # shorter work is repeated within a sample until it lasts as long
NOT_INSTALLED = "not installed"
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux
CPUS = Path("/sys/devices/system/cpu")
NOT_ASKED = "not asked: "  # begins the status of a peer left out on purpose


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
        """The percentiles as a benchmark's row holds them."""
        named = {f"p{percent}_ms": self.percentile(percent) for percent in (20, 50, 80)}
        if len(self.samples) >= 100:
            named |= {f"p{percent}_ms": self.percentile(percent) for percent in (95, 99)}
        return {**named, "samples": len(self.samples)}


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options every benchmark takes; its own are added to what this returns."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--plot", type=Path, help="write a plot there (.png or .svg)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=defaults.get("rounds", 15), help="samples a contender")
    parser.add_argument(
        "--seconds", type=float, default=defaults.get("seconds", 20.0), help="at most, a contender and case"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: what torch takes")
    return parser


def start(options: argparse.Namespace) -> torch.device:
    """Apply the shared options; the device to work on. Exits with a line where it is not there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here; use --device cpu")
    return device


def measure(
    contenders: Mapping[str, Work], device: torch.device, rounds: int = 15, seconds: float = 20.0
) -> dict[str, Times]:
    """Time each contender ``rounds`` times (fewer where that takes over ``seconds``), taking turns.

    Each runs twice before, unmeasured. On a GPU the times are of device events.
    """
    inner, left, samples = {}, {}, {}
    for name, work in contenders.items():
        work()
        once = _sample(work, 1, device)
        inner[name] = max(1, int(np.ceil(MIN_SAMPLE_S / max(once, 1e-9))))
        left[name] = max(1, min(rounds, int(seconds / max(once, MIN_SAMPLE_S))))
        samples[name] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(max(left.values(), default=0)):
            order = list(contenders)
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                if left[name] > turn:
                    samples[name].append(_sample(contenders[name], inner[name], device) * 1e3)
    finally:
        if collecting:
            gc.enable()
    return {name: Times(tuple(taken)) for name, taken in samples.items()}


def _sample(work: Work, repeats: int, device: torch.device) -> float:
    """Seconds a call, over ``repeats`` calls."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begun) / repeats


def apart(scores: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which of scores [B, W], best first, lie more than ``tolerance`` from both neighbours: bool [B, W].

    What stands there has to be the same for everyone; the last may tie with what was cut.
    """
    gap = (scores[:, :-1] - scores[:, 1:]) > tolerance
    ends = torch.ones_like(scores[:, :1], dtype=torch.bool)
    return torch.cat((ends, gap), 1) & torch.cat((gap, ~ends), 1)


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 0) -> float:
    """Floating-point operations a second of a square matrix product: the best of several, a limit.

    On a CPU that of torch (MKL) or of oneDNN over a packed weight, whichever is faster.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ways: dict[str, Work] = {"gemm": lambda: a @ b}
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        weight = torch.ops.mkldnn._reorder_linear_weight(b)
        ways["packed"] = lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
    taken = measure(ways, device, rounds=15, seconds=5)
    return 2 * size**3 / (min(min(t.samples) for t in taken.values()) / 1e3)


def copy_bandwidth(device: torch.device, megabytes: int = 0) -> float:
    """Bytes a second of a copy, read and written both counted: the best of several, a limit."""
    megabytes = megabytes or (1024 if device.type == "cuda" else 256)
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    taken = measure({"copy": lambda: target.copy_(source)}, device, rounds=9, seconds=5)
    return 2 * source.nbytes / (min(taken["copy"].samples) / 1e3)


def last_cache(device: torch.device) -> float:
    """Bytes of the last cache before memory, all its slices; inf where the system does not say, so that no
    floor counts what may have been there."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).L2_cache_size)
    slices = {}
    for index in CPUS.glob("cpu[0-9]*/cache/index3"):
        kibibytes = (index / "size").read_text().strip().removesuffix("K")
        slices[(index / "shared_cpu_list").read_text()] = float(kibibytes) * 2**10
    return sum(slices.values()) or float("inf")


def machine(device: torch.device) -> dict[str, Any]:
    """What ran: processor, cores, accelerator, versions."""
    said = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "transformers"):
        try:
            said[package] = version(package)
        except PackageNotFoundError:
            said[package] = NOT_INSTALLED
    return said


def _cpu_name() -> str:
    """As the kernel has it, with family and model: a rented processor may say no more than its brand."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    said = {
        key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)
    }
    known = [
        f"{part} {said[key]}" for part, key in (("family", "cpu family"), ("model", "model")) if key in said
    ]
    return ", ".join([said.get("model name", platform.processor()), *known])


def commit() -> str:
    """The commit of this tree, "+" behind it where more than prose and results differ, or "unknown"."""
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
    """The rows of one benchmark; written after each case, so that an interrupted run keeps what it has."""

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
        **more: Any,
    ) -> list[dict[str, Any]]:
        """Time our backends and the peers together, and add a row a pair; returns these rows.

        A peer that is a string could not run, for that reason. ``equal_to`` says what the outputs were
        compared with before; the comparison is the caller's. ``floor_ms`` is the physical limit, ``nbytes``
        what it has to move.
        """
        print(f"{self.op} {name}", flush=True)
        runnable = {peer: work for peer, work in peers.items() if not isinstance(work, str)}
        taken = measure({**ours, **runnable}, self.device, self.options.rounds, self.options.seconds)
        found = {peer: work if isinstance(work, str) else taken[peer] for peer, work in peers.items()}
        rows = []
        for backend in ours:
            rows += self.add(name, backend, taken[backend], found, equal_to, floor_ms, nbytes, **more)
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
        **more: Any,
    ) -> list[dict[str, Any]]:
        """Add and return the rows of one backend: one a peer, or one without. A string in place of times is
        the reason why there are none."""
        own: dict[str, Any] = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"))
        own |= {"samples": 0} if isinstance(times, str) else times.row()
        shared = {"op": self.op, "case": name, "backend": backend, "equal_to": equal_to, **own,
                  "bytes": nbytes, "floor_ms": floor_ms, **more}  # fmt: skip
        rows = []
        for peer, found in peers.items() or {"none": "no peer"}.items():
            row = {**shared, "peer": peer, "status": "ok", "peer_p50_ms": None, "ratio": None}
            if isinstance(found, str):
                row["status"] = found
            else:
                row["peer_p50_ms"] = found.p50
            if isinstance(times, str):
                row["status"] = f"ours skipped: {times}"
            elif isinstance(found, Times):
                row["ratio"] = found.p50 / times.p50
            rows.append(row)
        self.rows += rows
        return rows

    def said(self) -> dict[str, Any]:
        """What the JSON says besides the rows."""
        options = {name: value for name, value in vars(self.options).items() if not isinstance(value, Path)}
        return {"op": self.op, "machine": machine(self.device), "commit": commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self.begun), "options": options}  # fmt: skip

    def write(self) -> None:
        """The JSON of all rows so far, whole or not at all, where --json asks for it."""
        if not self.options.json:
            return
        said = self.said() | {"rows": self.rows}
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        partial = self.options.json.with_suffix(".part")
        partial.write_text(json.dumps(said, indent=1) + "\n")
        partial.replace(self.options.json)

    def take_up(self, options: Sequence[str]) -> set[str]:
        """The rows of an interrupted run, from the JSON; returns the cases that it has a time of ours for.

        Nothing where there is no file. Exits with a line where it is of another benchmark, machine, commit
        (or one with changes) or value of one of ``options``.
        """
        path = self.options.json
        if not path or not path.is_file():
            return set()
        before = json.loads(path.read_text())
        now = self.said()
        differs = [name for name in ("op", "machine", "commit") if before.get(name) != now[name]]
        differs += [
            f"--{name}" for name in options if before.get("options", {}).get(name) != now["options"][name]
        ]
        if now["commit"].endswith("+") or now["commit"] == "unknown":
            differs.append("state of the code, for all that is known")
        if differs:
            raise SystemExit(f"{path} cannot be taken up, it is of another {', '.join(differs)}: "
                             "leave out --resume, or name another --json")  # fmt: skip
        done = {row["case"] for row in before["rows"] if row["p50_ms"] is not None}
        self.rows += [row for row in before["rows"] if row["case"] in done]
        self.begun -= before["seconds"]
        return done

    def finish(self) -> None:
        """Print the table, draw the plot, say where the JSON is."""
        print(self.table())
        if self.options.plot:
            self.plot(self.options.plot)
        if self.options.json:
            print(f"rows in {self.options.json}")

    def table(self) -> str:
        """One line a row: ours, the peer, how many times faster, and the distance to the floor.

        Peers that were not asked, for one reason, share a line.
        """
        head = ("case", "backend", "ms", "peer", "peer ms", "ratio", "x floor")
        lines = [head]
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            own = "" if row["status"].startswith(NOT_ASKED) else row["peer"]
            groups.setdefault((row["case"], row["backend"], row["status"], own), []).append(row)
        for row, *others in groups.values():
            ours, floor, ratio = row["p50_ms"], row["floor_ms"], row["ratio"]
            theirs, peer = row["peer_p50_ms"], f"{len(others) + 1} peers" if others else row["peer"]
            lines.append((
                row["case"], row["backend"], row["status"] if ours is None else f"{ours:.3f}", peer,
                f"{theirs:.3f}" if theirs is not None else "" if ours is None else row["status"],
                f"{ratio:.2f}" if ratio else "", f"{ours / floor:.2f}" if ours and floor else "",
            ))  # fmt: skip
        return in_columns(lines)

    def plot(self, path: Path) -> None:
        """Median times as bars, a group a case, logarithmic, the floor as a line."""
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
            places = [cases.index(case) + i * width - 0.4 + width / 2 for case in medians]
            axes.bar(places, list(medians.values()), width, label=name)
        floors = {row["case"]: row["floor_ms"] for row in rows if row["floor_ms"]}
        for i, case in enumerate(cases):
            if case in floors:
                axes.hlines(floors[case], i - 0.42, i + 0.42, colors="black", linestyles="dashed",
                            label="floor" if case == next(iter(floors)) else None)  # fmt: skip
        axes.set(yscale="log", ylabel="milliseconds, median", title=f"{self.op} on {_title(self.device)}")
        axes.set_xticks(range(len(cases)), cases, rotation=15 if len(cases) > 3 else 0)
        axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def in_columns(lines: Sequence[Sequence[str]]) -> str:
    """The cells of each line under each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def _title(device: torch.device) -> str:
    said = machine(device)
    return said["device"] if device.type == "cuda" else f"{said['cpu']}, {said['threads']} threads"


def forget_peak() -> None:
    """Count the most memory held from here on: not what a worker's parent held, an earlier cell, or the
    building of a catalog."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def peak_mib() -> float:
    """The most held since, in MiB: by torch on the GPU where there is one, else by the process, with its
    libraries and the model."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if CLEAR_REFS.exists():
        status = CLEAR_REFS.with_name("status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def optional(names: Sequence[str]) -> str:
    """Why peers that need these packages cannot run; empty where all are there."""
    missing = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return f"{NOT_INSTALLED}: {', '.join(missing)}" if missing else ""


def built(make: Callable[[], Any]) -> Any:
    """A peer that ``make`` makes, or the reason why it cannot: its packages may raise whatever they like."""
    try:
        return make()
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> str:
    """An error as the status of a row."""
    return f"failed: {(str(error) or type(error).__name__).splitlines()[0][:80]}"


def checked(peers: Mapping[str, Any], check: Callable[[Any], object]) -> dict[str, Any]:
    """The peers, with a reason in place of those that ``check`` raises for; a reason stays."""
    said = dict(peers)
    for name, peer in peers.items():
        if not isinstance(peer, str):
            try:
                check(peer)
            except Exception as error:
                said[name] = failure(error)
    return said
