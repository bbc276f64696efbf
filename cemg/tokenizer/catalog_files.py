"""Catalogs in the files of others: ``X.index.json``, tables of codes, and tensors of codes.

N items, L levels, K codes of the largest level.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from cemg.data.keyed_json import read_keyed, short
from cemg.errors import UserError
from cemg.storage import files
from cemg.tokenizer.catalog import Catalog
from cemg.tokenizer.tokens import TokenMap, symbol
from cemg_kernels.trie.arrays import MAX_CODEBOOK_SIZE

TOKEN = re.compile(r"(.*?\D|)(\d{1,9})(\D*)")  # the last number in it is the code: <a_197>
CODE = re.compile(r"code_(\d+)")
HELD_OUT = 2  # last items of a user that training does not see: validation and test
INDEX, FORMATS = ".index.json", ".index.json, .csv, .parquet and .pt"


def read_catalog(
    path: Path | str, *, tokenizer: Any = None, code_token_start: TokenMap | None = None,
    shared: bool = False, codebook_size: int | Sequence[int] | None = None,
    interactions: Path | str | None = None, item: str | None = None, columns: Sequence[str] | None = None,
) -> Catalog:  # fmt: skip
    """The catalog of a file; see ``Catalog.read``."""
    path = Path(path)
    table = path.suffix in (".csv", ".parquet")
    if not table and (item is not None or columns is not None):
        raise UserError(f"{path} is not a table", cause="item and columns name columns", fix="leave them out")
    if path.name.endswith(".json"):
        return _of_index(
            path, tokenizer, code_token_start, shared=shared, interactions=interactions, size=codebook_size
        )
    if tokenizer is not None:
        raise UserError(
            f"{path} names no tokens", cause="only an index.json does", fix="pass code_token_start"
        )
    if table:
        ids, codes = _of_table(path, item, columns)
    elif path.suffix == ".pt":
        ids, codes = None, _of_tensor(path)
    else:
        raise UserError(f"the format of {path} is not known", cause=f"a catalog is one of {FORMATS}")
    if codebook_size is None and isinstance(code_token_start, int):
        raise UserError(
            "code_token_start needs a codebook_size",
            cause=f"{path} does not say how many codes a level has, and so where its tokens end",
            fix="pass codebook_size=256, or one number per level",
        )
    sizes = tuple((codes.amax(0) + 1).clamp_min(1).tolist()) if codebook_size is None else codebook_size
    counts = None if interactions is None else training_counts(interactions, ids or range(len(codes)))
    return _named(path, codes, sizes, ids, tokens=code_token_start, shared=shared, counts=counts)


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


def write_codes(catalog: Catalog, path: Path | str) -> None:
    """Write the codes as ``.csv`` or ``.parquet`` (columns item, code_0, code_1, …) or ``X.index.json``.

    Raises UserError for another name.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        rows = zip(catalog.item_ids, catalog.codes.tolist(), strict=True)
        index = {str(item): [symbol(level, code) for level, code in enumerate(row)] for item, row in rows}
        files.write_json(path, index, indent=None)
        return
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path} is not a known format of codes", fix="name it .csv, .parquet or .index.json")
    columns = {f"code_{level}": catalog.codes[:, level].numpy() for level in range(catalog.levels)}
    table = pl.DataFrame({"item": catalog.item_ids, **columns})
    with files.durable(path) as part:
        table.write_csv(part) if path.suffix == ".csv" else table.write_parquet(part)


def _of_index(
    path: Path, tokenizer: Any, start: TokenMap | None, *, shared: bool, interactions: Path | str | None,
    size: int | Sequence[int] | None,
) -> Catalog:  # fmt: skip
    """The catalog of an ``X.index.json``: item id -> one token per level."""
    index = read_keyed(path, "item ids")
    names, codes = _parsed(path, index)
    sizes = tuple((codes.amax(0) + 1).tolist())
    if tokenizer is not None and start is not None:
        raise UserError("pass tokenizer or code_token_start, not both")
    numbers = None
    if tokenizer is not None:
        numbers = _numbers(path, index, names, tokenizer)
    elif isinstance(start, int):
        numbers = {name: start + rank for rank, name in enumerate(sorted({n for own in names for n in own}))}
    tokens: TokenMap | None = start  # a table or lists, by code
    if numbers is not None:
        tokens = torch.full((len(sizes), max(sizes)), -1)
        for level, own in enumerate(names):
            for name, code in own.items():
                tokens[level, code] = numbers[name]
    counts = None if interactions is None else training_counts(interactions, index)
    wanted = sizes if size is None else size
    return _named(path, codes, wanted, list(index), tokens=tokens, shared=shared, counts=counts)


def _named(path: Path, codes: Tensor, sizes: Any, ids: list | None, **options: Any) -> Catalog:
    """``Catalog.from_codes`` whose errors name the file."""
    try:
        return Catalog.from_codes(codes, sizes, ids, **options)
    except UserError as error:
        raise UserError(f"{path}: {error.message}", cause=error.cause, fix=error.fix) from error


def _parsed(path: Path, index: dict[str, Any]) -> tuple[list[dict[str, int]], Tensor]:
    """Per level, the code of each token in use; and the codes [N, L]."""
    levels = next((len(row) for row in index.values() if isinstance(row, list)), 0)
    names: list[dict[str, int]] = [{} for _ in range(levels)]
    around: list[tuple[str, str] | None] = [None] * levels  # what stands around the numbers of a level
    rows = []
    for item, row in index.items():
        if not isinstance(row, list) or not row:
            raise UserError(f"{path}, item {item!r}: a list of tokens is needed, got {short(row)}")
        if len(row) != levels:
            raise UserError(f"{path}, item {item!r}: {len(row)} tokens where the first item has {levels}")
        codes = []
        for level, token in enumerate(row):
            found = TOKEN.fullmatch(token) if isinstance(token, str) else None
            if found is None:
                raise UserError(f"{path}, item {item!r}: {short(token)} is not a token like <a_197>")
            before, after = around[level] = around[level] or (found[1], found[3])
            if (found[1], found[3]) != (before, after):
                others = f"{before}…{after}"
                raise UserError(f"{path}, item {item!r}: token {token} on level {level}, which has {others}")
            if int(found[2]) >= MAX_CODEBOOK_SIZE:
                raise UserError(
                    f"{path}, item {item!r}: {token}: a level has {MAX_CODEBOOK_SIZE} codes at most"
                )
            names[level][token] = int(found[2])
            codes.append(int(found[2]))
        rows.append(codes)
    for level, own in enumerate(names):
        if len(set(own.values())) < len(own):  # <a_1> and <a_01>
            raise UserError(f"{path}: two tokens of level {level} have one number")
    return names, torch.tensor(rows, dtype=torch.int64)


def _numbers(
    path: Path, index: dict[str, Any], names: list[dict[str, int]], tokenizer: Any
) -> dict[str, int]:
    """The token id of every name. Raises UserError for the first item with a name the tokenizer lacks."""
    loaded = _tokenizer(tokenizer)
    every = sorted({name for own in names for name in own})
    ids = loaded.convert_tokens_to_ids(every)
    unknown = {getattr(loaded, "unk_token_id", None), None}
    numbers = {name: number for name, number in zip(every, ids, strict=True) if number not in unknown}
    for item, row in index.items() if len(numbers) < len(every) else ():
        missing = next((token for token in row if token not in numbers), None)
        if missing is not None:
            raise UserError(
                f"{path}, item {item!r}: the tokenizer does not know the token {missing}",
                cause=f"{len(every) - len(numbers)} of {len(every)} tokens of the index are unknown to it",
                fix="read the tokenizer that was saved with the checkpoint, or pass code_token_start",
            )
    return numbers


def _tokenizer(given: Any) -> Any:
    """A tokenizer, loaded from its folder or name where it is one."""
    if not isinstance(given, str | Path):
        return given
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(given), trust_remote_code=False)
    except Exception as error:  # of many kinds, by what is wrong with the files
        cause = str(error).strip().splitlines()
        raise UserError(f"{given} holds no readable tokenizer", cause=cause[0] if cause else None) from error


def _of_table(path: Path, item: str | None, columns: Sequence[str] | None) -> tuple[list[str], Tensor]:
    """Ids and codes [N, L] of a table: ``item``, and ``columns`` or all columns code_0, code_1, …"""
    try:
        if path.suffix == ".csv":
            table = pl.read_csv(path, infer_schema=False, encoding="utf8", glob=False)
        else:
            table = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read", cause=str(error).splitlines()[0]) from error
    name = item or next((one for one in ("item", "item_id") if one in table.columns), "item")
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
        raise UserError(f"{path} holds no items")
    table, chosen = _unpacked(path, table, chosen)
    for column in (name, *chosen):
        kind = table[column].dtype
        if kind.is_nested() or kind in (pl.Binary, pl.Object):
            raise UserError(f"{path}: column {column} is of type {kind}, which holds no ids or codes")
    numbers = table.select(pl.col(chosen).cast(pl.Int64, strict=False))
    for column in chosen:
        if numbers[column].null_count():
            row = int(numbers[column].is_null().arg_max() or 0)
            shown = short(table[column][row])
            raise UserError(f"{path}, row {row + 1}: {column} is {shown}, a code is an integer")
    ids = table[name].cast(pl.String, strict=False)
    if ids.null_count():
        raise UserError(f"{path}, row {int(ids.is_null().arg_max() or 0) + 1}: {name} is empty")
    return ids.to_list(), torch.from_numpy(numbers.to_numpy().copy()).contiguous()


def _unpacked(path: Path, table: pl.DataFrame, chosen: list[str]) -> tuple[pl.DataFrame, list[str]]:
    """A column of lists of codes, all of one length, as one column per level."""
    column = table[chosen[0]]
    if len(chosen) > 1 or not isinstance(column.dtype, pl.List | pl.Array):
        return table, chosen
    lists = column.cast(pl.List(column.dtype.inner))  # type: ignore[union-attr,arg-type]
    levels = lists.list.len()
    if levels.null_count() or levels.n_unique() > 1 or not levels[0]:
        raise UserError(f"{path}: the lists of {chosen[0]} must have one code per level, all the same number")
    names = [f"{chosen[0]}[{level}]" for level in range(levels[0])]
    return table.with_columns(lists.list.get(n).alias(name) for n, name in enumerate(names)), names


def _of_tensor(path: Path) -> Tensor:
    """Codes [N, L] of a ``.pt`` file with one tensor, [L, N] or [N, L]; no code of a pickle runs."""
    try:
        codes = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        cause = str(error).strip().splitlines()
        raise UserError(f"{path} holds no readable tensor", cause=cause[0] if cause else None) from error
    if isinstance(codes, Tensor) and (codes.layout != torch.strided or codes.dtype.is_complex):
        raise UserError(f"{path}: a dense tensor of integers is needed, got {codes.layout}, {codes.dtype}")
    if not isinstance(codes, Tensor) or codes.ndim != 2 or not codes.numel():
        got = f"a tensor {list(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise UserError(f"{path}: a tensor [levels, items] is needed, got {got}")
    if codes.shape[0] == codes.shape[1]:
        raise UserError(f"{path}: {list(codes.shape)} does not say which of the two are levels")
    if codes.dtype.is_floating_point and not torch.equal(codes, codes.round()):
        raise UserError(f"{path}: codes must be integers, got {codes.dtype}")
    wide = codes.to(torch.int64)
    return (wide.t() if wide.shape[0] < wide.shape[1] else wide).contiguous()
