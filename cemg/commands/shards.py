"""Commands whose work is split into parts: all parts, or a shard of them, with progress and resuming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cemg.commands import console as command
from cemg.errors import UserError
from cemg.progress import bar, console

if TYPE_CHECKING:
    import pyarrow as pa

    from cemg.features import FeatureCache
    from cemg.features.shards import FeatureWork
    from cemg.storage.parts import Compute, Shard, Work

FEATURES, ADDED = Path("shards/features.parquet"), Path("shards/added.parquet")  # in the folder of a run
FeatureShardOption = Annotated[
    str,
    typer.Option(
        metavar="i/N",
        help="Only encode the i-th of N shards of the texts and images, into a file in the folder of the "
        "run.",
    ),
]
RayOption = Annotated[
    str,
    typer.Option(
        metavar="local|ADDRESS",
        help="Compute on a Ray cluster: local for one on this machine, or HOST:PORT of its head.",
    ),
]


def read_shard(shard: str, *, join: bool, ray: str, device: str = "cpu") -> Shard | None:
    """Parse the value of --shard; None for "". Raises UserError for options that exclude each other."""
    if shard and join:
        raise UserError(
            "--shard and --join exclude each other", fix="compute each shard, then run --join without --shard"
        )
    if ray:
        if join:
            raise UserError(
                "--ray and --join exclude each other", fix="leave out --ray: --join computes nothing"
            )
        if device != "cpu":
            raise UserError(f"--ray computes on CPUs, not on {device}", fix="use --shard i/N on GPUs")
        from cemg.commands.on_ray import check_ray

        check_ray(ray)
    if not shard:
        return None
    from cemg.storage.parts import Shard

    return Shard.parse(shard)


def write_parts(work: Work, out: Path, *, shard: Shard | None, label: str, ray: str = "") -> Path:
    """Compute the missing parts of a file, or of a shard of it, and return the path of the file.

    An interrupted call keeps its finished parts, and the next one continues.

    Args:
        work: The table.
        out: The file with all parts.
        shard: The shard; None for all parts.
        label: Label of the progress bar.
        ray: Address of a Ray cluster; empty to compute one part after another in this process.

    Raises:
        UserError: Another process writes the file, or it has unfinished parts of another command.
    """
    from cemg.storage.parts import Parts

    compute = _in_turn(work)
    if ray:
        from cemg.commands.on_ray import on_ray

        compute = on_ray(ray, work)
    parts = Parts(out, work.about, total=work.total, schema=work.schema, shard=shard, made_on=work.made_on)
    with parts:
        done, size = (sum(map(work.size_of, numbers)) for numbers in (parts.finished, parts.numbers))
        if done:
            console.print(f"{parts.path}: {done:,} of {size:,} were computed before", highlight=False)
        with bar(label, total=size, done=done) as advance:
            for number, table in compute(parts.missing):
                parts.write(number, table)
                command.set_interrupt_message("finished parts are kept; the same command continues")
                advance(work.size_of(number))
        parts.publish()
    return parts.path


def write_features(work: FeatureWork, out: Path, *, shard: Shard, ray: str) -> None:
    """Encode a shard of texts and images, and print how to go on."""
    path = write_parts(work, out, shard=shard, label="features", ray=ray)
    size = sum(map(work.size_of, shard.parts(work.total)))
    fix = f"when all {shard.count} shards are there: the same command with --join in place of --shard {shard}"
    console.print(f"wrote {path}: {size:,} texts and images; {fix}", highlight=False, soft_wrap=True)


def load_features(work: FeatureWork, out: Path, cache: FeatureCache, *, ray: str) -> None:
    """Add the features in the shards of ``out`` to a cache; with ``ray``, compute them if they are missing.

    Raises:
        UserError: A shard is missing, damaged, or belongs to other items; or the cluster fails.
    """
    from cemg.features.shards import load_shards
    from cemg.storage.parts import WHOLE

    if not ray:
        print_note(load_shards(work, out, cache))
        return
    out = out.with_stem(f"{out.stem}-ray")  # a file of its own, beside the shards
    try:
        load_shards(work, out, cache)
    except UserError:  # not computed yet, or for other items
        write_parts(work, out, shard=WHOLE, label="features", ray=ray)
        load_shards(work, out, cache)


def _in_turn(work: Work) -> Compute:
    def compute(numbers: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        return ((number, work.table(number)) for number in numbers)

    return compute


def print_note(note: str | None) -> None:
    """Print a note on stderr, if there is one."""
    if note:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
