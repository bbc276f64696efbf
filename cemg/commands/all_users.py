"""``cemg-recommend --all-users``: recommendations for every user of a run, as one Parquet file.

Users are searched in batches of ``decoding.batch_size``, in the order of the data. A part of the file has a
fixed number of batches, so the lists do not depend on shards, interruptions or the order of the parts.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cemg.commands.items import allowed_items
from cemg.errors import UserError
from cemg.recommender import Recommender
from cemg.storage.manifest import stages_of
from cemg.storage.parts import WHOLE, Shard, describe_difference
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
        only: Ids of the items that may be recommended; None for all.
        exclude: Ids of items that may not.
        part_users: Number of users per part; None for the default.
    """

    schema = SCHEMA

    def __init__(
        self, recommender: Recommender, *, part: str, options: Mapping[str, Any],
        only: list[str] | None = None, exclude: list[str] | None = None, part_users: int | None = None,
    ) -> None:  # fmt: skip
        self.recommender, self.history_part, self.options = recommender, part, dict(options)
        self.only, self.exclude = only or [], exclude or []
        if self.only or self.exclude:
            self.options["filter"] = allowed_items(recommender, self.only, self.exclude)
        self.batch = recommender.artifacts.config.decoding.batch_size
        self.part_users = part_users or self.batch * max(1, PART_USERS // self.batch)
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

    def size_of(self, number: int) -> int:
        """Number of users of a part."""
        return len(self.rows[number * self.part_users : (number + 1) * self.part_users])

    def users_of(self, shard: Shard | None) -> int:
        """Number of users of a shard; None for all."""
        return sum(map(self.size_of, (shard or WHOLE).parts(self.total)))

    def table(self, number: int) -> pa.Table:
        """Compute a part: one row per user and recommended item, best first."""
        start = number * self.part_users
        batches = range(start, min(start + self.part_users, len(self.rows)), self.batch)
        rows = [row for batch in batches for row in self._batch(batch)]
        columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
        return pa.table([pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)

    def payload(self, number: int) -> int:
        """The number of a part, which is all that a worker needs."""
        return number

    def worker(self) -> Callable[[], Callable[[int], pa.Table]]:
        """Open the same run in another process."""
        artifacts = self.recommender.artifacts
        opened = {
            "folder": artifacts.run.folder.resolve(), "device": artifacts.device,
            "normalize": getattr(self.recommender.decoder, "normalize", None),
            "engine": self.recommender.engine, "verify": artifacts.verify,
        }  # fmt: skip
        options = {name: value for name, value in self.options.items() if name != "filter"}
        return partial(
            _open_worker, opened, self.about, part=self.history_part, options=options, only=self.only,
            exclude=self.exclude, part_users=self.part_users,
        )  # fmt: skip

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


def _open_worker(
    opened: Mapping[str, Any], about: Mapping[str, Any], **work: Any
) -> Callable[[int], pa.Table]:
    """Open the run of `AllUsers.worker`. Raises UserError if its files differ from those of the command."""
    recommender = Recommender.from_run(**opened)
    here = AllUsers(recommender, **work)
    difference = describe_difference(here.about, about)
    if difference:
        raise UserError(
            f"{opened['folder']} on {socket.gethostname()} is another run than that of the command",
            cause=difference, fix="use a folder that all machines share, or copy the run to each of them",
        )  # fmt: skip
    return here.table
