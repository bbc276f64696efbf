"""``python -m cemg.commands.new_items``: recommending items that training never saw (RQ5).

A share of the items is left out of the data, together with their interactions. A run is trained on the rest;
then the items are added to its catalog by their texts and images, and it is tested on the users whose target
is one of them.

U users of the data, T users with such a target.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from cemg.artifacts import RunArtifacts
from cemg.commands import catalog as catalog_command
from cemg.commands import console as command
from cemg.data import Dataset, Split, read_dataset
from cemg.errors import UserError
from cemg.evaluation import Rank, evaluate, hardware, write_result
from cemg.evaluation.mixture import mixture_ranker, open_mixture
from cemg.evaluation.ranker import beam_ranker
from cemg.evaluation.runs import stage_seconds
from cemg.processes import Stopwatch
from cemg.storage import files

SHARE = 0.05  # of the items, left out of the data
ITEMS = "items.parquet"
ADDING_SECONDS = ".adding-seconds"  # file of the time that adding the items took

app = command.command_line(help="Test a run on items that its training never saw.")
DataOption = Annotated[Path, typer.Option(help="Folder or file that cemg-data reads, with all items.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the choice of items.")]


@app.command(cls=command.Command)
def prepare(
    data: DataOption,
    out: Annotated[
        Path,
        typer.Option(help="Folder to write: data, a prepared folder without the items, and items.parquet."),
    ],
    seed: SeedOption = 0,
) -> None:
    """Leave a share of the items out of a data set."""
    whole = read_dataset(data)
    left_out = draw_items(whole, seed)
    without_items(whole, left_out).save(out / "data")
    rows = np.flatnonzero(left_out)
    table = pl.DataFrame(
        {
            "item": [whole.item_ids[row] for row in rows],
            "title": [whole.titles[row] for row in rows],
            "text": [whole.texts[row] for row in rows],
            "image": [str(path.resolve()) if (path := whole.images[row]) else None for row in rows],
        },
        schema={"item": pl.String, "title": pl.String, "text": pl.String, "image": pl.String},
    )
    with files.durable(out / ITEMS) as part:  # last: its presence says that the folder is complete
        table.write_parquet(part)


@app.command(cls=command.Command)
def test(
    data: DataOption,
    items: Annotated[Path, typer.Option(help="The table of the items that prepare wrote.")],
    run: Annotated[Path, typer.Option(help="A run trained on the prepared folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the result files.")],
    seed: SeedOption = 0,
) -> None:
    """Add the items to the catalog of the run, and test it on the users whose target is one of them."""
    added = pl.read_parquet(items, glob=False)["item"].to_list()
    with Stopwatch(out / ADDING_SECONDS) as adding:
        if not set(added) <= {*map(str, RunArtifacts.open(run).load_catalog().item_ids)}:
            catalog_command.add(run, items)
    artifacts = RunArtifacts.open(run)
    catalog = artifacts.load_catalog()
    split = split_of(read_dataset(data), artifacts.load_data(), added, [*map(str, catalog.item_ids)])
    loaded, beams = artifacts.load_generator(), artifacts.config.decoding.beams
    memory, gate = artifacts.load_memory(catalog), artifacts.load_gate()
    mixture = open_mixture(artifacts, *loaded, catalog, artifacts.sources(gate, memory), split)
    searches: dict[str, tuple[Rank, int | None]] = {
        "memory": (memory.ranker(), None),
        "search": (beam_ranker(artifacts, *loaded, catalog, beams=beams), beams),
        "result": (mixture_ranker(mixture, gate, beams=beams), beams),
    }
    stages = stage_seconds(artifacts.run)
    for name, (rank, most) in searches.items():
        started = time.monotonic()
        evaluation = evaluate(rank, split, max_list=most)
        used = {"memory": stages["memory"]} if name == "memory" else stages
        seconds = used | {"adding": adding.seconds, "evaluation": time.monotonic() - started}
        seconds = {stage: round(value, 1) for stage, value in seconds.items()}
        model = "memory" if name == "memory" else "cemg"
        about = {"model": model, "added_items": len(added), "stage_seconds": seconds}
        write_result(
            out / f"{name}.json",
            dataset=artifacts.load_data().name,
            command="python -m cemg.commands.new_items test",
            config=about | artifacts.config.to_dict(),
            seed=seed,
            hardware=hardware(artifacts.device),
            evaluation=evaluation,
            seconds=sum(seconds.values()),
        )


def draw_items(data: Dataset, seed: int) -> np.ndarray:
    """Draw SHARE of the items that have a text or an image, bool [N].

    Raises:
        UserError: There are too few.
    """
    described = [row for row in range(data.num_items) if data.texts[row] or data.images[row]]
    chosen = np.random.default_rng(seed).permutation(described)[: int(SHARE * data.num_items)]
    if not len(chosen):
        raise UserError(
            f"{data.name}: too few items have a text or an image to leave {SHARE:.0%} of them out"
        )
    left_out = np.zeros(data.num_items, dtype=bool)
    left_out[chosen] = True
    return left_out


def without_items(data: Dataset, left_out: np.ndarray) -> Dataset:
    """Return the data without some items and their interactions; all users remain."""
    kept = np.flatnonzero(~left_out)
    row_of = np.cumsum(~left_out, dtype=np.int32) - 1  # of the remaining items

    def remaining(values: list[Any]) -> list[Any]:
        return [values[row] for row in kept]

    return replace(
        data,
        item_ids=remaining(data.item_ids),
        titles=remaining(data.titles),
        texts=remaining(data.texts),
        images=remaining(data.images),
        sequences=[row_of[items[~left_out[items]]] for items in data.sequences],
        notes=[*data.notes, f"{int(left_out.sum()):,} items are left out, to be added later"],
    )


def split_of(whole: Dataset, trained: Dataset, added: list[str], catalog: list[str]) -> Split:
    """Return the users whose test target was left out, with catalog rows as items.

    The histories are those of the whole data, so they may have other added items. The training sequences are
    those of the run; the users with a target follow them, [U + T].
    """
    rows = {item: row for row, item in enumerate(catalog)}
    row_of = np.array([rows[item] for item in whole.item_ids], dtype=np.int32)
    split, new = whole.split(), {*added}
    chosen = [n for n, item in enumerate(split.test) if whole.item_ids[item] in new]
    if not chosen:
        raise UserError("no user has a target that was left out", fix="use a larger data set")
    histories, train = split.histories("test"), trained.split().train
    users = np.arange(len(train), len(train) + len(chosen), dtype=np.int32)
    nothing = np.empty(0, dtype=np.int32)
    targets = hashlib.sha256()
    for n in chosen:
        targets.update(f"{whole.user_ids[split.users[n]]}\t{whole.item_ids[split.test[n]]}\n".encode())
    fingerprint: dict[str, int | str] = {
        "users": len(chosen), "items": len(catalog), "targets_sha256": targets.hexdigest(),
        "tie_rule": whole.tie_rule, "split": f"leave-one-out; {len(added):,} items were added after training",
    }  # fmt: skip
    return Split(
        train=[*train, *[nothing] * len(chosen)],
        users=users,
        valid_users=users[:0],
        valid=nothing,
        test=row_of[split.test[chosen]],
        before_test=[row_of[histories[n]] for n in chosen],
        fingerprint=fingerprint,
    )


if __name__ == "__main__":
    command.run(app)
