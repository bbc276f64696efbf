"""The map from codes to tokens of the language model.

L levels, K codes of the largest level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cemg.errors import UserError

TokenMap = int | Tensor | Sequence[Sequence[int]] | Sequence[Tensor]  # what callers pass


class CodeTokens:
    """The token of every code.

    Attributes:
        table: [L, K] int64; −1 if a level has no such code.
        start: Set if code c of level m is token ``start + m·K + c``; None for every other map.
    """

    def __init__(self, table: Tensor, start: int | None = None) -> None:
        self.table, self.start = table, start

    @classmethod
    def consecutive(cls, start: int, sizes: Sequence[int]) -> CodeTokens:
        """Consecutive tokens from ``start`` on, level by level; ``sizes`` are the codes per level."""
        largest, begins = max(sizes), torch.tensor([0, *sizes]).cumsum(0)[:-1] + start
        codes = torch.arange(largest)
        table = (begins[:, None] + codes).masked_fill(codes >= torch.tensor(sizes)[:, None], -1)
        return cls(table, start if min(sizes) == largest else None)

    @classmethod
    def of(cls, given: TokenMap | CodeTokens, sizes: Sequence[int]) -> CodeTokens:
        """The map that a caller passed.

        Args:
            given: The first token of all, a table [L, K], or one list of tokens per level.
            sizes: Number of codes of each level.

        Raises:
            UserError: The number of levels differs, a level has more tokens than codes, a token is negative,
                or two codes of one level have the same token.
        """
        if isinstance(given, CodeTokens):
            given = given.table if given.start is None else given.start
        if isinstance(given, int):
            if given < 0:
                raise UserError(f"code_token_start must be 0 or more, got {given}")
            return cls.consecutive(given, sizes)
        rows = [torch.as_tensor(row, dtype=torch.int64).flatten() for row in given]
        if len(rows) != len(sizes):
            raise UserError(f"the token map has {len(rows)} levels, the catalog {len(sizes)}")
        table = torch.full((len(sizes), max(sizes)), -1)
        for level, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            if bool((row[size:] >= 0).any()):
                raise UserError(
                    f"the token map has {len(row)} tokens on level {level}, the catalog {size} codes"
                )
            if bool((row < -1).any()):
                raise UserError(f"token {int(row.min())} of level {level} is negative")
            table[level, : min(len(row), size)] = row[:size]
            used = row[row >= 0]
            if len(used) != len(used.unique()):
                duplicate = int(used.sort().values[:-1][used.sort().values.diff() == 0][0])
                raise UserError(f"two codes of level {level} have the token {duplicate}")
        return cls(table)

    @property
    def size(self) -> int:
        """K."""
        return self.table.shape[1]

    @cached_property
    def span(self) -> range:
        """The range from the smallest code token to the largest; it may include other tokens."""
        used = self.table[self.table >= 0]
        return range(int(used.min()), int(used.max()) + 1)

    def to(self, device: torch.device | str) -> CodeTokens:
        """The same map on another device."""
        return (
            self
            if self.table.device == torch.device(device)
            else CodeTokens(self.table.to(device), self.start)
        )

    def of_codes(self, codes: Tensor) -> Tensor:
        """Tokens of the codes [..., m] of the first m levels; −1 for a code without a token."""
        return self.table[torch.arange(codes.shape[-1], device=codes.device), codes.long()]

    def of_level(self, level: int, codes: Tensor) -> Tensor:
        """Input tokens for the codes of one level, any shape; an arbitrary token for a code without one."""
        if self.start is not None:
            return codes + (self.start + level * self.size)
        return self.input_table[level][codes]

    @cached_property
    def input_table(self) -> Tensor:
        """``table`` with a valid token in every cell: dead beams, whose code is 0, need some input."""
        return self.table.masked_fill(self.table < 0, self.span.start)

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Codes of the tokens [..., m] of the first m levels; −1 for any other token."""
        if not tokens.shape[-1]:
            return tokens
        return torch.stack([self.codes_of_level(m, tokens[..., m]) for m in range(tokens.shape[-1])], dim=-1)

    def codes_of_level(self, level: int, tokens: Tensor) -> Tensor:
        """Codes of the tokens of one level, any shape; −1 for a token that is not a code of that level."""
        if self.start is not None:
            codes = tokens - (self.start + level * self.size)
            return codes.masked_fill((codes < 0) | (codes >= self.size), -1)
        tokens_sorted, codes_sorted = self._sorted_by_token
        slot = torch.searchsorted(tokens_sorted[level], tokens.contiguous()).clamp_max(self.size - 1)
        matches = (tokens_sorted[level][slot] == tokens) & (tokens >= 0)
        return torch.where(matches, codes_sorted[level][slot], -1)

    def columns(self, level: int, logits: Tensor) -> Tensor:
        """The columns [R, K] of a level's codes in logits [R, V]; −inf for a code without a token."""
        tokens = self.table[level]
        if self.start is not None:
            first = self.start + level * self.size
            return logits[:, first : first + self.size]
        return logits[:, tokens.clamp_min(0)].masked_fill(tokens < 0, float("-inf"))

    def spread(self, level: int, values: Tensor, out: Tensor) -> None:
        """Write ``values`` [R, K] of a level's codes into their columns of ``out`` [R, V]."""
        if self.start is not None:
            first = self.start + level * self.size
            out[:, first : first + self.size] = values
        else:
            known = self.table[level] >= 0
            out[:, self.table[level][known]] = values[:, known]

    @cached_property
    def first_codes(self) -> list[int]:
        """The smallest code with a token, per level."""
        return (self.table >= 0).int().argmax(1).tolist()

    @cached_property
    def _sorted_by_token(self) -> tuple[Tensor, Tensor]:
        """The tokens of each level in ascending order, and their codes."""
        tokens, codes = self.table.sort(1)
        return tokens, codes

    def check_codes(self, codes: Tensor) -> None:
        """Raise UserError if one of ``codes`` [N, L] has no token."""
        missing = (self.of_codes(codes) < 0).nonzero()
        if len(missing):
            row, level = missing[0].tolist()
            raise UserError(
                f"code {int(codes[row, level])} of level {level} has no token",
                cause=f"row {row} of the catalog uses it",
                fix="add a token for every code in use",
            )


def level_name(level: int) -> str:
    """0 → a, 1 → b, …, 26 → aa."""
    name = ""
    level += 1
    while level:
        level, letter = divmod(level - 1, 26)
        name = chr(ord("a") + letter) + name
    return name


def symbol(level: int, code: int) -> str:
    """The paper's symbol of a code: ``symbol(0, 12) == "<a_12>"``."""
    return f"<{level_name(level)}_{code}>"
