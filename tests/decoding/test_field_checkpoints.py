"""A checkpoint with its index.json and tokenizer decodes to the items that ``generate()`` returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.tokenizer import Catalog

from ..helpers import generate_over_prefixes

WORDS = ("<pad>", "</s>", "<unk>", "buy", "next", "after")
ITEMS, LEVELS = 60, 4


def make_index(folder: Path, *, repeated: int = 0) -> tuple[Path, dict[str, list[str]]]:
    """Codes up to 30, of which a level uses some; the last items repeat the IDs of the first ones."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.tensor([20, 31, 31, 31])
    codes = (torch.rand(ITEMS, LEVELS, generator=generator) * sizes).long()
    codes[ITEMS - repeated :] = codes[:repeated]
    index = {
        str(i): [f"<{'abcd'[m]}_{c}>" for m, c in enumerate(row)] for i, row in enumerate(codes.tolist())
    }
    path = folder / "Beauty.index.json"
    path.write_text(json.dumps(index))
    return path, index


def make_tokenizer(index: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """The tokens that the training of these projects adds: the sorted set of all tokens of the index."""
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(sorted({token for row in index.values() for token in row}))
    return tokenizer


def make_model(family: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1}
    if family == "t5":
        model: Any = T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
                     tie_word_embeddings=False, **shared)
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, bos_token_id=1, initializer_range=0.2, **shared)
        )  # fmt: skip
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model.eval()


def by_generate(
    model: Any, tokenizer: Any, index: dict[str, list[str]], prompt: Any, beams: int
) -> tuple[list[list[str]], torch.Tensor]:
    """Items [B][W] and scores [B, W] by generate() over a prefix trie, as these projects evaluate."""
    rows = {item: tokenizer.convert_tokens_to_ids(row) for item, row in index.items()}
    sequences, scores = generate_over_prefixes(model, dict(prompt), list(rows.values()), beams)
    item_of = {tuple(row): item for item, row in reversed(rows.items())}  # the first item of a shared ID
    return [[item_of[row] for row in user] for user in sequences], scores


@pytest.mark.parametrize("given", ["tokenizer", "folder", "start"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_index_a_tokenizer_and_a_checkpoint_decode_as_under_generate(tmp_path, family, given):
    path, index = make_index(tmp_path)
    tokenizer = make_tokenizer(index)
    tokenizer.padding_side = "right" if family == "t5" else "left"
    model = make_model(family, len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    source: dict[str, Any] = {
        "tokenizer": {"tokenizer": tokenizer}, "folder": {"tokenizer": tmp_path / "checkpoint"},
        "start": {"code_token_start": len(WORDS)},
    }[given]  # fmt: skip
    decoder = Decoder(model, Catalog.read(path, **source))
    assert decoder.path.startswith("fast")
    texts = ["buy " + " ".join(index["3"]) + " next", "after " + " ".join(index["5"] + index["9"])]
    prompt = tokenizer(texts, return_tensors="pt", padding=True)
    prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    items, scores = by_generate(model, tokenizer, index, prompt, 10)
    found = decoder.decode(prompt["input_ids"], prompt["attention_mask"], 10)
    assert decoder.catalog.ids_of(found.items) == items
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)


def test_an_index_with_shared_ids_decodes_as_under_generate(tmp_path):
    path, index = make_index(tmp_path, repeated=12)
    tokenizer = make_tokenizer(index)
    model = make_model("t5", len(tokenizer))
    catalog = Catalog.read(path, tokenizer=tokenizer, shared=True)
    assert (len(catalog), catalog.num_ids) == (ITEMS, ITEMS - 12)
    prompt = tokenizer([" ".join(index["3"])], return_tensors="pt")
    prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    items, scores = by_generate(model, tokenizer, index, prompt, catalog.num_ids)
    found = Decoder(model, catalog).decode(*prompt.values(), len(catalog))
    ids = catalog.ids_of(found.items)[0]
    assert sorted(ids) == sorted(index)  # every item once
    firsts = [item for item in ids if int(item) < ITEMS - 12]
    assert firsts == items[0]
    for item, score in zip(ids, found.scores[0], strict=True):
        same = next(i for i, row in index.items() if row == index[item])
        assert abs(float(score) - float(scores[0, items[0].index(same)])) < 1e-5


def test_a_tokenizer_without_a_token_of_the_index_is_refused_with_item_and_token(tmp_path):
    path, index = make_index(tmp_path)
    missing = index["17"][2]
    kept = {item: [token for token in row if token != missing] for item, row in index.items()}
    first = next(item for item, row in index.items() if missing in row)
    tokenizer = make_tokenizer(kept)
    with pytest.raises(UserError, match=f"item '{first}': the tokenizer does not know the token {missing}"):
        Catalog.read(path, tokenizer=tokenizer)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    path, _ = make_index(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no readable tokenizer"):
        Catalog.read(path, tokenizer=tmp_path / "empty")
