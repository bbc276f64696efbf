"""``cemg-recommend``: the most likely next items for a history, with titles, scores and semantic IDs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cemg.commands import console as command
from cemg.commands.histories import (
    SOME_FAILED,
    STDIN,
    in_batches,
    no_history,
    output_line,
    parse_history,
    read_requests,
)
from cemg.commands.items import allowed_items, read_ids
from cemg.commands.shards import RayOption, print_note, read_shard, write_parts
from cemg.errors import UserError
from cemg.progress import console, plain_console, printable

if TYPE_CHECKING:
    from rich.table import Table

    from cemg.data import Dataset
    from cemg.decoding import Normalize
    from cemg.recommender import Recommender
    from cemg.storage.parts import Shard

app = command.command_line()


@app.command(
    cls=command.Command,
    epilog=command.examples(
        'cemg-recommend --run runs/beauty --history "12 7 105" --memory gate',
        "cemg-recommend --run runs/beauty --histories requests.jsonl > answers.jsonl",
        "cemg-recommend --run runs/beauty --all-users all.parquet --exclude-history",
    ),
)
def recommend(
    run: command.RunOption,
    history: Annotated[
        str | None,
        typer.Option(
            metavar="IDS",
            help="Item ids, oldest first, separated by spaces or commas; or a JSON list of ids. With the "
            'memory, "" lists the most popular items.',
        ),
    ] = None,
    user: Annotated[
        str, typer.Option(metavar="ID", help="Use the whole history of this user of the run's data.")
    ] = "",
    histories: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='File with one JSON line per request: a list of item ids, or {"user": …, "history": […]}. '
            "May be .gz, or - for stdin. Prints a JSON line per request; the exit code is 3 if some failed.",
        ),
    ] = None,
    everyone: Annotated[
        Path | None,
        typer.Option(
            "--all-users",
            "--all",
            metavar="OUT.parquet",
            help="Recommend for every user, and write a table. After an interruption, the same command "
            "continues.",
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            metavar="PART",
            help="Histories for --all-users: all (whole), or test or valid (up to that item, for cemg-eval).",
        ),
    ] = "all",
    shard: Annotated[
        str,
        typer.Option(
            metavar="i/N",
            help="Compute only the i-th of N shards of --all-users, into a file of its own beside it.",
        ),
    ] = "",
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="Join the shards of --all-users to one file, the same as without --shard."
        ),
    ] = False,
    ray: RayOption = "",
    top: Annotated[int, typer.Option(help="Number of items to recommend.")] = 10,
    beams: Annotated[int, typer.Option(help="Number of beams, raised to --top if that is larger.")] = 50,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Decoder: cemg, vllm, or transformers (slow, for comparison).")
    ] = "cemg",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Mix the item memory into the search: off, constant (one weight), or gate (a weight per "
            "history). Default: gate if the run has one.",
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Codes in the log-softmax: vocab, level or valid. Default: the run's setting.",
        ),
    ] = None,
    exclude_history: Annotated[
        bool, typer.Option(help="Do not recommend items of the history.", show_default=False)
    ] = False,
    only: Annotated[
        str,
        typer.Option(
            metavar="IDS|FILE", help="Recommend only these items: ids, or a file with one id per line."
        ),
    ] = "",
    exclude: Annotated[
        str,
        typer.Option(
            metavar="IDS|FILE", help="Do not recommend these items: ids, or a file with one id per line."
        ),
    ] = "",
    exact: Annotated[
        bool,
        typer.Option(
            help="Search until the list is proven to be the best of all allowed items.", show_default=False
        ),
    ] = False,
    device: command.DeviceOption = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    no_verify: command.NoVerifyOption = False,
    version: command.VersionOption = False,
) -> None:
    """Recommend the next items for a history, a user, a file of histories, or all users.

    Give exactly one of --history, --user, --histories and --all-users.
    """
    from cemg.recommender import Recommender

    command.check_device(device)
    command.check_normalize(normalize)
    command.check_memory(memory)
    for name, count in (("top", top), ("beams", beams)):
        if count < 1:
            raise UserError(f"--{name} must be at least 1, got {count}")
    if sum((history is not None, bool(user), bool(histories), bool(everyone))) != 1:
        raise UserError(
            "give exactly one of --history, --user, --histories and --all-users",
            fix='for example --history "12 7 105"',
        )
    one_shard = _check_all(everyone, part, shard, join=join, ray=ray, device=device)
    items = parse_history(history) if history is not None else []
    if histories and histories != STDIN and not histories.exists():
        raise UserError(f"{histories} does not exist")
    recommender = Recommender.from_run(
        run, device=device, engine=engine, normalize=cast("Normalize | None", normalize),
        verify=not no_verify,
    )  # fmt: skip
    command.warn_of_normalize(recommender.artifacts.config, normalize)
    options: dict[str, Any] = {
        "top": top,
        "beams": max(beams, top),
        "exclude_history": exclude_history,
        "exact": exact,
        "memory": recommender.default_memory if memory is None else memory,
    }
    if history is not None and not items and options["memory"] == "off":
        raise no_history(recommender.artifacts)
    allowed = read_ids(only, option="--only") if only else []
    forbidden = read_ids(exclude, option="--exclude") if exclude else []
    if allowed or forbidden:
        options["filter"] = allowed_items(recommender, allowed, forbidden)
    if everyone:
        from cemg.commands.all_users import AllUsers
        from cemg.storage.parts import join as join_shards

        work = AllUsers(recommender, part=part, options=options, only=allowed, exclude=forbidden)
        path, users = everyone, work.users_of(one_shard)
        if join:
            print_note(join_shards(everyone, work.about, schema=work.schema))
        else:
            path = write_parts(work, everyone, shard=one_shard, label="recommend", ray=ray)
        console.print(f"wrote {path}: {users:,} users, at most {top} items each", soft_wrap=True)
        return
    if histories:
        _serve(recommender, histories, options)
        return
    request = _history_of(user, recommender) if user else items
    answer = next(_recommendations(recommender, [request], options))
    if as_json:
        print(json.dumps(answer, indent=1))
        return
    rows = answer["items"]
    table = _table(rows)
    if answer["ranked_by"] == "popularity":
        table.caption = "there is no history: ranked by popularity"
    elif engine != "transformers":  # which computes no certificate
        proven = answer["certified"]
        table.caption = f"the first {proven} of {len(rows)} are proven to be the best"
        table.caption += "; --exact proves all" if proven < len(rows) and not exact else ""
    plain_console().print(table)


def _check_all(out: Path | None, part: str, shard: str, *, join: bool, ray: str, device: str) -> Shard | None:
    """Return the shard. Raises UserError for invalid options of --all-users."""
    if part not in ("all", "test", "valid"):
        raise UserError(f"--part must be all, test or valid, got {part!r}")
    options = {
        f"--part {part}": part != "all",
        f"--shard {shard}": bool(shard),
        "--join": join,
        "--ray": bool(ray),
    }
    given = [name for name, used in options.items() if used]
    if out is None and given:
        raise UserError(f"{given[0]} has no effect without --all-users", fix="add --all-users OUT.parquet")
    if out is not None and out.suffix != ".parquet":
        raise UserError(
            f"--all-users {out} must end in .parquet",
            fix=f"--all-users {quote(str(out.with_suffix('.parquet')))}",
        )
    return read_shard(shard, join=join, ray=ray, device=device)


def _serve(recommender: Recommender, path: Path, options: dict[str, Any]) -> None:
    """Print one JSON line per line of ``path``. Exits with code 3 if some could not be served."""
    failed = lines = 0
    known = set(map(str, recommender.catalog.item_ids))
    popularity = options["memory"] != "off"
    requests = read_requests(path, known, _known_histories(recommender), popularity=popularity)
    for batch in in_batches(requests, recommender.artifacts.config.decoding.batch_size):
        histories = [request.history for request in batch if request.error is None]
        answers = _recommendations(recommender, histories, options)
        for request in batch:
            print(json.dumps(output_line(request, None if request.error else next(answers))), flush=True)
        failed, lines = failed + len(batch) - len(histories), lines + len(batch)
    if failed:
        print(f'{failed:,} of {lines:,} lines could not be served; see their "error"', file=sys.stderr)
        raise typer.Exit(SOME_FAILED)


def _known_histories(recommender: Recommender) -> Callable[[str], list[str] | None]:
    """Return a function from user id to history (None if unknown), which reads the data on its first call."""

    @functools.cache
    def by_user() -> tuple[dict[str, int], Dataset]:
        data = recommender.artifacts.load_data()
        return {user: row for row, user in enumerate(data.user_ids)}, data

    def history_of(user: str) -> list[str] | None:
        rows, data = by_user()
        return [data.item_ids[item] for item in data.sequences[rows[user]]] if user in rows else None

    return history_of


def _history_of(user: str, recommender: Recommender) -> list[str]:
    history = _known_histories(recommender)(user)
    if history is None:
        data = recommender.artifacts.load_data()
        raise UserError(
            f"user {user!r} is not among the {data.num_users} users of this run",
            fix=f"use an id of its data, such as {data.user_ids[0]!r}",
        )
    return history


def _recommendations(
    recommender: Recommender, histories: list[list[str]], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each history's recommendations. The search runs in batches."""
    from cemg.tokenizer import symbol

    titles, size = recommender.titles(), recommender.artifacts.config.decoding.batch_size
    for start in range(0, len(histories), size):
        batch = histories[start : start + size]
        result = recommender.recommend(batch, **options)
        for row, (history, ids) in enumerate(zip(batch, recommender.item_ids(result), strict=True)):
            ranked = zip(ids, result.scores[row].tolist(), result.codes[row].tolist(), strict=True)
            items = [
                {
                    "item": item,
                    "title": titles.get(item) or "",
                    "score": score,
                    "codes": [symbol(m, c) for m, c in enumerate(codes)],
                }
                for item, score, codes in ranked
                if item is not None
            ]
            about = {"ranked_by": result.ranked_by[row], "certified": int(result.certified[row])}
            yield {"history": history, **about, "items": items}


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("rank", "item", "title", "log-prob", "semantic ID", caption_justify="left")
    for rank, row in enumerate(rows, start=1):
        table.add_row(
            str(rank),
            printable(str(row["item"])),
            printable(str(row["title"])),
            f"{row['score']:.3f}",
            " ".join(row["codes"]),
        )
    return table


def main() -> None:
    """Run ``cemg-recommend`` on the command line's arguments."""
    command.run(app)
