"""Errors that are the user's to mend: what failed, why with both values, what to type."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The commands print it as ``error: … / cause: … / fix: …`` and exit with 2."""

    def __init__(self, message: str, *, cause: str | None = None, fix: str | None = None) -> None:
        self.message, self.cause, self.fix = message, cause, fix
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The message, then its cause and its remedy where they are known."""
        extra = [
            f"  {name + ':':<6} {text}" for name, text in (("cause", self.cause), ("fix", self.fix)) if text
        ]
        return [self.message, *extra]


class DamagedError(UserError):
    """A file is missing, or its content is not what was written: what it belongs to has to be built again."""
