"""Which picture belongs to which item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import polars as pl

from cemg.data.readers.values import other_forms
from cemg.errors import UserError

PICTURES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".jfif",
    ".ppm",
    ".pgm",
)


def image_paths(
    about: pl.DataFrame, named_in: Path | None, images: Path | None
) -> tuple[list[Path | None], list[str]]:
    """The picture of each item, and notes: named files that are absent, a folder that fits no item.

    ``about`` has ``item`` and ``image``, a path relative to ``images`` or else to ``named_in``. A picture
    anywhere below ``images`` whose name without suffix is an item's id is that item's. Raises UserError for
    two of them, and for a named picture that lies outside of both folders.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"{images} is not a folder of images")
    by_id, notes = _by_id(images, about["item"]) if images else ({}, [])
    folder = images or named_in or Path()
    folders = [one for one in (images, named_in) if one is not None] or [folder]
    paths: list[Path | None] = []
    absent: list[str] = []
    for item, name in about.select("item", "image").iter_rows():
        found = (_named(item, name, folders) if name else None) or by_id.get(item)
        if found is None and name:
            absent.append(name)
        paths.append(found)
    if absent:
        more = f" and {len(absent) - 1:,} others" if len(absent) > 1 else ""
        notes.append(f"named images are absent from {folder}: {absent[0]}{more}; --images names their folder")
    if images and not any(paths):
        notes.append(f"no file of {images} is named by an item's id, such as {about['item'][0]}.jpg")
    return paths, notes


def _named(item: str, name: str, folders: Sequence[Path]) -> Path | None:
    """The file that an item names, in the first of ``folders`` that has it; it may lie below any of them."""
    file = next((path for path in (folder / name for folder in folders) if path.is_file()), None)
    if file is None:
        return None
    if not any(file.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise UserError(
            f"item {item} names a picture outside of {folders[0]}",
            cause=f"{name!r} is {file.resolve()}",
            fix=f"allow its folder: --images {quote(str(file.resolve().parent))}",
        )
    return file


def _by_id(folder: Path, items: pl.Series) -> tuple[dict[str, Path], list[str]]:
    """Item id to the picture of that name, in whatever subfolder; an id may be written in another form."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    by_stem: dict[str, list[Path]] = {}
    for file in files:
        by_stem.setdefault(file.stem, []).append(file)
    forms = other_forms(items, pl.Series("stem", list(by_stem), dtype=pl.String))
    found = {item: by_stem[item] for item in items if item in by_stem}
    found |= {item: by_stem[stem] for item, stem in forms.iter_rows()}
    twice = next(((item, own) for item, own in found.items() if len(own) > 1), None)
    if twice is not None:
        item, own = twice
        raise UserError(
            f"item {item} has {len(own)} pictures below {folder}",
            cause=" and ".join(str(file.relative_to(folder)) for file in own[:3]),
            fix="leave one picture per item id",
        )
    notes = []
    if forms.height:
        item, stem = forms.row(0)
        notes.append(f"{forms.height:,} pictures are named like {stem!r} for item {item!r}: they are matched")
    return {item: own[0] for item, own in found.items()}, notes
