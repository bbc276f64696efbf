"""One token per code: code c of level m is token ``code_token_start + m·K + c`` (CEMG paper §3.4.1).

With ``generator.item_tokens``, a token per item follows the codes' tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from cemg.storage.read import STRICT
from cemg.tokenizer.tokens import symbol


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids of the codes and of the special tokens.

    Attributes:
        code_token_start: Token of code 0 of level 0.
        instruction: Text tokens at the start of each prompt of a pre-trained decoder.
        items: Number of items with a token of their own, which stands for the item in histories.
        size: Number of tokens, text tokens included.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    levels: int
    codebook_size: int
    code_token_start: int
    pad: int
    bos: int
    eos: int
    instruction: tuple[int, ...] = ()
    items: int = 0

    @property
    def item_token_start(self) -> int:
        return self.code_token_start + self.levels * self.codebook_size

    @property
    def size(self) -> int:
        return self.item_token_start + self.items

    def symbols(self) -> list[str]:
        """Names of the tokens from ``code_token_start`` on: <a_0> … <d_255>."""
        return [symbol(m, c) for m in range(self.levels) for c in range(self.codebook_size)]

    def tokens(self, codes: Tensor) -> Tensor:
        """Tokens of the codes [..., levels], same shape, int64."""
        offset = torch.arange(self.levels) * self.codebook_size + self.code_token_start
        return codes.to(torch.int64) + offset

    def to_dict(self) -> dict[str, object]:
        """The fields, without ``items`` if no item has a token: earlier versions read such a file."""
        return {name: value for name, value in asdict(self).items() if name != "items" or value}
