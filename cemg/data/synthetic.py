"""The synthetic dataset: every signal is planted by rule, for the demo and for fast tests.

Each item belongs to three independent clusters: a visual one, which only its picture shows, a textual one,
which only its text shows, and a collaborative one, which only the purchases show. Each user likes a few
clusters of each kind and has a habit: after a cluster follows the next liked one, in cyclic order. A model
that ignores pictures, texts, co-purchases or the order of purchases therefore ranks worse.

U users, N items, C clusters per kind, 3 kinds: visual, textual, collaborative.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.storage import files
from cemg.storage.read import read_parquet

KINDS = ("visual", "textual", "collaborative")
CLUSTERS = 6  # per kind; 400 items fill the 6 x 6 x 6 combinations with about two each
LIKED = 2  # clusters per kind that a user likes
TASTE, HABIT = 2.0, 2.5  # added to the log-weight of an item per kind that matches the user's taste or habit
SKEW = 0.9  # popularity of the item of rank r is r ** -SKEW
NEW, NEW_WEIGHT = 0.1, 0.1  # share of new items, and the factor on their popularity
SHORTEST, LONGEST = 6, 25  # items of a history
MISSING = 0.03  # share of items without a picture, and of items without a text
SIDE = 80  # of a picture, in pixels

SHAPES = ("disc", "square", "triangle", "ring", "cross", "stripes")
COLOURS = ((205, 45, 45), (45, 95, 205), (50, 160, 70), (225, 165, 30), (140, 60, 170), (40, 40, 45))
TOPICS = (
    ("garden", "trowel watering-can seedling compost rake greenhouse tulip hedge", "grow beds of flowers"),
    ("kitchen", "skillet whisk ladle saucepan casserole rolling-pin oven dough", "cook supper for friends"),
    ("astronomy", "telescope star-chart planet eclipse comet nebula tripod orbit", "watch the night sky"),
    ("music", "violin metronome sheet-music cello drumstick melody piano chorus", "practise a concerto"),
    ("sailing", "rudder anchor jib compass dinghy mooring harbour keel", "cross the bay in a breeze"),
    ("office", "stapler notebook folder ledger calendar envelope printer desk", "keep the papers in order"),
)
ADJECTIVES = (
    "plain",
    "sturdy",
    "modest",
    "clever",
    "quiet",
    "handy",
    "lasting",
    "simple",
    "honest",
    "trusty",
)


@dataclass(frozen=True, slots=True)
class World:
    """The planted ground truth.

    Attributes:
        clusters: Cluster of each item per kind, [N, 3] int.
        popularity: Weight of each item, [N] float.
        likes: Whether a user likes a cluster, [U, 3, C] bool.
        following: Cluster that a user's habit puts after each cluster, [U, 3, C] int.
    """

    clusters: np.ndarray
    popularity: np.ndarray
    likes: np.ndarray
    following: np.ndarray

    def scores(self, last: np.ndarray | None, *, blind_to: str | None = None) -> np.ndarray:
        """Compute the log-weight of every item as the next item of every user.

        Args:
            last: Last item of each user, [U]; None for the first item.
            blind_to: One of KINDS to ignore, as an observer without this signal would.

        Returns:
            The log-weights, [U, N].
        """
        weight = np.repeat(np.log(self.popularity)[None, :], len(self.likes), axis=0)  # [U, N]
        for kind, name in enumerate(KINDS):
            if name == blind_to:
                continue
            cluster = self.clusters[:, kind]  # [N]
            weight += TASTE * self.likes[:, kind][:, cluster]
            if last is not None:
                users = np.arange(len(last))
                expected = self.following[users, kind, cluster[last]]  # [U]
                weight += HABIT * (cluster[None, :] == expected[:, None])
        return weight


def plant(*, users: int, items: int, seed: int) -> World:
    """Draw the clusters and popularities of the items, and the likes of the users."""
    rng = np.random.default_rng([seed, 1])
    clusters = np.stack([rng.permutation(np.arange(items) % CLUSTERS) for _ in KINDS], axis=1)
    popularity = np.arange(1, items + 1, dtype=np.float64) ** -SKEW
    popularity[rng.permutation(items)[: round(NEW * items)]] *= NEW_WEIGHT
    order = rng.random((users, len(KINDS), CLUSTERS)).argsort(axis=2)
    likes = order < LIKED
    return World(clusters, rng.permutation(popularity), likes, _following(likes))


def synthetic_dataset(folder: Path, *, users: int = 1200, items: int = 400, seed: int = 0) -> Dataset:
    """Generate the synthetic dataset. The same arguments give the same dataset.

    Writes ``folder/images/*.png`` and ``folder/planted.parquet``, see `planted_clusters`.

    Args:
        folder: Folder to write.
        users: Number of users.
        items: Number of items.
        seed: Random seed.

    Raises:
        UserError: There are too few items for the longest history.
    """
    if users < 1 or items < 2 * LONGEST:
        raise UserError(
            f"a synthetic set needs at least 1 user and {2 * LONGEST} items, got {users} and {items}"
        )
    world = plant(users=users, items=items, seed=seed)
    titles, texts = _write_texts(world, seed)
    data = Dataset(
        name="synthetic",
        user_ids=[f"user-{u + 1:04d}" for u in range(users)],
        item_ids=[f"item-{i + 1:04d}" for i in range(items)],
        sequences=_buy(world, np.random.default_rng([seed, 2])),
        titles=titles,
        texts=texts,
        images=_draw_images(world, folder / "images", seed),
        tie_rule="no ties: the order of purchase is generated",
        synthetic=True,
        notes=[f"synthetic: pictures drawn, texts written and purchases generated by rule, seed {seed}"],
    )
    columns = {"item": np.arange(items, dtype=np.int32)}
    columns |= {name: world.clusters[:, kind].astype(np.int32) for kind, name in enumerate(KINDS)}
    with files.durable(folder / "planted.parquet") as part:
        pl.DataFrame(columns).write_parquet(part)
    return data


def planted_clusters(folder: Path) -> pl.DataFrame:
    """Read the planted clusters of ``folder``.

    Returns:
        One row per item, with the columns ``item``, ``visual``, ``textual`` and ``collaborative``, all int32.
    """
    schema = {name: pl.Int32 for name in ("item", *KINDS)}
    return read_parquet(
        folder / "planted.parquet",
        schema,
        fix=f"generate the set again: cemg-data synthetic {quote(str(folder))}",
    )


def _following(likes: np.ndarray) -> np.ndarray:
    """Return the first liked cluster after each cluster, in cyclic order; [U, 3, C] bool -> [U, 3, C] int."""
    following = np.zeros(likes.shape, dtype=np.int64)
    for step in range(CLUSTERS, 0, -1):  # the nearest is written last
        candidate = (np.arange(CLUSTERS) + step) % CLUSTERS
        following = np.where(likes[:, :, candidate], candidate, following)
    return following


def _buy(world: World, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the purchases: at each step an item that the user does not own, by its weight (Gumbel-max)."""
    users, items = len(world.likes), len(world.clusters)
    lengths = np.minimum(SHORTEST + rng.geometric(0.14, users) - 1, LONGEST)
    bought = np.full((users, LONGEST), -1, dtype=np.int32)
    owned = np.zeros((users, items), dtype=bool)
    last = None
    for step in range(int(lengths.max())):
        weight = world.scores(last) + rng.gumbel(size=(users, items))
        last = np.where(owned, -np.inf, weight).argmax(axis=1)  # [U]
        bought[:, step] = last
        owned[np.arange(users), last] = True
    return [row[:length].copy() for row, length in zip(bought, lengths, strict=True)]


def _write_texts(world: World, seed: int) -> tuple[list[str], list[str | None]]:
    """Write titles and texts that depend only on the textual cluster; some are missing ("" and None)."""
    titles: list[str] = []
    texts: list[str | None] = []
    for item, topic in enumerate(world.clusters[:, KINDS.index("textual")]):
        rng = np.random.default_rng([seed, 3, item])
        title, text = _write_text(topic, rng)
        missing = rng.random() < MISSING
        titles.append("" if missing else title)
        texts.append(None if missing else text)
    return titles, texts


def _write_text(topic: int, rng: np.random.Generator) -> tuple[str, str]:
    name, words, purpose = TOPICS[topic]
    things = [str(word).replace("-", " ") for word in rng.permutation(words.split())]
    first, second = (str(word) for word in rng.permutation(ADJECTIVES)[:2])
    title = f"{first.capitalize()} {things[0]}"
    text = f"{title}. A {second} thing from the {name} shelf, for those who {purpose}; "
    return title, text + f"goes well with the {things[1]}, the {things[2]} and the {things[3]}."


def _draw_images(world: World, folder: Path, seed: int) -> list[Path | None]:
    """Draw one picture per item, which depends only on the visual cluster; some are missing (None)."""
    files.make_folder(folder)
    images: list[Path | None] = []
    for item, cluster in enumerate(world.clusters[:, KINDS.index("visual")]):
        rng = np.random.default_rng([seed, 4, item])
        if rng.random() < MISSING:
            images.append(None)
            continue
        path = folder / f"item-{item + 1:04d}.png"
        part = path.with_suffix(f".{os.getpid()}.png")  # another process may be reading the last one
        _draw_image(cluster, rng).save(part)  # not flushed, because every start draws it again
        part.replace(path)
        images.append(path)
    return images


def _draw_image(cluster: int, rng: np.random.Generator) -> Image.Image:
    """Draw the shape and colour of a cluster with random size, position and shade on a pale background."""
    background = np.clip(rng.integers(205, 250) + rng.integers(-12, 13, (SIDE, SIDE, 3)), 0, 255)
    image = Image.fromarray(background.astype(np.uint8))
    shade = rng.integers(-25, 26, 3)
    red, green, blue = (int(c) for c in np.clip(np.array(COLOURS[cluster]) + shade, 0, 255))
    x, y = (float(v) for v in SIDE / 2 + rng.uniform(-8, 8, 2))
    circle = (x, y, float(rng.uniform(18, 28)))
    _draw_shape(ImageDraw.Draw(image), SHAPES[cluster], circle, (red, green, blue))
    return image


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, circle: tuple[float, float, float], colour: tuple[int, int, int]
) -> None:
    """Draw ``shape`` inside ``circle``, given as (x, y, radius)."""
    x, y, radius = circle
    box = (x - radius, y - radius, x + radius, y + radius)
    third = radius / 3
    match shape:
        case "disc":
            draw.ellipse(box, fill=colour)
        case "square":
            draw.rectangle(box, fill=colour)
        case "triangle":
            turns = [math.radians(angle) for angle in (-90, 30, 150)]
            draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in turns], fill=colour)
        case "ring":
            draw.ellipse(box, outline=colour, width=int(radius / 2.5))
        case "cross":
            draw.rectangle((x - third, y - radius, x + third, y + radius), fill=colour)
            draw.rectangle((x - radius, y - third, x + radius, y + third), fill=colour)
        case _:  # stripes
            for top in np.arange(y - radius, y + radius, 2 * third):
                draw.rectangle((x - radius, float(top), x + radius, float(top) + third), fill=colour)
