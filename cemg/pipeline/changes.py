"""What a training would change in a run, in words: the settings that differ, and what differs in the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cemg.config import RunConfig
from cemg.data import Dataset
from cemg.errors import UserError
from cemg.features.vision import read_image_file
from cemg.settings import flat
from cemg.storage import files
from cemg.storage.read import digest, read_json

UNTRAINED = ("generator.checkpoint_seconds", "decoding.beams", "decoding.batch_size")  # which train nothing
IMAGES = "images.json"  # in the stage of the data: sha256 of each item's picture, or null
HASHES = ".image-hashes.json"  # in a run's folder: path to size, time, inode and sha256


def settings_changed(old: RunConfig, new: RunConfig) -> list[str]:
    """``seed: 0 → 3`` for each setting that decides what is trained and differs.

    Where a dataset was read from is not compared: its content is. The synthetic set is its own source.
    """
    before, after = flat(old.to_dict()), flat(new.to_dict())
    names = [n for n in before | after if before.get(n) != after.get(n) and n not in UNTRAINED]
    if old.data.path or new.data.path:
        names = [n for n in names if not n.startswith("data.")]
    said = [f"{n}: {_shown(before.get(n))} → {_shown(after.get(n))}" for n in names]
    if bool(old.data.path) != bool(new.data.path):
        sources = (config.data.path or "the synthetic set" for config in (old, new))
        said.insert(0, f"data: {' → '.join(sources)}")
    return said


def _shown(value: object) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def data_changed(
    old: Dataset, new: Dataset, *, old_images: Sequence[str | None], new_images: Sequence[str | None]
) -> list[str]:
    """What differs between two datasets; ``old_images`` and ``new_images`` are the sha256 of each item's."""
    said = [f"data: {old.name} → {new.name}"] if old.name != new.name else []
    for what, ids, new_ids in (("user", old.user_ids, new.user_ids), ("item", old.item_ids, new.item_ids)):
        gone, come = len(set(ids) - set(new_ids)), len(set(new_ids) - set(ids))
        if gone or come:
            parts = [f"{count} {verb}" for count, verb in ((come, "added"), (gone, "removed")) if count]
            said.append(f"data: of {len(ids)} {what}s, {' and '.join(parts)}")
    said += _differences("users' histories", _histories(old), _histories(new))
    for what, before, after in (("titles", old.titles, new.titles), ("texts", old.texts, new.texts)):
        said += _differences(what, _by_item(old, before), _by_item(new, after))
    said += _differences("images", _by_item(old, old_images), _by_item(new, new_images))
    if old.tie_rule != new.tie_rule:
        said.append(f"data: order of equal times: {old.tie_rule} → {new.tie_rule}")
    return said or ["data: the order of users or items changed"]


def _by_item(data: Dataset, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(data.item_ids, values, strict=True))


def _histories(data: Dataset) -> dict[str, list[str]]:
    ids = np.array(data.item_ids, dtype=object)
    return {user: ids[rows].tolist() for user, rows in zip(data.user_ids, data.sequences, strict=True)}


def _differences(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Of those on both sides, how many differ."""
    both = before.keys() & after.keys()
    differ = [name for name in both if before[name] != after[name]]
    if not differ:
        return []
    gone = sum(after[name] is None for name in differ)
    missing = f", {gone} of them missing now" if gone else ""
    return [f"data: {len(differ)} of {len(before)} {what} changed{missing}"]


def image_digests(images: Sequence[Path | None], folder: Path) -> list[str | None]:
    """sha256 of each picture, None where there is none.

    ``folder`` (a run's) keeps the hashes with size, time and inode, so that an unchanged picture is not read
    again.
    """
    known: dict[str, list[Any]] = _read_hashes(folder / HASHES)
    fresh: dict[str, list[Any]] = {}
    for path in images:
        if path is None or not path.is_file():
            continue
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = known.get(str(path))
        sha = entry[3] if entry is not None and entry[:3] == stamp else _picture_digest(path)
        fresh[str(path)] = [*stamp, sha]
    if fresh != known:
        files.write_json(folder / HASHES, {"pictures": fresh, "sha256": digest(fresh)}, indent=None)
    return [fresh[str(path)][3] if path is not None and str(path) in fresh else None for path in images]


def _picture_digest(path: Path) -> str:
    """sha256 of a picture that can be used; for any other, which is masked later, why it cannot."""
    try:
        return hashlib.sha256(read_image_file(path)).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except UserError as error:
        return str(error)


def _read_hashes(path: Path) -> dict[str, list[Any]]:
    """What an earlier call kept; nothing where that is missing or damaged: the pictures are read again."""
    try:
        record = read_json(path, dict[str, Any])
        entries, sha = record["pictures"], record["sha256"]
    except (UserError, KeyError):
        return {}
    return dict(entries) if sha == digest(entries) else {}


def content_digest(data: Dataset, images: Sequence[str | None]) -> str:
    """sha256 of all that a run learns from: interactions, ids, titles, texts and pictures."""
    sequences = [s.tolist() for s in data.sequences]
    return digest(
        [data.name, data.user_ids, data.item_ids, sequences, data.titles, data.texts, list(images),
         data.tie_rule]
    )  # fmt: skip
