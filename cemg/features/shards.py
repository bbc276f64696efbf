"""Features of items that several processes compute in shards, and one joins.

The distinct texts and images are encoded in the batches of `encode_texts` and `encode_images`, so the joined
features have the same bits as those of one process. A part of the table has a fixed number of batches.

N items, F feature width.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from cemg.errors import UserError
from cemg.features.cache import KEY_BYTES, FeatureCache
from cemg.features.encoding import first_rows
from cemg.features.text import TextConfig, TextEncoder
from cemg.features.vision import ImageConfig, ImageEncoder
from cemg.storage.parts import difference_of_machines, open_shards
from cemg.version import __version__

PART_ITEMS = 256  # texts or images of a part, as whole batches
SCHEMA = pa.schema(
    [
        ("encoder", pa.string()),  # "text" or "image"
        ("key", pa.binary(KEY_BYTES)),  # of the content, see `content_key`
        ("values", pa.list_(pa.float32())),  # the features [F]
    ]
)


Encoder = TextEncoder | ImageEncoder
Part = tuple[str, list[str], list[bytes]]  # "text" or "image", texts or paths, and their keys


class PartEncoder:
    """Encodes parts, in this process or in another one. An encoder is loaded when its first part comes.

    Args:
        configs: Settings of the encoders, by name.
        device: Device to compute on.
        check: Whether contents are compared with their keys: another machine may have other files.
    """

    def __init__(
        self, configs: Mapping[str, TextConfig | ImageConfig], *, device: str = "cpu", check: bool = False
    ) -> None:
        self.configs, self.device, self.check = dict(configs), device, check
        self.encoders: dict[str, Encoder] = {}

    def encoder(self, name: str) -> Encoder:
        """The encoder "text" or "image"."""
        if name not in self.encoders:
            config = self.configs[name]
            kind: Callable[..., Encoder] = TextEncoder if isinstance(config, TextConfig) else ImageEncoder
            self.encoders[name] = kind(config, device=self.device, dtype=torch.float32)
        return self.encoders[name]

    def __call__(self, part: Part) -> pa.Table:
        """Encode a part: one row per content, as in SCHEMA. Broken images have no row.

        Raises:
            UserError: A content, or the weights of the encoder, are other ones than in the plan.
        """
        name, contents, keys = part
        encoder, rows = self.encoder(name), list(range(len(contents)))
        if isinstance(encoder, TextEncoder):
            here = encoder.keys(contents) if self.check else keys
            batches = encoder.batches(contents, rows)
        else:
            here = encoder.keys(contents, {}) if self.check else keys
            batches = encoder.batches([(row, Path(contents[row])) for row in rows], {})
        other = next((row for row in rows if here[row] != keys[row]), None)
        if other is not None:
            raise UserError(
                f"{contents[other][:200]!r} or the {name} encoder on {socket.gethostname()} is missing, or "
                "another one than that of the command",
                fix="use a folder that all machines share, and the same models on each of them",
            )
        found = [(keys[row], v) for batch, values in batches for row, v in zip(batch, values, strict=True)]
        columns = [[name] * len(found), [key for key, _ in found], [values.numpy() for _, values in found]]
        return pa.table([pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


class FeatureWork:
    """The texts and images of N items, as parts to encode.

    Args:
        texts: N texts; None and blank texts have no features.
        images: N image files; None for an item without one.
        text: The text encoder. It is loaded only if there is a text, and the image encoder likewise.
        image: The image encoder.
        device: Device to compute on.

    Attributes:
        encode: The encoders.
        parts: "text" or "image", and the rows of each part.
    """

    schema = SCHEMA

    def __init__(
        self, texts: Sequence[str | None], images: Sequence[Path | str | None], *, text: TextConfig,
        image: ImageConfig, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.device, self.parts = device, list[tuple[str, list[int]]]()
        self.contents = {
            "text": [one or "" for one in texts],
            "image": ["" if path is None else str(Path(path).resolve()) for path in images],
        }
        self.keys: dict[str, list[bytes | None]] = {}
        given = {"text": any(one.strip() for one in self.contents["text"]), "image": any(images)}
        configs: dict[str, TextConfig | ImageConfig] = {"text": text, "image": image}
        self.encode = PartEncoder({name: configs[name] for name in configs if given[name]}, device=device)
        for name, config in self.encode.configs.items():
            encoder = self.encode.encoder(name)
            if isinstance(encoder, TextEncoder):
                self.keys[name] = encoder.keys(texts)
                rows = first_rows(self.keys[name])
                rows = encoder.in_order([self.contents[name][row] for row in rows], rows)
            else:
                self.keys[name] = encoder.keys(images, {})
                rows = first_rows(self.keys[name])
            size = config.batch_size * max(1, PART_ITEMS // config.batch_size)
            self.parts += [(name, rows[start : start + size]) for start in range(0, len(rows), size)]

    @property
    def about(self) -> dict[str, Any]:
        """What determines the features, for `Parts`."""
        content = hashlib.sha256()
        for name, keys in self.keys.items():
            content.update(name.encode() + b"".join(key or bytes(KEY_BYTES) for key in keys))
        names = self.encode.configs
        return {
            "version of CEMG": __version__,
            **{f"{name} encoder": asdict(self.encode.configs[name]) for name in names},
            **{f"{name} encoder's weights": self.encode.encoder(name).identity for name in names},
            "list of texts and images": content.hexdigest(),
            "items per part": PART_ITEMS,
        }

    @property
    def made_on(self) -> dict[str, Any]:
        """What may change the last bits of a feature from one machine to another."""
        return {
            "device": torch.device(self.device).type,
            "version of torch": torch.__version__,
            "instruction set": torch.backends.cpu.get_cpu_capability(),
        }

    @property
    def total(self) -> int:
        """Number of parts."""
        return len(self.parts)

    def size_of(self, number: int) -> int:
        """Number of distinct texts or images of a part."""
        return len(self.parts[number][1])

    def table(self, number: int) -> pa.Table:
        """Encode a part: one row per distinct content, as in SCHEMA. Broken images have no row."""
        return self.encode(self.payload(number))

    def payload(self, number: int) -> Part:
        """The contents of a part and their keys."""
        name, rows = self.parts[number]
        keys = [key for row in rows if (key := self.keys[name][row])]
        return name, [self.contents[name][row] for row in rows], keys

    def worker(self) -> Callable[[], PartEncoder]:
        """Load the same encoders in another process."""
        return partial(PartEncoder, self.encode.configs, device=self.device, check=True)


def load_shards(work: FeatureWork, out: Path, cache: FeatureCache) -> str | None:
    """Add the features in the shards of ``out`` to a cache. Rows that it has already are kept.

    Returns:
        A note if the shards were computed on machines of different kinds; None otherwise.

    Raises:
        UserError: A shard is missing, damaged, or belongs to other items, settings or another version.
    """
    shards = open_shards(out, work.about, schema=SCHEMA)
    shelves = {name: cache.shelf(work.encode.encoder(name).identity) for name in work.encode.configs}
    for shard in shards:
        for position, number in enumerate(shard.shard.parts(shard.total)):
            table, name = shard.table(position), work.parts[number][0]
            shelf, width = shelves[name], work.encode.encoder(name).width
            values = table["values"].combine_chunks().flatten().to_numpy().reshape(-1, width)  # [rows, F]
            rows = zip(table["key"].to_pylist(), torch.tensor(values), strict=True)
            shelf.add({key: row for key, row in rows if key not in shelf.rows})
    for shelf in shelves.values():
        shelf.flush()
    return difference_of_machines(shards)
