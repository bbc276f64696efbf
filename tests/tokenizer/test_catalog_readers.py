"""Catalogs from the files of LETTER, LC-Rec, MiniOneRec and GRID, and codes written for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from cemg.errors import UserError
from cemg.tokenizer import Catalog

INDEX = {
    "0": ["<a_197>", "<b_3>", "<c_250>"],
    "1": ["<a_9>", "<b_3>", "<c_0>"],
    "2": ["<a_10>", "<b_20>", "<c_0>"],
}


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return write(tmp_path, INDEX)


def write(folder: Path, value: Any) -> Path:
    path = folder / "Beauty.index.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_an_index_gives_codes_ids_and_one_size_per_level(index: Path) -> None:
    catalog = Catalog.read(index)
    assert catalog.item_ids == ["0", "1", "2"] and catalog.codebook_sizes == (198, 21, 251)
    assert catalog.codes.tolist() == [[197, 3, 250], [9, 3, 0], [10, 20, 0]]
    with pytest.raises(UserError, match="tokens of the codes are not known"):
        catalog.code_tokens()


def test_without_a_tokenizer_the_tokens_follow_the_sorted_names_in_use(index: Path) -> None:
    tokens = Catalog.read(index, code_token_start=100).code_tokens()
    # <a_10> <a_197> <a_9> <b_20> <b_3> <c_0> <c_250>
    assert tokens.of_codes(torch.tensor([[197, 3, 250], [9, 3, 0], [10, 20, 0]])).tolist() == [
        [101, 104, 106],
        [102, 104, 105],
        [100, 103, 105],
    ]
    assert int((tokens.table >= 0).sum()) == 7


def test_a_given_codebook_size_is_the_one_of_the_catalog(index: Path) -> None:
    catalog = Catalog.read(index, code_token_start=100, codebook_size=256)
    assert catalog.codebook_sizes == (256,) * 3
    assert torch.equal(
        catalog.code_tokens().of_codes(catalog.codes),
        Catalog.read(index, code_token_start=100).code_tokens().of_codes(catalog.codes),
    )
    with pytest.raises(UserError, match="no catalog can be built"):
        Catalog.read(index, codebook_size=100)


@pytest.mark.parametrize("option", [{"item": "sku"}, {"columns": ["a"]}])
def test_names_of_columns_are_refused_where_there_are_none(index: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is not a table"):
        Catalog.read(index, **option)


@pytest.mark.parametrize("form", ["<a_{}>", "<|sid_0_{}|>", "[A{}]", "{}", "a-{}"])
def test_tokens_of_any_form_have_their_last_number_as_their_code(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, {str(i): [form.format(code)] for i, code in enumerate((7, 10, 0))})
    catalog = Catalog.read(path, code_token_start=50)
    assert catalog.codes.flatten().tolist() == [7, 10, 0]
    ranks = {form.format(c): r for r, c in enumerate(sorted((7, 10, 0), key=lambda c: form.format(c)))}
    assert catalog.code_tokens().of_codes(catalog.codes).flatten().tolist() == [
        50 + ranks[form.format(code)] for code in (7, 10, 0)
    ]


def test_a_column_of_lists_has_one_code_per_level(tmp_path: Path) -> None:
    pl.DataFrame({"item": [5, 6], "codes": [[1, 2, 3], [4, 5, 6]]}).write_parquet(tmp_path / "x.parquet")
    catalog = Catalog.read(tmp_path / "x.parquet")
    assert catalog.codes.tolist() == [[1, 2, 3], [4, 5, 6]] and catalog.item_ids == ["5", "6"]
    pl.DataFrame({"item": [5, 6], "codes": [[1, 2, 3], [4, 5]]}).write_parquet(tmp_path / "y.parquet")
    with pytest.raises(UserError, match="all the same number"):
        Catalog.read(tmp_path / "y.parquet")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.index.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(INDEX).encode())
    assert len(Catalog.read(tmp_path / "x.index.json")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: not valid JSON"),
        ('{"0": ["<a_1>"],\n "1": ["<a_2>"', "line 2: not valid JSON"),
        ("[1, 2]", "expected a JSON object keyed by item ids, got \\[1, 2\\]"),
        ("{}", "has no item ids"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"0": ' + "9" * 5_000 + "}", "is not valid JSON"),
        ('{"0": ["<a_1>"], "0": ["<a_2>"]}', "the key '0' occurs more than once"),
        ({"0": 5}, "item '0': a list of tokens is needed, got 5"),
        ({"0": []}, "item '0': a list of tokens is needed"),
        ({"0": ["<a_1>"], "7": None}, "item '7': a list of tokens is needed, got None"),
        ({"0": ["<a_1>", "<b_1>"], "7": ["<a_1>"]}, "item '7': 1 tokens, but the first item has 2"),
        ({"0": ["<a_1>"], "7": ["<a>"]}, "item '7': '<a>' is not a token like <a_197>"),
        ({"0": ["<a_1>"], "7": ["a_1"]}, "item '7': token a_1 on level 0, whose other tokens are like <a_…>"),
        ({"0": ["<a_1>"], "7": ["<a_1|"]}, "item '7': token <a_1| on level 0"),
        ({"0": ["<a_1>"], "7": [12]}, "item '7': 12 is not a token"),
        ({"0": ["<a_1>"], "7": [["<a_1>"]]}, "item '7': .* is not a token"),
        (
            {"0": ["<a_1>", "<b_1>"], "7": ["<b_1>", "<a_1>"]},
            "item '7': token <b_1> on level 0, whose other tokens are like <a_…>",
        ),
        ({"0": ["<a_1>"], "7": ["<a_999999999>"]}, "a level has 32768 codes at most"),
        ({"0": ["<a_1>"], "7": ["<a_01>"]}, "two tokens of level 0 have the same number"),
        ({"0": ["<a_1>"], "7": ["<a_1>"]}, "no catalog can be built from these codes"),
        ({"": ["<a_1>"]}, "item id '' is empty"),
    ],
)
def test_a_malformed_index_is_refused_with_its_line_or_item(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        Catalog.read(path)
    assert str(path) in caught.value.message


def test_shared_ids_of_an_index_are_ordered_by_the_training_part_of_its_interactions(tmp_path: Path) -> None:
    path = write(tmp_path, {"0": ["<a_1>"], "1": ["<a_1>"], "2": ["<a_1>"], "3": ["<a_0>"]})
    with pytest.raises(UserError) as caught:
        Catalog.read(path)
    assert "shared=True" in str(caught.value.fix)
    (tmp_path / "Beauty.inter.json").write_text(json.dumps({"7": [2, 1, 0, 0], "8": ["2", 0, 0], "9": [3]}))
    catalog = Catalog.read(path, shared=True, interactions=tmp_path / "Beauty.inter.json")
    assert catalog.counts is not None and catalog.counts.tolist() == [0, 1, 2, 0]
    assert catalog.shared is not None and catalog.shared.members.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("name", ["codes.csv", "codes.parquet", "X.index.json"])
@pytest.mark.parametrize("ids", [None, ["a b", "c,d", 'e"f']])
def test_written_codes_are_read_again(tmp_path: Path, name: str, ids: list[str] | None) -> None:
    codes = torch.tensor([[0, 12, 3], [2, 0, 300], [2, 12, 3]])
    catalog = Catalog.from_codes(codes, 512, ids)
    catalog.write_codes(tmp_path / name)
    again = Catalog.read(tmp_path / name)
    assert torch.equal(again.codes, codes) and again.item_ids == [str(i) for i in catalog.item_ids]
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_codes_are_not_written_under_another_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"codes.xlsx is not a known format of codes"):
        Catalog.from_codes(torch.tensor([[0]]), 1).write_codes(tmp_path / "codes.xlsx")


def test_a_table_of_other_columns_is_read_by_their_names(tmp_path: Path) -> None:
    table = pl.DataFrame({"b": [1, 2], "sku": ["x", "y"], "a": [3, 3], "note": ["", ""]})
    table.write_parquet(tmp_path / "codes.parquet")
    catalog = Catalog.read(tmp_path / "codes.parquet", item="sku", columns=["a", "b"], codebook_size=4)
    assert catalog.codes.tolist() == [[3, 1], [3, 2]] and catalog.item_ids == ["x", "y"]
    with pytest.raises(UserError, match="has no column 'item'"):
        Catalog.read(tmp_path / "codes.parquet")
    with pytest.raises(UserError, match="row 1: note is ''"):
        Catalog.read(tmp_path / "codes.parquet", item="sku")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("item,code_0\n", "has no items"),
        ("item\n1\n", "has no columns of codes"),
        ("item,code_0\n1,x\n", "row 1: code_0 is 'x', and a code must be an integer"),
        ("item,code_0\n1,2\n2,\n", "row 2: code_0 is None"),
        ("item,code_0\n,2\n", "row 1: item is empty"),
        ("item,code_0\n1,-2\n", "no catalog can be built from these codes"),
        ("item,code_0\n1,99999999999\n", "codebook_size must be at most 32768"),
        ("item,code_0\n1,2\n1,3\n", "item id '1' occurs more than once"),
    ],
)
def test_a_malformed_table_is_refused_with_its_row(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "codes.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Catalog.read(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "columns",
    [
        {"item": ["a"], "code_0": [{"x": 1}]}, {"item": ["a"], "codes": [[[1], [2]]]},
        {"item": [["a"]], "code_0": [1]}, {"item": [b"\xff"], "code_0": [1]},
    ],
)  # fmt: skip
def test_nested_and_binary_columns_are_refused(tmp_path: Path, columns: dict[str, list]) -> None:
    path = tmp_path / "codes.parquet"
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(UserError, match=r"codes\.parquet: column .* is of type"):
        Catalog.read(path)


def test_a_start_without_a_codebook_size_is_refused_and_the_fix_works(tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    path.write_text("item,code_0,code_1\n1,2,0\n5,3,1\n")
    with pytest.raises(UserError, match="needs a codebook_size"):
        Catalog.read(path, code_token_start=10)
    catalog = Catalog.read(path, code_token_start=10, codebook_size=256)
    assert catalog.code_tokens().of_codes(catalog.codes).tolist() == [[12, 266], [13, 267]]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_tensor_of_codes_is_read_in_either_orientation(
    tmp_path: Path, turned: bool, dtype: torch.dtype
) -> None:
    codes = torch.tensor([[0, 1], [2, 3], [2, 0]])
    torch.save((codes.t() if turned else codes).to(dtype), tmp_path / "merged_predictions_tensor.pt")
    assert torch.equal(Catalog.read(tmp_path / "merged_predictions_tensor.pt").codes, codes)


class Trap:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save(Trap(tmp_path / "ran"), tmp_path / "trap.pt")
    with pytest.raises(UserError, match="has no readable tensor"):
        Catalog.read(tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2), torch.zeros(2, 2), torch.rand(2, 3), {"codes": 1},
        torch.zeros(2, 3, dtype=torch.complex64), torch.eye(3)[:2].to_sparse(),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_have_codes_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        Catalog.read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "name", ["nowhere.index.json", "nowhere.csv", "nowhere.parquet", "nowhere.pt", "x.txt", ""]
)
def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        Catalog.read(tmp_path / name)
