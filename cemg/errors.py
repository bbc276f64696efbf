"""Errors that the user can fix: what failed, why (with the values), and what to type."""

from __future__ import annotations


class UserError(ValueError):
    """Invalid input. The commands print it as ``error:``, ``cause:`` and ``fix:`` and exit with code 2.

    Args:
        message: What failed, with the values.
        cause: Why, if known.
        fix: What to do or type, if known.
    """

    def __init__(self, message: str, *, cause: str | None = None, fix: str | None = None) -> None:
        self.message, self.cause, self.fix = message, cause, fix
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """Return the message, and the cause and fix if they are known, one per line."""
        extra = [
            f"  {name + ':':<6} {text}" for name, text in (("cause", self.cause), ("fix", self.fix)) if text
        ]
        return [self.message, *extra]


class DamagedError(UserError):
    """A file is missing or was changed, so the stage that it belongs to must be rebuilt."""
