"""Commands whose work is split into parts: all parts, or a shard of them, with progress and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cemg.commands import console as command
from cemg.errors import UserError
from cemg.progress import bar, console

if TYPE_CHECKING:
    import pyarrow as pa

    from cemg.features import FeatureCache
    from cemg.features.shards import FeatureWork
    from cemg.storage.parts import Shard


Encode = Callable[[Any], "pa.Table"]  # payload of a part -> the part


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


FEATURES, ADDED = Path("shards/features.parquet"), Path("shards/added.parquet")  # in the folder of a run
Compute = Callable[[Sequence[int]], Iterable[tuple[int, "pa.Table"]]]  # numbers -> parts, in any order


def read_shard(shard: str, *, join: bool) -> Shard | None:
    """Parse the value of --shard; None for "". Raises UserError for options that exclude each other."""
    if shard and join:
        raise UserError(
            "--shard and --join exclude each other", fix="compute each shard, then run --join without --shard"
        )
    if not shard:
        return None
    from cemg.storage.parts import Shard

    return Shard.parse(shard)


def write_parts(work: Work, out: Path, *, shard: Shard | None, label: str) -> Path:
    """Compute the missing parts of a file, or of a shard of it, and return the path of the file.

    An interrupted call keeps its finished parts, and the next one continues.

    Args:
        work: The table.
        out: The file with all parts.
        shard: The shard; None for all parts.
        label: Label of the progress bar.

    Raises:
        UserError: Another process writes the file, or it has unfinished parts of another command.
    """
    from cemg.storage.parts import Parts

    parts = Parts(out, work.about, total=work.total, schema=work.schema, shard=shard, made_on=work.made_on)
    with parts:
        done, size = (sum(map(work.size_of, numbers)) for numbers in (parts.finished, parts.numbers))
        if done:
            console.print(f"{parts.path}: {done:,} of {size:,} were computed before", highlight=False)
        with bar(label, total=size, done=done) as advance:
            for number, table in _in_turn(work)(parts.missing):
                parts.write(number, table)
                command.set_interrupt_message("finished parts are kept; the same command continues")
                advance(work.size_of(number))
        parts.publish()
    return parts.path


def write_features(work: FeatureWork, out: Path, *, shard: Shard) -> None:
    """Encode a shard of texts and images, and print how to go on."""
    path = write_parts(work, out, shard=shard, label="features")
    size = sum(map(work.size_of, shard.parts(work.total)))
    fix = f"when all {shard.count} shards are there: the same command with --join in place of --shard {shard}"
    console.print(f"wrote {path}: {size:,} texts and images; {fix}", highlight=False, soft_wrap=True)


def load_features(work: FeatureWork, out: Path, cache: FeatureCache) -> None:
    """Add the features in the shards of ``out`` to a cache.

    Raises:
        UserError: A shard is missing, damaged, or belongs to other items.
    """
    from cemg.features.shards import load_shards

    print_note(load_shards(work, out, cache))


def _in_turn(work: Work) -> Compute:
    def compute(numbers: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        return ((number, work.table(number)) for number in numbers)

    return compute


def print_note(note: str | None) -> None:
    """Print a note on stderr, if there is one."""
    if note:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
