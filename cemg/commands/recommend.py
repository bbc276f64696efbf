"""``cemg-recommend``: the next items for a history, with titles, scores and codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cemg.commands import console as command
from cemg.errors import UserError
from cemg.progress import plain_console, printable

if TYPE_CHECKING:
    from rich.table import Table

    from cemg.decoding import Normalize
    from cemg.recommender import Recommender

app = command.command_line()


@app.command(cls=command.Command)
def recommend(
    run: Annotated[Path, typer.Option(help="Folder that cemg-train wrote.")],
    history: Annotated[str, typer.Option(help="Item ids, oldest first, parted by spaces or commas.")] = "",
    user: Annotated[str, typer.Option(help="A user of the run's data, for all that is known of them.")] = "",
    histories: Annotated[
        Path | None, typer.Option(help="A file, a JSON list of item ids a line; prints a JSON line for each.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many items.")] = 10,
    beams: Annotated[int, typer.Option(help="Width of the beam search; --top at least.")] = 50,
    engine: Annotated[str, typer.Option(help="cemg; transformers, the yardstick; or vllm.")] = "cemg",
    normalize: Annotated[
        str | None, typer.Option(help="vocab, level or valid; the run's own if not given.")
    ] = None,
    exclude_history: Annotated[bool, typer.Option(help="Leave out the items of the history.")] = False,
    exact: Annotated[bool, typer.Option(help="Search on until the list is proven to be the top.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    version: command.VersionOption = False,
) -> None:
    """Recommend the next items after a history, a user's, or each of a file of histories.

    Example: cemg-recommend --run runs/beauty --history "12 7 105" --top 10
    """
    from cemg.recommender import Recommender

    command.check_device(device)
    command.check_normalize(normalize)
    if beams < 1:
        raise UserError(f"--beams must be at least 1, got {beams}")
    if sum(map(bool, (history, user, histories))) != 1:
        raise UserError(
            "name one of --history, --user and --histories", fix='for example --history "12 7 105"'
        )
    items = history.replace(",", " ").split()
    if history and not items:
        raise UserError("--history names no item", fix='write it as --history "12 7 105"')
    recommender = Recommender.from_run(
        run, device=device, engine=engine, normalize=cast("Normalize | None", normalize)
    )
    command.warn_of_normalize(recommender.pipeline.config, normalize)
    many = _read(histories, set(map(str, recommender.catalog.item_ids))) if histories else []
    own = many or [_history_of(user, recommender) if user else items]
    options = {"top": top, "beams": max(beams, top), "exclude_history": exclude_history, "exact": exact}
    answers = _answers(recommender, own, options)
    if histories:
        for answer in answers:
            print(json.dumps(answer))
        return
    answer = next(answers)
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


def _read(path: Path, known: set[str]) -> list[list[str]]:
    """A file of histories; UserError names the line that is none, or has an unknown item."""
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read", cause=str(error)) from error
    found: list[list[str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            items = json.loads(line) if line.strip() else []
        except ValueError:
            items = None
        if not isinstance(items, list) or (line.strip() and not items):
            raise UserError(f'{path}, line {number}: wanted a JSON list of item ids, such as ["12", "7"]')
        unknown = next((str(item) for item in items if str(item) not in known), None)
        if unknown is not None:
            raise UserError(f"{path}, line {number}: item {unknown!r} is not in the catalog")
        if items:
            found.append([str(item) for item in items])
    if not found:
        raise UserError(f"{path} holds no history")
    return found


def _history_of(user: str, recommender: Recommender) -> list[str]:
    data = recommender.pipeline.load_data()
    if user not in data.user_ids:
        raise UserError(
            f"user {user!r} is not among the {data.num_users} of this run",
            fix=f"their ids are written like {data.user_ids[0]!r}",
        )
    return [data.item_ids[row] for row in data.sequences[data.user_ids.index(user)]]


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
