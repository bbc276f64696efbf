"""A run is a folder, a stage a folder in it: written under a temporary name, renamed when whole (DESIGN §8).

A stage whose key (its config and its inputs' keys) has not changed is reused if its files are those that
were written and its inputs those that it was made of; everything else is built anew. A stage that replaces
another is built in ``.next``: the run stays what it was until ``commit`` publishes all new stages and their
configuration by one rename, to ``.ready``, from where they are moved into place. Hidden names are not stages.
"""

from __future__ import annotations

import difflib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from cemg.errors import DamagedError, UserError
from cemg.progress import console
from cemg.storage import files
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

PENDING, NEXT = ".config.next.yaml", ".next"  # the configuration and the stages that a run is being made into
CHECKPOINT = Path(".generator.part") / "checkpoints" / "checkpoint.safetensors"
ADDING = ".adding"  # where a command changes a copy of a stage
Guard = Callable[[str, Path, Mapping[str, Any]], None]


class Run:
    """The folder of a run. Holds a lock while a command writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._places: dict[str, Path] = {}  # of the stages that this training reused or built

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """A run that is there, settled where this process may write. Raises UserError, which names others."""
        run = cls(folder)
        if not run.started():
            raise no_such_run(folder)
        run.recover()
        return run

    def path(self, name: str) -> Path:
        """Where a stage, or the configuration, is now."""
        return self._places.get(name) or place_of(self.folder, name)

    def key_of(self, config: Mapping[str, Any], inputs: tuple[str, ...]) -> str:
        """What identifies a stage: its settings, the keys of its inputs and the version of CEMG."""
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
        """The finished folder of stage ``name``, built by ``build(folder)`` unless it stands already.

        An interrupted build finds in its folder what it had written, if config and inputs are the same.
        ``settings`` are those of the whole run, for the manifest. ``guard(name, folder, config)`` is called
        before anything is built that will replace ``folder``, and raises where that is not wanted.
        """
        key = self.key_of(config, inputs)
        self.keys[name] = key
        self._places.pop(name, None)
        old = self.path(name)
        stands = next((p for p in (old, self.folder / NEXT / name) if self._stands(p, key)), None)
        if stands is not None:
            console.print(f"{name}: reused", highlight=False)
        else:
            if guard is not None and old.exists():
                guard(name, old, config)
            base = self.folder / NEXT if old.exists() else self.folder
            if not self._stands(base / f".{name}.part", key):  # else it was killed just before the renaming
                with named_range(f"stage: {name}"):
                    self._build(base, name, key, config, build, inputs, settings)
            stands = _place(base, name)
        self._places[name] = stands
        self.seconds[name] = Manifest.read(stands).seconds
        return stands

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
            console.print(f"{folder.name}: {why}", highlight=False, soft_wrap=True, markup=False)
            return False
        return manifest.key == key and check_origin(self.path, manifest) is None

    def _build(
        self, base: Path, name: str, key: str, config: Mapping[str, Any], build: Callable[[Path], None],
        inputs: tuple[str, ...], settings: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        doing = base / f".{name}.part"
        if _key_of(doing) != key:
            shutil.rmtree(doing, ignore_errors=True)
            files.make_folder(doing)
            files.write_json(doing / KEY, signed({"key": key}))
        console.print(f"{name}: started", highlight=False)
        started = time.monotonic()
        build(doing)
        files.sweep(doing)
        before = read_clock(doing) or 0.0  # of training that was interrupted before
        seconds = round(max(time.monotonic() - started, before), 2)
        made_of = {name: Manifest.read(self.path(name)) for name in inputs}
        manifest = describe(
            doing, key=key, config=config, seconds=seconds, made_of=made_of, settings=settings
        )
        files.sync_tree(doing)
        files.write_json(doing / MANIFEST, manifest)
        console.print(f"{name}: done in {seconds:.1f} s", highlight=False)

    # ---- replacing

    def finished(self) -> bool:
        """Whether a training has ended here."""
        path = self.path(CONFIG)
        return path.exists() or path.is_symlink()

    def started(self) -> bool:
        """Whether there is anything of a run: a configuration, or a stage, finished or not."""
        named = self.finished() or any((self.folder / name).exists() for name in (PENDING, NEXT))
        return named or any(self.folder.glob(f"*/{MANIFEST}")) or any(self.folder.glob(f".*.part/{KEY}"))

    def approve(self) -> None:
        """Remember that what stands may be replaced: an interrupted training is then continued unasked."""
        files.make_folder(self.folder / NEXT)

    def approved(self) -> bool:
        return (self.folder / NEXT).is_dir()

    def trains(self) -> bool:
        """Whether there is a checkpoint of an unfinished generator."""
        return any((base / CHECKPOINT).exists() for base in (self.folder, self.folder / NEXT))

    def retrained(self) -> bool:
        """Whether stages, or a checkpoint, of an unfinished retraining are there."""
        fresh = self.folder / NEXT
        return any(fresh.glob(f"*/{MANIFEST}")) or (fresh / CHECKPOINT).exists()

    def commit(self, config: str) -> None:
        """Publish the stages of this training with their configuration; killed at any line, the run is the
        old one or the new one."""
        fresh = self.folder / NEXT
        wanted = {path.name for path in self._places.values() if path.parent == fresh}
        if wanted:
            for path in fresh.iterdir():
                if path.name not in wanted:
                    _remove(path)
            files.write_text(fresh / CONFIG, config)
            self.publish(fresh)
        else:
            files.write_text(self.folder / CONFIG, config)
        (self.folder / PENDING).unlink(missing_ok=True)
        self.abandon()

    def publish(self, fresh: Path) -> None:
        """Let the stages in the folder ``fresh`` of this run replace those of the same names."""
        files.sync_tree(fresh)
        files.move(fresh, self.folder / READY)
        self.settle()

    @contextmanager
    def revised(self, name: str) -> Iterator[Path]:
        """A copy of a finished stage to be changed; it replaces the stage, with its key, if the block ends
        well."""
        adding = self.folder / ADDING
        try:
            files.make_folder(adding)
            shutil.copytree(self.path(name), adding / name)
            yield adding / name
            renew(adding / name)
            self.publish(adding)
        finally:
            shutil.rmtree(adding, ignore_errors=True)

    def abandon(self) -> None:
        """Remove the stages that were to replace others, and unfinished ones beside finished ones."""
        shutil.rmtree(self.folder / NEXT, ignore_errors=True)
        for stage in self.folder.glob(f"*/{MANIFEST}"):
            shutil.rmtree(self.folder / f".{stage.parent.name}.part", ignore_errors=True)

    def settle(self) -> None:
        """Finish what a killed command left: published stages are moved into place, old ones removed."""
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
        """``settle`` for a command that only reads; where it may not write, it reads around what is left."""
        if (self.folder / READY).exists() or any(self.folder.glob(".*.old")):
            with suppress(UserError, OSError), self.locked():
                pass

    def check_whole(self) -> None:
        """UserError where a stage was made of another one than stands there: a training has not ended."""
        for stage, manifest in stages_of(self.folder).items():
            name = check_origin(self.path, manifest)
            if name is not None:
                raise UserError(
                    f"{self.folder} is between two trainings",
                    cause=f"its {stage} was not made of the {name} that is there now",
                    fix=f"restore it from a copy, or build it again: {remedy(self.path(stage))}",
                )

    def locked(self) -> AbstractContextManager[None]:
        """Refuses a second command on the same folder while the first one lives; settles the run."""
        return _Lock(self)


def runs_in(folder: Path) -> list[Path]:
    """The runs among the children of a folder, by name."""
    with suppress(OSError):
        found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not files.hidden(path)]
        return [path for path in found if (path / CONFIG).exists() or (path / PENDING).exists()]
    return []


def nearest_run(folder: Path) -> Path | None:
    """The run beside ``folder``, which does not exist, whose name is spelled much like its own."""
    others = [] if folder.exists() else runs_in(folder.parent)
    near = difflib.get_close_matches(folder.name, [path.name for path in others], n=1, cutoff=0.75)
    return folder.with_name(near[0]) if near else None


def no_such_run(folder: Path) -> UserError:
    """The error for a folder that is not a run: what runs there are, and the nearest name."""
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
    """The system holds the lock for the process that has the file open: it dies with the process."""

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.folder / ".lock"

    def __enter__(self) -> None:
        files.make_folder(self.path.parent)
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
        try:
            self.run.settle()
        except BaseException:
            self.file.close()
            raise

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


def _place(base: Path, name: str) -> Path:
    """Rename a finished stage into place; killed at any line, the next call still finds a whole one."""
    done, doing = base / name, base / f".{name}.part"
    (doing / KEY).unlink(missing_ok=True)
    _remove(done)  # of other settings; never published
    files.move(doing, done)
    return done


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
