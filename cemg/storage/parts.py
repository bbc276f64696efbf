"""A Parquet table that is computed in parts, by one process or by several, and published when it is complete.

``OUT.parquet`` has P parts. A shard i/N has every N-th of them, from part i - 1 on, and its own file,
``OUT.shard-i-of-N.parquet``. Finished parts are kept in a hidden folder beside the file, so that an
interrupted command continues. Every file has one row group per part, in order; so the whole table has the
same bytes whether one process wrote it, or the shards were joined.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cemg.errors import DamagedError, UserError
from cemg.storage import files
from cemg.storage.read import check_file, read_json

ABOUT = "about.json"
META = b"cemg"  # key of the JSON record in the metadata of every file


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard ``index`` of ``count``, from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "2/4". Raises UserError for anything else."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        shard = cls(int(match[1]), int(match[2])) if match else None
        if shard is None or not 1 <= shard.index <= shard.count:
            raise UserError(f"--shard must be i/N with i from 1 to N, got {text!r}", fix="--shard 1/4")
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def parts(self, total: int) -> range:
        """The parts of this shard, of ``total`` parts."""
        return range(self.index - 1, total, self.count)

    def path(self, out: Path) -> Path:
        """The file of this shard of ``out``."""
        return out.with_name(f"{out.stem}.shard-{self.index}-of-{self.count}{out.suffix}")


WHOLE = Shard(1, 1)


Compute = Callable[[Sequence[int]], Iterable[tuple[int, pa.Table]]]  # numbers -> parts, in any order
Encode = Callable[[Any], pa.Table]  # payload of a part -> the part


class Work(Protocol):
    """A table that is computed in parts, in this process or in others."""

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def about(self) -> Mapping[str, Any]:
        """What determines the table, for `Parts`."""
        ...

    @property
    def made_on(self) -> Mapping[str, Any]:
        """What may change its last bits from one machine to another."""
        ...

    @property
    def total(self) -> int:
        """Number of parts."""
        ...

    def size_of(self, number: int) -> int:
        """Number of users or items of a part."""
        ...

    def table(self, number: int) -> pa.Table:
        """Compute a part in this process."""
        ...

    def payload(self, number: int) -> Any:
        """What another process needs for a part; it can be pickled."""
        ...

    def worker(self) -> Callable[[], Encode]:
        """A function that another process calls once, and that returns how it computes parts; it can be
        pickled."""
        ...


class Parts:
    """The parts of one file, as a context manager: ``write`` those that are ``missing``, then ``publish``.

    Args:
        out: The file with all parts.
        about: What determines the table: names that a user understands, and JSON values.
        total: Number of parts, P.
        schema: Columns of the table.
        shard: The shard to compute; None for the whole table.
        made_on: Facts about this machine. They may differ between shards.

    Raises:
        UserError: Another process writes the file, or there are unfinished parts with another ``about``.
    """

    def __init__(
        self, out: Path, about: Mapping[str, Any], *, total: int, schema: pa.Schema,
        shard: Shard | None = None, made_on: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.about, self.total, self.schema, self.shard = dict(about), total, schema, shard
        self.path = shard.path(out) if shard else out
        self.folder = _folder(self.path)
        self.numbers = (shard or WHOLE).parts(total)
        self.made_on = dict(made_on or {})
        self.finished: set[int] = set()
        self._lock = _locked(self.path)

    def __enter__(self) -> Parts:
        self._lock.__enter__()
        try:
            self._begin()
        except BaseException as error:
            self._lock.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.__exit__(kind, value, trace)

    @property
    def missing(self) -> list[int]:
        """The parts that are not computed yet, in order."""
        return [number for number in self.numbers if number not in self.finished]

    def write(self, number: int, table: pa.Table) -> None:
        """Keep a finished part. Writing it again replaces it."""
        _write(self._part(number), iter((table,)), self.schema, {"part": number})
        self.finished.add(number)

    def publish(self) -> None:
        """Write the file from its parts, completely or not at all, and remove them."""
        record: dict[str, Any] = {"about": self.about}
        if self.shard:
            record |= {"shard": str(self.shard), "total": self.total, "made_on": self.made_on}
        tables = (self._read(number) for number in self.numbers)
        _write(self.path, tables, self.schema, record)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.finished.clear()

    def _begin(self) -> None:
        files.make_folder(self.folder)
        files.sweep(self.folder)
        path = self.folder / ABOUT
        if any(self.folder.glob("part-*.parquet")):
            difference = describe_difference(read_json(path, dict[str, Any], fix=self._discard), self.about)
            if difference:
                raise UserError(
                    f"{self.path} has unfinished parts of another command", cause=difference,
                    fix=f"repeat that command, which continues; or discard them: {self._discard}",
                )  # fmt: skip
        else:
            files.write_json(path, self.about)
        self.finished = {number for number in self.numbers if _is_part(self._part(number), self.schema)}

    @property
    def _discard(self) -> str:
        return f"rm -r {quote(str(self.folder))}"

    def _read(self, number: int) -> pa.Table:
        try:
            return pq.read_table(self._part(number), schema=self.schema, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(
                f"{self._part(number)} is damaged", cause=str(error).split("\n")[0],
                fix="delete it and repeat the command, which computes it again",
            ) from error  # fmt: skip

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:08}.parquet"


def join(out: Path, about: Mapping[str, Any], *, schema: pa.Schema) -> str | None:
    """Join the shards of ``out`` to one file, the same as `Parts` writes without shards.

    The shards are kept.

    Args:
        out: The file to write.
        about: What the table must have been computed from.
        schema: Columns of the table.

    Returns:
        A note if the shards were computed on machines of different kinds; None otherwise.

    Raises:
        UserError: A shard is missing, damaged, or was computed from something else; or another process
            writes ``out``.
    """
    with _locked(out):
        shards = open_shards(out, about, schema=schema)
        _write(out, _in_order(shards), schema, {"about": dict(about)})
    return difference_of_machines(shards)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A finished shard, opened."""

    path: Path
    shard: Shard
    about: dict[str, Any]
    total: int
    made_on: dict[str, Any]
    file: pq.ParquetFile

    def table(self, position: int) -> pa.Table:
        """The part at a position of this shard."""
        try:
            return self.file.read_row_group(position)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self.path, self.shard, str(error)) from error


def open_shards(out: Path, about: Mapping[str, Any], *, schema: pa.Schema) -> list[ShardFile]:
    """Open all shards of ``out``, in order, and check that they belong together and to ``about``."""
    found = _find_shards(out)
    counts = sorted({shard.count for shard in found})
    if not counts:
        raise UserError(
            f"there is no shard of {out}", cause=f"there is no {out.stem}.shard-i-of-N{out.suffix} beside it",
            fix="compute them: the same command with --shard i/N in place of --join, for i from 1 to N",
        )  # fmt: skip
    if len(counts) > 1:
        names = ", ".join(f"{count} ({sum(s.count == count for s in found)} files)" for count in counts)
        raise UserError(
            f"{out} has shards of different splits", cause=f"there are some of N = {names}",
            fix="delete the files of all but one split",
        )  # fmt: skip
    every = [Shard(index, counts[0]) for index in range(1, counts[0] + 1)]
    missing = [shard for shard in every if shard not in found]
    if missing:
        begun = _folder(missing[0].path(out)).is_dir()
        raise UserError(
            f"shard {missing[0]} of {out} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
            cause="it is not finished" if begun else f"there is no {missing[0].path(out)}",
            fix=f"compute it: the same command with --shard {missing[0]} in place of --join",
        )
    shards = [_open_shard(shard.path(out), shard, schema) for shard in every]
    for one in shards:
        difference = describe_difference(one.about, about)
        if difference:
            raise UserError(
                f"{one.path} was computed by another command", cause=difference,
                fix=f"use the run and options of the shards; or compute it again: --shard {one.shard}",
            )  # fmt: skip
        rows = len(one.shard.parts(one.total))
        if one.total != shards[0].total or one.file.num_row_groups != rows:
            raise _damaged(one.path, one.shard, f"it has {one.file.num_row_groups} parts, not {rows}")
    return shards


def describe_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first entry in which two records differ, in words; None if they are equal."""
    for name in dict.fromkeys((*ours, *theirs)):
        there, here = (json.loads(json.dumps(one.get(name))) for one in (theirs, ours))
        if there != here:
            return f"its {name} is {_short(there)}, not {_short(here)}"
    return None


def difference_of_machines(shards: list[ShardFile]) -> str | None:
    """A note if shards were computed on machines of different kinds; None otherwise."""
    for one in shards[1:]:
        difference = describe_difference(one.made_on, shards[0].made_on)
        if difference:
            who = f"{one.path} and {shards[0].path} were computed on different kinds of machines"
            return f"{who}, so their last bits may differ from those of one machine: {difference}"
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _find_shards(out: Path) -> set[Shard]:
    name = re.compile(rf"{re.escape(out.stem)}\.shard-(\d{{1,9}})-of-(\d{{1,9}}){re.escape(out.suffix)}")
    folder = out.parent
    matches = [name.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return {Shard(int(match[1]), int(match[2])) for match in matches if match}


def _open_shard(path: Path, shard: Shard, schema: pa.Schema) -> ShardFile:
    check_file(path)
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        record = json.loads((file.schema_arrow.metadata or {})[META])
        made = ShardFile(path, shard, record["about"], record["total"], record["made_on"], file)
        named = record["shard"]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, shard, str(error).split("\n")[0]) from error
    if named != str(shard):
        fix = f"compute it again: the same command with --shard {shard} in place of --join"
        raise UserError(f"{path} holds shard {named}", cause="the file was renamed", fix=fix)
    if not file.schema_arrow.remove_metadata().equals(schema.remove_metadata()):
        raise _damaged(path, shard, f"its columns are {', '.join(file.schema_arrow.names)}")
    return made


def _damaged(path: Path, shard: Shard, cause: str) -> DamagedError:
    return DamagedError(
        f"{path} is not a finished shard", cause=cause,
        fix=f"compute it again: the same command with --shard {shard} in place of --join",
    )  # fmt: skip


def _in_order(shards: list[ShardFile]) -> Iterator[pa.Table]:
    for number in range(shards[0].total):
        position, shard = divmod(number, len(shards))
        yield shards[shard].table(position)


def _write(path: Path, tables: Iterator[pa.Table], schema: pa.Schema, record: Mapping[str, Any]) -> None:
    """Write one row group per table; ``record`` goes into the metadata of the file."""
    described = schema.with_metadata({META: json.dumps(record, sort_keys=True)})
    with (
        files.durable(path) as unfinished,
        pq.ParquetWriter(unfinished, described, write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(described), row_group_size=max(1, table.num_rows))


def _is_part(path: Path, schema: pa.Schema) -> bool:
    """Whether a part is there and can be read. Parts are written completely or not at all."""
    try:
        return bool(pq.read_schema(path).remove_metadata().equals(schema.remove_metadata()))
    except (OSError, pa.ArrowException):
        return False


def _folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file to be written against other processes. The system releases the lock when one ends."""
    lock = path.with_name(f".{path.name}.lock")
    files.make_folder(lock.parent)
    file = _lock(lock, path)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _lock(lock: Path, path: Path) -> IO[str]:
    while True:
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process = file.read() or "another"
            file.close()
            raise UserError(
                f"{path} is being written by process {process}", fix="wait for it, or name another file"
            ) from None
        try:
            current = os.stat(lock).st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:  # the process that had it has just removed it
            current = False
        if current:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()
