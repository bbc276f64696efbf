"""The one shape every reader produces: items with their texts and images, users with their histories.

U users, N items; an item is its row 0 … N-1, and keeps the identifier its source gave it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from pydantic import ConfigDict

from cemg.errors import DamagedError, UserError
from cemg.progress import UNPRINTABLE
from cemg.storage import files
from cemg.storage.read import STRICT, check_signature, file_digest, read_json, read_parquet, signed

FORMAT = 1  # of the prepared folder; raised when its files change meaning
REMEDY = "prepare the data again: cemg-data prepare"
TABLES: dict[str, dict[str, Any]] = {  # name to columns
    "users.parquet": {"user_id": pl.String},
    "items.parquet": {"item_id": pl.String, "title": pl.String, "text": pl.String, "image": pl.String},
    "interactions.parquet": {"user": pl.Int32, "item": pl.Int32},
}


@dataclass(frozen=True, slots=True)
class Dataset:
    """Users' histories over a catalog of N items.

    ``sequences[u]`` holds user u's item rows, int32, oldest first. ``texts`` and ``images`` (paths)
    hold None where an item has none: a missing modality is masked later, never made up.
    ``tie_rule`` says in words how interactions of equal time were ordered.
    """

    FILES: ClassVar[tuple[str, ...]] = ("dataset.json", *TABLES)  # of a prepared folder

    name: str
    user_ids: list[str]
    item_ids: list[str]
    sequences: list[np.ndarray]
    titles: list[str]
    texts: list[str | None]
    images: list[Path | None]
    tie_rule: str
    synthetic: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.user_ids) != len(self.sequences):
            raise UserError(f"{self.name}: {len(self.user_ids)} user ids for {len(self.sequences)} sequences")
        for what, column in (("titles", self.titles), ("texts", self.texts), ("images", self.images)):
            if len(column) != len(self.item_ids):
                raise UserError(f"{self.name}: {len(column)} {what} for {len(self.item_ids)} items")
        for what, ids in (("user", self.user_ids), ("item", self.item_ids)):
            check_ids(ids, what, source=self.name)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        return int(sum(map(len, self.sequences)))

    def stats(self) -> dict[str, float]:
        """The columns of the paper's Table 1: users, items, interactions, avg_length, sparsity (a share)."""
        count = self.num_interactions
        cells = self.num_users * self.num_items
        return {
            "users": self.num_users,
            "items": self.num_items,
            "interactions": count,
            "avg_length": count / max(self.num_users, 1),
            "sparsity": 1 - count / max(cells, 1),
        }

    def split(self) -> Split:
        """Leave-one-out (paper §4.1.3): last item tests, second-last validates, the rest trains.

        A user with fewer than three items only trains.
        """
        return Split.leave_one_out(self)

    def save(self, folder: Path) -> None:
        """Write the prepared folder: ``interactions.parquet``, ``items.parquet``, ``dataset.json``."""
        lengths = [len(s) for s in self.sequences]
        pairs = {
            "user": np.repeat(np.arange(self.num_users, dtype=np.int32), lengths),
            "item": _flat(self.sequences),
        }
        _write(pl.DataFrame(pairs), folder / "interactions.parquet")
        users = pl.DataFrame({"user_id": self.user_ids}, schema={"user_id": pl.String})
        _write(users, folder / "users.parquet")
        items = pl.DataFrame(
            {
                "item_id": self.item_ids,
                "title": self.titles,
                "text": self.texts,
                "image": [str(p.resolve()) if p else None for p in self.images],
            },
            schema={"item_id": pl.String, "title": pl.String, "text": pl.String, "image": pl.String},
        )
        _write(items, folder / "items.parquet")
        about = {
            "format": FORMAT,
            "name": self.name,
            "tie_rule": self.tie_rule,
            "synthetic": self.synthetic,
            "notes": self.notes,
        }
        about["files"] = {name: file_digest(folder / name) for name in TABLES}
        files.write_json(folder / "dataset.json", signed(about))

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Read a prepared folder; UserError names the file that is missing, damaged or of another format."""
        about = _read_about(folder / "dataset.json")
        for name, sha in (about.files or {}).items():
            if file_digest(folder / name, fix=REMEDY) != sha:
                cause = "its bytes do not have the sha256 that they were written with"
                raise DamagedError(f"{folder / name} is damaged", cause=cause, fix=REMEDY)
        users, items, pairs = (read_parquet(folder / name, TABLES[name], fix=REMEDY) for name in TABLES)
        _check_tables(folder, users, items, pairs)
        return cls(
            name=about.name,
            user_ids=users["user_id"].to_list(),
            item_ids=items["item_id"].to_list(),
            sequences=_unflatten(pairs["user"].to_numpy(), pairs["item"].to_numpy(), len(users)),
            titles=items["title"].to_list(),
            texts=items["text"].to_list(),
            images=[Path(p) if p else None for p in items["image"]],
            tie_rule=about.tie_rule,
            synthetic=about.synthetic,
            notes=about.notes,
        )


@dataclass(frozen=True, slots=True)
class _About:
    """``dataset.json``; ``files`` are the tables' sha256."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: int
    name: str
    tie_rule: str
    synthetic: bool
    notes: list[str]
    files: dict[str, str] | None = None  # which earlier versions did not write, nor the digest
    sha256: str | None = None


def _read_about(path: Path) -> _About:
    record = read_json(path, dict[str, Any], fix=REMEDY)
    if record.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {str(record.get('format'))[:80]}, this version reads {FORMAT}", fix=REMEDY
        )
    about = read_json(path, _About, fix=REMEDY)
    if about.files is not None or about.sha256 is not None:
        check_signature(record, name=str(path), fix=REMEDY)
    return about


def _check_tables(folder: Path, users: pl.DataFrame, items: pl.DataFrame, pairs: pl.DataFrame) -> None:
    """DamagedError for tables that do not belong together, or do not hold what every dataset has."""
    problem = None
    for name, ids in (("users.parquet", users["user_id"]), ("items.parquet", items["item_id"])):
        if ids.null_count() or ids.is_duplicated().any():
            problem = f"an id of {name} is missing or occurs twice"
    if items["title"].null_count():
        problem = "a title is missing"
    if pairs["user"].null_count() or pairs["item"].null_count() or not pairs["user"].is_sorted():
        problem = "interactions.parquet is not in the order of the users"
    for column, count in (("user", len(users)), ("item", len(items))):
        rows = pairs[column]
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < count):  # type: ignore[arg-type]
            problem = f"interactions.parquet names a {column} that is not among the {count}"
    if problem:
        raise DamagedError(f"{folder} holds a damaged dataset", cause=problem, fix=REMEDY)


@dataclass(frozen=True, slots=True)
class Split:
    """Leave-one-out. ``train[u]`` for every user; targets for those with three items or more.

    ``users`` [T] are the rows evaluated, ``valid`` [T] and ``test`` [T] their targets. The history of a
    validation target is ``train[u]``; of a test target ``train[u]`` and then the validation target.
    """

    train: list[np.ndarray]
    users: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    fingerprint: dict[str, int | str]

    @classmethod
    def leave_one_out(cls, data: Dataset) -> Split:
        lengths = np.array([len(s) for s in data.sequences], dtype=np.int64)
        users = np.flatnonzero(lengths >= 3).astype(np.int32)
        valid = np.array([data.sequences[u][-2] for u in users], dtype=np.int32)
        test = np.array([data.sequences[u][-1] for u in users], dtype=np.int32)
        train = [s[:-2] if len(s) >= 3 else s for s in data.sequences]
        targets = hashlib.sha256()
        for user, item in zip(users, test, strict=True):
            targets.update(f"{data.user_ids[user]}\t{data.item_ids[item]}\n".encode())
        fingerprint: dict[str, int | str] = {
            "users": len(users),
            "items": data.num_items,
            "targets_sha256": targets.hexdigest(),
            "tie_rule": data.tie_rule,
        }
        return cls(train, users, valid, test, fingerprint)

    def histories(self, part: str) -> list[np.ndarray]:
        """What is known of each evaluated user before the target of ``part`` ("valid" or "test")."""
        if part == "valid":
            return [self.train[u] for u in self.users]
        if part == "test":
            known = zip(self.users, self.valid, strict=True)
            return [np.append(self.train[u], item).astype(np.int32) for u, item in known]
        raise ValueError(f"part must be 'valid' or 'test', got {part!r}")

    def targets(self, part: str) -> np.ndarray:
        """The target item of each evaluated user, [T] int32."""
        return {"valid": self.valid, "test": self.test}[part]

    def train_counts(self, num_items: int) -> np.ndarray:
        """How often each item occurs in training, [N] int64: popularity, and what makes an item cold."""
        return np.bincount(_flat(self.train), minlength=num_items)


def check_ids(ids: Sequence[str], what: str, *, source: str) -> None:
    """UserError for an id that is empty or that a terminal, a log or a line of a file cannot carry."""
    if UNPRINTABLE.search("".join(ids)) is None and "" not in ids:
        return
    bad = next(one for one in ids if not one or UNPRINTABLE.search(one))
    raise UserError(
        f"{source}: {what} id {bad!r} is empty or contains a control character",
        fix="ids are printable text on one line; rename it in the source",
    )


def _write(table: pl.DataFrame, path: Path) -> None:
    with files.durable(path) as part:
        table.write_parquet(part)


def _flat(sequences: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(sequences).astype(np.int32) if sequences else np.zeros(0, np.int32)


def _unflatten(users: np.ndarray, items: np.ndarray, num_users: int) -> list[np.ndarray]:
    ends = np.searchsorted(users, np.arange(num_users), side="right")
    return [np.asarray(part, dtype=np.int32) for part in np.split(items, ends[:-1])] if num_users else []
