"""Trie files: saved tries load, everything else is rejected, nothing crashes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cemg_kernels import Trie
from cemg_kernels.trie.arrays import TrieArrays, problem_reference, verify
from cemg_kernels.trie.file import FORMAT, ids_problem
from cemg_kernels.trie.packed import pack, unpack


def make_trie(num_items: int = 30, *, ids: bool = True) -> Trie:
    codes = torch.cartesian_prod(*[torch.arange(4)] * 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:num_items]
    return Trie.from_codes(codes[order], 4, torch.arange(num_items) * 7 if ids else None)


@pytest.mark.parametrize("ids", [True, False])
def test_a_saved_trie_loads_unchanged(backend, tmp_path: Path, ids):
    trie, path = make_trie(ids=ids), tmp_path / "trie.safetensors"
    trie.save(path)
    loaded = Trie.load(path)
    for name in ("code", "first_child", "rows"):
        assert torch.equal(getattr(loaded.arrays, name), getattr(trie.arrays, name))
    assert torch.equal(loaded.ids_by_rank, trie.ids_by_rank)
    assert loaded.fingerprint == trie.fingerprint
    assert (loaded.nbytes, loaded.id_nbytes) == (trie.nbytes, trie.id_nbytes)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list its mappings")
def test_a_loaded_trie_uses_the_mapped_file(tmp_path: Path):
    path = tmp_path / "trie.safetensors"
    make_trie().save(path)
    trie = Trie.load(path)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    mapped = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for tensor in (trie.arrays.code, trie.arrays.first_child, trie.arrays.rows, trie.ids_by_rank):
        assert any(begin <= tensor.data_ptr() < end for begin, end in mapped)


def test_overwriting_a_mapped_file_leaves_the_loaded_trie_intact(tmp_path: Path):
    path = tmp_path / "trie.safetensors"
    make_trie(64).save(path)
    old = Trie.load(path)
    make_trie(1).save(path)
    assert old.fingerprint == make_trie(64).fingerprint
    assert torch.equal(old.arrays.code, make_trie(64).arrays.code)
    assert Trie.load(path).num_items == 1


def test_a_missing_file_or_another_format_is_rejected(tmp_path: Path):
    with pytest.raises(ValueError, match="is missing"):
        Trie.load(tmp_path / "none")
    (tmp_path / "text").write_text("no trie")
    with pytest.raises(ValueError, match="is not a trie file"):
        Trie.load(tmp_path / "text")
    save_file({"code": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=f"format is None, this version reads {FORMAT}"):
        Trie.load(tmp_path / "other")


@pytest.mark.parametrize("name", ["code", "first_child", "rows", "ids"])
def test_a_file_with_a_missing_or_changed_part_is_rejected(backend, tmp_path: Path, name: str):
    path = tmp_path / "trie.safetensors"
    make_trie().save(path)
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata=header["__metadata__"])
    with pytest.raises(ValueError, match="is not a"):
        Trie.load(path)
    save_file(tensors | {"more": torch.zeros(1)}, path, metadata=header["__metadata__"])
    with pytest.raises(ValueError, match="it contains"):
        Trie.load(path)
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, path, metadata=header["__metadata__"])
    with pytest.raises(ValueError, match="is not a valid trie"):
        Trie.load(path)


def broken_arrays(draw: random.Random) -> TrieArrays:
    """Returns the arrays of a trie with up to three wrong entries, levels or codebook size; or all valid."""
    good = make_trie(draw.choice([1, 2, 30, 64])).arrays
    code, packed, rows = good.code.clone(), good.first_child.clone(), good.rows.clone()
    first = unpack(packed, good.num_inner + 1)
    for _ in range(draw.randrange(4)):
        tensor = draw.choice([code, first, rows, packed])
        tensor[draw.randrange(len(tensor))] = draw.choice([0, 1, 2, 3, 4, len(tensor), draw.randrange(99)])
    first[0 if draw.random() < 0.02 else -1] += draw.choice([0, 0, 0, 1])
    if draw.random() < 0.8 and bool((first.diff() > 0).all()):
        packed = pack(first)  # ascending, but changed
    levels, size = draw.choice([3] * 8 + [1, 2, 4, 200]), draw.choice([4] * 8 + [3, 2, 5])
    short = draw.choice([0] * 8 + [1])
    return TrieArrays(code[short:], packed, rows, levels, size)


def test_the_native_check_of_arrays_equals_the_reference():
    draw, verdicts = random.Random(0), []
    for _ in range(1500):
        arrays = broken_arrays(draw)
        verdicts.append(bool(problem_reference(arrays)))
        assert bool(verify(arrays)) == verdicts[-1], (verify(arrays), problem_reference(arrays), arrays)
    assert 300 < sum(verdicts) < 1400  # some valid, some invalid


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 5, 5], "contain 5 twice"),
        ([3, -1, 4], "contain -1"),
        ([10**15, 7, 10**15], f"contain {10**15} twice"),  # too far apart for a bitmap
        ([10**15, 7, 0], ""),
        ([2, 1, 0], ""),
        ([1, 2], r"\[2\]"),
    ],
)
def test_invalid_ids_are_detected(backend, ids, message):
    problem = ids_problem(torch.tensor(ids), 3)
    assert message.replace("\\", "") in problem and bool(problem) == bool(message)


def flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] = draw.randrange(256)


def flip_header(data: bytearray, draw: random.Random) -> None:
    length = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
    if length == 0:
        return
    data[8 + draw.randrange(length)] = draw.choice(b'0123456789"{}[]:,-aIFU ')


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def extend(data: bytearray, draw: random.Random) -> None:
    data += bytes(draw.randrange(256) for _ in range(draw.randrange(1, 50)))


def drop(data: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(data))
    del data[begin : begin + draw.randrange(1, 9)]


def swap(data: bytearray, draw: random.Random) -> None:
    a, b = (draw.randrange(len(data) - 8) for _ in range(2))
    data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]


def blank(data: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.randrange(1, 64))
    data[begin:end] = bytes([draw.choice([0, 255])]) * (end - begin)


def relength(data: bytearray, draw: random.Random) -> None:
    data[:8] = struct.pack("<Q", draw.choice([0, 1, len(data), 2**63, draw.randrange(1000)]))


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    flip, flip, flip_header, flip_header, cut, extend, drop, swap, blank, relength,
]  # fmt: skip


def mutate_and_load(folder: Path, count: int) -> int:
    """Loads ``count`` mutated files; returns how many were rejected. All others must equal the saved trie."""
    draw, refused = random.Random(count), 0
    originals = []
    for ids in (True, False):
        trie = make_trie(ids=ids)
        trie.save(folder / "good")
        originals.append((trie, (folder / "good").read_bytes()))
    for index in range(count):
        trie, good = originals[index % 2]
        bad, path = bytearray(good), folder / f"bad{index % 7}"
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            if len(bad) > 16:
                draw.choice(MUTATIONS)(bad, draw)
        path.write_bytes(bad)
        try:
            loaded = Trie.load(path)
        except ValueError as error:
            assert str(path) in str(error) and "write it again" in str(error)
            refused += 1
        else:
            assert loaded.fingerprint == trie.fingerprint
            assert torch.equal(loaded.mask(torch.arange(70)), trie.mask(torch.arange(70)))
            assert torch.equal(loaded.ids_by_rank, trie.ids_by_rank)
        path.unlink()
    return refused


def test_mutated_files_are_rejected(tmp_path: Path):
    assert mutate_and_load(tmp_path, 300) > 270


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_rejected(tmp_path: Path):
    refused = mutate_and_load(tmp_path, 10_000)
    print(f"{refused} of 10000 mutated files refused, the others held the trie unchanged")
    assert refused > 9_000
