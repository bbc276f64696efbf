"""The file of an item memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cemg.errors import UserError
from cemg.memory.config import Constants, MemoryConfig
from cemg.memory.rows import Rows, check_rows
from cemg.storage.read import check_tensors, parse_json, read_tensor_file

MEMORY_FILE = "memory.safetensors"
FORMAT = 1  # of the file; increased when the meaning of a tensor changes


@dataclass(frozen=True, slots=True)
class About:
    """The header of the file."""

    format: int
    catalog: str
    catalog_items: int
    config: MemoryConfig
    constants: Constants
    added: str | None = None


def read_memory(folder: Path, *, fix: str) -> tuple[About, np.ndarray, dict[str, Rows]]:
    """Read the file that `Memory.save` wrote, by memory map.

    Args:
        folder: Its folder.
        fix: What an error suggests.

    Returns:
        The header, n of the module `cemg.memory.memory` [N] int64, and T and C by the names "transitions" and
        "similar"; there is no C for a catalog without texts.

    Raises:
        DamagedError: The file is missing or damaged.
        UserError: The file has a format that this version does not read.
    """
    path = folder / MEMORY_FILE
    tensors, metadata = read_tensor_file(path, finite=False, fix=fix)
    record = parse_json(metadata.get("memory", ""), dict[str, Any], name=f"the header of {path}", fix=fix)
    if record.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {record.get('format')!r:.80}; this version reads format {FORMAT!r}",
            fix="build the memory again: cemg-train --run RUN",
        )
    about = parse_json(json.dumps(record), About, name=f"the header of {path}", fix=fix)
    names = ("transitions", "similar") if "similar.items" in tensors else ("transitions",)
    spec: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {"counts": (torch.int64, ("N",))}
    for name in names:
        spec[f"{name}.starts"] = (
            torch.int64,
            (len(tensors["counts"]) + 1 if "counts" in tensors else 1,),
        )
        spec[f"{name}.items"] = (torch.int32, (name,))
        spec[f"{name}.values"] = (torch.float32, (name,))
    check_tensors(path, tensors, spec, fix=fix)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    rows = {
        name: Rows(*(arrays[f"{name}.{part}"] for part in ("starts", "items", "values"))) for name in names
    }
    for name, matrix in rows.items():
        check_rows(path, name, matrix, fix=fix)
    return about, arrays["counts"], rows
