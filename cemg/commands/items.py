"""Item ids on the command line: several in one argument, or a file of ids."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cemg.errors import UserError

if TYPE_CHECKING:
    from cemg.recommender import Recommender
    from cemg_kernels import ItemFilter


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        return False  # too long, or otherwise impossible as a file name: a list of ids


def allowed_items(recommender: Recommender, only: Sequence[str], exclude: Sequence[str]) -> ItemFilter:
    """Allow the items of ``only`` (all items if it is empty) except those of ``exclude``."""
    if not exclude:
        return recommender.only(only)
    not_excluded = ~recommender.only(exclude)
    return recommender.only(only) & not_excluded if only else not_excluded


def read_ids(value: str, *, option: str) -> list[str]:
    """Read item ids, in order and without repetitions.

    Args:
        value: Ids separated by commas or spaces, or the path of a file with one id per line.
        option: Name of the command-line option, for errors.

    Raises:
        UserError: There is no id, or the file is not UTF-8 text.
    """
    path = Path(value)
    try:
        is_file = _is_file(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines() if is_file else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {value} cannot be read", cause=str(error)) from error
    values = [line.strip() for line in lines] if is_file else value.replace(",", " ").split()
    ids = list(dict.fromkeys(filter(None, values)))
    if not ids:
        raise UserError(f"{option} names no item", fix=f'{option} "12 7 105", or a file with one id per line')
    return ids
