"""What leaves a run: its codes as a table, and model, token map and catalog as one checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg import Recommender
from cemg.commands import catalog
from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.generator import Vocabulary
from cemg.generator.prompts import Prompter
from cemg.tokenizer import Catalog


@pytest.mark.parametrize("name", ["codes.csv", "codes.parquet", "Beauty.index.json"])
def test_a_runs_codes_are_exported_and_read_again(tiny_run: Path, tmp_path: Path, command, capsys, name: str):
    assert command(catalog.main, "export", "--run", tiny_run, tmp_path / name) == 0
    own, again = Catalog.load(tiny_run / "catalog"), Catalog.read(tmp_path / name)
    assert torch.equal(again.codes, own.codes) and again.item_ids == own.item_ids
    assert str(tmp_path / name) in capsys.readouterr().err.replace("\n", "")


def test_another_format_is_refused(tiny_run: Path, tmp_path: Path, command, capsys):
    assert command(catalog.main, "export", "--run", tiny_run, tmp_path / "codes.xlsx") == 2
    assert "name it .csv, .parquet or .index.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_saved_recommender_decodes_without_its_run(tiny_run: Path, tmp_path: Path):
    recommender = Recommender.from_run(tiny_run)
    history = recommender.catalog.item_ids[:3]
    found = recommender.recommend([history], top=8)
    recommender.save_pretrained(tmp_path / "checkpoint")
    decoder = Decoder.from_pretrained(tmp_path / "checkpoint")
    about = json.loads((tmp_path / "checkpoint" / "cemg_catalog" / "cemg_decoder.json").read_text())[
        "prompts"
    ]
    items = about.pop("history_items")
    prompter = Prompter(
        Vocabulary(**about), decoder.catalog.codes, history_items=items,
        seq2seq=decoder.model.config.is_encoder_decoder,
    )  # fmt: skip
    rows = np.array(decoder.catalog.rows_of(history))
    again = decoder.decode(*prompter.batch([rows]), 50).top(8)
    assert decoder.catalog.ids_of(again.items) == recommender.item_ids(found)
    assert torch.equal(again.scores, found.scores) and torch.equal(again.certified, found.certified)


def test_a_run_whose_catalog_shares_ids_is_refused(tiny_run: Path, tmp_path: Path, monkeypatch):
    from cemg.pipeline import Pipeline

    own = Catalog.load(tiny_run / "catalog")
    shared = Catalog.from_codes(own.codes, own.codebook_size, own.item_ids, shared=True)
    monkeypatch.setattr(Pipeline, "load_catalog", lambda pipeline: shared)
    with pytest.raises(UserError, match="one item per semantic ID"):
        Recommender.from_run(tiny_run)
