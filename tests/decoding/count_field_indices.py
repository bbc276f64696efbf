"""Counts the items of published indices that decode as under ``generate()``.

``python -m tests.decoding.count_field_indices X.index.json …`` reads, for example, LETTER's files. Each index
gets a tokenizer with its tokens added in sorted order, as the training code of these projects does it, and a
small random T5 and Llama. An item counts if it has the same rank in both lists, over ``--prompts`` random
histories of five items.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from cemg.decoding import Decoder
from cemg.tokenizer import Catalog

from ..helpers import generate_over_prefixes

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2}


def tokenizer_of(index: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_tokens(sorted({token for row in index.values() for token in row}))
    return made


def model_of(family: str, vocabulary: int) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1}
    if family == "T5":
        sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config: Any = hf.T5Config(decoder_start_token_id=0, tie_word_embeddings=False, **sizes, **shared)
        model: Any = hf.T5ForConditionalGeneration(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(bos_token_id=1, initializer_range=0.2, **sizes, **shared))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model.eval()


def count(path: Path, *, prompts: int, beams: int) -> None:
    index: dict[str, list[str]] = json.loads(path.read_text())
    tokenizer = tokenizer_of(index)
    catalog = Catalog.read(path, tokenizer=tokenizer, shared=True)
    assert torch.equal(
        catalog.code_tokens().table,
        Catalog.read(path, shared=True, code_token_start=len(WORDS)).code_tokens().table,
    )
    used = (catalog.code_tokens().table >= 0).sum(1).tolist()
    print(f"{path.name}: {len(catalog)} items on {catalog.num_ids} semantic IDs, codes in use {used}")
    rows = catalog.code_tokens().of_codes(catalog.codes)
    chosen = torch.randint(len(catalog), (prompts, 5), generator=torch.Generator().manual_seed(1))
    ids = rows[chosen].flatten(1)
    for family in ("T5", "Llama"):
        model = model_of(family, len(tokenizer))
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected, _ = generate_over_prefixes(model, prompt, rows.tolist(), beams)
        decoder = Decoder(model, catalog)
        found = catalog.ids_of(decoder.decode(ids, torch.ones_like(ids), beams).items)
        items: dict[tuple[int, ...], list[str]] = {}  # of each sequence of tokens, in file order
        for item, row in zip(index, rows.tolist(), strict=True):
            items.setdefault(tuple(row), []).append(item)
        lists = [[item for row in own for item in items[row]][:beams] for own in expected]
        pairs = [
            pair for own, theirs in zip(found, lists, strict=True) for pair in zip(own, theirs, strict=True)
        ]
        right, total = sum(a == b for a, b in pairs), len(pairs)
        print(f"  {family} ({decoder.path}): {right} of {total} places as under generate()")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--beams", type=int, default=10)
    asked = parser.parse_args()
    for path in asked.paths:
        count(path, prompts=asked.prompts, beams=asked.beams)
