"""Features that several commands encode in shards: the same bits as in one, and refusals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from cemg.commands import catalog, train
from cemg.commands.shards import ADDED, FEATURES, write_parts
from cemg.config import load_config
from cemg.errors import UserError
from cemg.features import FeatureCache, Features, ImageConfig, TextConfig, encode_images, encode_texts, shards
from cemg.features.shards import FeatureWork, load_shards
from cemg.features.text import TextEncoder
from cemg.features.vision import ImageEncoder
from cemg.pipeline import Pipeline
from cemg.storage.manifest import Manifest
from cemg.storage.parts import Shard
from cemg.storage.run import Run

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*images cannot"),
]
IMAGES = ImageConfig("mobilenet_v3_small", "random", batch_size=3)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch) -> None:
    monkeypatch.setattr(shards, "PART_ITEMS", 6)


@pytest.fixture
def items(tmp_path: Path) -> tuple[list[str | None], list[Path | None]]:
    """17 items: texts of many lengths, repeated, blank and missing ones, repeated and broken images."""
    texts: list[str | None] = [
        " ".join(["plain", "garden", "music"] * (n % 5)) + f" a{n % 11}" for n in range(17)
    ]
    texts[3:6] = [None, "  ", texts[0]]
    images: list[Path | None] = []
    for n in range(17):
        pixels = np.random.default_rng(n % 12).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        images.append(tmp_path / f"{n}.png")
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:500])
    images[5:7] = [None, tmp_path / "absent.png"]
    return texts, images


def work_of(items: tuple[list[str | None], list[Path | None]], model: Path, **text: object) -> FeatureWork:
    return FeatureWork(*items, text=TextConfig(str(model), batch_size=2, **text), image=IMAGES)


def encoded(items, model: Path, cache: FeatureCache | None = None) -> tuple[Features, Features]:
    texts, images = items
    return (
        encode_texts(texts, config=TextConfig(str(model), batch_size=2), cache=cache, progress=False),
        encode_images(images, config=IMAGES, cache=cache, progress=False),
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_joined_features_equal_those_of_one_process_bit_for_bit(
    items, tiny_text_model, tmp_path, monkeypatch, count
):
    whole = encoded(items, tiny_text_model)
    work, out = work_of(items, tiny_text_model), tmp_path / "features.parquet"
    assert [name for name, _ in work.parts] == ["text"] * 3 + ["image"] * 2
    for index in range(count, 0, -1):
        write_parts(work, out, shard=Shard(index, count), label="")
    cache = FeatureCache(tmp_path / "cache")
    assert load_shards(work, out, cache) is None
    monkeypatch.setattr(TextEncoder, "_encode", None)  # nothing is encoded again; broken images stay broken
    monkeypatch.setattr(
        ImageEncoder,
        "batches",
        lambda self, files, reasons: iter([reasons.update({row: "broken" for row, _ in files})][:0]),
    )
    joined = encoded(items, tiny_text_model, FeatureCache(tmp_path / "cache"))
    for one, other in zip(whole, joined, strict=True):
        assert torch.equal(one.values, other.values) and torch.equal(one.present, other.present)
    assert whole[0].present.sum() == 15 and whole[1].present.sum() == 14


def test_an_interrupted_shard_continues(items, tiny_text_model, tmp_path, monkeypatch):
    work, out, shard = work_of(items, tiny_text_model), tmp_path / "features.parquet", Shard(1, 2)
    expected = write_parts(work, tmp_path / "expected.parquet", shard=shard, label="").read_bytes()
    table, computed = FeatureWork.table, []

    def counted(self: FeatureWork, number: int):
        if computed == [0]:
            computed.append(-1)
            raise KeyboardInterrupt
        computed.append(number)
        return table(self, number)

    monkeypatch.setattr(FeatureWork, "table", counted)
    with pytest.raises(KeyboardInterrupt):
        write_parts(work, out, shard=shard, label="")
    assert write_parts(work, out, shard=shard, label="").read_bytes() == expected
    assert computed == [0, -1, 2, 4]


def test_shards_of_other_items_or_encoders_are_refused(items, tiny_text_model, tmp_path):
    out, cache = tmp_path / "features.parquet", FeatureCache(tmp_path / "cache")
    work = work_of(items, tiny_text_model)
    write_parts(work, out, shard=Shard(1, 2), label="")
    with pytest.raises(UserError, match=r"shard 2/2 of .* is missing[\s\S]*there is no"):
        load_shards(work, out, cache)
    write_parts(work_of(items, tiny_text_model, pooling="cls"), out, shard=Shard(2, 2), label="")
    with pytest.raises(UserError, match=r"its text encoder is .*cls.*, not .*mean"):
        load_shards(work, out, cache)
    texts, images = items
    write_parts(work_of((["new", *texts[1:]], images), tiny_text_model), out, shard=Shard(2, 2), label="")
    with pytest.raises(UserError, match="its list of texts and images is"):
        load_shards(work, out, cache)
    shard = write_parts(work, out, shard=Shard(2, 2), label="")
    content = bytearray(shard.read_bytes())
    place = parquet.ParquetFile(shard).metadata.row_group(0).column(2).data_page_offset + 60
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-2-of-2.parquet is not a finished shard"):
        load_shards(work, out, cache)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def train_settings(tiny_settings: list[str]) -> list[str]:
    settings = [*tiny_settings, "text.batch_size=4", "image.batch_size=4"]
    return [part for setting in settings for part in ("--set", setting)]


def test_a_run_trained_from_shards_has_the_features_of_one_without(
    tiny_settings, tmp_path, command: Callable[..., int], capsys
):
    options = train_settings(tiny_settings)
    run, alone = (
        tmp_path / "run",
        Pipeline(Run(tmp_path / "alone"), load_config(None, options[1::2]), cache=tmp_path / "alone-cache"),
    )
    alone.data()
    alone.features()
    for shard in ("1/2", "2/2"):
        assert command(train.main, "--run", run, *options, "--shard", shard) == 0
    assert f"wrote {run / 'shards' / 'features.shard-2-of-2.parquet'}: " in capsys.readouterr().err
    assert not (run / "features").exists() and not (run / "config.yaml").exists()
    (run / "shards" / "features.shard-1-of-2.parquet").rename(tmp_path / "kept")
    assert command(train.main, "--run", run, *options, "--join") == 2
    assert f"error: shard 1/2 of {run / FEATURES} is missing" in capsys.readouterr().err
    assert not (run / "data").exists()
    (tmp_path / "kept").rename(run / "shards" / "features.shard-1-of-2.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "_encode", None)
        assert command(train.main, "--run", run, *options, "--join") == 0
    one, other = (Manifest.read(folder / "features") for folder in (tmp_path / "alone", run))
    assert one.files == other.files and one.contents == other.contents


def test_items_added_from_shards_get_the_same_codes(tiny_run, tmp_path, command, capsys):
    lines = [f"n{n},{' '.join(['plain telescope'] * (1 + n % 4))} {n}" for n in range(14)]
    table = tmp_path / "new.csv"
    table.write_text("\n".join(["item,text", *lines]) + "\n")
    runs = [Path(shutil.copytree(tiny_run, tmp_path / name)) for name in ("whole", "shards")]
    arguments = [("add", "--run", run, "--items", table) for run in runs]
    assert command(catalog.main, *arguments[0]) == 0
    expected = capsys.readouterr().out
    for shard in ("2/3", "1/3", "3/3"):
        assert command(catalog.main, *arguments[1], "--shard", shard) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and re.search(rf"wrote {runs[1] / 'shards'}/added.shard-3-of-3", captured.err)
    table.write_text(table.read_text() + "n14,plain garden\n")
    assert command(catalog.main, *arguments[1], "--join") == 2
    err = capsys.readouterr().err
    assert f"{ADDED.stem}.shard-1-of-3.parquet was computed by another command" in err
    table.write_text("\n".join(["item,text", *lines]) + "\n")
    assert command(catalog.main, *arguments[1], "--join") == 0
    assert capsys.readouterr().out == expected
    saved = [(run / "catalog" / "catalog.safetensors").read_bytes() for run in runs]
    assert saved[0] == saved[1]
