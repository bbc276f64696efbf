"""Catalog files: a saved catalog loads unchanged, and changes to its files are detected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cemg.errors import UserError
from cemg.tokenizer import Catalog

CODES = torch.tensor([[0, 1, 2], [0, 1, 3], [2, 0, 0], [3, 3, 3]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Catalog.from_codes(CODES, 4, [4, 0, 9, 7]).save(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    about = json.loads((folder / "catalog.json").read_text())
    change(about)
    (folder / "catalog.json").write_text(json.dumps(about))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 4), size=st.integers(2, 6), named=st.booleans())
def test_every_tuple_of_any_catalog_maps_back_to_its_item_and_no_other_tuple_does(seed, levels, size, named):
    generator = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*[torch.arange(size)] * levels).reshape(-1, levels)
    order = torch.randperm(len(every), generator=generator)
    count = (len(every) + 1) // 2
    ids: list[int] = torch.randperm(10 * count, generator=generator)[:count].tolist()
    names = [f"item {i}" for i in ids] if named else ids
    catalog = Catalog.from_codes(every[order[:count]], size, names)
    found = catalog.trie.items(catalog.trie.lookup(catalog.codes))
    assert catalog.ids_of(found[None])[0] == names
    others = catalog.trie.items(catalog.trie.lookup(every[order[count:]]))
    assert catalog.ids_of(others[None])[0] == [None] * (len(every) - count)


@pytest.mark.parametrize("ids", [[4, 0, 9, 7], ["b", "a", "ü", "4"]])
def test_a_catalog_comes_back_with_ids_of_the_same_kind(tmp_path: Path, ids: list):
    Catalog.from_codes(CODES.to(torch.uint8), 4, ids).save(tmp_path)
    again = Catalog.load(tmp_path)
    assert again.item_ids == ids and torch.equal(again.codes, CODES) and again.codebook_size == 4
    assert again.rows_of([ids[2], ids[0]]) == [2, 0]


def test_numpy_ids_are_saved_as_plain_integers(tmp_path: Path):
    Catalog.from_codes(CODES, 4, np.array([4, 0, 9, 7])).save(tmp_path)
    assert Catalog.load(tmp_path).item_ids == [4, 0, 9, 7]


def test_the_catalog_of_some_items_can_be_saved(tmp_path: Path):
    Catalog.from_codes(CODES, 4).first(2).save(tmp_path)
    assert torch.equal(Catalog.load(tmp_path).codes, CODES[:2])


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("codebook_size"),
        lambda about: about.pop("item_ids"),
        lambda about: about.update(item_ids=4),
        lambda about: about.update(item_ids=[4, 0, 9]),
        lambda about: about.update(item_ids=[4, 0, 9, 9]),
        lambda about: about.update(item_ids=[4, 0, "9", 7]),
        lambda about: about.update(codebook_size=2),
        lambda about: about.update(codebook_size="4"),
        lambda about: about.update(codebook_size=None),
    ],
)
def test_an_invalid_catalog_json_is_refused_with_its_folder(folder: Path, change):
    rewrite(folder, change)
    with pytest.raises(UserError, match="has no readable catalog") as caught:
        Catalog.load(folder)
    assert str(folder) in caught.value.message and caught.value.cause and caught.value.fix


@pytest.mark.parametrize("text", ["", "[]", "4", "null", '{"codebook_size": 4', "\x00"])
def test_a_catalog_json_of_another_shape_is_refused(folder: Path, text: str):
    (folder / "catalog.json").write_text(text)
    with pytest.raises(UserError, match="has no readable catalog"):
        Catalog.load(folder)


@pytest.mark.parametrize("tensor", [CODES.float(), CODES[:, 0].contiguous(), CODES[:3], CODES - 1, CODES * 0])
def test_invalid_codes_are_refused_on_loading(folder: Path, tensor: torch.Tensor):
    save_file({"codes": tensor.contiguous()}, folder / "catalog.safetensors")
    with pytest.raises(UserError, match="has no readable catalog"):
        Catalog.load(folder)


def test_a_safetensors_file_without_codes_is_refused(folder: Path):
    save_file({"other": CODES}, folder / "catalog.safetensors")
    with pytest.raises(UserError, match="'codes' is missing"):
        Catalog.load(folder)


def test_a_folder_without_a_catalog_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="has no readable catalog"):
        Catalog.load(tmp_path / "nowhere")


@settings(max_examples=60, deadline=None)
@given(
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    name=st.sampled_from(["json", "safetensors"]),
)
def test_one_flipped_bit_is_refused_or_changes_nothing(tmp_path_factory, place: float, bit: int, name: str):
    folder = tmp_path_factory.mktemp("flipped")
    Catalog.from_codes(CODES, 4, [4, 0, 9, 7]).save(folder)
    file = folder / f"catalog.{name}"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)
    try:
        again = Catalog.load(folder)
    except UserError as error:
        assert str(folder) in error.message and error.cause
    else:
        assert torch.equal(again.codes, CODES) and again.item_ids == [4, 0, 9, 7] and again.codebook_size == 4


def test_codes_of_one_catalog_beside_the_ids_of_another_are_refused(folder: Path):
    save_file({"codes": CODES.flip(0).contiguous()}, folder / "catalog.safetensors")
    with pytest.raises(UserError, match="has a damaged catalog"):
        Catalog.load(folder)


def test_adding_an_existing_id_or_semantic_id_is_refused():
    catalog = Catalog.from_codes(CODES, 4, ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="item id 'b' occurs more than once"):
        catalog.extended(torch.tensor([[1, 1, 1]]), ["b"])
    with pytest.raises(UserError, match="no catalog can be built from these codes"):
        catalog.extended(CODES[:1], ["e"])
    assert len(catalog) == 4


def test_ids_of_two_kinds_are_refused():
    with pytest.raises(UserError, match="all integers or all strings"):
        Catalog.from_codes(CODES, 4, [1, "b", 3, 4])


def test_negative_ids_are_refused_because_they_stand_for_no_item():
    with pytest.raises(UserError, match="no catalog can be built from these codes"):
        Catalog.from_codes(CODES, 4, [-1, 0, 1, 2])


def test_codes_without_a_level_are_refused():
    with pytest.raises(
        UserError, match=r"codes must be integers \[items, levels\], got torch.int64 \[3, 0\]"
    ):
        Catalog.from_codes(torch.empty(3, 0, dtype=torch.int64), 4)
