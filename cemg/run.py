"""A run is a folder, a stage a folder in it: written under a temporary name, renamed when whole (DESIGN §8).

A stage whose key (its config and its inputs' keys) has not changed is reused; everything else is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from safetensors import safe_open

import cemg
from cemg.errors import UserError
from cemg.progress import console

MANIFEST = "manifest.json"


class Run:
    """The folder of a run. Holds a lock while a command writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def path(self, stage: str) -> Path:
        return self.folder / stage

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        inputs: tuple[str, ...] = (),
    ) -> Path:
        """The finished folder of stage ``name``, built by ``build(folder)`` unless it stands already.

        An interrupted build finds in its folder what it had written, if config and inputs are the same.
        """
        key = digest(
            {"config": config, "inputs": {i: self.keys[i] for i in inputs}, "version": cemg.__version__}
        )
        self.keys[name] = key
        done, doing = self.path(name), self.folder / f".{name}.part"
        if _key_of(done / MANIFEST) == key:
            self.seconds[name] = json.loads((done / MANIFEST).read_text())["seconds"]
            console.print(f"{name}: reused", highlight=False)
            return done
        if _key_of(doing / "key.json") != key:
            shutil.rmtree(doing, ignore_errors=True)
            doing.mkdir(parents=True)
            write_json(doing / "key.json", {"key": key})
        console.print(f"{name}: started", highlight=False)
        started = time.monotonic()
        build(doing)
        self._finish(name, key, config, seconds=time.monotonic() - started)
        return done

    def _finish(self, name: str, key: str, config: Mapping[str, Any], *, seconds: float) -> None:
        done, doing = self.path(name), self.folder / f".{name}.part"
        clock = doing / "seconds.json"  # of training that was interrupted before
        seconds = max(seconds, json.loads(clock.read_text()) if clock.is_file() else 0.0)
        (doing / "key.json").unlink()
        write_json(
            doing / MANIFEST,
            {"key": key, "seconds": round(seconds, 2), **_contents(doing), "config": dict(config)},
        )
        shutil.rmtree(done, ignore_errors=True)
        doing.replace(done)
        self.seconds[name] = round(seconds, 2)
        console.print(f"{name}: done in {seconds:.1f} s", highlight=False)

    def locked(self) -> AbstractContextManager[None]:
        """Refuses a second command on the same folder while the first one lives."""
        return _Lock(self.folder / ".lock")


class _Lock(AbstractContextManager[None]):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and _alive(self.path.read_text()):
            raise UserError(
                f"{self.path.parent} is in use by process {self.path.read_text()}",
                fix="wait, or use another --run",
            )
        self.path.write_text(str(os.getpid()))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    """Whether a process of that number runs; the lock of a killed command is no hindrance."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def digest(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def _key_of(path: Path) -> str | None:
    try:
        return json.loads(path.read_text())["key"]
    except (OSError, ValueError, KeyError):
        return None


def _contents(folder: Path) -> dict[str, Any]:
    """Hashes of a folder's files, shapes of its tensors, and the versions that made them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    shapes: dict[str, list[int]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                shapes |= {f"{path.name}:{k}": list(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    versions = {
        "cemg": cemg.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"files": hashes, "shapes": shapes, "versions": versions}
