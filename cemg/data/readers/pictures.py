"""Assignment of image files to items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import polars as pl

from cemg.data.readers.values import other_forms
from cemg.errors import UserError

SUFFIXES = (
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
    about: pl.DataFrame, image_folder: Path | None, images: Path | None
) -> tuple[list[Path | None], list[str]]:
    """Find the image file of each item.

    Args:
        about: One row per item, with the columns ``item`` (its id) and ``image`` (a path or null).
        image_folder: Folder that these paths are relative to, after ``images``.
        images: Folder of images, searched with its subfolders. An image whose name without suffix is the id
            of an item belongs to that item.

    Returns:
        The path of each item's image or None, and notes for the user.

    Raises:
        UserError: An item has two images, or names a file outside of both folders.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"{images} is not a folder of images")
    by_id, notes = _by_id(images, about["item"]) if images else ({}, [])
    folder = images or image_folder or Path()
    folders = [path for path in (images, image_folder) if path is not None] or [folder]
    paths: list[Path | None] = []
    missing: list[str] = []
    for item, name in about.select("item", "image").iter_rows():
        path = (_by_name(item, name, folders) if name else None) or by_id.get(item)
        if path is None and name:
            missing.append(name)
        paths.append(path)
    if missing:
        others = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
        notes.append(f"images are missing in {folder}: {missing[0]}{others}; --images names their folder")
    if images and not any(paths):
        notes.append(f"no file in {images} is named by an item id, such as {about['item'][0]}.jpg")
    return paths, notes


def _by_name(item: str, name: str, folders: Sequence[Path]) -> Path | None:
    """Return the file that an item names, in the first of ``folders`` that has it."""
    file = next((path for path in (folder / name for folder in folders) if path.is_file()), None)
    if file is None:
        return None
    if not any(file.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise UserError(
            f"item {item} names an image outside of {folders[0]}",
            cause=f"{name!r} is {file.resolve()}",
            fix=f"allow its folder: --images {quote(str(file.resolve().parent))}",
        )
    return file


def _by_id(folder: Path, items: pl.Series) -> tuple[dict[str, Path], list[str]]:
    """Map item ids to the images named by them, in any subfolder, and return notes."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    by_stem: dict[str, list[Path]] = {}
    for file in files:
        by_stem.setdefault(file.stem, []).append(file)
    forms = other_forms(items, pl.Series("stem", list(by_stem), dtype=pl.String))
    images = {item: by_stem[item] for item in items if item in by_stem}
    images |= {item: by_stem[stem] for item, stem in forms.iter_rows()}
    ambiguous = next(((item, paths) for item, paths in images.items() if len(paths) > 1), None)
    if ambiguous is not None:
        item, paths = ambiguous
        raise UserError(
            f"item {item} has {len(paths)} images in {folder}",
            cause=" and ".join(str(file.relative_to(folder)) for file in paths[:3]),
            fix="keep one image per item id",
        )
    notes = []
    if forms.height:
        item, stem = forms.row(0)
        notes.append(f"{forms.height:,} images are named like {stem!r} for item {item!r}: they are matched")
    return {item: paths[0] for item, paths in images.items()}, notes
