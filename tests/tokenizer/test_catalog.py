"""The catalog: every tuple maps back to its item, files are checked, ids keep their kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cemg.errors import UserError
from cemg.tokenizer import Catalog

CODES = torch.tensor([[0, 1, 2], [0, 1, 3], [2, 0, 0], [3, 3, 3]])


@pytest.mark.parametrize("ids", [None, [10, 7, 99, 3], ["a", "b", "c", "d"]])
def test_every_tuple_maps_back_to_its_own_item(ids: list | None) -> None:
    catalog = Catalog.from_codes(CODES, 4, ids)
    found = catalog.trie.items(catalog.trie.lookup(CODES))
    assert catalog.ids_of(found[None])[0] == (ids or [0, 1, 2, 3])


def test_a_saved_catalog_comes_back_whole(tmp_path: Path) -> None:
    Catalog.from_codes(CODES, 4, ["a", "b", "c", "d"]).save(tmp_path)
    again = Catalog.load(tmp_path)
    assert (
        torch.equal(again.codes, CODES)
        and again.item_ids == ["a", "b", "c", "d"]
        and again.codebook_size == 4
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["catalog.json", "catalog.safetensors"]


@pytest.mark.parametrize("name", ["catalog.json", "catalog.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_a_truncated_file_is_refused_with_its_folder(tmp_path: Path, name: str, keep: float) -> None:
    Catalog.from_codes(CODES, 4).save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match="no readable catalog"):
        Catalog.load(tmp_path)


def test_two_items_with_one_semantic_id_are_refused() -> None:
    codes = torch.tensor([[0, 1], [3, 1], [0, 0], [3, 1], [3, 1]])
    with pytest.raises(UserError, match="no catalog can be built from these codes") as caught:
        Catalog.from_codes(codes, 4, ["a", "b", "c", "d", "e"])
    assert caught.value.cause == ("5 items have 3 different semantic IDs: items 'b' and 'd' both have [3, 1]")


@pytest.mark.parametrize("codes", [torch.tensor([[0, 4]]), torch.tensor([[-1, 0]])])
def test_a_code_outside_the_codebook_is_refused(codes: torch.Tensor) -> None:
    with pytest.raises(UserError, match="no catalog can be built from these codes"):
        Catalog.from_codes(codes, 4)


def test_there_must_be_one_unique_id_per_item() -> None:
    with pytest.raises(UserError, match="3 item ids for 4 rows"):
        Catalog.from_codes(CODES, 4, [1, 2, 3])
    with pytest.raises(UserError, match="item id 2 occurs more than once"):
        Catalog.from_codes(CODES, 4, [1, 2, 2, 3])


def test_float_codes_are_refused_with_their_shape() -> None:
    with pytest.raises(UserError, match=r"codes must be integers \[items, levels\]"):
        Catalog.from_codes(CODES.float(), 4)


def test_an_extended_catalog_keeps_what_it_had_and_gives_back_its_first_items() -> None:
    catalog = Catalog.from_codes(CODES, 4, ["a", "b", "c", "d"])
    larger = catalog.extended(torch.tensor([[1, 1, 1]]), ["e"])
    assert torch.equal(larger.codes[:4], CODES) and larger.item_ids == ["a", "b", "c", "d", "e"]
    assert torch.equal(larger.first(4).codes, CODES) and larger.first(4).item_ids == catalog.item_ids


def test_an_unknown_item_is_named() -> None:
    with pytest.raises(UserError, match="item 'x' is not in the catalog of 4 items"):
        Catalog.from_codes(CODES, 4, ["a", "b", "c", "d"]).rows_of(["a", "x"])


@pytest.mark.parametrize("counts", [[-1, 2], [float("nan"), 1.0], [0.5, 1.0], [1j, 2]])
def test_counts_are_integers_from_0_on(counts: list) -> None:
    with pytest.raises(UserError, match="counts must be integers from 0 on"):
        Catalog.from_codes([[0], [0]], 1, shared=True, counts=counts)
    found = Catalog.from_codes([[0], [0]], 1, shared=True, counts=[1.0, 2.0])  # type: ignore[list-item]
    assert found.counts is not None and found.counts.tolist() == [1, 2]
