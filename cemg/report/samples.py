"""Recommendations for a few users, with pictures where the data has them."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cemg.data import Dataset
from cemg.decoding import Recommendations
from cemg.evaluation import seeded_sample
from cemg.features.vision import open_image, read_image_file
from cemg.progress import printable
from cemg.recommender import Recommender
from cemg.report.blocks import Block, Card, SampleUser, SampleUsers, Text
from cemg.report.sources import dataset_of, left_out

USERS, HISTORY, TOP = 8, 6, 5  # users shown; items of each history and of each list
PICTURE_SIDE = 112  # pixels: twice the size on the page, for dense screens
JPEG_QUALITY = 70


def samples_section(run: Path, *, device: str = "cpu") -> list[Block]:
    """Lists for a seeded sample of the tested users, from what was known before the test item."""
    data = dataset_of(run)
    split = data.split()
    chosen = seeded_sample(split, USERS)
    if not len(chosen):
        return [left_out(run, "no user has a test item")]
    recommender = Recommender.from_run(run, device=device)
    beams = max(recommender.artifacts.config.decoding.beams, TOP)
    before_test = split.histories("test")
    histories = [before_test[row] for row in chosen]
    ids = [[data.item_ids[item] for item in history] for history in histories]
    found = recommender.recommend(ids, top=TOP, beams=beams, exclude_history=True)
    album = _Album(data)
    users = []
    for place, row in enumerate(chosen):
        history = histories[place][-HISTORY:]
        users.append(
            SampleUser(
                user=printable(data.user_ids[split.users[row]]),
                history=[album.card(data.item_ids[item], data.titles[item]) for item in history],
                earlier=len(histories[place]) - len(history),
                recommended=_recommended(album, found, place),
                outcome=_outcome(data, found.ids[place], int(split.test[row])),
            )
        )
    intro = (
        f"{len(users)} of {len(split.users):,} tested users, drawn at random. Each list is made from the "
        f"history before the test item, which is excluded from the list, with {beams} beams. The score is "
        "the log-probability of the item's semantic ID. A certified result provably has this rank among all "
        "items of the catalog."
    )
    if not found.certified.any():
        intro += (
            " No result here is certified: the search pruned prefixes that could lead to better items. The "
            "lists may still be the true top. This is usual under decoding.normalize=vocab; more beams "
            "certify more."
        )
    return [Text(intro), *album.notes(), SampleUsers(users, album.illustrated)]


def _recommended(album: _Album, found: Recommendations, place: int) -> list[Card]:
    proven = int(found.certified[place])
    rows = zip(found.ids[place], found.titles[place], found.scores[place].tolist(), strict=True)
    return [
        album.card(item, title, note=f"score {score:.2f}", certified=rank < proven)
        for rank, (item, title, score) in enumerate(rows)
        if item is not None
    ]


def _outcome(data: Dataset, listed: Sequence[int | str | None], target: int) -> str:
    item = data.item_ids[target]
    title = printable(data.titles[target] or item)
    if item in listed:
        return f"The user took {title} next: number {listed.index(item) + 1} of this list."
    return f"The user took {title} next, which is not among these {len(listed)}."


class _Album:
    """Pictures of items. ``unreadable`` counts the files that could not be used."""

    def __init__(self, data: Dataset) -> None:
        self.paths: dict[int | str, Path | None] = dict(zip(data.item_ids, data.images, strict=True))
        self.illustrated = any(self.paths.values())
        self.unreadable = 0

    def card(self, item: int | str, title: str | None, *, note: str = "", certified: bool = False) -> Card:
        """An item with its picture, if the data has one that can be read."""
        return Card(printable(title or str(item)), self._picture(item), note, certified)

    def notes(self) -> list[Block]:
        """What is said where pictures are missing."""
        if not self.illustrated:
            return [Text("The data has no images, so there are titles only.")]
        if self.unreadable:
            return [Text(f"{self.unreadable} pictures cannot be read now; their items have titles only.")]
        return []

    def _picture(self, item: int | str) -> str | None:
        path = self.paths.get(item)  # an item that was added to the catalog has none
        if path is None:
            return None
        picture = thumbnail(path)
        self.unreadable += picture is None
        return picture


def thumbnail(path: Path) -> str | None:
    """A small JPEG of an image file as a data URI. None where the file is missing or cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` has its own limit
            image = open_image(io.BytesIO(read_image_file(path)))
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    except Exception:  # malformed files make the decoders raise almost anything
        return None
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")
