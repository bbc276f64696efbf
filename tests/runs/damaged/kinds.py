"""Kinds of damage: each is a function of (path, rng, donors) that alters one file, or returns False.

``donors`` are other files that may come to stand in the file's place.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random, Sequence[Path]], bool | None]


def put(path: Path, content: bytes) -> None:
    """Replaces a file with a new one, so that hard links keep the old content."""
    path.unlink()
    path.write_bytes(content)


def truncated(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    content = path.read_bytes()
    put(path, content[: rng.randrange(max(len(content), 1))])


def emptied(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    put(path, b"")


def halved(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    content = path.read_bytes()
    put(path, content[: len(content) // 2])


def without_the_last_byte(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    put(path, path.read_bytes()[:-1])


def one_bit_flipped(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    content = bytearray(path.read_bytes())
    if not content:
        return False
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    put(path, bytes(content))
    return True


def bytes_overwritten(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    content = bytearray(path.read_bytes())
    if not content:
        return False
    start = rng.randrange(len(content))
    content[start : start + 16] = rng.randbytes(len(content[start : start + 16]))
    put(path, bytes(content))
    return True


def zeros_in_the_middle(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(len(content), 1))
    put(path, bytes(content[:start]) + bytes(len(content) - start))
    return bool(content)


def garbage_inserted(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    content = path.read_bytes()
    start = rng.randrange(len(content) + 1)
    put(path, content[:start] + rng.randbytes(rng.randrange(1, 40)) + content[start:])


def garbage_appended(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    put(path, path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def random_bytes(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    put(path, rng.randbytes(max(path.stat().st_size, 20)))


def another_file(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    others = [d for d in donors if d.suffix == path.suffix and d.read_bytes() != path.read_bytes()]
    if not others:
        return False
    put(path, rng.choice(others).read_bytes())
    return True


def deleted(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    path.unlink()


def a_folder(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_pipe(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    path.unlink()
    os.mkfifo(path)


def another_stage(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    """The whole folder, with its manifest, comes from another run."""
    shutil.rmtree(path)
    shutil.copytree(donors[0], path)


def stage_deleted(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    shutil.rmtree(path)


def deep_nesting(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    put(path, rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"[" * 60_000 + b"]" * 60_000]))


def another_type(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    put(path, rng.choice([b"[]", b"{}", b"null", b"3", b'"text"', b"[1, 2]", b"true", b"NaN", b"\xff\xfe"]))


def a_long_integer(path: Path, rng: random.Random, donors: Sequence[Path]) -> None:
    put(path, b"9" * 5000)


ODD_VALUES: tuple[Any, ...] = (None, [], {}, "x", -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), True)


def a_value_changed(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    """One value of a JSON file changes to a value of any type or an integer of 5,000 digits."""
    tree = _json(path)
    places = list(_places(tree))
    if not places:
        return False
    parent, key = rng.choice(places)
    parent[key] = rng.choice([value for value in (*ODD_VALUES, "BIG") if value != parent[key]])
    put(path, json.dumps(tree).replace('"BIG"', "9" * 5000).encode())
    return True


def a_name_changed(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    """One key of a JSON object is missing, renamed or added."""
    tree = _json(path)
    objects = [o for o in _objects(tree) if o]
    if not objects:
        return False
    chosen = rng.choice(objects)
    key = rng.choice(sorted(chosen))
    match rng.randrange(3):
        case 0:
            del chosen[key]
        case 1:
            chosen[f"{key}x"] = chosen.pop(key)
        case _:
            chosen["another"] = chosen[key]
    put(path, json.dumps(tree).encode())
    return True


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _places(tree: Any) -> Any:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield tree, key
        yield from _places(value)


def _objects(tree: Any) -> Any:
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _objects(value)


def tensors_changed(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    """A valid safetensors file with a tensor that is not finite, of another dtype or shape, or missing."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if not tensors:
        return False
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    flat = tensor.reshape(-1)
    twins = [
        k for k, t in tensors.items() if k != name and t.shape == tensor.shape and t.dtype == tensor.dtype
    ]
    match rng.randrange(9):
        case 0 if tensor.is_floating_point():
            tensors[name] = torch.full_like(tensor, rng.choice([float("nan"), float("inf"), -float("inf")]))
        case 1 if tensor.is_floating_point() and flat.numel():
            flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), 1e30])
        case 2:
            kinds = (torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8)
            tensors[name] = tensor.to(rng.choice([k for k in kinds if k != tensor.dtype]))
        case 3:
            tensors[name] = tensor.reshape(-1)[:-1].clone() if tensor.ndim < 2 else tensor.T.contiguous()
        case 4 if twins:
            other = rng.choice(twins)
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 5:
            del tensors[name]
        case 6:
            tensors[f"{name}x"] = tensors.pop(name)
        case 7 if tensor.ndim and len(tensor) > 1:
            tensors[name] = tensor.roll(1, 0)
        case _:
            tensors[name] = torch.zeros_like(tensor)[..., :0] if tensor.ndim else tensor + 1
    put(path, save(tensors, metadata if rng.random() < 0.9 else None))
    return True


def table_changed(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    """A valid Parquet file with another column, dtype, order, number or range of rows."""
    import polars as pl

    table = pl.read_parquet(path)
    column = rng.choice(table.columns)
    match rng.randrange(7):
        case 0:
            table = table.drop(column)
        case 1:
            table = table.rename({column: f"{column}x"})
        case 2:
            kind = pl.Int64 if table[column].dtype != pl.Int64 else pl.String
            table = table.with_columns(pl.col(column).cast(kind, strict=False))
        case 3:
            table = table.reverse()
        case 4:
            table = table.head(rng.randrange(table.height))
        case 5:
            table = table.with_columns(pl.lit(None, table[column].dtype).alias(column))
        case _:
            value = 10**6 if table[column].dtype.is_integer() else "x"
            table = table.with_columns(pl.lit(value, table[column].dtype).alias(column))
    put(path, b"")
    table.write_parquet(path)
    return True


def settings_changed(path: Path, rng: random.Random, donors: Sequence[Path]) -> bool:
    """A line of YAML is missing, has another value, or is followed by something odd."""
    lines = path.read_text().splitlines()
    row = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[row]
        case 1:
            lines[row] = (
                lines[row].split(":")[0] + ": " + rng.choice(["7", "x", "[1]", "-3", "null", "9" * 5000])
            )
        case 2:
            lines = lines[1:]
        case 3:
            lines = lines[:row]
        case _:
            lines.append(rng.choice(["a: &a [*a, *a]", "? [", "b: " + "[" * 3000, "seed: 5", "\t- x"]))
    put(path, "\n".join(lines).encode())
    return True


BYTES: tuple[Damage, ...] = (
    truncated, emptied, halved, without_the_last_byte, one_bit_flipped, one_bit_flipped, one_bit_flipped,
    bytes_overwritten, bytes_overwritten, zeros_in_the_middle, garbage_inserted, garbage_appended,
    random_bytes, another_file, another_file, deleted, a_folder, a_dangling_link, a_pipe,
)  # fmt: skip
TEXT: tuple[Damage, ...] = (deep_nesting, another_type, a_long_integer)
BY_SUFFIX: dict[str, tuple[Damage, ...]] = {
    ".json": (*TEXT, *(a_value_changed,) * 4, *(a_name_changed,) * 2),
    ".jsonl": TEXT,
    ".yaml": (*TEXT, *(settings_changed,) * 6),
    ".safetensors": (tensors_changed,) * 9,
    ".parquet": (table_changed,) * 6,
}


def kinds_for(path: Path) -> tuple[Damage, ...]:
    """The kinds of damage for a file. Common kinds occur several times."""
    return BYTES + BY_SUFFIX.get(path.suffix, ())


def copy_run(source: Path, target: Path) -> None:
    """Copies a folder with hard links, except for files that commands append to."""

    def link(one: str, other: str) -> None:
        if Path(one).suffix in (".jsonl", ".lock", ".0") or Path(one).name == ".lock":
            shutil.copy2(one, other)
        else:
            os.link(one, other)

    shutil.copytree(source, target, copy_function=link, symlinks=True)
