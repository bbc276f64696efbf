"""A run is a folder, a stage a folder in it: written under a temporary name, renamed when whole (DESIGN §8).

A stage whose key (its config and its inputs' keys) has not changed is reused; everything else is made anew.
"""

from __future__ import annotations

import fcntl
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
from cemg import files
from cemg.errors import UserError
from cemg.progress import console
from cemg_kernels.ranges import named_range

MANIFEST, KEY = "manifest.json", "key.json"


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
            console.print(f"{name}: reused", highlight=False)
        else:
            if _key_of(doing / MANIFEST) != key:  # else all but the renaming was done when it was killed
                with named_range(f"stage: {name}"):
                    self._build(name, key, config, build, inputs)
            self._place(name)
        self.seconds[name] = json.loads((done / MANIFEST).read_text())["seconds"]
        return done

    def _build(
        self, name: str, key: str, config: Mapping[str, Any], build: Callable[[Path], None],
        inputs: tuple[str, ...],
    ) -> None:  # fmt: skip
        doing = self.folder / f".{name}.part"
        if _key_of(doing / KEY) != key:
            shutil.rmtree(doing, ignore_errors=True)
            doing.mkdir(parents=True)
            files.write_json(doing / KEY, {"key": key})
        console.print(f"{name}: started", highlight=False)
        started = time.monotonic()
        build(doing)
        clock = doing / "seconds.json"  # of training that was interrupted before
        before = json.loads(clock.read_text()) if clock.is_file() else 0.0
        seconds = round(max(time.monotonic() - started, before), 2)
        own = {name: self.keys[name] for name in inputs}
        manifest = {"key": key, "inputs": own, "seconds": seconds, **_contents(doing), "config": dict(config)}
        files.write_json(doing / MANIFEST, manifest)
        console.print(f"{name}: done in {seconds:.1f} s", highlight=False)

    def _place(self, name: str) -> None:
        """Rename a whole stage into place; killed at any line, the next call still finds a whole one."""
        done, doing, old = self.path(name), self.folder / f".{name}.part", self.folder / f".{name}.old"
        (doing / KEY).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        if done.exists():
            done.replace(old)
        doing.replace(done)
        shutil.rmtree(old, ignore_errors=True)

    def check_whole(self) -> None:
        """UserError where a stage was made of another one than stands there: a training has not ended."""
        for manifest in sorted(self.folder.glob(f"*/{MANIFEST}")):
            for name, key in json.loads(manifest.read_text()).get("inputs", {}).items():
                if _key_of(self.path(name) / MANIFEST) != key:
                    raise UserError(
                        f"{self.folder} is between two trainings",
                        cause=f"its {manifest.parent.name} was not made of the {name} that is there now",
                        fix=f"cemg-train --run {self.folder} goes on",
                    )

    def locked(self) -> AbstractContextManager[None]:
        """Refuses a second command on the same folder while the first one lives."""
        return _Lock(self.folder / ".lock")


class _Lock(AbstractContextManager[None]):
    """The system holds the lock for the process that has the file open: it dies with the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(
                f"{self.path.parent} is in use by process {self.path.read_text()}",
                fix="wait, or use another --run",
            ) from None
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def digest(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _key_of(path: Path) -> str | None:
    try:
        return json.loads(path.read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _contents(folder: Path) -> dict[str, Any]:
    """Hashes of a folder's files, shapes of its tensors, and the versions that made them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != KEY)
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
