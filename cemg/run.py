"""A run is a folder, a stage a folder in it: written under a temporary name, renamed when whole (DESIGN §8).

A stage whose key (its config and its inputs' keys) has not changed is reused if its files are those that
were written and its inputs those that it was made of; everything else is made anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import cemg
from cemg import files
from cemg.artifacts import check_signature, digest, read_json, signed
from cemg.errors import DamagedError, UserError
from cemg.manifest import KEY, MANIFEST, Manifest, check_origin, describe, read_clock, stages_of, verify
from cemg.progress import console
from cemg_kernels.ranges import named_range


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
        if self._stands(done, key):
            console.print(f"{name}: reused", highlight=False)
        else:
            if not self._stands(doing, key):  # else all but the renaming was done when it was killed
                with named_range(f"stage: {name}"):
                    self._build(name, key, config, build, inputs)
            self._place(name)
        self.seconds[name] = Manifest.read(done).seconds
        return done

    def _stands(self, folder: Path, key: str) -> bool:
        """Whether the stage in ``folder`` is the one of ``key``, whole, and made of the inputs of now.

        A damaged one is built anew, and a line says so.
        """
        if not (folder / MANIFEST).exists() and (files.hidden(folder) or not folder.exists()):
            return False
        try:
            manifest = verify(folder)
        except DamagedError as error:
            why = f"{error.message} ({error.cause})" if error.cause else error.message
            console.print(f"{folder.name}: built anew, for {why}", highlight=False, soft_wrap=True)
            return False
        return manifest.key == key and check_origin(self.folder, manifest) is None

    def _build(
        self, name: str, key: str, config: Mapping[str, Any], build: Callable[[Path], None],
        inputs: tuple[str, ...],
    ) -> None:  # fmt: skip
        doing = self.folder / f".{name}.part"
        if _key_of(doing) != key:
            shutil.rmtree(doing, ignore_errors=True)
            doing.mkdir(parents=True)
            files.write_json(doing / KEY, signed({"key": key}))
        console.print(f"{name}: started", highlight=False)
        started = time.monotonic()
        build(doing)
        before = read_clock(doing) or 0.0  # of training that was interrupted before
        seconds = round(max(time.monotonic() - started, before), 2)
        made_of = {name: Manifest.read(self.path(name)) for name in inputs}
        manifest = describe(doing, key=key, config=config, seconds=seconds, made_of=made_of)
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
        for stage, manifest in stages_of(self.folder).items():
            name = check_origin(self.folder, manifest)
            if name is not None:
                raise UserError(
                    f"{self.folder} is between two trainings",
                    cause=f"its {stage} was not made of the {name} that is there now",
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


def _key_of(doing: Path) -> str | None:
    """The key of the stage that is under way in ``doing``; None where there is none, or none can be read."""
    path = doing / KEY
    if not doing.is_dir():
        return None
    try:
        record = read_json(path, dict[str, str])
        check_signature(record, name=str(path))
        return record.get("key")
    except DamagedError as error:
        if path.exists():
            console.print(f"{error.message}: its stage starts from the beginning", highlight=False)
        return None
