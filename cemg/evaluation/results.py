"""Result files: one JSON per evaluation, with the fingerprint of its split and the rank of each target."""

from __future__ import annotations

import base64
import os
import platform
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from cemg.errors import DamagedError, UserError
from cemg.evaluation.metrics import intervals_at, metrics_at, paired_differences
from cemg.evaluation.protocol import COLD, Evaluation
from cemg.evaluation.sample import Sample
from cemg.precision import has_native_bfloat16
from cemg.storage import files
from cemg.storage.read import check_signature, parse_json, read_bytes, signed
from cemg.version import __version__

KEPT, REMOVED = "metrics", "metrics_history_removed"  # keys of the metrics of each ranking
EXCLUDED = "metrics_history_excluded_in_search"  # exclude_history=True
OF_LISTS = ("spread", "targets_in_history", "short_lists_history_removed", "compared", "sha256")


def hardware(device: str = "cpu") -> dict[str, str | int]:
    """Describe CPU, cores, versions and, if used, the GPU. The names of host and user are left out.

    "native_bfloat16": without it, ``--dtype bfloat16`` was computed in float32.
    """
    about: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "native_bfloat16": has_native_bfloat16(torch.device(device).type),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if torch.device(device).type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


@cache
def code_version() -> dict[str, str]:
    """The version of CEMG and, in a clone of its repository, the commit, with "+" if files were changed."""
    about = {"version": __version__}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(root)]
            commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True)
            changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
            about["commit"] = commit.strip() + ("+" if changed.strip() else "")
    return about


def write_result(
    path: Path,
    *,
    dataset: str,
    command: str,
    config: Mapping[str, Any],
    seed: int,
    hardware: Mapping[str, str | int],
    seconds: float,
    evaluation: Evaluation,
    excluded: Evaluation | None = None,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write the metrics and ranks of one evaluation as JSON, atomically.

    Args:
        path: The file to write.
        dataset: Name of the data set.
        command: The command that measured the metrics.
        config: Settings of the model.
        seed: Seed of the training.
        hardware: See ``hardware``.
        seconds: Wall-clock time of training and evaluation together.
        evaluation: The evaluation.
        excluded: The evaluation of the same users with the history excluded in the search, if it was made.
        further: More entries of the file.

    Raises:
        TypeError: ``config`` has a value that JSON cannot represent.
    """
    record = {
        "dataset": dataset,
        "command": command,
        "config": dict(config),
        "seed": seed,
        "hardware": dict(hardware),
        "code": code_version(),
        "seconds": round(seconds, 1),
        **_metrics_of(evaluation, excluded),
        **(further or {}),
    }
    files.write_json(path, signed(record | {"file": path.name}))


def ranks_of(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the ranks of all users in a result file, by ranking.

    Args:
        record: The content of the file.

    Returns:
        For "metrics" and each other key of metrics in the file, the ranks [T] int64 by ascending position of
        the user in the split; MISS beyond the largest cutoff. Empty for files of earlier versions.
    """
    return {key: _unpacked(text).long() for key, text in record.get("ranks", {}).items()}


def restrict(record: Mapping[str, Any], sample: Sample) -> dict[str, Any] | None:
    """Restrict a result of all users to a sample, without running the model again.

    The ranks, metrics and intervals are those of an evaluation of the sample, and so are those of cold
    targets. What needs the lists is left out: the spread, the length of the lists and the targets in the
    history. Files of earlier versions do not say which targets are cold, so that those are left out, too.

    Returns:
        A record for tables; None if ``record`` is itself of a part of the users, or has no ranks.
    """
    users, split = int(record["split"]["users"]), record["split"]
    if "subset" in split or "ranks" not in record:
        return None
    rows = torch.from_numpy(sample.rows(users))
    of_user = record.get("cold", {}).get("of_user")
    cold = torch.zeros(len(rows), dtype=torch.bool) if of_user is None else _unpacked(of_user)[rows].bool()
    rankings = {key: ranks[rows] for key, ranks in ranks_of(record).items()}
    cutoffs = sorted({int(name.partition("@")[2]) for name in record[KEPT]})
    name = sample.name(users)
    found = {key: value for key, value in record.items() if key not in OF_LISTS}
    found |= {"split": split | ({"subset": name} if name else {}), "evaluated_users": len(rows)}
    found |= _metrics_of_ranks(rankings, cold, cutoffs)
    return found if of_user is not None else {key: found[key] for key in found if key != "cold"}


def differences_of(*pairs: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
    """Compare two models for the same users, ranking by ranking: see ``paired_differences``.

    Args:
        pairs: The results of both models, a pair per seed.

    Returns:
        The differences by key of metrics, for the rankings that all files have ranks of.
    """
    ranks = [(ranks_of(first), ranks_of(second)) for first, second in pairs]
    cutoffs = sorted({int(name.split("@")[1]) for name in pairs[0][0]["metrics"]})
    shared = [key for key in ranks[0][0] if all(key in one for pair in ranks for one in pair)]
    found = {}
    for key in shared:
        first, second = (torch.stack([pair[side][key] for pair in ranks]) for side in (0, 1))  # [S, T]
        found[key] = paired_differences(first, second, cutoffs)
    return found


def same_results(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether several seeds have the same metrics, so that the model is deterministic."""
    found = [(record[KEPT], record[REMOVED], record.get("ranks")) for record in records]
    return len(found) > 1 and all(one == found[0] for one in found)


def _metrics_of(evaluation: Evaluation, excluded: Evaluation | None) -> dict[str, Any]:
    rankings = {KEPT: evaluation.ranks, REMOVED: evaluation.ranks_history_removed}
    if excluded is not None:
        assert excluded.users.tolist() == evaluation.users.tolist()
        rankings[EXCLUDED] = excluded.ranks
    spreads = {KEPT: evaluation.spread, REMOVED: evaluation.spread_history_removed}
    if excluded is not None:
        spreads[EXCLUDED] = excluded.spread
    return {
        "split": evaluation.fingerprint,
        "evaluated_users": len(evaluation.users),
        **_metrics_of_ranks(
            {key: evaluation.by_user(ranks) for key, ranks in rankings.items()},
            evaluation.by_user(evaluation.cold),
            evaluation.cutoffs,
        ),
        "spread": {key: found for key, found in spreads.items() if found},
        "targets_in_history": evaluation.targets_in_history,
        "short_lists_history_removed": evaluation.short_lists,
    }


def _metrics_of_ranks(rankings: Mapping[str, Tensor], cold: Tensor, cutoffs: Sequence[int]) -> dict[str, Any]:
    """The entries of ranks [T] by ascending position of the user, and of which targets are cold, [T]."""
    by_ranking = {key: metrics_at(ranks, cutoffs) for key, ranks in rankings.items()}
    intervals = {intervals_key(key): intervals_at(ranks, cutoffs) for key, ranks in rankings.items()}
    about_cold: dict[str, Any] = {
        "at_most_training_interactions": COLD,
        "targets": int(cold.sum()),
        **{key: metrics_at(ranks[cold], cutoffs) if cold.any() else {} for key, ranks in rankings.items()},
        "of_user": _packed(cold),
    }
    if cold.any():
        about_cold |= {
            intervals_key(key): intervals_at(ranks[cold], cutoffs) for key, ranks in rankings.items()
        }
    return {
        **by_ranking,
        **intervals,
        "cold": about_cold,
        "ranks": {key: _packed(ranks) for key, ranks in rankings.items()},
    }


def intervals_key(key: str) -> str:
    """Return the key of the intervals of the metrics at ``key``."""
    return key.replace("metrics", "intervals_95")


def _packed(values: Tensor) -> str:
    """Values as int8, compressed with zlib, as base64 text: a few kilobytes for 20,000 users."""
    return base64.b64encode(zlib.compress(values.to(torch.int8).numpy().tobytes(), 9)).decode()


def _unpacked(text: str) -> Tensor:
    """What `_packed` was given, as int8."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.int8)


@dataclass(frozen=True, slots=True)
class _Cold:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Split:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    users: int
    items: int
    subset: str = ""


@dataclass(frozen=True, slots=True)
class _Record:
    """The entries of a result file that a table shows."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    dataset: str
    split: _Split
    metrics: dict[str, float]
    metrics_history_removed: dict[str, float]
    cold: _Cold | None = None


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file. Raises DamagedError where it is missing, altered or not a result file.

    Files of earlier versions have no digest, so alterations of them are not detected.
    """
    fix = "name a result file, or write it again: cemg-eval --run RUN"
    content = read_bytes(path, fix=fix)
    record = parse_json(content, dict[str, Any], name=str(path), fix=fix)
    for key in ("dataset", "split", "metrics", "metrics_history_removed"):
        if key not in record:
            raise DamagedError(f"{path} is not a result file", cause=f"it has no {key!r}", fix=fix)
    parse_json(content, _Record, name=str(path), fix=fix)
    if record["metrics"].keys() != record["metrics_history_removed"].keys():
        raise DamagedError(f"{path} is damaged", cause="its entries have different metrics", fix=fix)
    if "sha256" in record:
        check_signature(record, name=str(path), fix=fix)
    return record


def results_of(folder: Path, pattern: str, *, generator: str) -> tuple[list[Path], list[str]]:
    """Find the result files of a run.

    Args:
        folder: The folder of result files.
        pattern: A glob pattern of their names.
        generator: The key in the manifest of the run's generator.

    Returns:
        The files that belong to the generator, and a message for each of the others.
    """
    good: dict[Path, dict[str, Any]] = {}
    wrong: list[str] = []
    for path in sorted(folder.glob(pattern)):
        if path.name.startswith("."):
            continue
        try:
            record = read_result(path)
        except UserError as error:
            wrong.append(error.message)
            continue
        if record.get("file", path.name) != path.name:
            wrong.append(f"{path} is a copy of {record['file']}")
        elif record.get("generator_key", generator) != generator:
            wrong.append(f"{path} was measured with another generator")
        else:
            good[path] = record
    return list(good), wrong + _missing_partners(folder, good)


def _missing_partners(folder: Path, records: Mapping[Path, dict[str, Any]]) -> list[str]:
    """Name missing files of the pairs that an evaluation writes: the results of a model and of popularity."""
    beside = {record["beside"] for record in records.values() if "beside" in record}
    missing = [f"{folder / name} is missing" for name in sorted(beside) if not (folder / name).exists()]
    for path, record in records.items():
        if "file" in record and record["config"].get("model") == "popularity" and path.name not in beside:
            missing.append(f"the result of a model beside {path} is missing")
    return missing


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
