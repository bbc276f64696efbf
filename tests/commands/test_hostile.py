"""Hostile input: text that looks like markup, endless files, and archives and images that expand."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cemg.commands import console, recommend
from cemg.config import load_config
from cemg.data import Dataset, read_dataset
from cemg.data.readers import limits
from cemg.errors import UserError
from cemg.features import ImageConfig, TextConfig, encode_images, encode_texts
from cemg.generator import BackboneConfig, build_backbone
from cemg.pipeline.changes import image_digests
from cemg.progress import plain_console, printable
from cemg.tokenizer import Catalog

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")
TITLE = "[/b] :smile: [red]\x1b[2J\x1b]0;owned\x07\nsecond line\ud800\u202e"


def test_a_title_is_printed_as_text_on_one_line():
    shown = printable(TITLE)
    assert shown == r"[/b] :smile: [red]\x1b[2J\x1b]0;owned\x07\nsecond line\ud800\u202e"
    assert printable("Café – 100 % コーヒー") == "Café – 100 % コーヒー"


def test_the_console_does_not_interpret_markup_or_emoji():
    out = io.StringIO()
    terminal = plain_console()
    terminal.file = out
    terminal.print("[/b] [red]a[/red] :smile:")
    assert out.getvalue() == "[/b] [red]a[/red] :smile:\n"


def test_recommendations_with_hostile_titles_are_a_table(tiny_run, tmp_path, command, capsys, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    titles = {f"item-{row:04d}": "[/b]\x1b[31mTitle\nof two lines" for row in range(60)}
    (run / "catalog" / "added_titles.json").write_text(json.dumps(titles))
    monkeypatch.setenv("COLUMNS", "160")
    assert command(recommend.main, "--run", run, "--no-verify", "--user", "user-0001", "--top", 3) == 0
    printed = capsys.readouterr().out
    assert printed.count(r"[/b]\x1b[31mTitle\nof two lines") == 3
    assert "\x1b[31m" not in printed


def test_an_error_with_escape_sequences_is_printed_as_text(monkeypatch, capsys):
    def fail() -> None:
        raise UserError("user '\x1b[31mred' is unknown", cause="[/b]")

    with pytest.raises(SystemExit):
        console.run(fail)
    assert capsys.readouterr().err == "error: user '\\x1b[31mred' is unknown\n  cause: [/b]\n"


def test_a_character_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.run(lambda: print("Café"))
    sys.stdout.flush()
    assert raw.getvalue() == b"Caf\\xe9\n"


@pytest.mark.parametrize("bad", ["a\x1b[2J", "two\nlines", "\ud800", "", "tab\t", "\u202eright to left"])
@pytest.mark.parametrize("what", ["user", "item"])
def test_an_id_with_a_control_character_is_refused(what, bad):
    users, items = (["u", bad], ["i"]) if what == "user" else (["u"], ["i", bad])
    with pytest.raises(UserError, match=f"shop: {what} id .* is empty or contains a control character"):
        Dataset(
            name="shop", user_ids=users, item_ids=items, sequences=[np.zeros(1, np.int32)] * len(users),
            titles=[""] * len(items), texts=[None] * len(items), images=[None] * len(items), tie_rule="none",
        )  # fmt: skip
    with pytest.raises(UserError, match="is empty or contains a control character"):
        Catalog.from_codes(torch.tensor([[0], [1]]), 2, ["i", bad])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    "text, said",
    [
        (BOMB, "its aliases expand to more than 100,000 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 30_000, "nested too deeply"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("a" * 200_000, "more than 100,000 characters"),
        ("seed: 2026-13-45", "month must be in 1..12"),
    ],
)
def test_a_configuration_that_expands_without_limit_is_refused(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "c.yaml")
    assert said in str(refused.value)


def test_a_configuration_is_not_read_from_an_endless_device():
    with pytest.raises(UserError, match="pipe or a device instead of a file"):
        load_config(Path("/dev/zero"))


def test_a_small_yaml_alias_is_accepted(tmp_path):
    (tmp_path / "c.yaml").write_text("graph: {dim: &dim 32}\npca: {dim: *dim}\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.graph.dim, config.pca.dim) == (32, 32)


def _png_of(width: int, height: int) -> bytes:
    """A valid PNG of black 1-bit pixels, a few kilobytes long."""
    row = b"\0" + bytes((width + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_endless_images_and_images_with_too_many_pixels_are_masked_with_the_reason(tmp_path):
    files = {name: tmp_path / name for name in ("huge.png", "large.png", "pipe.png", "sparse.png", "a.eps")}
    files["huge.png"].write_bytes(_png_of(20_000, 20_000))
    files["large.png"].write_bytes(_png_of(13_000, 13_000))  # 169 megapixels
    os.mkfifo(files["pipe.png"])
    with files["sparse.png"].open("wb") as sparse:
        sparse.truncate(1 << 40)
    files["a.eps"].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    paths = [*files.values(), Path("/dev/zero"), tmp_path]
    config = ImageConfig(backbone="shufflenet_v2_x0_5", weights="random")
    with pytest.warns(UserWarning, match="7 of 7 images cannot be read"):
        found = encode_images(paths, config=config, progress=False)
    assert not found.present.any()
    device = "not a regular file"
    said = ["400000000 pixels", "13000 x 13000 pixels; the limit is 80,000,000", device,
            "the limit is 268,435,456", "Ghostscript", device, device]  # fmt: skip
    for row, reason in enumerate(said):
        assert reason in found.reasons[row], (paths[row], found.reasons[row])


@pytest.mark.parametrize("build", [
    lambda folder: build_backbone(BackboneConfig(kind="causal", pretrained=folder), 2, 4, history_items=2),
    lambda folder: build_backbone(BackboneConfig(kind="t5", pretrained=folder), 2, 4, history_items=2),
    lambda folder: encode_texts(["a"], config=TextConfig(model=folder)),
])  # fmt: skip
def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch, build):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import BertConfig as C, BertModel as M\n"
    (tmp_path / "evil.py").write_text(code)
    auto = dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), "evil.M")
    about = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", **auto}, "architectures": ["M"]}
    (tmp_path / "config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError):
        build(str(tmp_path))
    assert not ran.exists()


def _refused(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_dataset(path)
    return str(refused.value)


def test_an_archive_that_expands_too_much_is_refused(tmp_path, monkeypatch):
    bomb = tmp_path / "reviews.json.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(8):
            file.write(bytes(1 << 20))
    monkeypatch.setattr(limits, "FREE_BYTES", 1 << 20)
    assert f"{bomb} expands to more than 100 times its size" in _refused(bomb)
    assert "expands to more than 100 times" in _refused(tmp_path)  # as a folder too


def test_a_table_of_a_million_columns_is_refused(tmp_path):
    (tmp_path / "interactions.csv").write_text(",".join(f"c{n}" for n in range(1_000_000)) + "\n")
    assert "has 1,000,000 columns; the limit is 2,000" in _refused(tmp_path)


def test_a_parquet_file_that_claims_too_many_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FREE_ROWS", 1000)
    same = pl.Series([1]).new_from_index(0, 1_000_000)
    pl.DataFrame({"user": same, "item": same, "timestamp": same}).write_parquet(
        tmp_path / "interactions.parquet"
    )
    assert "expands to too many rows" in _refused(tmp_path)


def test_an_endless_source_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (Path("/dev/zero"), tmp_path / "pipe.csv"):
        assert f"{path} is not a regular file" in _refused(path)
    (tmp_path / "link.csv").symlink_to("/dev/zero")
    assert "not a regular file" in _refused(tmp_path / "link.csv")


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000])
def test_json_that_cannot_be_parsed_is_refused_with_its_line(tmp_path, value):
    review = '{"user_id": "u", "parent_asin": "i", "timestamp": 1, "rating": 5.0}\n'
    (tmp_path / "reviews.jsonl").write_text(review + review.replace("1,", f"{value},"))
    assert "reviews.jsonl, line 2" in _refused(tmp_path / "reviews.jsonl")
    (tmp_path / "interactions.txt").write_text("1 2 3\n")
    (tmp_path / "items.json").write_text('{"1": {"title": ' + value)
    assert "items.json" in _refused(tmp_path / "interactions.txt")


def test_a_list_length_of_10_to_the_12_is_refused(tiny_run, command, capsys):
    assert command(recommend.main, "--run", tiny_run, "--user", "user-0001", "--top", 10**12) == 2
    assert "beams must be within 1 … 100,000, got 1,000,000,000,000" in capsys.readouterr().err


@pytest.mark.parametrize("allocate", [lambda: bytearray(1 << 60), lambda: torch.empty(1 << 58)])
def test_a_refused_allocation_is_an_error_in_one_line(allocate, capsys):
    with pytest.raises(SystemExit) as end:
        console.run(allocate)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: not enough memory\n")


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png", "link.png"])
def test_an_image_path_must_stay_in_its_folder_unless_another_is_allowed(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(_png_of(8, 8))
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [f"u{user},i{item},{item}" for user in range(5) for item in range(5)]
    (shop / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    (shop / "items.csv").write_text(f"item,title,image\ni0,One,{name.format(folder=tmp_path)}\n")
    said = _refused(shop)
    assert "item i0 names an image outside of" in said
    assert f"fix:   allow its folder: --images {tmp_path}" in said
    assert read_dataset(shop, images=tmp_path).images[0] is not None


def test_a_too_large_image_is_not_read_to_hash_it(tmp_path):
    (tmp_path / "small.png").write_bytes(_png_of(8, 8))
    with (tmp_path / "sparse.png").open("wb") as sparse:
        sparse.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe.png")
    paths = [tmp_path / name for name in ("small.png", "sparse.png", "pipe.png", "absent.png")]
    small, sparse_size, pipe, absent = image_digests([*paths], tmp_path)
    assert small == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert sparse_size is not None and "the limit is 268,435,456" in sparse_size
    assert pipe is None and absent is None
