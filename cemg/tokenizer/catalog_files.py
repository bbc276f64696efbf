"""Semantic IDs in the file formats of other projects: ``X.index.json``, tables and tensors of codes.

N items, L levels, K codes of the largest level.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from cemg.data.readers.keyed_json import read_keyed, short
from cemg.errors import UserError
from cemg.storage import files
from cemg.tokenizer.tokens import TokenMap, symbol
from cemg_kernels.trie.arrays import MAX_CODEBOOK_SIZE

TOKEN = re.compile(r"(.*?\D|)(\d{1,9})(\D*)")  # the last number of a token is its code: <a_197>
CODE = re.compile(r"code_(\d+)")
HELD_OUT = 2  # validation and test item of every user, which training does not see
INDEX, FORMATS = ".index.json", ".index.json, .csv, .parquet and .pt"


class CodesFile(NamedTuple):
    """The content of a file of codes, as arguments of ``Catalog.from_codes``."""

    codes: Tensor  # [N, L] int64
    codebook_sizes: int | Sequence[int]
    item_ids: list[str] | None
    tokens: TokenMap | None
    counts: list[int] | None


def read_codes(
    path: Path, *, tokenizer: Any = None, code_token_start: TokenMap | None = None,
    codebook_size: int | Sequence[int] | None = None, interactions: Path | str | None = None,
    item: str | None = None, columns: Sequence[str] | None = None,
) -> CodesFile:  # fmt: skip
    """Read a file of codes. ``Catalog.read`` describes the formats and the arguments."""
    is_table = path.suffix in (".csv", ".parquet")
    if not is_table and (item is not None or columns is not None):
        raise UserError(f"{path} is not a table", cause="item and columns name columns", fix="leave them out")
    if path.name.endswith(".json"):
        return _read_index(path, tokenizer, code_token_start, interactions=interactions, sizes=codebook_size)
    if tokenizer is not None:
        raise UserError(
            f"{path} has no token names", cause="only an index.json has", fix="pass code_token_start"
        )
    if is_table:
        ids, codes = _read_table(path, item, columns)
    elif path.suffix == ".pt":
        ids, codes = None, _read_tensor(path)
    else:
        raise UserError(f"the format of {path} is not known", cause=f"the known formats are {FORMATS}")
    if codebook_size is None and isinstance(code_token_start, int):
        raise UserError(
            "code_token_start needs a codebook_size",
            cause=f"{path} does not state the number of codes per level, so the last token is unknown",
            fix="pass codebook_size=256, or one number per level",
        )
    sizes = tuple((codes.amax(0) + 1).clamp_min(1).tolist()) if codebook_size is None else codebook_size
    counts = None if interactions is None else training_counts(interactions, ids or range(len(codes)))
    return CodesFile(codes, sizes, ids, code_token_start, counts)


def training_counts(path: Path | str, item_ids: Iterable[int | str]) -> list[int]:
    """How often each item occurs in an ``X.inter.json``, without the last two items of every user."""
    counts = {str(item): 0 for item in item_ids}
    for user, history in read_keyed(path, "users").items():
        if not isinstance(history, list):
            raise UserError(f"{path}, user {user!r}: a list of item ids is needed, got {short(history)}")
        for item in history[:-HELD_OUT]:
            if str(item) in counts:
                counts[str(item)] += 1
    return list(counts.values())


def write_codes(path: Path, item_ids: Sequence[int | str], codes: Tensor) -> None:
    """Write codes [N, L] as ``.csv`` or ``.parquet`` (columns item, code_0, code_1, …) or ``X.index.json``.

    Raises UserError for another name.
    """
    if path.name.endswith(INDEX):
        rows = zip(item_ids, codes.tolist(), strict=True)
        index = {str(item): [symbol(level, code) for level, code in enumerate(row)] for item, row in rows}
        files.write_json(path, index, indent=None)
        return
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path} is not a known format of codes", fix="name it .csv, .parquet or .index.json")
    columns = {f"code_{level}": codes[:, level].numpy() for level in range(codes.shape[1])}
    table = pl.DataFrame({"item": item_ids, **columns})
    with files.durable(path) as part:
        table.write_csv(part) if path.suffix == ".csv" else table.write_parquet(part)


def _read_index(
    path: Path, tokenizer: Any, code_token_start: TokenMap | None, *, interactions: Path | str | None,
    sizes: int | Sequence[int] | None,
) -> CodesFile:  # fmt: skip
    """An ``X.index.json``: item id -> one token per level."""
    index = read_keyed(path, "item ids")
    code_of, codes = _parse_tokens(path, index)
    used_sizes = tuple((codes.amax(0) + 1).tolist())
    if tokenizer is not None and code_token_start is not None:
        raise UserError("pass tokenizer or code_token_start, not both")
    token_ids = None
    if tokenizer is not None:
        token_ids = _token_ids(path, index, code_of, tokenizer)
    elif isinstance(code_token_start, int):
        names = sorted({name for level in code_of for name in level})
        token_ids = {name: code_token_start + rank for rank, name in enumerate(names)}
    tokens: TokenMap | None = code_token_start  # a table or lists, by code
    if token_ids is not None:
        tokens = torch.full((len(used_sizes), max(used_sizes)), -1)
        for level, codes_of_level in enumerate(code_of):
            for name, code in codes_of_level.items():
                tokens[level, code] = token_ids[name]
    counts = None if interactions is None else training_counts(interactions, index)
    return CodesFile(codes, used_sizes if sizes is None else sizes, list(index), tokens, counts)


def _parse_tokens(path: Path, index: dict[str, Any]) -> tuple[list[dict[str, int]], Tensor]:
    """Per level, the code of each token name in use; and the codes [N, L]."""
    levels = next((len(row) for row in index.values() if isinstance(row, list)), 0)
    code_of: list[dict[str, int]] = [{} for _ in range(levels)]
    affixes: list[tuple[str, str] | None] = [None] * levels  # text before and after the number, per level
    rows = []
    for item, row in index.items():
        if not isinstance(row, list) or not row:
            raise UserError(f"{path}, item {item!r}: a list of tokens is needed, got {short(row)}")
        if len(row) != levels:
            raise UserError(f"{path}, item {item!r}: {len(row)} tokens, but the first item has {levels}")
        codes = []
        for level, token in enumerate(row):
            match = TOKEN.fullmatch(token) if isinstance(token, str) else None
            if match is None:
                raise UserError(f"{path}, item {item!r}: {short(token)} is not a token like <a_197>")
            before, after = affixes[level] = affixes[level] or (match[1], match[3])
            if (match[1], match[3]) != (before, after):
                raise UserError(
                    f"{path}, item {item!r}: token {token} on level {level}, "
                    f"whose other tokens are like {before}…{after}"
                )
            if int(match[2]) >= MAX_CODEBOOK_SIZE:
                raise UserError(
                    f"{path}, item {item!r}: {token}: a level has {MAX_CODEBOOK_SIZE} codes at most"
                )
            code_of[level][token] = int(match[2])
            codes.append(int(match[2]))
        rows.append(codes)
    for level, codes_of_level in enumerate(code_of):
        if len(set(codes_of_level.values())) < len(codes_of_level):  # <a_1> and <a_01>
            raise UserError(f"{path}: two tokens of level {level} have the same number")
    return code_of, torch.tensor(rows, dtype=torch.int64)


def _token_ids(
    path: Path, index: dict[str, Any], code_of: list[dict[str, int]], tokenizer: Any
) -> dict[str, int]:
    """The token id of every name. Raises UserError for the first item with a name the tokenizer lacks."""
    loaded = _load_tokenizer(tokenizer)
    names = sorted({name for level in code_of for name in level})
    ids = loaded.convert_tokens_to_ids(names)
    unknown = {getattr(loaded, "unk_token_id", None), None}
    token_ids = {name: id for name, id in zip(names, ids, strict=True) if id not in unknown}
    for item, row in index.items() if len(token_ids) < len(names) else ():
        missing = next((token for token in row if token not in token_ids), None)
        if missing is not None:
            raise UserError(
                f"{path}, item {item!r}: the tokenizer does not know the token {missing}",
                cause=f"{len(names) - len(token_ids)} of {len(names)} tokens of the index are unknown to it",
                fix="read the tokenizer that was saved with the checkpoint, or pass code_token_start",
            )
    return token_ids


def _load_tokenizer(given: Any) -> Any:
    """A tokenizer; loaded first if its folder or name is given."""
    if not isinstance(given, str | Path):
        return given
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(given), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of errors
        cause = str(error).strip().splitlines()
        raise UserError(f"{given} has no readable tokenizer", cause=cause[0] if cause else None) from error


def _read_table(path: Path, item: str | None, columns: Sequence[str] | None) -> tuple[list[str], Tensor]:
    """Ids and codes [N, L] of a table: ``item``, and ``columns`` or all columns code_0, code_1, …"""
    try:
        if path.suffix == ".csv":
            table = pl.read_csv(path, infer_schema=False, encoding="utf8", glob=False)
        else:
            table = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read", cause=str(error).splitlines()[0]) from error
    name = item or next(
        (candidate for candidate in ("item", "item_id") if candidate in table.columns), "item"
    )
    numbered = sorted((int(m[1]), m[0]) for column in table.columns if (m := CODE.fullmatch(column)))
    chosen = list(columns) if columns is not None else [column for _, column in numbered]
    chosen = chosen or [column for column in table.columns if column != name]
    missing = [column for column in (name, *chosen) if column not in table.columns]
    if missing or not chosen:
        raise UserError(
            f"{path} has no column {missing[0]!r}" if missing else f"{path} has no columns of codes",
            cause=f"its columns are {', '.join(table.columns)}",
            fix="name them: item='sku', columns=['a', 'b', 'c']",
        )
    if table.is_empty():
        raise UserError(f"{path} has no items")
    table, chosen = _unpacked(path, table, chosen)
    for column in (name, *chosen):
        kind = table[column].dtype
        if kind.is_nested() or kind in (pl.Binary, pl.Object):
            raise UserError(f"{path}: column {column} is of type {kind}, which cannot be an id or a code")
    numbers = table.select(pl.col(chosen).cast(pl.Int64, strict=False))
    for column in chosen:
        if numbers[column].null_count():
            row = int(numbers[column].is_null().arg_max() or 0)
            shown = short(table[column][row])
            raise UserError(f"{path}, row {row + 1}: {column} is {shown}, and a code must be an integer")
    ids = table[name].cast(pl.String, strict=False)
    if ids.null_count():
        raise UserError(f"{path}, row {int(ids.is_null().arg_max() or 0) + 1}: {name} is empty")
    return ids.to_list(), torch.from_numpy(numbers.to_numpy().copy()).contiguous()


def _unpacked(path: Path, table: pl.DataFrame, chosen: list[str]) -> tuple[pl.DataFrame, list[str]]:
    """A column of lists of codes, all of one length, as one column per level."""
    column = table[chosen[0]]
    if len(chosen) > 1 or not isinstance(column.dtype, pl.List | pl.Array):
        return table, chosen
    lists = column.cast(pl.List(column.dtype.inner))
    levels = lists.list.len()
    if levels.null_count() or levels.n_unique() > 1 or not levels[0]:
        raise UserError(f"{path}: the lists of {chosen[0]} must have one code per level, all the same number")
    names = [f"{chosen[0]}[{level}]" for level in range(levels[0])]
    return table.with_columns(lists.list.get(n).alias(name) for n, name in enumerate(names)), names


def _read_tensor(path: Path) -> Tensor:
    """Codes [N, L] of a ``.pt`` file with one tensor, [L, N] or [N, L]. No pickled code is executed."""
    try:
        codes = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors
        cause = str(error).strip().splitlines()
        raise UserError(f"{path} has no readable tensor", cause=cause[0] if cause else None) from error
    if isinstance(codes, Tensor) and (codes.layout != torch.strided or codes.dtype.is_complex):
        raise UserError(f"{path}: a dense tensor of integers is needed, got {codes.layout}, {codes.dtype}")
    if not isinstance(codes, Tensor) or codes.ndim != 2 or not codes.numel():
        got = f"a tensor {list(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise UserError(f"{path}: a tensor [levels, items] is needed, got {got}")
    if codes.shape[0] == codes.shape[1]:
        raise UserError(f"{path}: the shape {list(codes.shape)} is square, so levels and items look alike")
    if codes.dtype.is_floating_point and not torch.equal(codes, codes.round()):
        raise UserError(f"{path}: codes must be integers, got {codes.dtype}")
    wide = codes.to(torch.int64)
    return (wide.t() if wide.shape[0] < wide.shape[1] else wide).contiguous()
