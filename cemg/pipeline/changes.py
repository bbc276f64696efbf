"""Descriptions of what a training would change in a run: settings and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cemg.config import RunConfig
from cemg.data import Dataset
from cemg.data.sequences import Sequences
from cemg.errors import UserError
from cemg.features.vision import read_image_file
from cemg.settings import flat
from cemg.storage import files
from cemg.storage.read import digest, read_json

UNTRAINED = (  # no effect on the weights
    "generator.checkpoint_seconds", "generator.gradient_checkpointing", "decoding.beams",
    "decoding.batch_size",
)  # fmt: skip
GATE = "gate."  # settings of the gate, which is fitted again in a minute and keeps the generator
IMAGES = "images.json"  # in the data stage: sha256 of each item's picture, or null
BLOCK = 1 << 16  # entries of a list that are JSON text at once
HASHES = ".image-hashes.json"  # in a run's folder: path to size, time, inode and sha256


def settings_changed(old: RunConfig, new: RunConfig) -> list[str]:
    """One line, like ``seed: 0 → 3``, per changed setting that affects training.

    The path of a data set is not compared, since its content is; for the synthetic set the settings are.
    """
    before, after = flat(old.to_dict()), flat(new.to_dict())
    names = [n for n in before | after if before.get(n) != after.get(n) and n not in UNTRAINED]
    names = [n for n in names if not n.startswith(GATE)]
    if old.data.path or new.data.path:
        names = [n for n in names if not n.startswith("data.")]
    changes = [f"{n}: {_shown(before.get(n))} → {_shown(after.get(n))}" for n in names]
    if bool(old.data.path) != bool(new.data.path):
        sources = (config.data.path or "the synthetic set" for config in (old, new))
        changes.insert(0, f"data: {' → '.join(sources)}")
    return changes


def _shown(value: object) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def data_changed(
    old: Dataset, new: Dataset, *, old_images: Sequence[str | None], new_images: Sequence[str | None]
) -> list[str]:
    """How two data sets differ. ``old_images`` and ``new_images``: sha256 of each item's picture."""
    changes = [f"data: {old.name} → {new.name}"] if old.name != new.name else []
    for kind, ids, new_ids in (("user", old.user_ids, new.user_ids), ("item", old.item_ids, new.item_ids)):
        removed, added = len(set(ids) - set(new_ids)), len(set(new_ids) - set(ids))
        if removed or added:
            parts = [f"{count} {verb}" for count, verb in ((added, "added"), (removed, "removed")) if count]
            changes.append(f"data: of {len(ids)} {kind}s, {' and '.join(parts)}")
    changes += _differences("users' histories", _histories(old), _histories(new))
    for field, before, after in (("titles", old.titles, new.titles), ("texts", old.texts, new.texts)):
        changes += _differences(field, _by_item(old, before), _by_item(new, after))
    changes += _differences("images", _by_item(old, old_images), _by_item(new, new_images))
    if (old.cuts is None) != (new.cuts is None):
        names = ["leave-one-out" if data.cuts is None else "in time" for data in (old, new)]
        changes.append(f"data: split {' → '.join(names)}")
    if old.tie_rule != new.tie_rule:
        changes.append(f"data: order of equal times: {old.tie_rule} → {new.tie_rule}")
    return changes or ["data: the order of users or items changed"]


def _by_item(data: Dataset, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(data.item_ids, values, strict=True))


def _histories(data: Dataset) -> dict[str, list[str]]:
    ids = np.array(data.item_ids, dtype=object)
    return {user: ids[rows].tolist() for user, rows in zip(data.user_ids, data.sequences, strict=True)}


def _differences(field: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How many of the entries on both sides differ."""
    both = before.keys() & after.keys()
    differ = [name for name in both if before[name] != after[name]]
    if not differ:
        return []
    lost = sum(after[name] is None for name in differ)
    missing = f", {lost} of them missing now" if lost else ""
    return [f"data: {len(differ)} of {len(before)} {field} changed{missing}"]


def image_digests(images: Sequence[Path | None], folder: Path) -> list[str | None]:
    """sha256 of each picture; None for an item without one.

    The hashes are kept in ``folder``, the folder of a run, with size, time and inode, so that unchanged
    pictures are not read again.
    """
    known: dict[str, list[Any]] = _read_hashes(folder / HASHES)
    current: dict[str, list[Any]] = {}
    for path in images:
        if path is None or not path.is_file():
            continue
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = known.get(str(path))
        sha = entry[3] if entry is not None and entry[:3] == stamp else _picture_digest(path)
        current[str(path)] = [*stamp, sha]
    if current != known:
        files.write_json(folder / HASHES, {"pictures": current, "sha256": digest(current)}, indent=None)
    return [current[str(path)][3] if path is not None and str(path) in current else None for path in images]


def _picture_digest(path: Path) -> str:
    """sha256 of a valid picture; for others, which are masked later, the reason."""
    try:
        return hashlib.sha256(read_image_file(path)).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except UserError as error:
        return str(error)


def _read_hashes(path: Path) -> dict[str, list[Any]]:
    """The hashes that an earlier call kept; {} if they are missing or damaged, so pictures are read again."""
    try:
        record = read_json(path, dict[str, Any])
        entries, sha = record["pictures"], record["sha256"]
    except (UserError, KeyError):
        return {}
    return dict(entries) if sha == digest(entries) else {}


def content_digest(data: Dataset, images: Sequence[str | None]) -> str:
    """sha256 of the training data: interactions, ids, titles, texts and pictures."""
    parts = [data.name, data.user_ids, data.item_ids, data.sequences, data.titles, data.texts, list(images),
             data.tie_rule, *([] if data.cuts is None else [data.cuts.tolist()])]  # fmt: skip
    sha = hashlib.sha256()
    for number, part in enumerate(parts):
        sha.update(b", " if number else b"[")
        for piece in _json_pieces(part):
            sha.update(piece.encode())
    sha.update(b"]")
    return sha.hexdigest()


def _json_pieces(value: Any) -> Iterator[str]:
    """The JSON text of a value; that of a list block by block, since it is large in a large data set."""
    if not isinstance(value, list | Sequences):
        yield json.dumps(value)
        return
    yield "["
    for low in range(0, len(value), BLOCK):
        entries = [e.tolist() if isinstance(e, np.ndarray) else e for e in value[low : low + BLOCK]]
        yield (", " if low else "") + json.dumps(entries)[1:-1]
    yield "]"
