"""Amazon and Yelp as they are published: file names, folders, and Python literals that are never executed."""

from __future__ import annotations

import json

import pytest

from cemg.data import read_dataset
from cemg.data.readers import ColumnNames
from cemg.errors import UserError

from ..helpers import write_file

REVIEW = {"reviewerID": "a", "asin": "x", "unixReviewTime": 1, "overall": 5.0}
REVIEW_2018 = REVIEW | {"verified": True, "reviewTime": "09 1, 2016", "style": {"Size:": "L"}}
REVIEW_2023 = {
    "rating": 5.0,
    "asin": "v",
    "parent_asin": "x",
    "user_id": "a",
    "timestamp": 1588687728923,
    "images": [],
}
META = {"asin": "x", "title": "Red", "categories": [["Beauty"]]}
META_2023 = {"main_category": "All Beauty", "title": "Red", "store": "Opi", "parent_asin": "x", "details": {}}
PUBLISHED = {  # reviews, metadata (name, content), name of the set
    "2014 5-core": (
        "reviews_Beauty_5.json.gz",
        json.dumps(REVIEW),
        "meta_Beauty.json.gz",
        repr(META),
        "Beauty",
    ),
    "2014 whole": ("reviews_Beauty.json.gz", json.dumps(REVIEW), "meta_Beauty.json.gz", repr(META), "Beauty"),
    "2014, Python literals": (
        "reviews_Beauty.json.gz",
        repr(REVIEW),
        "meta_Beauty.json.gz",
        repr(META),
        "Beauty",
    ),
    "2018 whole": (
        "Beauty.json.gz",
        json.dumps(REVIEW_2018),
        "meta_Beauty.json.gz",
        json.dumps(META),
        "Beauty",
    ),
    "2018 5-core": (
        "All_Beauty_5.json.gz",
        json.dumps(REVIEW_2018),
        "meta_All_Beauty.json.gz",
        json.dumps(META),
        "All_Beauty",
    ),
    "2023": (
        "All_Beauty.jsonl.gz",
        json.dumps(REVIEW_2023),
        "meta_All_Beauty.jsonl.gz",
        json.dumps(META_2023),
        "All_Beauty",
    ),
    "2023 unpacked": (
        "All_Beauty.jsonl",
        json.dumps(REVIEW_2023),
        "meta_All_Beauty.jsonl",
        json.dumps(META_2023),
        "All_Beauty",
    ),
    "2023 of the hub": (
        "review_categories/All_Beauty.jsonl",
        json.dumps(REVIEW_2023),
        "meta_categories/meta_All_Beauty.jsonl",
        json.dumps(META_2023),
        "All_Beauty",
    ),
    "2023 5-core ratings": (
        "All_Beauty.csv.gz",
        "user_id,parent_asin,rating,timestamp\na,x,5.0,1588687728923",
        "meta_All_Beauty.jsonl.gz",
        json.dumps(META_2023),
        "All_Beauty",
    ),
    "2023 leave-last-out": (
        "All_Beauty.train.csv.gz",
        "user_id,parent_asin,rating,timestamp,history\na,x,5.0,1588687728923,",
        "meta_All_Beauty.jsonl.gz",
        json.dumps(META_2023),
        "All_Beauty",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_amazons_real_file_names_are_read_with_their_metadata(name, tmp_path):
    reviews, line, metadata, about, subject = PUBLISHED[name]
    path = write_file(tmp_path / reviews, line + "\n")
    write_file(tmp_path / metadata, about + "\n")
    data = read_dataset(path, min_count=0)
    assert (data.name, data.titles, data.user_ids, data.item_ids) == (subject, ["Red"], ["a"], ["x"])
    elsewhere = write_file(tmp_path / "else" / "where" / path.name, line + "\n")
    assert read_dataset(elsewhere, min_count=0).titles == [""]
    assert read_dataset(elsewhere, items=tmp_path / metadata, min_count=0).titles == ["Red"]


@pytest.mark.parametrize(
    ("file", "row", "columns"),
    [
        ("ratings_Beauty.csv", "a,x,5.0,1400000000", "user=#1,item=#2,rating=#3,timestamp=#4"),  # 2014
        ("All_Beauty.csv", "x,a,5.0,1400000000", "item=#1,user=#2,rating=#3,timestamp=#4"),  # 2018
    ],
)
def test_amazons_ratings_without_a_header_are_refused_until_their_columns_are_named(
    file, row, columns, tmp_path
):
    path = write_file(tmp_path / file, f"{row}\n{row.replace('x', 'y')}\n")
    with pytest.raises(
        UserError, match=r"no column 'user'(.|\n)*in a file without a header, --columns user=#1"
    ):
        read_dataset(path, min_count=0)
    data = read_dataset(path, columns=ColumnNames.parse(columns), min_count=0)
    assert (data.user_ids, data.item_ids) == (["a"], ["x", "y"])


@pytest.mark.parametrize(
    "expression", ["__import__('os').system('touch ran')", "open('ran', 'w')", "[1] * 10**9"]
)
def test_python_literals_are_never_executed(expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "reviews_Beauty.json", "{'reviewerID': " + expression + "}\n")
    with pytest.raises(UserError, match="line 1: neither JSON nor a Python literal"):
        read_dataset(tmp_path / "reviews_Beauty.json", format="amazon-2014")
    assert not (tmp_path / "ran").exists()


VISIT = '{"user_id": "a", "business_id": "x", "stars": 5, "date": "2018-01-01 00:00:00"}\n'
YELP = ["yelp_academic_dataset_{}.json", "yelp_academic_dataset_{}.json.gz", "{}.json"]


@pytest.mark.parametrize("name", YELP)
def test_yelps_real_file_names_are_read(name, tmp_path):
    write_file(tmp_path / name.format("review"), VISIT)
    write_file(tmp_path / name.format("business"), '{"business_id": "x", "name": "Red", "hours": null}\n')
    for path in (tmp_path, tmp_path / name.format("review")):
        assert read_dataset(path, min_count=0).titles == ["Red"]
