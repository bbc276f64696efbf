"""One token per code (paper §3.4.1): code c of level m is token ``code_token_start + m·K + c``."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Where the special tokens and the codes lie. ``size`` counts them all, a pre-trained text vocabulary too.

    The ``users`` tokens after the codes are hashed user tokens, none by default. ``instruction`` holds
    text tokens that open each prompt of a pre-trained decoder.
    """

    levels: int
    codebook_size: int
    code_token_start: int
    pad: int
    bos: int
    eos: int
    users: int = 0
    instruction: tuple[int, ...] = ()

    @property
    def user_token_start(self) -> int:
        return self.code_token_start + self.levels * self.codebook_size

    @property
    def size(self) -> int:
        return self.user_token_start + self.users

    def symbols(self) -> list[str]:
        """Names of the tokens from ``code_token_start`` on: <a_0> … <d_255>, then <user_0> …"""
        codes = [f"<{level_name(m)}_{c}>" for m in range(self.levels) for c in range(self.codebook_size)]
        return codes + [f"<user_{u}>" for u in range(self.users)]

    def tokens(self, codes: Tensor) -> Tensor:
        """Codes [..., levels] to tokens of the same shape, int64."""
        offset = torch.arange(self.levels) * self.codebook_size + self.code_token_start
        return codes.to(torch.int64) + offset

    def user_token(self, user_id: str) -> list[int]:
        """The hashed token of a user, or nothing where user tokens are off."""
        if self.users == 0:
            return []
        digest = hashlib.sha256(user_id.encode()).digest()
        return [self.user_token_start + int.from_bytes(digest[:8], "little") % self.users]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


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
