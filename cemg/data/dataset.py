"""The dataset that every reader returns: items with texts and images, and users with histories.

U users, N items. Code refers to an item by its row, 0 … N-1; the id of the source is kept beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from pydantic import ConfigDict

from cemg.data.sequences import Sequences
from cemg.errors import DamagedError, UserError
from cemg.progress import UNPRINTABLE
from cemg.storage import files
from cemg.storage.read import STRICT, check_signature, file_digest, read_json, read_parquet, signed

FORMAT = 1  # of the prepared folder; increased when the meaning of its files changes
TIMED = 2  # the format of a folder that is split in time, which earlier versions would split otherwise
CUTS = "cuts.parquet"
CUT_SHARES = (0.8, 0.9)  # of the interactions, before the cut for validation and the one for the test
CUTS_SCHEMA: dict[str, Any] = {"before_validation": pl.Int32, "before_test": pl.Int32}
REMEDY = "prepare the data again: cemg-data prepare"
TABLES: dict[str, dict[str, Any]] = {  # file -> columns
    "users.parquet": {"user_id": pl.String},
    "items.parquet": {"item_id": pl.String, "title": pl.String, "text": pl.String, "image": pl.String},
    "interactions.parquet": {"user": pl.Int32, "item": pl.Int32},
}


@dataclass(frozen=True, slots=True)
class Served:
    """Which events of a service a data set has.

    Attributes:
        store: Identifies the store of the service.
        events: Number of the last event in it. Users and items may be missing nevertheless.
    """

    store: str
    events: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """Histories of users over a catalog of items.

    A missing text or image is None. It is masked later, never replaced.

    Attributes:
        name: Name of the dataset.
        user_ids: Ids of the users, [U].
        item_ids: Ids of the items, [N].
        sequences: Item rows of each user's history, oldest first, U arrays of int32; kept as
            `Sequences`.
        titles: Titles of the items, [N], "" if missing.
        texts: Texts of the items, [N].
        images: Paths of the items' images, [N].
        tie_rule: How interactions with equal times are ordered.
        synthetic: Whether the data were generated.
        notes: Notes for the user: what was dropped, matched or missing.
        cuts: For a split in time, how many interactions of each user are before the cut for validation and
            before the cut for the test, [U, 2] int32; None for leave-one-out.
        served: Which events of a service the data have; None for none.
    """

    FILES: ClassVar[tuple[str, ...]] = ("dataset.json", *TABLES)  # of a prepared folder

    name: str
    user_ids: list[str]
    item_ids: list[str]
    sequences: Sequence[np.ndarray]
    titles: list[str]
    texts: list[str | None]
    images: list[Path | None]
    tie_rule: str
    synthetic: bool = False
    notes: list[str] = field(default_factory=list)
    cuts: np.ndarray | None = None
    served: Served | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", Sequences.of(self.sequences))
        if self.cuts is not None and self.cuts.shape != (len(self.user_ids), 2):
            raise UserError(f"{self.name}: cuts must be [{len(self.user_ids)}, 2], got {self.cuts.shape}")
        if len(self.user_ids) != len(self.sequences):
            raise UserError(f"{self.name}: {len(self.user_ids)} user ids for {len(self.sequences)} sequences")
        if self.cuts is not None and not _cuts_fit(self.cuts, Sequences.of(self.sequences)):
            raise UserError(f"{self.name}: cuts must be ascending and within the history of each user")
        for plural, column in (("titles", self.titles), ("texts", self.texts), ("images", self.images)):
            if len(column) != len(self.item_ids):
                raise UserError(f"{self.name}: {len(column)} {plural} for {len(self.item_ids)} items")
        for kind, ids in (("user", self.user_ids), ("item", self.item_ids)):
            check_ids(ids, kind, source=self.name)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        """Number of interactions."""
        return int(Sequences.of(self.sequences).lengths.sum())

    def stats(self) -> dict[str, float]:
        """Compute the columns of Table 1 of the CEMG paper.

        Returns:
            ``users``, ``items``, ``interactions``, ``avg_length`` (of a history) and ``sparsity`` (the share
            of user-item pairs without an interaction).
        """
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
        """Split the histories: leave-one-out, or in time if the data set has ``cuts``.

        See `Split.leave_one_out` and `Split.in_time`.
        """
        return Split.leave_one_out(self) if self.cuts is None else Split.in_time(self)

    def save(self, folder: Path) -> None:
        """Write a prepared folder: the tables interactions, users and items as Parquet, and dataset.json.

        Images in the folder move with it; others are named by their absolute paths.
        """
        sequences, here = Sequences.of(self.sequences), folder.resolve()
        paths = [path.resolve() if path else None for path in self.images]
        pairs = {
            "user": np.repeat(np.arange(self.num_users, dtype=np.int32), sequences.lengths),
            "item": sequences.flat(),
        }
        _write(pl.DataFrame(pairs), folder / "interactions.parquet")
        users = pl.DataFrame({"user_id": self.user_ids}, schema={"user_id": pl.String})
        _write(users, folder / "users.parquet")
        items = pl.DataFrame(
            {
                "item_id": self.item_ids,
                "title": self.titles,
                "text": self.texts,
                "image": [
                    None if p is None else str(p.relative_to(here) if p.is_relative_to(here) else p)
                    for p in paths
                ],
            },
            schema={"item_id": pl.String, "title": pl.String, "text": pl.String, "image": pl.String},
        )
        _write(items, folder / "items.parquet")
        tables = [*TABLES]
        if self.cuts is not None:
            cuts = dict(zip(CUTS_SCHEMA, self.cuts.T, strict=True))
            _write(pl.DataFrame(cuts, schema=CUTS_SCHEMA), folder / CUTS)
            tables.append(CUTS)
        about: dict[str, Any] = {
            "format": FORMAT if self.cuts is None else TIMED,
            "name": self.name,
            "tie_rule": self.tie_rule,
            "synthetic": self.synthetic,
            "notes": self.notes,
        }
        if self.served is not None:
            about["served"] = dataclasses.asdict(self.served)
        about["files"] = {name: file_digest(folder / name) for name in tables}
        files.write_json(folder / "dataset.json", signed(about))

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Read a prepared folder.

        Raises:
            UserError: A file is missing, damaged or of another format.
        """
        about = _read_about(folder / "dataset.json")
        for name, sha in (about.files or {}).items():
            if file_digest(folder / name, fix=REMEDY) != sha:
                cause = "its sha256 differs from the recorded one"
                raise DamagedError(f"{folder / name} is damaged", cause=cause, fix=REMEDY)
        users, items, pairs = (read_parquet(folder / name, TABLES[name], fix=REMEDY) for name in TABLES)
        _check_tables(folder, users, items, pairs)
        lengths = np.bincount(pairs["user"].to_numpy(), minlength=len(users))
        sequences = Sequences.of_lengths(pairs["item"].to_numpy(), lengths)
        return cls(
            name=about.name,
            user_ids=users["user_id"].to_list(),
            item_ids=items["item_id"].to_list(),
            sequences=sequences,
            titles=items["title"].to_list(),
            texts=items["text"].to_list(),
            images=[folder.resolve() / p if p else None for p in items["image"]],  # / keeps absolute ones
            tie_rule=about.tie_rule,
            synthetic=about.synthetic,
            notes=about.notes,
            cuts=_read_cuts(folder, sequences) if about.format == TIMED else None,
            served=about.served,
        )


@dataclass(frozen=True, slots=True)
class _About:
    """Content of ``dataset.json``. ``files`` has the sha256 of each table."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: int
    name: str
    tie_rule: str
    synthetic: bool
    notes: list[str]
    files: dict[str, str] | None = None  # earlier versions wrote neither this nor sha256
    served: Served | None = None
    sha256: str | None = None


def _read_about(path: Path) -> _About:
    record = read_json(path, dict[str, Any], fix=REMEDY)
    if record.get("format") not in (FORMAT, TIMED):
        raise UserError(
            f"{path} has format {str(record.get('format'))[:80]}; this version reads {FORMAT} and {TIMED}",
            fix=REMEDY,
        )
    about = read_json(path, _About, fix=REMEDY)
    if about.files is not None or about.sha256 is not None:
        check_signature(record, name=str(path), fix=REMEDY)
    return about


def _check_tables(folder: Path, users: pl.DataFrame, items: pl.DataFrame, pairs: pl.DataFrame) -> None:
    """Raise DamagedError for tables that are incomplete or do not fit together."""
    problem = None
    for name, ids in (("users.parquet", users["user_id"]), ("items.parquet", items["item_id"])):
        if ids.null_count() or ids.is_duplicated().any():
            problem = f"an id of {name} is missing or occurs twice"
    if items["title"].null_count():
        problem = "a title is missing"
    if pairs["user"].null_count() or pairs["item"].null_count() or not pairs["user"].is_sorted():
        problem = "interactions.parquet is not sorted by user"
    for column, count in (("user", len(users)), ("item", len(items))):
        rows = pairs[column]
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < count):  # type: ignore[arg-type]
            problem = f"interactions.parquet refers to a {column} that does not exist (there are {count})"
    if problem:
        raise DamagedError(f"the dataset in {folder} is damaged", cause=problem, fix=REMEDY)


def _read_cuts(folder: Path, sequences: Sequences) -> np.ndarray:
    """Read the cuts in time. Raises DamagedError if they do not fit the histories."""
    table = read_parquet(folder / CUTS, CUTS_SCHEMA, fix=REMEDY)
    cuts = np.stack([table[name].to_numpy() for name in CUTS_SCHEMA], axis=1) if len(table) else None
    if cuts is None or len(cuts) != len(sequences) or not _cuts_fit(cuts, sequences):
        cause = f"{CUTS} does not fit the histories of {len(sequences)} users"
        raise DamagedError(f"the dataset in {folder} is damaged", cause=cause, fix=REMEDY)
    return cuts


def _cuts_fit(cuts: np.ndarray, sequences: Sequences) -> bool:
    first, second = cuts.T
    return bool(((first >= 0) & (first <= second) & (second <= sequences.lengths)).all())


@dataclass(frozen=True, slots=True)
class Split:
    """A split of the histories into training, validation targets and test targets.

    Attributes:
        train: Item rows for training, per user, U arrays of int32; kept as `Sequences`. They are the
            histories of the validation targets.
        users: Rows of the users that have a test target, [T] int32.
        valid_users: Rows of the users that have a validation target, [V] int32: leave-one-out, the same.
        valid: Validation targets, [V] int32.
        test: Test targets, [T] int32.
        before_test: What the histories of the test targets have after ``train``, T arrays of int32; kept as
            `Sequences`.
        fingerprint: Identifies the split; results of different splits are not compared.
    """

    train: Sequence[np.ndarray]
    users: np.ndarray
    valid_users: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    before_test: Sequence[np.ndarray]
    fingerprint: dict[str, int | str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", Sequences.of(self.train))
        object.__setattr__(self, "before_test", Sequences.of(self.before_test))

    @classmethod
    def leave_one_out(cls, data: Dataset) -> Split:
        """Keep the last item of each user for the test, and the one before it for validation.

        All items of a user with fewer than three are for training.

        Source: CEMG paper, section 4.1.3, https://arxiv.org/abs/2512.21543.
        """
        sequences = Sequences.of(data.sequences)
        users = np.flatnonzero(sequences.lengths >= 3).astype(np.int32)
        tested = sequences.of_users(users)
        valid, test = tested.at(tested.lengths - 2), tested.at(tested.lengths - 1)
        train = sequences.part(0, sequences.lengths - np.where(sequences.lengths >= 3, 2, 0))
        between = tested.part(tested.lengths - 2, tested.lengths - 1)
        return cls(train, users, users, valid, test, between, _fingerprint(data, users, test))

    @classmethod
    def in_time(cls, data: Dataset) -> Split:
        """Cut the interactions of all users at two times.

        Those before the first cut are for training. A target is the first item of a user after a cut, and
        between both cuts for validation; its history is what the user has before that cut. Users without a
        history have no target.

        Source: Meng et al., https://arxiv.org/abs/2007.13237, on leave-one-out splits, whose models are
        trained on interactions that are later than the targets of other users.
        """
        assert data.cuts is not None
        first, second = data.cuts.astype(np.int64).T  # [U]
        sequences = Sequences.of(data.sequences)
        valid_users = np.flatnonzero((first > 0) & (second > first)).astype(np.int32)
        users = np.flatnonzero((second > 0) & (sequences.lengths > second)).astype(np.int32)
        valid = sequences.of_users(valid_users).at(first[valid_users])
        tested = sequences.of_users(users)
        test = tested.at(second[users])
        train, between = sequences.part(0, first), tested.part(first[users], second[users])
        shares = " and ".join(f"{share:.0%}" for share in CUT_SHARES)
        about: dict[str, int | str] = {"split": f"in time, at {shares} of the interactions"}
        return cls(train, users, valid_users, valid, test, between, _fingerprint(data, users, test) | about)

    def users_of(self, part: str) -> np.ndarray:
        """Return the rows of the users that have a target in ``part`` ("valid" or "test")."""
        return {"valid": self.valid_users, "test": self.users}[part]

    def histories(self, part: str) -> Sequences:
        """Return the history before each target of ``part`` ("valid" or "test"), arrays of int32.

        Raises:
            ValueError: ``part`` has another value.
        """
        train = Sequences.of(self.train)
        if part == "valid":
            return train.of_users(self.valid_users)
        if part == "test":
            return train.of_users(self.users).followed_by(Sequences.of(self.before_test))
        raise ValueError(f"part must be 'valid' or 'test', got {part!r}")

    def targets(self, part: str) -> np.ndarray:
        """Return the target items of ``part`` ("valid" or "test"), int32."""
        return {"valid": self.valid, "test": self.test}[part]

    def train_counts(self, num_items: int) -> np.ndarray:
        """Count the training interactions of each item, [N] int64."""
        return np.bincount(Sequences.of(self.train).flat(), minlength=num_items)


def _fingerprint(data: Dataset, users: np.ndarray, test: np.ndarray) -> dict[str, int | str]:
    """Identify a split by its test targets."""
    targets = hashlib.sha256()
    for user, item in zip(users, test, strict=True):
        targets.update(f"{data.user_ids[user]}\t{data.item_ids[item]}\n".encode())
    return {
        "users": len(users),
        "items": data.num_items,
        "targets_sha256": targets.hexdigest(),
        "tie_rule": data.tie_rule,
    }


def check_ids(ids: Sequence[str], kind: str, *, source: str) -> None:
    """Raise UserError for an id that is empty, or has characters that break terminals, logs or files.

    Args:
        ids: The ids.
        kind: "user" or "item", for the error.
        source: Where the ids are from, for the error.
    """
    if UNPRINTABLE.search("".join(ids)) is None and "" not in ids:
        return
    bad = next(id for id in ids if not id or UNPRINTABLE.search(id))
    raise UserError(
        f"{source}: {kind} id {bad!r} is empty or contains a control character",
        fix="rename it in the source: ids are printable text on one line",
    )


def _write(table: pl.DataFrame, path: Path) -> None:
    with files.durable(path) as part:
        table.write_parquet(part)
