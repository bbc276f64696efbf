"""The folder of a run: one folder per stage, written under a temporary name and renamed when complete.

A stage is reused if its key (settings and keys of its inputs) has not changed, its files are unchanged, and
its inputs are those that it was built from; otherwise it is built again. A stage that replaces another is
built in ``.next``. The old run stays valid until ``commit`` publishes all new stages and their configuration
by one rename to ``.ready``; from there they are moved into place. Hidden names are not stages.
"""

from __future__ import annotations

import difflib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from cemg.errors import DamagedError, UserError
from cemg.processes import Stopwatch
from cemg.progress import console
from cemg.storage import files
from cemg.storage.checkpoint import CHECKPOINTS, FILE
from cemg.storage.manifest import (
    CONFIG,
    KEY,
    MANIFEST,
    READY,
    Manifest,
    check_origin,
    describe,
    place_of,
    read_clock,
    remedy,
    renew,
    stages_of,
    verify,
)
from cemg.storage.read import check_signature, digest, read_json, signed
from cemg.version import __version__
from cemg_kernels.runtime.ranges import named_range

PENDING, NEXT = ".config.next.yaml", ".next"  # configuration and stages of a training in progress
SECONDS = ".seconds"  # of a stage in progress, by all processes that built it
ADDING = ".adding"  # holds the copies of stages that a command changes
Guard = Callable[[str, Path, Mapping[str, Any]], None]


class Run:
    """The folder of a run. `locked` holds a lock while a command writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._places: dict[str, Path] = {}  # of stages that this training reused or built

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """An existing run, after `recover`. Raises UserError that names other runs."""
        run = cls(folder)
        if not run.started():
            raise no_such_run(folder)
        run.recover()
        return run

    def path(self, name: str) -> Path:
        """The current path of a stage or of the configuration."""
        return self._places.get(name) or place_of(self.folder, name)

    def key_of(self, config: Mapping[str, Any], inputs: tuple[str, ...]) -> str:
        """The key of a stage: digest of its settings, the keys of its inputs and the version of CEMG."""
        return digest({"config": config, "inputs": {i: self.keys[i] for i in inputs}, "version": __version__})

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        inputs: tuple[str, ...] = (),
        settings: Mapping[str, Any] | None = None,
        guard: Guard | None = None,
    ) -> Path:
        """The finished folder of a stage, built unless a valid one exists.

        Args:
            name: Name of the stage.
            config: Settings of the stage.
            build: ``build(folder)`` writes the stage. After an interruption, the folder still has what the
                last call wrote, if config and inputs are unchanged.
            inputs: Names of the stages that it reads.
            settings: Settings of the whole run, for the manifest.
            guard: ``guard(name, folder, config)`` is called before a stage is built that replaces ``folder``,
                and raises to refuse.
        """
        key = self.key_of(config, inputs)
        self.keys[name] = key
        self._places.pop(name, None)
        old = self.path(name)
        valid = next((p for p in (old, self.folder / NEXT / name) if self._is_valid(p, key)), None)
        if valid is not None:
            console.print(f"{name}: reused", highlight=False)
        else:
            if guard is not None and old.exists():
                guard(name, old, config)
            base = self.folder / NEXT if old.exists() else self.folder
            if not self._is_valid(base / f".{name}.part", key):  # else killed just before the rename
                with named_range(f"stage: {name}"):
                    self._build(base, name, key, config, build, inputs, settings)
            valid = _move_into_place(base, name)
        self._places[name] = valid
        self.seconds[name] = Manifest.read(valid).seconds
        return valid

    def _is_valid(self, folder: Path, key: str) -> bool:
        """Whether ``folder`` has the stage of ``key``, undamaged and built from the current inputs.

        Prints a line if it is damaged.
        """
        if not (folder / MANIFEST).exists() and (files.hidden(folder) or not folder.exists()):
            return False
        try:
            manifest = verify(folder)
        except DamagedError as error:
            reason = f"{error.message} ({error.cause})" if error.cause else error.message
            console.print(f"{folder.name}: {reason}", highlight=False, soft_wrap=True, markup=False)
            return False
        return manifest.key == key and check_origin(self.path, manifest) is None

    def _build(
        self, base: Path, name: str, key: str, config: Mapping[str, Any], build: Callable[[Path], None],
        inputs: tuple[str, ...], settings: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        part = base / f".{name}.part"
        made_of = {name: Manifest.read(self.path(name)) for name in inputs}
        contents = digest({name: manifest.contents for name, manifest in made_of.items()})
        if not _continues(part, key, contents):
            shutil.rmtree(part, ignore_errors=True)
            files.make_folder(part)
            files.write_json(part / KEY, signed({"key": key, "contents": contents}))
        console.print(f"{name}: started", highlight=False)
        clock = part / SECONDS
        with Stopwatch(clock) as watch:
            build(part)
        clock.unlink(missing_ok=True)
        files.sweep(part)
        trained = read_clock(part) or 0.0  # of a training that an earlier version began
        seconds = round(max(watch.seconds, trained), 2)
        manifest = describe(part, key=key, config=config, seconds=seconds, made_of=made_of, settings=settings)
        files.sync_tree(part)
        files.write_json(part / MANIFEST, manifest)
        console.print(f"{name}: done in {seconds:.1f} s", highlight=False)

    # ---- replacing

    def finished(self) -> bool:
        """Whether a training has finished."""
        path = self.path(CONFIG)
        return path.exists() or path.is_symlink()

    def started(self) -> bool:
        """Whether there is a configuration or a stage, finished or not."""
        named = self.finished() or any((self.folder / name).exists() for name in (PENDING, NEXT))
        return named or any(self.folder.glob(f"*/{MANIFEST}")) or any(self.folder.glob(f".*.part/{KEY}"))

    def approve(self) -> None:
        """Record consent to replace stages, so that an interrupted training continues without a question."""
        files.make_folder(self.folder / NEXT)

    def approved(self) -> bool:
        return (self.folder / NEXT).is_dir()

    def trains(self) -> bool:
        """Whether there is a checkpoint of an unfinished stage."""
        return any(map(_has_checkpoint, (self.folder, self.folder / NEXT)))

    def retrained(self) -> bool:
        """Whether there are stages or a checkpoint of an unfinished retraining."""
        new = self.folder / NEXT
        return any(new.glob(f"*/{MANIFEST}")) or _has_checkpoint(new)

    def commit(self, config: str) -> None:
        """Publish the stages of this training with their configuration, atomically."""
        new = self.folder / NEXT
        new_names = {path.name for path in self._places.values() if path.parent == new}
        if new_names:
            for path in new.iterdir():
                if path.name not in new_names:
                    _remove(path)
            files.write_text(new / CONFIG, config)
            self.publish(new)
        else:
            files.write_text(self.folder / CONFIG, config)
        (self.folder / PENDING).unlink(missing_ok=True)
        self.abandon()

    def publish(self, new: Path) -> None:
        """Replace stages by those of the same names in ``new``, a folder in this run."""
        files.sync_tree(new)
        files.move(new, self.folder / READY)
        self.settle()

    @contextmanager
    def revised(self, *names: str) -> Iterator[Path]:
        """A folder with copies of finished stages to be changed in a ``with`` block.

        They replace the stages, together and under the same keys, unless the block raises.
        """
        adding = self.folder / ADDING
        try:
            files.make_folder(adding)
            for name in names:
                shutil.copytree(self.path(name), adding / name)
            yield adding
            for name in names:
                renew(adding / name)
            self.publish(adding)
        finally:
            shutil.rmtree(adding, ignore_errors=True)

    def abandon(self) -> None:
        """Remove unpublished stages, and unfinished stages beside finished ones."""
        shutil.rmtree(self.folder / NEXT, ignore_errors=True)
        for stage in self.folder.glob(f"*/{MANIFEST}"):
            shutil.rmtree(self.folder / f".{stage.parent.name}.part", ignore_errors=True)

    def settle(self) -> None:
        """Finish what a killed command left: move published stages into place, remove old ones."""
        ready = self.folder / READY
        if ready.is_dir():
            for path in sorted(ready.iterdir()):
                target = self.folder / path.name
                if target.is_dir():
                    old = self.folder / f".{path.name}.old"
                    shutil.rmtree(old, ignore_errors=True)
                    files.move(target, old)
                files.move(path, target)
            ready.rmdir()
        self._places.clear()
        for old in self.folder.glob(".*.old"):
            files.recover_folder(self.folder / old.name[1:].removesuffix(".old"))
        shutil.rmtree(self.folder / ADDING, ignore_errors=True)
        files.sweep(self.folder)
        files.sweep(self.folder / "results", shared=True)

    def recover(self) -> None:
        """`settle` for a command that only reads; it does nothing without permission to write."""
        if (self.folder / READY).exists() or any(self.folder.glob(".*.old")):
            with suppress(UserError, OSError), self.locked():
                pass

    def check_whole(self) -> None:
        """Raise UserError if an input of a stage is missing, or is another one than it was built from."""
        for stage, manifest in stages_of(self.folder).items():
            name = check_origin(self.path, manifest)
            if name is not None and not self.path(name).exists():
                raise UserError(
                    f"the {name} of {self.folder} is missing",
                    cause=f"its {stage} was built from it, but there is no {self.path(name)}",
                    fix=f"restore it from a copy, or build it again: {remedy(self.path(name))}",
                )
            if name is not None:
                raise UserError(
                    f"{self.folder} is between two trainings",
                    cause=f"its {stage} was not built from the {name} that is there now",
                    fix=f"restore it from a copy, or build it again: {remedy(self.path(stage))}",
                )

    def check_unlocked(self) -> None:
        """Raise UserError while another command writes to the folder."""
        path = self.folder / ".lock"
        with suppress(FileNotFoundError, PermissionError), path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(path) from None

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder against other commands, and settle the run."""
        return _Lock(self)


def runs_in(folder: Path) -> list[Path]:
    """The runs among the children of a folder, by name."""
    with suppress(OSError):
        folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not files.hidden(path)]
        return [path for path in folders if (path / CONFIG).exists() or (path / PENDING).exists()]
    return []


def nearest_run(folder: Path) -> Path | None:
    """For a folder that does not exist, the run beside it with a similar name."""
    others = [] if folder.exists() else runs_in(folder.parent)
    near = difflib.get_close_matches(folder.name, [path.name for path in others], n=1, cutoff=0.75)
    return folder.with_name(near[0]) if near else None


def no_such_run(folder: Path) -> UserError:
    """The error for a folder that is not a run. It lists the existing runs and the closest name."""
    others = runs_in(folder) or runs_in(folder.parent)
    what = f"{folder} is not a run: it has no {CONFIG}" if folder.is_dir() else f"there is no run {folder}"
    if not others:
        return UserError(what, fix=f"train one: cemg-train --data DATA --run {quote(str(folder))}")
    shown = ", ".join(map(str, others[:8])) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    near = difflib.get_close_matches(folder.name, [path.name for path in others], n=1, cutoff=0)
    return UserError(
        what, cause=f"there are {shown}", fix=f"--run {quote(str(others[0].with_name(near[0])))}"
    )


class _Lock(AbstractContextManager[None]):
    """A file lock. The system releases it when the process ends."""

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.folder / ".lock"

    def __enter__(self) -> None:
        files.make_folder(self.path.parent)
        self.file = self.path.open("a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise _in_use(self.path) from None
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()
        try:
            self.run.settle()
        except BaseException:
            self.file.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def _in_use(lock: Path) -> UserError:
    return UserError(
        f"{lock.parent} is in use by process {lock.read_text()}", fix="wait, or use another --run"
    )


def _has_checkpoint(base: Path) -> bool:
    return any(base.glob(f".*.part/{CHECKPOINTS}/{FILE}"))


def _continues(part: Path, key: str, contents: str) -> bool:
    """Whether ``part`` has the beginning of the stage ``key``, made from inputs of these contents."""
    path = part / KEY
    if not part.is_dir():
        return False
    try:
        record = read_json(path, dict[str, str])
        check_signature(record, name=str(path))
    except DamagedError as error:
        if path.exists():
            console.print(f"{error.message}: its stage starts from the beginning", highlight=False)
        return False
    return record.get("key") == key and record.get("contents", contents) == contents


def _move_into_place(base: Path, name: str) -> Path:
    """Rename a finished stage. If the process is killed, the next call finds a complete stage."""
    finished, part = base / name, base / f".{name}.part"
    (part / KEY).unlink(missing_ok=True)
    shutil.rmtree(part / CHECKPOINTS, ignore_errors=True)  # a generator's: five times the size of its weights
    _remove(finished)  # built with other settings and never published
    files.move(part, finished)
    return finished


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
