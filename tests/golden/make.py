"""Writes the golden files of this folder: a saved run, a saved decoder, tries, and the results of each.

    python tests/golden/make.py

``test_golden.py`` checks that later versions read these files, compute the same results from them and write
the same bytes. Run this script again only when a file format changes on purpose, and name the change under
"Breaking" in the changelog.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

import cemg
from cemg.commands.train import main as train
from cemg.decoding import Decoder, Recommendations
from cemg.tokenizer import Catalog
from cemg_kernels import Trie

SAVED = Path(__file__).parent / "saved"
MIN_GAP = 1e-3  # between neighbouring scores of a list: ten times the tolerance of test_golden.py
SETTINGS = [
    "data.synthetic_users=40", "data.synthetic_items=50", "pca.dim=4", "graph.dim=8", "graph.epochs=3",
    "tokenizer.levels=3", "tokenizer.codebook_size=8", "tokenizer.dim=16", "tokenizer.latent=8",
    "tokenizer.hidden=[32]", "tokenizer.epochs=20", "backbone.layers=1", "backbone.dim=16",
    "backbone.heads=2", "generator.epochs=6", "generator.batch_size=8", "generator.history_items=6",
    "decoding.beams=10", "decoding.validation_beams=5",
]  # fmt: skip
STAGES = ("data", "features", "graph", "memory", "tokenizer", "catalog", "generator", "gate")


def make() -> None:
    """Replaces ``saved/``."""
    torch.set_num_threads(1)
    shutil.rmtree(SAVED, ignore_errors=True)
    make_run(SAVED / "run")
    expected = {"version": cemg.__version__, "run": run_results(SAVED / "run")}
    expected["decoder"] = make_decoder(SAVED / "decoder")
    expected["tries"] = make_tries(SAVED / "tries")
    (SAVED / "expected.json").write_text(json.dumps(expected) + "\n")


def make_run(folder: Path) -> None:
    """Trains a tiny run and copies its stages."""
    with tempfile.TemporaryDirectory(prefix="cemg-golden-") as temporary:
        run = Path(temporary) / "run"
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        socket.gethostname = lambda: "golden"  # part of the names of TensorBoard's files
        sys.argv = ["cemg-train", "--run", str(run), *settings]
        try:
            train()
        except SystemExit as end:
            if end.code:
                raise
        folder.mkdir(parents=True)
        shutil.copy(run / "config.yaml", folder)
        for stage in STAGES:
            shutil.copytree(run / stage, folder / stage)


def run_results(folder: Path) -> dict[str, Any]:
    """Three histories, and the lists for them under each normalization and option."""
    opened = {name: cemg.Recommender.from_run(folder, normalize=name) for name in ("vocab", "level", "valid")}
    items = opened["vocab"].catalog.item_ids
    histories = [[str(items[(7 * i + 3 * k) % 50]) for k in range(1 + i % 6)] for i in range(40)]
    options: dict[str, dict[str, Any]] = {"plain": {}, "exclude_history": {"exclude_history": True},
                                          "exact": {"exact": True}}  # fmt: skip
    chosen = []
    for history in histories:
        found = (
            recommender.recommend([history], top=9, beams=20, **extra)
            for recommender in opened.values()
            for extra in options.values()
        )
        if all(smallest_gap(one) > MIN_GAP for one in found):
            chosen.append(history)
    chosen = chosen[:3]
    assert len(chosen) == 3, "too few histories whose lists have clear scores"
    lists = {
        f"{name}/{option}": as_json(recommender.recommend(chosen, top=8, beams=20, **extra))
        for name, recommender in opened.items()
        for option, extra in options.items()
    }
    return {"histories": chosen, "lists": lists}


def make_decoder(folder: Path) -> dict[str, Any]:
    """A T5 of random weights with a catalog of shared semantic IDs and a token table, and two lists of it."""
    levels, size = 3, 6
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(size**levels, generator=generator)[:40]
    codes = torch.stack([chosen // size ** (levels - 1 - m) % size for m in range(levels)], dim=1)
    codes = torch.cat((codes, codes[:10]))
    tokens = [[3 + m * size + (5 * c) % size for c in range(size)] for m in range(levels)]
    catalog = Catalog.from_codes(
        codes, size, [f"item-{n}" for n in range(50)], tokens=tokens, shared=True, counts=list(range(50))
    )
    torch.manual_seed(0)
    shape = T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(shape).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    Decoder(model, catalog).save_pretrained(folder)
    decoder = Decoder.from_pretrained(folder)
    for prompts in draw_prompts(generator):
        found = decoder.decode(prompts, [[1] * 5] * 2, 12)
        if smallest_gap(found, ties=True) > MIN_GAP:
            return {"prompts": prompts, "list": as_json(found)}
    raise AssertionError("no prompts whose lists have clear scores")


def draw_prompts(generator: torch.Generator) -> Iterator[list[list[int]]]:
    for _ in range(100):
        yield torch.randint(3, 21, (2, 5), generator=generator).tolist()


def make_tries(folder: Path) -> dict[str, Any]:
    """A trie of one byte per code with item ids, and one of two bytes per code without."""
    folder.mkdir()
    facts = {}
    for name, size, levels, items in (("one-byte", 16, 4, 300), ("two-bytes", 1000, 2, 300)):
        generator = torch.Generator().manual_seed(size)
        codes = torch.randint(0, size, (items * 2, levels), generator=generator).unique(dim=0)
        codes = codes[torch.randperm(len(codes), generator=generator)[:items]]
        ids = torch.randperm(5 * items, generator=generator)[:items] if name == "one-byte" else None
        trie = Trie.from_codes(codes, size, item_ids=ids)
        trie.save(folder / f"{name}.safetensors")
        facts[name] = {
            "codes": codes.tolist(), "ids": None if ids is None else ids.tolist(), "codebook_size": size,
            "nbytes": trie.nbytes, "fingerprint": trie.fingerprint,
        }  # fmt: skip
    return facts


def smallest_gap(found: Recommendations, *, ties: bool = False) -> float:
    """The least difference of neighbouring scores; with ``ties``, items of one semantic ID may be equal."""
    gaps = -found.scores.diff(dim=1)
    gaps = gaps[found.items[:, 1:] >= 0]
    return float(gaps[gaps > 0].min() if ties else gaps.min())


def as_json(found: Recommendations) -> dict[str, Any]:
    return {
        "items": found.items.tolist(), "ids": found.ids, "titles": found.titles,
        "scores": found.scores.tolist(), "codes": found.codes.tolist(), "certified": found.certified.tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    make()
