"""Text files: plain or gzip, in any encoding, with or without a byte order mark."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cemg.errors import UserError

UTF8 = "utf-8"
PATTERN = frozenset("*?[")  # Polars takes a path with one of these for a glob pattern
MARKS = (  # UTF-32 first, because its little-endian mark begins with the one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NOT_CHARSETS = ("undefined", "idna", "punycode", "utf-7", "unicode-escape", "raw-unicode-escape")
DAMAGED = (OSError, EOFError, zlib.error)
ENCODING_FIX = "name the file's encoding, for example --encoding cp1252, latin-1 or utf-16"


def bad_line(path: Path, number: int, reason: str, *, fix: str | None = None) -> UserError:
    """Return the error for a malformed line."""
    return UserError(f"{path}, line {number}: {reason}", fix=fix)


def empty_file(path: Path) -> UserError:
    """Return the error for a file without records."""
    return UserError(f"{path} is empty", fix="download or export it again")


def check_encoding(name: str) -> None:
    """Raise UserError for a name that is not a text encoding of Python. "" stands for the default."""
    try:
        codec = codecs.lookup(name or UTF8)
        if not codec._is_text_encoding or codec.name in NOT_CHARSETS:
            raise LookupError
    except (LookupError, ValueError):
        raise UserError(
            f"{name!r} is not a valid encoding", fix="use --encoding cp1252, latin-1 or utf-16"
        ) from None


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text file. ``encoding`` "" is the one of its byte order mark, or UTF-8 without a mark."""

    path: Path
    encoding: str = ""

    def __post_init__(self) -> None:
        check_encoding(self.encoding)

    @property
    def suffix(self) -> str:
        """The suffix before ``.gz``, in lower case: ``.csv`` of orders.CSV.gz."""
        return Path(self.path.name.lower().removesuffix(".gz")).suffix

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def codec(self) -> str:
        """Python's name of the encoding. The one of UTF-8 with a mark removes the mark."""
        with self._open() as file:
            head = file.read(4)
        marked = next((codec for mark, codec in MARKS if head.startswith(mark)), UTF8)
        if not self.encoding:
            return marked
        requested = codecs.lookup(self.encoding).name
        return marked if requested == UTF8 else requested

    def source(self) -> Path | bytes:
        """Return what Polars reads: the path of a plain UTF-8 file, or else the text as UTF-8.

        The text is also returned for a path with a character of a glob pattern, because `scan_ndjson` would
        read all files that match it, and has no ``glob=False``.
        """
        plain = self.codec == UTF8 and not PATTERN & set(str(self.path))
        return self.path if plain else self.text().encode()

    def text(self) -> str:
        """Read the whole text. Raises UserError with the line of a byte that cannot be decoded."""
        codec = self.codec
        try:
            with self._open() as file:
                raw = file.read()
        except DAMAGED as error:
            raise UserError(f"{self.path}: the file is damaged or cut short", cause=str(error)) from error
        try:
            return raw.decode(codec)
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode(codec, errors="ignore")
            raise self._undecodable(before.count("\n") + 1, codec, error) from error

    def lines(self) -> Iterator[str]:
        """Yield the lines with their line ends. Raises UserError for bytes that cannot be decoded."""
        codec = self.codec
        if codec != UTF8:
            yield from self.text().splitlines(keepends=True)
            return
        number = 1
        try:
            with self._open() as file:
                for raw in file:
                    yield raw.decode(codec)
                    number += 1
        except UnicodeDecodeError as error:
            raise self._undecodable(number, codec, error) from error
        except DAMAGED as error:
            raise bad_line(self.path, number, f"the file is damaged or cut short: {error}") from error

    def first_line(self) -> str:
        """Return the first line that is not blank, at most 1 MiB; "" if there is none or it is not text."""
        try:
            codec = self.codec
            if codec not in (UTF8, "utf-8-sig"):
                return next((line.strip() for line in self.lines() if line.strip()), "")
            with self._open() as file:
                lines = iter(lambda: file.readline(1 << 20), b"")
                line = next((line for line in lines if line.strip(codecs.BOM_UTF8 + b" \t\r\n")), b"")
            return line.decode("utf-8-sig", errors="ignore" if len(line) == 1 << 20 else "strict").strip()
        except (*DAMAGED, UserError, UnicodeDecodeError):
            return ""

    def _open(self) -> IO[bytes]:
        return gzip.open(self.path, "rb") if self.path.suffix.lower() == ".gz" else self.path.open("rb")  # type: ignore[return-value]

    def _undecodable(self, number: int, codec: str, error: UnicodeDecodeError) -> UserError:
        byte = error.object[error.start]
        name = "UTF-8" if codec.startswith(UTF8) else codec
        return bad_line(self.path, number, f"byte 0x{byte:02X} is not valid {name}", fix=ENCODING_FIX)
