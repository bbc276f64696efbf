"""The readers of artifacts return valid content and raise an error for any other."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
import torch
from pydantic import ConfigDict
from safetensors.torch import save_file

from cemg.errors import DamagedError, UserError
from cemg.storage.read import (
    STRICT,
    check_signature,
    file_digest,
    read_json,
    read_parquet,
    read_tensors,
    signed,
    tensors_digest,
)


@dataclass(frozen=True)
class Shape:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    levels: int
    names: tuple[str, ...] = ()
    share: float = 0.5


GOOD = {"levels": 3, "names": ["a", "b"], "share": 1}


def test_a_json_file_is_read_as_its_dataclass(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read_json(tmp_path / "a.json", Shape) == Shape(3, ("a", "b"), 1.0)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"3", b'"x"', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"levels": "3"}', b'{"levels": 3.5}', b'{"levels": true}', b'{"levels": 3, "more": 1}', b"{}",
        b'{"levels": 3, "share": NaN}', b'{"levels": 3, "share": Infinity}', b"9" * 5000,
        b'{"levels": ' + b"9" * 5000 + b"}x",
        b'{"levels": 3, "names": "ab"}', b'{"levels": 3, "names": [1]}',
    ],
)  # fmt: skip
def test_any_other_json_is_refused_with_the_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedError) as error:
        read_json(tmp_path / "a.json", Shape)
    assert str(tmp_path / "a.json") in error.value.message and error.value.fix
    assert len(str(error.value)) < 1000


def in_place_of(path: Path, what: str) -> None:
    match what:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a dangling link":
            path.symlink_to("nowhere")
        case "below a file":
            path.parent.rmdir()
            path.parent.write_text("x")


READERS = {
    "json": lambda path: read_json(path, Shape),
    "tensors": read_tensors,
    "parquet": lambda path: read_parquet(path, {"a": pl.Int32}),
    "digest": file_digest,
}


@pytest.mark.parametrize("what", ["nothing", "a folder", "a pipe", "a dangling link", "below a file"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_path_that_is_not_a_file(tmp_path: Path, what: str, reader: str) -> None:
    path = tmp_path / "folder" / "x"
    path.parent.mkdir()
    in_place_of(path, what)
    with pytest.raises(DamagedError, match=r"is missing|instead of a file"):
        READERS[reader](path)


def test_a_file_that_the_system_cannot_open_is_not_reported_as_damaged(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.json").write_text("{}")

    def refused(*_: Any, **__: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match=r"a\.json cannot be read: Permission denied") as error:
        read_json(tmp_path / "a.json", Shape)
    assert not isinstance(error.value, DamagedError)


TENSORS = {"codes": torch.arange(6).reshape(3, 2), "mean": torch.ones(2)}
SPEC: dict[str, Any] = {"codes": (torch.int64, ("N", "M")), "mean": (torch.float32, ("M",))}


def test_tensors_are_read_with_their_dtypes_and_shapes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors", SPEC)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"mean": torch.ones(3)}, r"mean is torch.float32 \[3\], not torch.float32 \[2\]"),
        ({"mean": torch.ones(2, 1)}, r"mean is torch.float32 \[2, 1\]"),
        ({"mean": torch.ones(2).double()}, "mean is torch.float64"),
        ({"codes": torch.arange(6)}, r"codes is torch.int64 \[6\], not torch.int64 \[N, M\]"),
        ({"more": torch.ones(1)}, "'more' is not expected"),
        ({"mean": torch.tensor([1.0, float("nan")])}, "mean has values that are not finite"),
        ({"mean": torch.tensor([float("inf"), 1.0])}, "mean has values that are not finite"),
    ],
)
def test_tensors_with_a_wrong_name_dtype_or_shape_are_refused(
    tmp_path: Path, changed: Any, said: str
) -> None:
    save_file(TENSORS | changed, tmp_path / "a.safetensors")
    with pytest.raises(DamagedError, match=said):
        read_tensors(tmp_path / "a.safetensors", SPEC)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_file({"mean": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(DamagedError, match="'codes' is missing"):
        read_tensors(tmp_path / "a.safetensors", SPEC)


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, cut: int) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:cut])
    with pytest.raises(DamagedError, match="is not a valid safetensors file"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.parquet is not a valid Parquet file"):
        read_parquet(tmp_path / "a.parquet", {"a": pl.Int32})


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DamagedError, match="its columns are a Int64, not a Int32"):
        read_parquet(tmp_path / "a.parquet", {"a": pl.Int32})


def test_a_polars_panic_is_reported_as_an_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")

    def panics(*_: Any, **__: Any) -> None:
        raise pl.exceptions.PanicException("index out of bounds")

    monkeypatch.setattr(pl, "read_parquet", panics)
    with pytest.raises(DamagedError, match="index out of bounds"):
        read_parquet(tmp_path / "a.parquet", {})


def test_a_signature_is_valid_for_its_record_only() -> None:
    record = signed({"a": [1, 2.5], "b": {"c": None}})
    check_signature(json.loads(json.dumps(record)), name="r")
    for change in ({"a": [1, 2.25]}, {"d": 1}, {"sha256": "0"}):
        with pytest.raises(DamagedError, match="r is damaged"):
            check_signature(record | change, name="r")


def test_a_digest_of_tensors_depends_on_names_dtypes_shapes_and_values() -> None:
    digests = {
        tensors_digest({"a": torch.zeros(2)}), tensors_digest({"b": torch.zeros(2)}),
        tensors_digest({"a": torch.zeros(1, 2)}), tensors_digest({"a": torch.zeros(2, dtype=torch.int32)}),
        tensors_digest({"a": torch.tensor([0.0, -0.0])}), tensors_digest({"a": torch.zeros(2)}, "about"),
        tensors_digest({"a": torch.zeros(())}),
    }  # fmt: skip
    assert len(digests) == 7


def test_a_file_is_hashed_again_only_after_it_changes(tmp_path: Path, monkeypatch) -> None:
    import hashlib

    path, calls = tmp_path / "a", []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: calls.append(1) or real(*a))
    path.write_bytes(b"one")
    first = file_digest(path)
    assert file_digest(path) == first and len(calls) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_digest(path) != first and len(calls) == 2
