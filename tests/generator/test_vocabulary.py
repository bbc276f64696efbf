"""Codes as tokens and as symbols."""

from __future__ import annotations

import torch

from cemg.generator import Vocabulary
from cemg.tokenizer import symbol


def test_code_12_of_the_first_codebook_is_a_12():
    assert symbol(0, 12) == "<a_12>"
    assert [symbol(level, 0) for level in (1, 3, 25, 26, 27, 52)] == [
        "<b_0>", "<d_0>", "<z_0>", "<aa_0>", "<ab_0>", "<ba_0>",
    ]  # fmt: skip


def test_every_code_has_a_token_and_a_symbol_of_its_own_and_comes_back():
    vocabulary = Vocabulary(levels=3, codebook_size=5, code_token_start=7, pad=0, bos=1, eos=2)
    codes = torch.cartesian_prod(*[torch.arange(5)] * 3)  # [125, 3]
    tokens = vocabulary.tokens(codes)
    assert tokens.dtype == torch.int64 and sorted(tokens.unique().tolist()) == list(range(7, 22))
    assert torch.equal((tokens - 7) % 5, codes)
    assert torch.equal((tokens - 7) // 5, torch.arange(3).expand(125, 3))
    symbols = vocabulary.symbols()
    assert len(set(symbols)) == 15 == vocabulary.size - 7
    assert symbols[int(tokens[-1, 2]) - 7] == symbol(2, 4) == "<c_4>"


def test_small_integer_codes_do_not_overflow():
    vocabulary = Vocabulary(levels=2, codebook_size=256, code_token_start=3, pad=0, bos=1, eos=2)
    assert vocabulary.tokens(torch.tensor([[255, 255]], dtype=torch.uint8)).tolist() == [[258, 514]]
