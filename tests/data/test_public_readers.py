"""Amazon, Yelp, RecBole, CSV and Parquet: small files of each, read and refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from cemg.data import read_dataset
from cemg.data.readers import ColumnNames, detect_format
from cemg.errors import UserError

# user, item, time, rating: a buys x then y (out of order in the file), b buys y twice at one time, then x
EVENTS = [("a", "y", 200, 4), ("a", "x", 100, 5), ("b", "y", 50, 2), ("b", "y", 50, 5), ("b", "x", 60, 3)]
SEQUENCES = {"a": ["x", "y"], "b": ["y", "y", "x"]}


def json_lines(path: Path, records: list[dict], *, dump: Callable[[dict], str] = json.dumps) -> None:
    text = "".join(dump(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def amazon_2014(folder: Path) -> Path:
    names = ("reviewerID", "asin", "unixReviewTime", "overall")
    json_lines(
        folder / "reviews_Beauty_5.json.gz",
        [dict(zip(names, e, strict=True)) | {"helpful": [0, 1]} for e in EVENTS],
    )
    about = {"asin": "x", "title": "It's &quot;red&quot;", "categories": [["Beauty", "Nails"]], "price": 3.5}
    unused = {"asin": "z", "title": "nobody bought it"}
    json_lines(folder / "meta_Beauty.json.gz", [unused, about], dump=repr)
    return folder


def amazon_2018(folder: Path) -> Path:
    names = ("reviewerID", "asin", "unixReviewTime", "overall")
    records = [dict(zip(names, e, strict=True)) | {"verified": True, "style": {"Size:": "L"}} for e in EVENTS]
    json_lines(folder / "Beauty_5.json.gz", records)
    about = {
        "category": ["Beauty", "Nails"],
        "description": ["Long", "lasting"],
        "title": 'It\'s "red"',
        "asin": "x",
    }
    json_lines(folder / "meta_Beauty.json.gz", [about, about | {"title": "a second record"}])
    return folder


def amazon_2023(folder: Path) -> Path:
    names = ("user_id", "parent_asin", "timestamp", "rating")
    records = [dict(zip(names, e, strict=True)) | {"asin": "variant", "images": []} for e in EVENTS]
    json_lines(folder / "All_Beauty.jsonl", records)
    about = {
        "title": 'It\'s "red"',
        "store": "OPI",
        "categories": [],
        "features": ["Shiny"],
        "parent_asin": "x",
    }
    json_lines(folder / "meta_All_Beauty.jsonl", [about])
    return folder


def yelp(folder: Path) -> Path:
    records = [
        {
            "review_id": "r",
            "user_id": u,
            "business_id": i,
            "stars": s,
            "date": f"2018-01-01 00:{t // 60:02}:{t % 60:02}",
        }
        for u, i, t, s in EVENTS
    ]
    json_lines(folder / "yelp_academic_dataset_review.json", records)
    about = {
        "business_id": "x",
        "name": 'It\'s "red"',
        "categories": None,
        "city": "Reno",
        "state": "NV",
        "hours": {},
    }
    json_lines(folder / "yelp_academic_dataset_business.json", [about])
    return folder


def recbole(folder: Path) -> Path:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"{u}\t{i}\t{s}\t{t}.0" for u, i, t, s in EVENTS]
    (folder / "set.inter").write_text("\n".join(lines) + "\n")
    head = "item_id:token\trelease_year:float\tmovie_title:token_seq\tgenre:token_seq\n"
    (folder / "set.item").write_text(head + 'x\t1999\tIt\'s "red"\tNew Drama\n')
    return folder


def csv(folder: Path) -> Path:
    pl.DataFrame(EVENTS, schema=["user", "item", "timestamp", "rating"], orient="row").write_csv(
        folder / "interactions.csv"
    )
    pl.DataFrame({"item": ["x"], "title": ['It\'s "red"'], "text": [None], "image": ["x.png"]}).write_csv(
        folder / "items.csv"
    )
    (folder / "x.png").touch()
    return folder


def parquet(folder: Path) -> Path:
    frame = pl.DataFrame(EVENTS, schema=["user", "item", "timestamp", "rating"], orient="row")
    frame.with_columns(pl.from_epoch("timestamp")).write_parquet(folder / "interactions.parquet")
    pl.DataFrame({"item": ["x"], "title": ['It\'s "red"']}).write_parquet(folder / "items.parquet")
    return folder


def movielens_100k(folder: Path) -> Path:
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{s}\t{t}\n" for u, i, t, s in EVENTS))
    (folder / "u.item").write_bytes('x|It\'s "red"|01-Jan-1995||http://é|0|1|1\n'.encode("latin-1"))
    (folder / "u.genre").write_text("unknown|0\nComedy|1\nDrama|2\n\n")
    return folder


def movielens_1m(folder: Path) -> Path:
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{s}::{t}\n" for u, i, t, s in EVENTS))
    (folder / "movies.dat").write_bytes('x::It\'s "red"::Comedy|Drama\nz::é::(no genres listed)\n'.encode())
    return folder


def movielens_latest(folder: Path) -> Path:
    pl.DataFrame(EVENTS, schema=["userId", "movieId", "timestamp", "rating"], orient="row").write_csv(
        folder / "ratings.csv"
    )
    pl.DataFrame({"movieId": ["x"], "title": ['It\'s "red"'], "genres": ["Comedy|Drama"]}).write_csv(
        folder / "movies.csv"
    )
    return folder


TEXTS = {
    "movielens": (movielens_100k, 'It\'s "red". Comedy, Drama.'),
    "movielens, 1M": (movielens_1m, 'It\'s "red". Comedy, Drama.'),
    "movielens, latest": (movielens_latest, 'It\'s "red". Comedy, Drama.'),
    "amazon-2014": (amazon_2014, 'It\'s "red". Beauty, Nails.'),
    "amazon-2018": (amazon_2018, 'It\'s "red". Beauty, Nails. Long. lasting.'),
    "amazon-2023": (amazon_2023, 'It\'s "red". OPI. Shiny.'),
    "yelp": (yelp, 'It\'s "red". Reno, NV.'),
    "recbole": (recbole, 'It\'s "red". New Drama.'),
    "csv": (csv, 'It\'s "red".'),
    "parquet": (parquet, 'It\'s "red".'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_format_is_detected_and_gives_the_same_histories_titles_and_texts(name, tmp_path):
    write, text = TEXTS[name]
    folder = write(tmp_path)
    assert detect_format(folder) == name.split(",")[0]
    data = read_dataset(folder, min_count=0)
    histories = [[data.item_ids[i] for i in s] for s in data.sequences]
    assert dict(zip(data.user_ids, histories, strict=True)) == SEQUENCES
    x, y = data.item_ids.index("x"), data.item_ids.index("y")
    assert (data.titles[x], data.texts[x]) == ('It\'s "red"', text)
    assert (data.titles[y], data.texts[y], data.images[y]) == ("", None, None)
    assert data.tie_rule == "equal times in order of the source file"


@pytest.mark.parametrize("name", TEXTS)
def test_a_five_core_is_the_default_of_every_raw_format(name, tmp_path):
    with pytest.raises(UserError, match="none of 5 interactions is left"):
        read_dataset(TEXTS[name][0](tmp_path))


@pytest.mark.parametrize("name", TEXTS)
def test_low_ratings_are_dropped_before_the_core_is_computed(name, tmp_path):
    data = read_dataset(TEXTS[name][0](tmp_path), min_count=0, min_rating=4)
    assert data.num_interactions == 3


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("amazon-2014", "reviews_Beauty_5.json.gz"),
        ("amazon-2023", "All_Beauty.jsonl"),
        ("yelp", "yelp_academic_dataset_review.json"),
        ("movielens", "u.data"),
        ("movielens, 1M", "ratings.dat"),
        ("recbole", "set.inter"),
        ("csv", "interactions.csv"),
        ("parquet", "interactions.parquet"),
    ],
)
def test_a_file_can_be_named_instead_of_its_folder(name, file, tmp_path):
    path = TEXTS[name][0](tmp_path) / file
    assert read_dataset(path, min_count=0).num_interactions == 5
    path.write_bytes(gzip.compress(b"") if path.suffix == ".gz" else b"")
    with pytest.raises(UserError, match=r"is empty|cannot be read"):
        read_dataset(path, format=name.split(",")[0])


def test_an_image_column_is_relative_to_the_items_file(tmp_path):
    data = read_dataset(csv(tmp_path), min_count=0)
    assert data.images[data.item_ids.index("x")] == tmp_path / "x.png"


def test_columns_can_be_named(tmp_path):
    (tmp_path / "log.csv").write_text("who,what,when\n1,9,5\n1,8,4\n")
    names = ColumnNames(user="who", item="what", timestamp="when")
    data = read_dataset(tmp_path / "log.csv", columns=names, min_count=0, name="log book")
    assert (data.name, data.item_ids) == ("log book", ["8", "9"])
    assert data.notes == ["there is no items.csv: items have no text"]
    with pytest.raises(UserError, match="three different columns"):
        ColumnNames(user="who", item="who")


def test_usual_column_names_are_recognized(tmp_path):
    (tmp_path / "ratings.csv").write_text("user_id,parent_asin,rating,timestamp\nu,B01,5.0,1700000000000\n")
    assert read_dataset(tmp_path / "ratings.csv", min_count=0).item_ids == ["B01"]


def test_duplicates_and_ties_options_apply(tmp_path):
    folder = csv(tmp_path)
    assert read_dataset(folder, min_count=0, duplicates="last").num_interactions == 4
    shuffled = read_dataset(folder, min_count=0, ties="shuffle", seed=3)
    assert shuffled.tie_rule == "equal times shuffled, seed 3"


def test_a_prepared_folder_is_loaded_and_can_be_renamed(tmp_path):
    data = read_dataset(csv(tmp_path), min_count=0)
    data.save(tmp_path / "prepared")
    assert read_dataset(tmp_path / "prepared").split().fingerprint == data.split().fingerprint
    assert read_dataset(tmp_path / "prepared", name="mine").name == "mine"


REVIEW = '{"reviewerID": "a", "asin": "x", "unixReviewTime": 1, "overall": 5}\n'
VISIT = '{"user_id": "a", "business_id": "x", "stars": 5, "date": "2018-01-01 00:00:00"}\n'
HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("a.json", REVIEW * 3 + "{oops\n", r"a\.json, line 4: not valid JSON: .* at column 2"),
        ("a.json", REVIEW + "\n" + REVIEW.replace('"asin"', '"isbn"'), r"line 3: no field 'asin'"),
        (
            "a.json",
            REVIEW + REVIEW.replace(": 1,", ': "noon",'),
            r"line 2: field 'unixReviewTime' is 'noon', which is not a time",
        ),
        (
            "a.json",
            REVIEW + REVIEW.replace(": 1,", ": true,"),
            r"line 2: field 'unixReviewTime' is 'true', which is not a time",
        ),
        ("a.json", REVIEW + "[1, 2]\n", r"line 2: expected a JSON object, got list"),
        (
            "a.json",
            REVIEW + REVIEW.replace("5", '"five"'),
            r"line 2: field 'overall' is 'five', expected a number",
        ),
        (
            "yelp_r.json",
            VISIT + VISIT.replace("2018-01-01 00:00:00", "yesterday"),
            r"line 2: field 'date' is 'yesterday'",
        ),
        ("u.data", "a\tx\t5\t1\na\tx\t5\n", r"u\.data, line 2: expected user\titem\trating\ttimestamp"),
        (
            "ratings.dat",
            "a::x::5::1\n\na::x::5::soon\n",
            r"ratings\.dat, line 3: column 'timestamp' is 'soon', which is not a time",
        ),
        ("ratings.dat", "", r"ratings\.dat is empty"),
        (
            "s.inter",
            HEAD + "a\tx\t1\na\tx\tsoon\n",
            r"s\.inter, line 3: column 'timestamp' is 'soon', which is not a time",
        ),
        ("s.inter", HEAD + "a\tx\tnan\n", r"line 2: column 'timestamp' is 'nan', which is not a time"),
        ("s.inter", HEAD + "a\tx\n", r"line 2: column 'timestamp' is empty"),
        ("s.inter", HEAD + "a\tx\t1\t9\n", r"line 2: it has 4 fields, the first line has 3"),
        ("s.inter", "user_id\titem_id\na\tx\n", r"line 1: header 'user_id'; expected name:type"),
        (
            "s.inter",
            "user_id:token\titem_id:token\na\tx\n",
            r"line 1: no column 'timestamp'; the columns are user_id, item_id",
        ),
        ("i.csv", "user,item\na,x\n", r"i\.csv, line 1: no column 'timestamp'; the columns are user, item"),
        (
            "i.csv",
            "user,item,timestamp\na,x,1\n\na,x,1:5\n",
            r"line 4: column 'timestamp' is '1:5', which is not a time",
        ),
        ("i.csv", 'user,item,timestamp\n"a\nb",x,1\n,x,2\n', r"line 4: column 'user' is empty"),
        ("i.csv", "user,item,timestamp\na,x,1\na,x,1,2\n", r"line 3: it has 4 fields, the first line has 3"),
        ("i.csv", "user,item,timestamp\n", r"i\.csv is empty"),
        ("i.parquet", "no parquet", r"i\.parquet cannot be read"),
    ],
)
def test_a_malformed_file_is_refused_with_file_line_and_reason(tmp_path, file, text, reason):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=reason):
        read_dataset(tmp_path / file, min_count=0)


def test_a_truncated_gzip_file_is_refused(tmp_path):
    whole = gzip.compress((REVIEW * 2000).encode(), mtime=0)
    (tmp_path / "a.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.json\.gz"):
        read_dataset(tmp_path / "a.json.gz", format="amazon-2014", min_count=0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'asin': 'x', 'title': }\n", r"meta_a\.json, line 2: neither JSON nor a Python literal"),
        ('{"asin": "x", "title": \n', r"line 2: neither JSON nor a Python literal"),
        ("{'asin': 'x', 'title': print(1)}\n", r"line 2: neither JSON nor a Python literal"),
        ("{'title': 'no id'}\n", r"line 2: no field 'asin'"),
    ],
)
def test_malformed_metadata_is_refused_and_never_executed(tmp_path, line, reason):
    (tmp_path / "a.json").write_text(REVIEW)
    (tmp_path / "meta_a.json").write_text("{'asin': 'z'}\n" + line)
    with pytest.raises(UserError, match=reason):
        read_dataset(tmp_path / "a.json", min_count=0)


def test_two_review_files_in_a_folder_are_refused_with_their_names(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(REVIEW)
    with pytest.raises(UserError, match=r"expected one review file, found a\.json, b\.json"):
        read_dataset(tmp_path)


def test_a_missing_path_and_an_unknown_format_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_dataset(tmp_path / "none")
    with pytest.raises(UserError, match="cannot detect the format"):
        read_dataset(tmp_path)
    with pytest.raises(UserError, match="unknown format 'xls'"):
        read_dataset(tmp_path, format="xls")


def test_a_rating_limit_without_ratings_is_refused(tmp_path):
    (tmp_path / "i.csv").write_text("user,item,timestamp\na,x,1\n")
    with pytest.raises(UserError, match="has no ratings"):
        read_dataset(tmp_path / "i.csv", min_rating=4)


def test_an_error_in_parquet_names_the_row(tmp_path):
    frame = pl.DataFrame({"user": ["a", None], "item": ["x", "y"], "timestamp": [1, 2]})
    frame.write_parquet(tmp_path / "i.parquet")
    with pytest.raises(UserError, match=r"i\.parquet, row 2: column 'user' is empty"):
        read_dataset(tmp_path / "i.parquet", min_count=0)


def test_dates_of_a_parquet_file_are_times(tmp_path):
    days = [datetime(2020, 1, 2), datetime(2020, 1, 1)]
    pl.DataFrame({"user": ["a", "a"], "item": ["late", "early"], "timestamp": days}).write_parquet(
        tmp_path / "i.parquet"
    )
    assert read_dataset(tmp_path / "i.parquet", min_count=0).item_ids == ["early", "late"]


def test_a_truncated_line_of_movies_is_refused_with_its_number(tmp_path):
    folder = movielens_100k(tmp_path)
    (folder / "u.item").write_bytes((folder / "u.item").read_bytes() + b"y|Toy Story|x\n")
    with pytest.raises(UserError, match=r"u\.item, line 2: expected an id, a title and genres"):
        read_dataset(folder, min_count=0)
