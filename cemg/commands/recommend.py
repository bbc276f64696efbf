"""``cemg-recommend``: the next items for a history, with titles, scores and codes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cemg.commands import console as command
from cemg.commands.histories import (
    SOME_FAILED,
    STDIN,
    answer_of,
    in_batches,
    parse_history,
    read_requests,
)
from cemg.commands.items import read_ids
from cemg.errors import UserError
from cemg.progress import console, plain_console, printable

if TYPE_CHECKING:
    from rich.table import Table

    from cemg.data import Dataset
    from cemg.decoding import Normalize
    from cemg.recommender import Recommender
    from cemg_kernels import ItemFilter

app = command.command_line()


@app.command(cls=command.Command)
def recommend(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    history: Annotated[
        str, typer.Option(help="Item ids, oldest first, between spaces or commas; or a JSON list.")
    ] = "",
    user: Annotated[str, typer.Option(help="A user of the run's data, for all that is known of them.")] = "",
    histories: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='One JSON line per history: a list of item ids or {"user": …, "history": […]}; .gz, or - '
            "for stdin. Prints one JSON line for each; exit code 3 where one has an error.",
        ),
    ] = None,
    everyone: Annotated[
        Path | None,
        typer.Option(
            "--all",
            metavar="OUT.parquet",
            help="Write the lists of all users as a table.",
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(help="With --all: the histories before the test or valid item, for cemg-eval; or all."),
    ] = "all",
    top: Annotated[int, typer.Option(help="How many items.")] = 10,
    beams: Annotated[int, typer.Option(help="Width of the beam search; --top at least.")] = 50,
    engine: Annotated[str, typer.Option(help="cemg; transformers, the yardstick; or vllm.")] = "cemg",
    normalize: Annotated[
        str | None, typer.Option(help="vocab, level or valid; the run's own if not given.")
    ] = None,
    exclude_history: Annotated[bool, typer.Option(help="Leave out the items of the history.")] = False,
    only: Annotated[
        str, typer.Option(metavar="IDS|FILE", help="Recommend these items alone; a file has one id per line.")
    ] = "",
    exclude: Annotated[str, typer.Option(metavar="IDS|FILE", help="Never recommend these items.")] = "",
    exact: Annotated[bool, typer.Option(help="Search on until the list is proven to be the top.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    no_verify: command.NoVerifyOption = False,
    version: command.VersionOption = False,
) -> None:
    """Recommend the next items after a history, a user's, or each of a file of histories.

    Example: cemg-recommend --run runs/beauty --history "12 7 105" --top 10
    """
    from cemg.recommender import Recommender

    command.check_device(device)
    command.check_normalize(normalize)
    for name, count in (("top", top), ("beams", beams)):
        if count < 1:
            raise UserError(f"--{name} must be at least 1, got {count}")
    if sum(map(bool, (history, user, histories, everyone))) != 1:
        raise UserError(
            "name one of --history, --user, --histories and --all", fix='for example --history "12 7 105"'
        )
    _check_all(everyone, part)
    items = parse_history(history) if history else []
    if histories and histories != STDIN and not histories.exists():
        raise UserError(f"{histories} does not exist")
    recommender = Recommender.from_run(
        run, device=device, engine=engine, normalize=cast("Normalize | None", normalize),
        verify=not no_verify,
    )  # fmt: skip
    command.warn_of_normalize(recommender.pipeline.config, normalize)
    options: dict[str, Any] = {
        "top": top,
        "beams": max(beams, top),
        "exclude_history": exclude_history,
        "exact": exact,
    }
    if only or exclude:
        allowed = read_ids(only, option="--only") if only else []
        forbidden = read_ids(exclude, option="--exclude") if exclude else []
        options["filter"] = _filter(recommender, allowed, forbidden)
    if everyone:
        from cemg.commands.everyone import write_all

        count = write_all(recommender, everyone, part=part, options=options)
        console.print(f"wrote {everyone}: {count:,} users, {top} items each at most", soft_wrap=True)
        return
    if histories:
        _serve(recommender, histories, options)
        return
    own = _history_of(user, recommender) if user else items
    answer = next(_answers(recommender, [own], options))
    if as_json:
        print(json.dumps(answer, indent=1))
        return
    rows = answer["items"]
    table = _table(rows)
    if engine != "transformers":  # which proves nothing
        proven = answer["certified"]
        table.caption = f"the first {proven} of {len(rows)} are proven to be the best"
        table.caption += "; --exact searches on" if proven < len(rows) and not exact else ""
    plain_console().print(table)


def _check_all(out: Path | None, part: str) -> None:
    if part not in ("all", "test", "valid"):
        raise UserError(f"--part must be all, test or valid, got {part!r}")
    if out is None and part != "all":
        raise UserError("--part goes with --all")
    if out is not None and out.suffix != ".parquet":
        raise UserError(f"--all {out} must end in .parquet", fix=f"--all {out.with_suffix('.parquet')}")


def _filter(recommender: Recommender, only: Sequence[str], exclude: Sequence[str]) -> ItemFilter:
    """Admits the items of ``only``, or all where it names none, but those of ``exclude``."""
    if not exclude:
        return recommender.only(only)
    kept = ~recommender.only(exclude)
    return recommender.only(only) & kept if only else kept


def _serve(recommender: Recommender, path: Path, options: dict[str, Any]) -> None:
    """Print one JSON line per line of ``path``; exit code 3 where some could not be served."""
    failed = lines = 0
    known = set(map(str, recommender.catalog.item_ids))
    requests = read_requests(path, known, _known_histories(recommender))
    for batch in in_batches(requests, recommender.pipeline.config.decoding.batch_size):
        histories = [request.history for request in batch if request.error is None]
        answers = _answers(recommender, histories, options)
        for request in batch:
            print(json.dumps(answer_of(request, None if request.error else next(answers))), flush=True)
        failed, lines = failed + len(batch) - len(histories), lines + len(batch)
    if failed:
        print(f'{failed:,} of {lines:,} lines could not be served; see their "error"', file=sys.stderr)
        raise typer.Exit(SOME_FAILED)


def _known_histories(recommender: Recommender) -> Callable[[str], list[str] | None]:
    """User id to all items known of the user; the data are read when the first user is asked for."""

    @functools.cache
    def by_user() -> tuple[dict[str, int], Dataset]:
        data = recommender.pipeline.load_data()
        return {user: row for row, user in enumerate(data.user_ids)}, data

    def history_of(user: str) -> list[str] | None:
        rows, data = by_user()
        return [data.item_ids[item] for item in data.sequences[rows[user]]] if user in rows else None

    return history_of


def _history_of(user: str, recommender: Recommender) -> list[str]:
    history = _known_histories(recommender)(user)
    if history is None:
        data = recommender.pipeline.load_data()
        raise UserError(
            f"user {user!r} is not among the {data.num_users} of this run",
            fix=f"their ids are written like {data.user_ids[0]!r}",
        )
    return history


def _answers(
    recommender: Recommender, histories: list[list[str]], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What is recommended for each history, searched in batches."""
    from cemg.generator import symbol

    titles, size = recommender.titles(), recommender.pipeline.config.decoding.batch_size
    for start in range(0, len(histories), size):
        batch = histories[start : start + size]
        found = recommender.recommend(batch, **options)
        for row, (history, ids) in enumerate(zip(batch, recommender.item_ids(found), strict=True)):
            listed = zip(ids, found.scores[row].tolist(), found.codes[row].tolist(), strict=True)
            items = [
                {
                    "item": item,
                    "title": titles.get(item) or "",
                    "score": score,
                    "codes": [symbol(m, c) for m, c in enumerate(codes)],
                }
                for item, score, codes in listed
                if item is not None
            ]
            yield {"history": history, "certified": int(found.certified[row]), "items": items}


def _table(rows: list[dict[str, object]]) -> Table:
    from rich.table import Table

    table = Table("", "item", "title", "log-prob", "codes", caption_justify="left")
    for place, row in enumerate(rows, start=1):
        codes = " ".join(row["codes"])  # type: ignore[arg-type]
        table.add_row(
            str(place),
            printable(str(row["item"])),
            printable(str(row["title"])),
            f"{row['score']:.3f}",
            codes,
        )
    return table


def main() -> None:
    """Entry point of ``cemg-recommend``."""
    command.run(app)
