"""Sample recommendations of a report: pictures, scores, and what is said where pictures are missing."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cemg.data import Dataset
from cemg.recommender import Recommender
from cemg.report import samples
from cemg.report.blocks import SampleUser, SampleUsers, Text
from cemg.report.samples import HISTORY, PICTURE_SIDE, TOP, USERS, samples_section, thumbnail


def users_of(run: Path) -> list[SampleUser]:
    return next(block for block in samples_section(run) if isinstance(block, SampleUsers)).users


def texts_of(run: Path) -> list[str]:
    return [block.text for block in samples_section(run) if isinstance(block, Text)]


def test_lists_are_those_of_the_recommender_for_the_history_before_the_test_item(tiny_run: Path) -> None:
    users = users_of(tiny_run)
    assert len(users) == USERS
    data = Dataset.load(tiny_run / "data")
    recommender = Recommender.from_run(tiny_run)
    for user in users:
        rows = data.sequences[data.user_ids.index(user.user)]
        history = [data.item_ids[row] for row in rows[:-1]]
        found = recommender.recommend(history, top=TOP, beams=10, exclude_history=True)
        titles = [title or item for item, title in zip(found.ids[0], found.titles[0], strict=True)]
        assert [card.title for card in user.recommended] == titles
        assert [card.note for card in user.recommended] == [
            f"score {s:.2f}" for s in found.scores[0].tolist()
        ]
        assert sum(card.certified for card in user.recommended) == int(found.certified[0])
        assert user.earlier + len(user.history) == len(history) and len(user.history) <= HISTORY
        target = data.item_ids[rows[-1]]
        assert (data.titles[rows[-1]] or target) in user.outcome
        assert ("number" in user.outcome) == (target in found.ids[0])


def test_items_with_an_image_have_a_small_jpeg(tiny_run: Path) -> None:
    data = Dataset.load(tiny_run / "data")
    with_image = {data.titles[n] or data.item_ids[n] for n in range(data.num_items) if data.images[n]}
    cards = [card for user in users_of(tiny_run) for card in (*user.history, *user.recommended)]
    assert any(card.picture for card in cards)
    for card in cards:
        assert card.picture is None or card.title in with_image
        if card.picture is not None:
            image = Image.open(io.BytesIO(base64.b64decode(card.picture.partition(",")[2])))
            assert image.format == "JPEG" and max(image.size) <= PICTURE_SIDE


def test_the_page_of_a_run_shows_the_users_and_their_pictures(tiny_run: Path) -> None:
    page = (tiny_run / "report" / "report.html").read_text()
    assert page.count('<article class="user">') == USERS
    assert page.count('<img src="data:image/jpeg;base64,') >= USERS
    assert "Left out" not in page and len(page) < 1_000_000


def test_the_report_says_that_the_data_has_no_images(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dataset.load(tiny_run / "data")
    bare = dataclasses.replace(data, images=[None] * data.num_items)
    monkeypatch.setattr(samples, "dataset_of", lambda run: bare)
    assert "The data has no images, so there are titles only." in texts_of(tiny_run)
    assert not any(card.picture for user in users_of(tiny_run) for card in user.history)


def test_the_report_says_how_many_pictures_are_gone(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = Dataset.load(tiny_run / "data")
    moved = dataclasses.replace(data, images=[tmp_path / "gone.png"] * data.num_items)
    monkeypatch.setattr(samples, "dataset_of", lambda run: moved)
    cards = [card for user in users_of(tiny_run) for card in (*user.history, *user.recommended)]
    assert f"{len(cards)} pictures cannot be read now; their items have titles only." in texts_of(tiny_run)


def test_a_run_without_a_generator_has_no_samples_and_says_why(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "generator" / "weights.safetensors").unlink()
    from cemg.report.sources import or_left_out

    (block,) = or_left_out(samples_section, run)
    assert isinstance(block, Text) and block.text.startswith("Left out: ") and "weights" in block.text


def test_the_thumbnail_of_an_unreadable_picture_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("pipe.png", "text.png", "missing.png"):
        assert thumbnail(tmp_path / name) is None


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "I;16"])
def test_thumbnails_are_made_of_every_mode(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (300, 200)).save(tmp_path / "a.png")
    picture = thumbnail(tmp_path / "a.png")
    assert picture is not None and picture.startswith("data:image/jpeg;base64,")
