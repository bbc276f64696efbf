"""The report of a run: what it draws, and what it says where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cemg.report import fusion_facts, read_log, write_report
from cemg.storage.manifest import describe
from cemg.tokenizer import Catalog

N = 40


@pytest.fixture
def run(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.arange(N) // 8, torch.arange(N) % 8], dim=1)
    Catalog.from_codes(codes, 8).save(tmp_path / "catalog")
    facts = {"items": N, "colliding_before": 3, "colliding_after": 0, "changed_codes_share": 0.05}
    (tmp_path / "catalog" / "uniqueness.json").write_text(json.dumps(facts))
    (tmp_path / "tokenizer").mkdir()
    attention = torch.rand(N, 2, generator=generator).softmax(1)
    items = {"codes": codes, "z": torch.randn(N, 4, generator=generator), "attention": attention}
    items["present"] = torch.ones(N, 3, dtype=torch.bool)
    save_file(items, tmp_path / "tokenizer" / "items.safetensors")
    for stage, key in (("graph", "graph/bpr"), ("tokenizer", "rqvae/recon"), ("generator", "generator/loss")):
        (tmp_path / stage).mkdir(exist_ok=True)
        lines = [json.dumps({"step": step, key: 1.0 / (step + 1)}) for step in range(5)]
        (tmp_path / stage / "log.jsonl").write_text("\n".join(lines))
    for stage in ("graph", "tokenizer", "catalog", "generator"):
        finish(tmp_path / stage)
    return tmp_path


def finish(stage: Path, *, seconds: float = 1.0) -> None:
    """Write the manifest of a stage's files as they are."""
    about = describe(stage, key="0" * 64, config={}, seconds=seconds, made_of={})
    (stage / "manifest.json").write_text(json.dumps(about))


def test_a_complete_run_gets_every_plot_and_a_page_that_shows_them(run: Path) -> None:
    folder = write_report(run)
    page = (folder / "report.md").read_text()
    for name in ("losses.png", "codebooks.png", "tsne.png", "attention.png"):
        assert (folder / name).stat().st_size > 1000
        assert name in page
    assert "| colliding before | 3 |" in page and "| changed codes share | 5.00% |" in page


def test_a_missing_stage_is_named_and_the_rest_is_plotted(run: Path) -> None:
    (run / "tokenizer" / "items.safetensors").unlink()
    folder = write_report(run)
    assert "Left out: RUN/tokenizer/items.safetensors is missing" in (folder / "report.md").read_text()
    assert (folder / "codebooks.png").is_file() and not (folder / "tsne.png").exists()


def test_a_stage_without_a_log_is_named_and_the_other_curves_are_plotted(run: Path) -> None:
    (run / "generator" / "log.jsonl").unlink()
    page = (write_report(run) / "report.md").read_text()
    assert "Left out: RUN/generator/log.jsonl is missing." in page
    assert "![losses.png](losses.png)" in page and "graph/log.jsonl" not in page


def test_the_curves_of_an_unfinished_stage_are_plotted(run: Path) -> None:
    (run / "generator").rename(run / ".generator.part")
    assert "generator/log.jsonl" not in (write_report(run) / "report.md").read_text()


def test_the_report_of_an_empty_run_lists_everything_as_missing(tmp_path: Path) -> None:
    folder = write_report(tmp_path)
    page = (folder / "report.md").read_text()
    assert [path.name for path in folder.iterdir()] == ["report.md"]
    assert "no stage is finished" in page and "RUN/catalog is missing" in page
    assert page.count("log.jsonl is missing or empty") == 3  # graph, tokenizer, generator
    assert str(tmp_path) not in page


def test_results_of_different_splits_are_refused_in_the_report_and_do_not_stop_it(run: Path) -> None:
    (run / "results").mkdir()
    for users in (5, 6):
        record = {"dataset": "d", "split": {"users": users, "items": N}, "metrics": {"HR@10": 0.5}}
        record["metrics_history_removed"] = {"HR@10": 0.5}
        (run / "results" / f"{users}-test.json").write_text(json.dumps(record))
    folder = write_report(run)
    assert "measured on different splits" in (folder / "report.md").read_text()
    assert (folder / "codebooks.png").is_file()


def test_results_and_stage_seconds_are_in_tables(run: Path) -> None:
    (run / "results").mkdir()
    record = {"dataset": "d", "split": {"users": 5, "items": N}, "metrics": {"HR@10": 0.25}}
    record["metrics_history_removed"] = {"HR@10": 0.5}
    (run / "results" / "d-cemg-test.json").write_text(json.dumps(record))
    finish(run / "graph", seconds=12.34)
    page = (write_report(run) / "report.md").read_text()
    assert "| graph | 12.34 |" in page
    assert "| d-cemg-test | 0.2500 |" in page and "| - history removed from the list | 0.5000 |" in page


def test_a_report_does_not_change_the_state_of_pyplot(run: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    write_report(run)
    assert pyplot.get_fignums() == before


def test_a_one_dimensional_latent_is_plotted_too(run: Path) -> None:
    path = run / "tokenizer" / "items.safetensors"
    items = load_file(path)
    save_file(items | {"z": items["z"][:, :1].contiguous()}, path)
    finish(path.parent)
    assert (write_report(run) / "tsne.png").is_file()


@pytest.mark.parametrize("spread", [0.0, 1e-8])
def test_a_map_of_identical_items_is_not_plotted(run: Path, spread: float) -> None:
    path = run / "tokenizer" / "items.safetensors"
    items = load_file(path)
    save_file(items | {"z": 1 + spread * items["z"]}, path)
    finish(path.parent)
    folder = write_report(run)
    assert "Left out: all items have the same z." in (folder / "report.md").read_text()
    assert not (folder / "tsne.png").exists()


def test_a_second_report_replaces_the_first_completely(run: Path) -> None:
    (write_report(run) / "stale.txt").write_text("old")
    assert not (write_report(run) / "stale.txt").exists()
    assert not list(run.glob(".report*"))


def test_alpha_is_reported_as_constant_if_no_item_has_an_image() -> None:
    attention = torch.tensor([[0.0, 1.0]]).repeat(N, 1)
    present = torch.tensor([[False, True, True]]).repeat(N, 1)
    facts = fusion_facts(attention, present)
    assert facts["verdict"].startswith("α is constant")
    assert facts["verdict"].endswith(f"It is 1 on text for {N} items.")
    assert facts["present"] == {"image": 0, "text": N, "collab": N}


def test_alpha_that_varies_is_reported_with_its_spread() -> None:
    attention = torch.tensor([[0.2, 0.8], [0.8, 0.2]])
    facts = fusion_facts(attention, torch.ones(2, 3, dtype=torch.bool))
    assert facts["alpha_std_where_both"] == pytest.approx(0.3)  # half the distance between .2 and .8
    assert "differs" in facts["verdict"]


def test_a_truncated_line_and_a_repeated_step_of_a_log_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 1, "a": 3}\n{"step": 2, "a"')
    assert read_log(path) == [{"step": 0, "a": 1}, {"step": 1, "a": 3}]
