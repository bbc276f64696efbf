"""The feature cache: rows are read back, damaged files are ignored, an interruption loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cemg.errors import UserError
from cemg.features import FeatureCache
from cemg.features.encoding import content_key, encode_rows

KEYS = [content_key("model", text.encode()) for text in "abcdefgh"]
VALUES = torch.arange(32, dtype=torch.float32).reshape(8, 4) / 7  # [8, 4]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def store(folder: Path, *, shard_rows: int = 3) -> None:
    shelf = FeatureCache(folder, shard_rows=shard_rows).shelf("model")
    for key, value in zip(KEYS, VALUES, strict=True):
        shelf.add({key: value})
    shelf.flush()


def test_stored_rows_are_read_back_bit_for_bit_from_several_shards(tmp_path: Path):
    store(tmp_path)
    cache = FeatureCache(tmp_path)
    stored = cache.shelf("model").find(KEYS)
    assert len(shards(tmp_path)) == 3  # 3 + 3 + 2 rows
    assert torch.equal(torch.stack([stored[key] for key in KEYS]), VALUES)
    assert (cache.hits, cache.misses) == (8, 0)


def test_rows_of_another_model_are_not_found(tmp_path: Path):
    store(tmp_path)
    cache = FeatureCache(tmp_path)
    assert cache.shelf("another").find(KEYS) == {}
    assert cache.misses == 8


@pytest.mark.parametrize("damage", ["torn", "one bit", "empty", "not ours"])
def test_a_damaged_shard_is_ignored_with_a_warning(tmp_path: Path, damage: str):
    store(tmp_path, shard_rows=4)
    victim = shards(tmp_path)[0]
    content = victim.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    victim.write_bytes({"torn": content[:-9], "one bit": flipped, "empty": b"", "not ours": b"hello"}[damage])
    with pytest.warns(UserWarning, match=f"{victim.name}.*damaged"):
        shelf = FeatureCache(tmp_path).shelf("model")
    assert len(shelf.find(KEYS)) == 4


def test_an_unfinished_file_is_not_read(tmp_path: Path):
    store(tmp_path, shard_rows=8)
    shard = shards(tmp_path)[0]
    shard.rename(shard.with_suffix(".123.part"))
    assert FeatureCache(tmp_path).shelf("model").find(KEYS) == {}


def test_an_interrupted_encoding_continues_where_it_stopped(tmp_path: Path):
    asked: list[int] = []

    def compute(rows: list[int], *, stop_after: int) -> Iterator[tuple[list[int], Tensor]]:
        for count, row in enumerate(rows):
            if count == stop_after:
                raise KeyboardInterrupt
            asked.append(row)
            yield [row], VALUES[row : row + 1]

    def run(stop_after: int):
        return encode_rows(
            KEYS,
            lambda rows: compute(rows, stop_after=stop_after),
            width=4,
            shelf=FeatureCache(tmp_path, shard_rows=2).shelf("model"),
            label="test",
            progress=False,
        )

    with pytest.raises(KeyboardInterrupt):
        run(stop_after=5)
    features = run(stop_after=99)
    assert asked == [0, 1, 2, 3, 4, 5, 6, 7]  # nothing twice
    assert torch.equal(features.values, VALUES)


def test_equal_contents_are_computed_once(tmp_path: Path):
    asked: list[int] = []

    def compute(rows: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        asked.extend(rows)
        yield rows, VALUES[rows]

    keys = [KEYS[0], None, KEYS[0], KEYS[1]]
    features = encode_rows(keys, compute, width=4, shelf=None, label="test", progress=False)
    assert asked == [0, 3]
    assert torch.equal(features.values[2], features.values[0])
    assert features.present.tolist() == [True, False, True, True]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="taken"):
        FeatureCache(tmp_path / "taken")
