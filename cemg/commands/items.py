"""Item ids on the command line: several in one word, or a file of them."""

from __future__ import annotations

import errno
from pathlib import Path

from cemg.errors import UserError


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        return False  # a file cannot have such a name


def read_ids(value: str, *, option: str) -> list[str]:
    """Ids between commas or spaces, or where ``value`` is a file, its lines; each once, in order.

    Raises UserError where there is none, and for a file that is not UTF-8 text.
    """
    path = Path(value)
    try:
        is_file = _is_file(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines() if is_file else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {value} cannot be read", cause=str(error)) from error
    found = [line.strip() for line in lines] if is_file else value.replace(",", " ").split()
    ids = list(dict.fromkeys(filter(None, found)))
    if not ids:
        raise UserError(f"{option} names no item", fix=f'{option} "12 7 105", or a file with one id per line')
    return ids
