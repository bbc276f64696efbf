"""``cemg-recommend --all-users``: recommendations for every user of a run, as one Parquet file.

Users are searched in batches of ``decoding.batch_size``, in the order of the data. A part of the file has a
fixed number of batches, so the lists do not depend on shards, interruptions or the order of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cemg.commands import console as command
from cemg.progress import bar, console
from cemg.recommender import Recommender
from cemg.storage.manifest import stages_of
from cemg.storage.parts import WHOLE, Parts, Shard, join
from cemg.storage.read import digest
from cemg.version import __version__

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
    ]
)
PART_USERS = 1024  # users of a part, as whole batches
STAGES = ("data", "memory", "catalog", "generator", "gate")  # that determine the lists


class AllUsers:
    """The recommendations of a run for all of its users, in parts.

    Args:
        recommender: The run and its decoder.
        part: "all" uses each user's whole history; "test" and "valid" use the history before the item that
            the evaluation holds out.
        options: Keyword arguments of `Recommender.recommend`.
        only: Ids of the items that ``options["filter"]`` allows, of which ``exclude`` are forbidden.
        exclude: See ``only``.
    """

    def __init__(
        self, recommender: Recommender, *, part: str, options: Mapping[str, Any],
        only: list[str] | None = None, exclude: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.recommender, self.history_part, self.options = recommender, part, dict(options)
        self.only, self.exclude = only or [], exclude or []
        self.batch = recommender.artifacts.config.decoding.batch_size
        self.part_users = self.batch * max(1, PART_USERS // self.batch)
        self.data = recommender.artifacts.load_data()
        popularity = (options.get("memory") or recommender.default_memory) != "off"
        split = None if part == "all" else self.data.split()
        users = np.arange(self.data.num_users) if split is None else split.users_of(part)
        self.histories = self.data.sequences if split is None else split.histories(part)
        # users without a history are left out unless popularity ranks for them
        self.rows = [row for row, history in enumerate(self.histories) if len(history) or popularity]
        self.users = [int(users[row]) for row in self.rows]

    @property
    def total(self) -> int:
        """Number of parts."""
        return -(-len(self.rows) // self.part_users)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What determines the lists, for `Parts`."""
        artifacts, options = self.recommender.artifacts, self.options
        stages = stages_of(artifacts.run.folder)
        named = {name.replace("_", "-"): value for name, value in options.items() if name != "filter"}
        return {
            "version of CEMG": __version__,
            **{f"{name} of the run": stages[name].sha256 for name in STAGES if name in stages},
            "list of removed items": digest(self.recommender.removed),
            "users per batch": self.batch,
            "users per part": self.part_users,
            "--part": self.history_part,
            "--engine": self.recommender.engine,
            "--normalize": getattr(self.recommender.decoder, "normalize", None),
            **{f"--{name}": value for name, value in named.items()},
            "--only": digest(self.only),
            "--exclude": digest(self.exclude),
        }

    @property
    def made_on(self) -> dict[str, Any]:
        """What may change the last bits of a score from one machine to another."""
        return {
            "decoder": getattr(self.recommender.decoder, "path", self.recommender.engine),
            "device": torch.device(self.recommender.artifacts.device).type,
            "version of torch": torch.__version__,
            "instruction set": torch.backends.cpu.get_cpu_capability(),
        }

    def users_in(self, number: int) -> int:
        """The number of users of a part."""
        return len(self.rows[number * self.part_users : (number + 1) * self.part_users])

    def users_of(self, shard: Shard | None) -> int:
        """The number of users of a shard, or of all users."""
        return sum(map(self.users_in, (shard or WHOLE).parts(self.total)))

    def table(self, number: int) -> pa.Table:
        """Compute a part: one row per user and recommended item, best first."""
        start = number * self.part_users
        batches = range(start, min(start + self.part_users, len(self.rows)), self.batch)
        rows = [row for batch in batches for row in self._batch(batch)]
        columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
        return pa.table([pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)

    def _batch(self, start: int) -> Iterator[tuple[str, int, str, str, float]]:
        """Yield the rows of the users from position ``start`` on, as in SCHEMA."""
        batch, ids = slice(start, start + self.batch), self.data.item_ids
        histories = [[ids[item] for item in self.histories[row]] for row in self.rows[batch]]
        top = self.recommender.recommend(histories, **self.options)
        for user, own, titles, scores in zip(
            self.users[batch], top.ids, top.titles, top.scores.tolist(), strict=True
        ):
            for rank, (item, title, score) in enumerate(zip(own, titles, scores, strict=True), start=1):
                if item is not None:
                    yield self.data.user_ids[user], rank, str(item), title or "", score


def write_all(job: AllUsers, path: Path, *, shard: Shard | None = None) -> Path:
    """Write the recommendations of all users, or of a shard of them, and return the path of the file.

    An interrupted call keeps its finished parts, and the next one continues.

    Raises:
        UserError: Another process writes the file, or it has unfinished parts of another command.
    """
    parts = Parts(path, job.about, total=job.total, schema=SCHEMA, shard=shard, made_on=job.made_on)
    with parts:
        done = sum(map(job.users_in, parts.finished))
        users = job.users_of(shard)
        if done:
            console.print(f"{parts.path}: {done:,} of {users:,} users were computed before", highlight=False)
        with bar("recommend", total=users, done=done) as advance:
            for number in parts.missing:
                parts.write(number, job.table(number))
                command.set_interrupt_message("finished parts are kept; the same command continues")
                advance(job.users_in(number))
        parts.publish()
    return parts.path


def join_all(job: AllUsers, path: Path) -> Path:
    """Join the shards of ``path`` to the file that `write_all` writes without shards, and return ``path``.

    Raises:
        UserError: A shard is missing, damaged, or belongs to another run, version or command.
    """
    note = join(path, job.about, schema=SCHEMA)
    if note:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return path
