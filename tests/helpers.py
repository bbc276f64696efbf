"""What several test files share: drawn codes, tries, files, a tokenizer, and beam search by transformers."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cemg_kernels import Trie


def draw_codes(num_items: int, levels: int, size: int, *, seed: int = 0) -> Tensor:
    """Distinct codes [N, L] that share prefixes, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    if size**levels <= 4096:
        codes = torch.tensor(list(itertools.product(range(size), repeat=levels)))
    else:
        codes = torch.randint(size, (4 * num_items, levels), generator=generator)
        codes[:, : levels - 1] %= 3
        codes = torch.unique(codes, dim=0)
    return codes[torch.randperm(len(codes), generator=generator)[:num_items]]


def two_level_trie(num_items: int, *, id_step: int | None = None) -> Trie:
    """Two levels of 64 codes, items in random order; their ids are ``id_step`` apart, or their rows."""
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(num_items))
    ids = None if id_step is None else torch.arange(num_items) * id_step
    return Trie.from_codes(torch.stack((order // 64, order % 64), 1), 64, ids)


def write_file(path: Path, content: str | bytes) -> Path:
    """Writes ``content``, compressed if the name ends in .gz, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def save_wordpiece_tokenizer(folder: Path, words: Sequence[str], *, lowercase: bool = False) -> None:
    """Saves a BERT tokenizer whose vocabulary is the five special tokens and ``words``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    vocabulary = {word: index for index, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    if lowercase:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def generate_over_prefixes(
    model: Any,
    prompt: dict[str, Tensor],
    rows: Sequence[Sequence[int]],
    beams: int,
    processors: Sequence[Any] = (),
    **options: Any,
) -> tuple[list[list[tuple[int, ...]]], Tensor]:
    """Beam search by ``model.generate`` over a dictionary of the prefixes of ``rows``.

    Returns the sequences of tokens [B][W] and their scores [B, W].
    """
    from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

    following: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        for length in range(len(row)):
            following.setdefault(tuple(row[:length]), set()).add(row[length])
    start = 1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]

    def allowed(_: int, sequence: Tensor) -> list[int]:
        return sorted(following.get(tuple(sequence[start:].tolist()), {1}))

    levels = len(rows[0])
    mask = PrefixConstrainedLogitsProcessor(allowed, beams)
    out = model.generate(
        **prompt, num_beams=beams, num_return_sequences=beams, max_new_tokens=levels, min_new_tokens=levels,
        length_penalty=0.0, early_stopping=False, do_sample=False, return_dict_in_generate=True,
        output_scores=True, logits_processor=LogitsProcessorList([*processors, mask]), **options,
    )  # fmt: skip
    sequences = [tuple(row) for row in out.sequences[:, start:].tolist()]
    grouped = [sequences[i : i + beams] for i in range(0, len(sequences), beams)]
    return grouped, out.sequences_scores.view(-1, beams)
