"""Unusual files: tables as users have them, and published files with their quirks.

Each entry of a table below is one file. All of them have the same five interactions, unless the entry says
otherwise.
"""

from __future__ import annotations

import json

import polars as pl
import pytest

from cemg.data import Dataset, read_dataset
from cemg.data.readers import ColumnNames
from cemg.errors import UserError

from ..helpers import write_file

ROWS = [("a", "y", 200), ("a", "x", 100), ("b", "y", 50), ("b", "z", 55), ("b", "x", 60)]
HISTORIES = {"a": ["x", "y"], "b": ["y", "z", "x"]}
CSV = "user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)
ITEMS = "item,title,text\nx,Red,It is red\ny,Blue,\nz,,Plain\n"


def histories(data: Dataset) -> dict[str, list[str]]:
    ids = [[data.item_ids[i] for i in s] for s in data.sequences]
    return dict(zip(data.user_ids, ids, strict=True))


def joined(separator: str, *, end: str = "\n", tail: str = "") -> str:
    rows = [("user", "item", "timestamp"), *ROWS]
    return end.join(separator.join(map(str, row)) + tail for row in rows) + end


TABLES: dict[str, tuple[str, str | bytes, dict]] = {
    "gzip": ("orders.csv.gz", CSV, {}),
    "capital suffix": ("ORDERS.CSV", CSV, {}),
    "tab separated": ("orders.tsv", joined("\t"), {}),
    "tab separated, gzip": ("orders.tsv.gz", joined("\t"), {}),
    "semicolons": ("orders.csv", joined(";"), {}),
    "pipes": ("orders.csv", joined("|"), {}),
    "a separator of its own": ("orders.csv", joined("~"), {"separator": "~"}),
    "a separator by name": ("orders.csv", joined("\t"), {"separator": "tab"}),
    "Windows line ends": ("orders.csv", joined(",", end="\r\n"), {}),
    "no line end at the end": ("orders.csv", CSV.rstrip(), {}),
    "blank lines": ("orders.csv", CSV.replace("\n", "\n\n") + "\n\n", {}),
    "trailing separators in rows": ("orders.csv", CSV.replace("0\n", "0,\n").replace("5\n", "5,\n"), {}),
    "trailing separators everywhere": ("orders.csv", joined(",", tail=","), {}),
    "blanks around": ("orders.csv", joined(" , "), {}),
    "quotes": ("orders.csv", joined('","').replace("\n", '"\n"').rstrip('"').join(['"', ""]), {}),
    "quoted line ends": ("orders.csv", CSV.replace("\na,", '\n"a",', 1).replace("item,", '"item",', 1), {}),
    "UTF-8 with a mark": ("orders.csv", b"\xef\xbb\xbf" + CSV.encode(), {}),
    "UTF-8 with a mark, gzip": ("orders.csv.gz", b"\xef\xbb\xbf" + CSV.encode(), {}),
    "UTF-16 with a mark": ("orders.csv", CSV.encode("utf-16"), {}),
    "UTF-16 without a mark": ("orders.csv", CSV.encode("utf-16-le"), {"encoding": "utf-16-le"}),
    "UTF-32 with a mark": ("orders.csv", CSV.encode("utf-32"), {}),
    "further columns": ("orders.csv", CSV.replace("\n", ",1.5,é\n"), {}),
    "columns in another order": (
        "orders.csv",
        "timestamp,item,user\n" + "".join(f"{t},{i},{u}\n" for u, i, t in ROWS),
        {},
    ),
    "other names": (
        "orders.csv",
        CSV.replace("user,item,timestamp", "uid,sku,ts"),
        {"columns": "user=uid,item=sku,timestamp=ts"},
    ),
    "names with commas": (
        "orders.csv",
        CSV.replace("user,", '"user, id",'),
        {"columns": '{"user": "user, id"}'},
    ),
    "no header": ("orders.csv", CSV.split("\n", 1)[1], {"columns": "user=#1,item=#2,timestamp=#3"}),
    "no header, another order": (
        "orders.csv",
        "".join(f"{i},{u},5,{t}\n" for u, i, t in ROWS),
        {"columns": "user=#2,item=#1,timestamp=#4,rating=#3"},
    ),
    "a name of no suffix": ("orders", CSV, {"format": "csv"}),
    "Amazon 2023 5-core": (
        "All_Beauty.csv.gz",
        CSV.replace("user,item,timestamp", "user_id,parent_asin,timestamp"),
        {},
    ),
    "ids that are floats": (
        "orders.csv",
        CSV.replace(",x", ",1.0").replace(",y", ",2.0").replace(",z", ",3.0"),
        {"ids": {"x": "1", "y": "2", "z": "3"}},
    ),
    "ids with zeros in front": ("orders.csv", CSV.replace(",x", ",0108775015"), {"ids": {"x": "0108775015"}}),
    "ids with blanks and commas": (
        "orders.csv",
        CSV.replace(",x", ',"red, small"'),
        {"ids": {"x": "red, small"}},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_an_unusual_table_gives_the_same_histories(name, tmp_path):
    file, content, options = TABLES[name]
    columns = options.pop("columns", None) if (options := dict(options)) else None
    ids = options.pop("ids", {})
    path = write_file(tmp_path / file, content)
    named = ColumnNames.parse(columns) if columns else None
    data = read_dataset(path, min_count=0, columns=named, **options)
    expected = {user: [ids.get(item, item) for item in items] for user, items in HISTORIES.items()}
    assert histories(data) == expected


PARQUET_IDS = {
    "integers": (pl.Series([12, 7]), ["12", "7"]),
    "floats": (pl.Series([12.0, 7.0]), ["12", "7"]),
    "categories": (pl.Series(["012", "7"], dtype=pl.Categorical), ["012", "7"]),
    "texts with blanks": (pl.Series([" 012", "7 "]), ["012", "7"]),
}


@pytest.mark.parametrize("name", PARQUET_IDS)
def test_typed_ids_in_parquet_become_text(name, tmp_path):
    series, expected = PARQUET_IDS[name]
    pl.DataFrame({"user": ["u", "u"], "item": series, "timestamp": [1, 2]}).write_parquet(
        tmp_path / "t.parquet"
    )
    assert read_dataset(tmp_path / "t.parquet", min_count=0).item_ids == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([12.5, 1.0], "is 12.5, which is not a valid id"),
        ([None, 1.0], "is empty"),
        ([float("nan"), 1.0], "is nan, which is not a valid id"),
        ([[1], [2]], "which cannot be an id"),
        ([True, False], "which cannot be an id"),
        (["", "a"], "is empty"),
        (["  ", "a"], "is empty"),
        (["a\tb", "a"], "control characters"),
    ],
)
def test_values_that_are_not_ids_are_refused(tmp_path, values, reason):
    pl.DataFrame({"user": ["u", "u"], "item": values, "timestamp": [1, 2]}).write_parquet(
        tmp_path / "t.parquet"
    )
    with pytest.raises(UserError, match=reason):
        read_dataset(tmp_path / "t.parquet", min_count=0)


SHARDS = {
    "a folder of shards": ["part-0.parquet", "part-1.parquet"],
    "a subfolder": ["interactions/part-0.parquet", "interactions/part-1.parquet"],
    "partitions": ["day=1/x.parquet", "day=2/y.parquet"],
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_folder_of_parquet_files_is_one_table(name, tmp_path):
    frame = pl.DataFrame(ROWS, schema=["user", "item", "timestamp"], orient="row")
    for file, part in zip(SHARDS[name], (frame[:2], frame[2:]), strict=True):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        part.write_parquet(tmp_path / file)
    (tmp_path / "_SUCCESS.parquet").touch()  # hidden files of other tools are not shards
    pl.DataFrame({"item": ["x", "y", "z"], "title": ["Red", "Blue", "Plain"]}).write_parquet(
        tmp_path / "items.parquet"
    )
    data = read_dataset(tmp_path, min_count=0)
    assert histories(data) == HISTORIES and data.texts[data.item_ids.index("x")] == "Red."


def test_parquet_files_with_different_columns_are_refused(tmp_path):
    frame = pl.DataFrame(ROWS, schema=["user", "item", "timestamp"], orient="row")
    frame.write_parquet(tmp_path / "a.parquet")
    frame.rename({"item": "sku"}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has other columns than .*a\.parquet"):
        read_dataset(tmp_path, min_count=0)


def test_orders_and_products_are_joined_by_the_named_columns(tmp_path):
    orders = write_file(tmp_path / "orders.csv", CSV.replace("user,item,timestamp", "uid,product,ts"))
    products = write_file(
        tmp_path / "in" / "products.tsv",
        "sku\tname\tabout\tpicture\nx\tRed\tIt is red\tp/x.png\ny\tBlue\tBlue sky\t\nz\t\tPlain\tnone.png\n",
    )
    write_file(tmp_path / "in" / "p" / "x.png", b"")
    columns = "user=uid,item=product,timestamp=ts,id=sku,title=name,text=name+about,image=picture"
    data = read_dataset(orders, items=products, columns=ColumnNames.parse(columns), min_count=0)
    about = {
        item: (t, x, i)
        for item, t, x, i in zip(data.item_ids, data.titles, data.texts, data.images, strict=True)
    }
    assert about["x"] == ("Red", "Red. It is red.", tmp_path / "in" / "p" / "x.png")
    assert about["y"] == ("Blue", "Blue sky.", None)  # which begins with the title already
    assert about["z"] == ("", "Plain.", None)
    assert "images are missing in" in " ".join(data.notes)


def test_an_items_file_without_the_id_column_is_refused_with_the_option_that_names_it(tmp_path):
    write_file(tmp_path / "items.csv", ITEMS.replace("item,", "product,"))
    orders = write_file(tmp_path / "orders.csv", CSV)
    with pytest.raises(
        UserError, match=r"no column 'item'; the columns are product, title, text\n.*--columns id="
    ):
        read_dataset(orders, min_count=0)
    data = read_dataset(orders, columns=ColumnNames.parse("id=product"), min_count=0)
    assert data.titles[data.item_ids.index("x")] == "Red"


def test_an_items_file_without_a_header_takes_positions(tmp_path):
    write_file(tmp_path / "items.csv", ITEMS.split("\n", 1)[1])
    orders = write_file(tmp_path / "orders.csv", CSV)
    data = read_dataset(orders, columns=ColumnNames.parse("id=#1,title=#2,text=#3"), min_count=0)
    assert data.texts[data.item_ids.index("x")] == "Red. It is red."


@pytest.mark.parametrize("role", ["user", "item", "timestamp", "rating", "id", "title", "text", "image"])
def test_a_column_that_does_not_exist_is_refused_with_the_existing_ones(role, tmp_path):
    write_file(tmp_path / "items.csv", ITEMS)
    orders = write_file(tmp_path / "orders.csv", CSV)
    with pytest.raises(UserError) as refused:
        read_dataset(orders, columns=ColumnNames.parse(f"{role}=nowhere"), min_count=0)
    existing = (
        "user, item, timestamp" if role in ("user", "item", "timestamp", "rating") else "item, title, text"
    )
    assert f"no column 'nowhere'; the columns are {existing}" in str(refused.value)


@pytest.mark.parametrize(
    "columns",
    [
        "who=uid",
        "user",
        "user=",
        "user=a,user=b",
        '{"user": 3}',
        '{"text": [1]}',
        "{",
        "",
        "user=#1",
        "title=#1,text=b",
    ],
)
def test_invalid_columns_options_are_refused(columns):
    with pytest.raises(UserError):
        ColumnNames.parse(columns)


def test_a_header_is_noticed_when_positions_are_given(tmp_path):
    with pytest.raises(
        UserError, match=r"line 1: .* is 'timestamp', which is not a time\n.*if this line is a header"
    ):
        read_dataset(
            write_file(tmp_path / "o.csv", CSV), columns=ColumnNames.parse("user=#1,item=#2,timestamp=#3")
        )


MATCHES = {  # ids of the interactions, ids of the items file
    "floats in the interactions": ("12.0", "12"),
    "floats in the items": ("12", "12.0"),
    "zeros lost in the interactions": ("108775015", "0108775015"),
    "zeros lost in the items": ("0108775015", "108775015"),
    "blanks in the items": ("x", " x "),
}


@pytest.mark.parametrize("name", MATCHES)
def test_ids_that_are_written_differently_are_matched_with_a_note(name, tmp_path):
    item_id, described_id = MATCHES[name]
    orders = write_file(tmp_path / "orders.csv", f"user,item,timestamp\nu,{item_id},1\nu,other,2\n")
    write_file(tmp_path / "items.csv", f"item,title\n{described_id},Red\nother,Blue\n")
    data = read_dataset(orders, min_count=0)
    assert dict(zip(data.item_ids, data.titles, strict=True)) == {item_id: "Red", "other": "Blue"}
    note = f"items.csv has 1 ids such as {described_id!r} for {item_id!r}: they are matched"
    assert (note in data.notes) == (described_id.strip() != item_id)


def test_ambiguous_ids_are_not_matched_and_similar_ids_are_noted(tmp_path):
    orders = write_file(tmp_path / "orders.csv", "user,item,timestamp\nu,12,1\nu,012,2\nu,z,3\n")
    write_file(tmp_path / "items.csv", "item,title\n12.0,Red\nz,Blue\n")
    data = read_dataset(orders, min_count=0)
    assert data.item_ids == ["12", "012", "z"] and data.titles == ["", "", "Blue"]
    assert (
        "2 item ids differ from another one only in how they are written, such as '12' and '012'"
        in " ".join(data.notes)
    )
    assert "items.csv describes 1 of 3 items" in data.notes


def test_an_items_file_that_describes_no_item_is_refused(tmp_path):
    orders = write_file(tmp_path / "orders.csv", CSV)
    write_file(tmp_path / "items.csv", "item,title\nB1,Red\n")
    with pytest.raises(UserError) as refused:
        read_dataset(orders, min_count=0)
    assert refused.value.message == "items.csv describes 0 of 3 items"
    assert refused.value.cause == "the interactions have item ids such as 'x'; items.csv has ids such as 'B1'"


def test_the_first_of_two_descriptions_counts_with_a_note(tmp_path):
    orders = write_file(tmp_path / "orders.csv", CSV)
    write_file(tmp_path / "items.csv", ITEMS + "x,Green,\n")
    data = read_dataset(orders, min_count=0)
    assert data.titles[data.item_ids.index("x")] == "Red"
    assert "items.csv has 1 further rows for items that it already describes: ignored" in data.notes


CP1252 = "user,item,timestamp\na,x,1\na,café,2\n"
UNDECODABLE = {
    "csv": ("o.csv", CP1252, 3),
    "csv, far down": ("o.csv", "user,item,timestamp\n" + "a,x,1\n" * 5000 + "a,café,2\n", 5002),
    "csv, gzip": ("o.csv.gz", CP1252, 3),
    "recbole": ("o.inter", "user_id:token\titem_id:token\ttimestamp:float\na\tx\t1\na\tcafé\t2\n", 3),
    "amazon": ("o.jsonl", '{"user_id": "a", "parent_asin": "café", "timestamp": 1, "rating": 5}\n', 1),
    "yelp": ("o.json", '{"user_id": "a", "business_id": "café", "date": "2020-01-01", "stars": 5}\n', 1),
    "movielens": ("ratings.dat", "1::1::5::1\n1::café::5::1\n", 2),
    "sequence": ("interactions.txt", "1 2\n2 é\n", 2),
    "inter-json": ("o.inter.json", '{"1":\n ["é"]}\n', 2),
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_another_encoding_is_refused_with_the_line_and_read_with_the_encoding_option(name, tmp_path):
    file, text, line = UNDECODABLE[name]
    path = write_file(tmp_path / file, text.encode("cp1252"))
    kind = {"amazon": "amazon-2023"}.get(name, name.split(",")[0])
    with pytest.raises(UserError) as refused:
        read_dataset(path, format=kind, min_count=0)
    assert refused.value.message == f"{path}, line {line}: byte 0xE9 is not valid UTF-8"
    assert "--encoding cp1252" in str(refused.value)
    if name != "sequence":  # whose ids are integers
        data = read_dataset(path, format=kind, min_count=0, encoding="cp1252")
        assert any("é" in item for item in data.item_ids)


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", UNDECODABLE)
def test_a_byte_order_mark_is_recognized_in_every_format(name, mark, tmp_path):
    file, text, _ = UNDECODABLE[name]
    path = write_file(tmp_path / file, text.replace("é", "3").encode(mark))
    data = read_dataset(path, format={"amazon": "amazon-2023"}.get(name, name.split(",")[0]), min_count=0)
    assert data.num_interactions > 0 and not any("\ufeff" in item for item in data.item_ids + data.user_ids)


@pytest.mark.parametrize(
    "encoding",
    ["klingon", "rot13", "base64", "undefined", "idna", "punycode", "utf7", "unicode_escape", "a\0b"],
)
def test_an_unknown_encoding_is_refused(encoding, tmp_path):
    with pytest.raises(UserError, match="is not a valid encoding"):
        read_dataset(write_file(tmp_path / "o.csv", CSV), encoding=encoding)


@pytest.mark.parametrize("separator", ["ab", "é", '"', "\n"])
def test_a_separator_that_is_not_one_byte_is_refused(separator, tmp_path):
    with pytest.raises(UserError, match="is not a valid separator"):
        read_dataset(write_file(tmp_path / "o.csv", CSV), separator=separator)


def test_decimal_commas_are_read_in_files_separated_by_semicolons(tmp_path):
    orders = write_file(tmp_path / "o.csv", "user;item;timestamp;rating\na;x;1;4,5\na;y;2;3,5\n")
    assert read_dataset(orders, min_count=0, min_rating=4).num_interactions == 1


def test_quoted_line_ends_belong_to_the_text_and_do_not_shift_the_line_of_an_error(tmp_path):
    write_file(tmp_path / "items.csv", 'item,title\nx,"Red\nand, blue"\ny,Blue\nz,Z\n')
    data = read_dataset(write_file(tmp_path / "o.csv", CSV), min_count=0)
    assert data.titles[data.item_ids.index("x")] == "Red and, blue"
    write_file(tmp_path / "items.csv", 'item,title\nx,"Red\nand, blue"\n,Blue\n')
    with pytest.raises(UserError, match=r"items\.csv, line 4: column 'item' is empty"):
        read_dataset(tmp_path / "o.csv", min_count=0)


def test_images_in_subfolders_are_found_and_two_images_of_one_item_are_refused(tmp_path):
    orders = write_file(tmp_path / "orders.csv", CSV.replace(",x", ",0108775015"))
    for name in ("010/0108775015.JPG", "b/c/y.png", "b/unknown.jpg", "b/y.txt"):
        write_file(tmp_path / "pictures" / name, b"")
    data = read_dataset(orders, images=tmp_path / "pictures", min_count=0)
    images = {item: path and path.name for item, path in zip(data.item_ids, data.images, strict=True)}
    assert images == {"0108775015": "0108775015.JPG", "y": "y.png", "z": None}
    write_file(tmp_path / "pictures" / "again" / "y.jpg", b"")
    with pytest.raises(UserError) as refused:
        read_dataset(orders, images=tmp_path / "pictures", min_count=0)
    assert "item y has 2 images" in str(refused.value) and "again/y.jpg and b/c/y.png" in str(refused.value)


def test_image_names_with_leading_zeros_are_matched_with_a_note(tmp_path):
    orders = write_file(tmp_path / "orders.csv", CSV.replace(",x", ",108775015"))
    write_file(tmp_path / "pictures" / "010" / "0108775015.jpg", b"")
    data = read_dataset(orders, images=tmp_path / "pictures", min_count=0)
    assert data.images[data.item_ids.index("108775015")] is not None
    assert "1 images are named like '0108775015' for item '108775015': they are matched" in data.notes


def test_notes_say_what_the_filters_dropped(tmp_path):
    rows = [(f"u{n % 6}", f"i{n % 5}", n, 1 + n % 5) for n in range(30)]
    rows += [("lonely", "i0", 99, 5), ("u0", "rare", 98, 5), rows[0], rows[0]]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp", "rating"], orient="row")
    frame.write_csv(tmp_path / "o.csv")
    notes = read_dataset(tmp_path / "o.csv").notes
    assert notes[1:] == [
        "2 of 34 interactions exactly repeat another one: kept; --drop-duplicates drops them",
        "5-core: 7 → 6 users, 6 → 5 items, interactions 34 → 32",
    ]
    notes = read_dataset(tmp_path / "o.csv", drop_duplicates=True, min_rating=2, min_count=2).notes
    assert notes[1:] == [
        "2 of 34 interactions exactly repeat another one: dropped",
        "ratings of 2 or more kept: interactions 32 → 26",
        "2-core: 7 → 6 users, 6 → 4 items, interactions 26 → 24",
    ]
    repeats = read_dataset(tmp_path / "o.csv", duplicates="last").notes
    assert "last of repeated (user, item) pairs kept: interactions 34 → 32" in repeats


def test_users_without_items_are_left_out_with_a_note(tmp_path):
    folder = tmp_path / "set"
    write_file(folder / "interactions.txt", "1 5 6\n2\n3 6 5\n")
    data = read_dataset(folder)
    assert data.user_ids == ["1", "3"]
    assert "1 of 3 users have no items and are left out; the first is user 2 in line 2" in data.notes
    write_file(tmp_path / "x.inter.json", json.dumps({"1": ["5"], "2": []}))
    assert read_dataset(tmp_path / "x.inter.json").user_ids == ["1"]


def test_a_folder_of_unknown_files_is_refused_with_their_names(tmp_path):
    write_file(tmp_path / "orders.csv", CSV)
    write_file(tmp_path / "products.csv", ITEMS)
    with pytest.raises(UserError) as refused:
        read_dataset(tmp_path)
    assert refused.value.cause == "it contains orders.csv, products.csv"
    assert "--interactions FILE --items FILE" in str(refused.value)


BROKEN = {  # a table, and what its error says
    "a quote that is not closed": (CSV.replace("b,y", 'b,"y'), "line 4: a quoted field is not closed"),
    "text behind a quote": (CSV.replace("b,y", 'b,"y"q'), "line 4: a quoted field is not closed, or text"),
    "carriage returns": (CSV.replace("\n", "\r"), "line 1: lines end with a lone carriage return"),
    "a column twice": ("user,item,timestamp,item\na,x,1,y\n", "line 1: two columns are named 'item'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_with_its_line(name, tmp_path):
    content, message = BROKEN[name]
    with pytest.raises(UserError) as refused:
        read_dataset(write_file(tmp_path / "o.csv", content), min_count=0)
    assert f"o.csv, {message}" in refused.value.message and "\n" not in refused.value.message


def test_similar_user_ids_are_noted(tmp_path):
    write_file(tmp_path / "o.csv", "user,item,timestamp\n1.0,x,1\n1,x,2\n")
    notes = " ".join(read_dataset(tmp_path / "o.csv", min_count=0).notes)
    assert "2 user ids differ from another one only in how they are written, such as '1.0' and '1'" in notes
