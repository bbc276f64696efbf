"""``X.inter.json`` and ``X.item.json``, the files of LETTER, LC-Rec and MiniOneRec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cemg.data import read_dataset
from cemg.errors import UserError

INTER = {"0": [0, 2, 10], "1": [2, "1", 0, 2]}
ITEM = {
    "0": {"title": "Soap &amp; co", "description": "Cleans", "brand": "Acme", "categories": "Bath"},
    "1": {"title": "Comb", "description": ["A comb.", "Black"]},
    "2": {},
    "10": {"title": "Towel", "categories": [["Bath", "Linen"]]},
    "11": {"title": "Never bought"},
}


def write(folder: Path, inter: Any = INTER, item: Any = ITEM) -> Path:
    for name, value in (("inter", inter), ("item", item)):
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / f"Beauty.{name}.json").write_text(text)
    (folder / "Beauty.index.json").write_text('{"0": ["<a_1>"]}')
    return folder


@pytest.mark.parametrize("name", ["", "Beauty.inter.json"])
def test_lists_become_histories_and_items_get_titles_and_texts(tmp_path: Path, name: str) -> None:
    data = read_dataset(write(tmp_path) / name)
    assert data.name == "Beauty" and data.user_ids == ["0", "1"]
    assert data.item_ids == ["0", "1", "2", "10", "11"]
    assert [s.tolist() for s in data.sequences] == [[0, 2, 3], [2, 1, 0, 2]]
    assert data.titles == ["Soap & co", "Comb", "", "Towel", "Never bought"]
    assert data.texts == [
        "Soap & co. Acme. Bath. Cleans.", "Comb. A comb. Black.", None, "Towel. Bath, Linen.",
        "Never bought.",
    ]  # fmt: skip


def test_without_an_item_file_the_histories_define_the_items(tmp_path: Path) -> None:
    data = read_dataset(write(tmp_path, item=None))
    assert data.item_ids == ["0", "1", "2", "10"] and data.texts == [None] * 4


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        ('{"0": [1,\n', None, "Beauty.inter.json, line 2: not valid JSON"),
        ("[]", None, "expected a JSON object keyed by users"),
        ({"0": 4}, None, "user '0': expected a list of item ids, got 4"),
        ({"0": []}, None, "no user has an item"),
        ({"0": [1, 2.5]}, None, "user '0': 2.5 is not a valid item id"),
        ({"0": [1, True]}, None, "user '0': True is not a valid item id"),
        ({"0": [1, 99]}, ITEM, "user '0': item '99' is not in Beauty.item.json"),
        ('{"0": [1], "0": [2]}', None, "the key '0' occurs more than once"),
        ({"0": [1]}, {"1": "a comb"}, "Beauty.item.json, item '1': expected an object, got 'a comb'"),
        ({"0": [1]}, "[" * 100_000, "Beauty.item.json is not valid JSON"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line_user_or_item(
    tmp_path: Path, inter: Any, item: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_dataset(write(tmp_path, inter, item))


def test_a_folder_with_two_datasets_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "Yelp.inter.json").write_text(json.dumps(INTER))
    with pytest.raises(UserError, match=r"2 files \*.inter.json"):
        read_dataset(tmp_path)
