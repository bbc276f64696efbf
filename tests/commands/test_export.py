"""Exports of a run: its codes as a table, and model, token map and catalog as one checkpoint folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg import Recommender
from cemg.artifacts import RunArtifacts
from cemg.commands import catalog
from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.generator import Vocabulary
from cemg.generator.prompts import Prompter
from cemg.tokenizer import Catalog


@pytest.mark.parametrize("name", ["codes.csv", "codes.parquet", "Beauty.index.json"])
def test_the_codes_of_a_run_can_be_exported_and_read_again(
    tiny_run: Path, tmp_path: Path, command, capsys, name: str
):
    assert command(catalog.main, "export", "--run", tiny_run, tmp_path / name) == 0
    own, again = Catalog.load(tiny_run / "catalog"), Catalog.read(tmp_path / name)
    assert torch.equal(again.codes, own.codes) and again.item_ids == own.item_ids
    assert str(tmp_path / name) in capsys.readouterr().err.replace("\n", "")


def test_a_changed_catalog_is_exported_only_without_verifying(
    tiny_run: Path, tmp_path: Path, command, capsys
):
    run, out = tmp_path / "run", tmp_path / "codes.csv"
    shutil.copytree(tiny_run, run)
    about = run / "catalog" / "catalog.json"
    about.write_text(about.read_text() + "\n")
    assert command(catalog.main, "export", "--run", run, out) != 0
    assert "catalog.json" in capsys.readouterr().err.replace("\n", "") and not out.exists()
    assert command(catalog.main, "export", "--run", run, out, "--no-verify") == 0 and out.is_file()


def test_another_format_is_refused(tiny_run: Path, tmp_path: Path, command, capsys):
    assert command(catalog.main, "export", "--run", tiny_run, tmp_path / "codes.xlsx") == 2
    assert "name it .csv, .parquet or .index.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_saved_recommender_decodes_without_its_run(tiny_run: Path, tmp_path: Path):
    recommender = Recommender.from_run(tiny_run)
    history = recommender.catalog.item_ids[:3]
    found = recommender.recommend([history], top=8, memory="off")
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


def test_removed_items_are_not_in_what_a_recommender_saves(tiny_run: Path, tmp_path: Path, command):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    history = Catalog.load(run / "catalog").item_ids[:3]
    best = Recommender.from_run(run).recommend([history], top=1).ids[0][0]
    assert command(catalog.main, "remove", "--run", run, "--items", best) == 0
    recommender = Recommender.from_run(run)
    recommender.save_pretrained(tmp_path / "checkpoint")
    saved = Decoder.from_pretrained(tmp_path / "checkpoint")
    assert best not in saved.catalog.item_ids and len(saved.catalog) == len(recommender.catalog) - 1
    own = recommender.catalog.rows_of(history)
    prompt = recommender.prompter.batch([np.array(own)])
    found = recommender.recommend([history], top=8, memory="off")
    again = saved.decode(*prompt, 50).top(8)
    assert saved.catalog.ids_of(again.items) == found.ids
    torch.testing.assert_close(again.scores, found.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "tokens", "sizes"])
def test_a_catalog_of_a_form_that_runs_do_not_support_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch, kind: str
):
    """The prompts and filters of a run require one item per semantic ID and K tokens per level."""
    own = Catalog.load(tiny_run / "catalog")
    size = own.codebook_size
    few = own.take((own.codes[:, -1] < size - 1).nonzero().flatten().tolist())
    sizes = (*[size] * (own.levels - 1), size - 1 if kind == "sizes" else size)
    other = Catalog.from_codes(
        few.codes, sizes, few.item_ids, shared=kind == "shared", tokens=7 if kind == "tokens" else None
    )
    monkeypatch.setattr(RunArtifacts, "load_catalog", lambda pipeline: other)
    with pytest.raises(UserError, match="is not the catalog of a run"):
        Recommender.from_run(tiny_run)
