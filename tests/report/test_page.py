"""The page of a report: each of its parts, and what it says where a part is missing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cemg.data import Dataset
from cemg.report import fusion_facts, sections, write_report
from cemg.report.blocks import Text
from cemg.storage.manifest import describe
from cemg.storage.run import Run
from cemg.tokenizer import Catalog

N = 40
HOSTILE = "<script>alert('&')</script>"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """The elements and texts of a page. Fails where elements are not closed in the order they were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """What a reader sees, tags removed and white space joined."""
        return " ".join(" ".join(self.texts).split())

    def section(self, anchor: str) -> str:
        """The source of one section."""
        return self.source.partition(f'<section id="{anchor}">')[2].partition("</section>")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage but without settings, weights and results."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.arange(N) // 8, torch.arange(N) % 8], dim=1)
    Catalog.from_codes(codes, 8).save(folder / "catalog")
    counts = {"items": N, "colliding_before": 3, "colliding_after": 0, "changed_codes_share": 0.05}
    (folder / "catalog" / "uniqueness.json").write_text(json.dumps(counts))
    data = Dataset(
        name="shop", user_ids=["u"], item_ids=[f"i{n}" for n in range(N)],
        sequences=[np.arange(4, dtype=np.int32)],
        titles=[HOSTILE, *(f"Item {n}" for n in range(1, N))], texts=["a text"] * N, images=[None] * N,
        tie_rule="source",
    )  # fmt: skip
    data.save(folder / "data")
    (folder / "tokenizer").mkdir()
    attention = torch.rand(N, 2, generator=generator).softmax(1)
    items = {"codes": codes, "z": torch.randn(N, 4, generator=generator), "attention": attention}
    items["present"] = torch.ones(N, 3, dtype=torch.bool)
    save_file(items, folder / "tokenizer" / "items.safetensors")
    for stage, key in (("graph", "graph/bpr"), ("tokenizer", "rqvae/recon"), ("generator", "generator/loss")):
        (folder / stage).mkdir(exist_ok=True)
        lines = [json.dumps({"step": step, key: 1.0 / (step + 1)}) for step in range(8)]
        (folder / stage / "log.jsonl").write_text("\n".join(lines))
    (folder / "generator" / "training.json").write_text(json.dumps({"epochs": 4, "best_epoch": 3}))
    for stage in ("data", "graph", "tokenizer", "catalog", "generator"):
        finish(folder / stage)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def page(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a copy that is not changed."""
    return report(Path(shutil.copytree(whole, tmp_path_factory.mktemp("page") / "run")))


def finish(stage: Path, *, seconds: float = 1.0) -> None:
    """Write the manifest of a stage's files as they are."""
    about = describe(stage, key="0" * 64, config={}, seconds=seconds, made_of={})
    (stage / "manifest.json").write_text(json.dumps(about))


def report(run: Path) -> Page:
    return Page(write_report(run))


def test_the_page_is_valid_accessible_and_refers_to_no_other_file(page: Page) -> None:
    assert page.source.startswith("<!DOCTYPE html>") and page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert page.source.count("<title>") == N + 1  # the page's own and one per point of the map
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("alt" in image for image in page.all("img"))
    links = [
        value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "xlink:href")
    ]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not re.search(r"url\((?!#)|@import|<link", page.source)
    drawings = [a for tag, a in page.elements if a.get("role") == "img"]
    assert len(drawings) == 3 + 2 + 1 + 1 and all(a["aria-label"] for a in drawings)


def test_every_part_of_a_complete_run_is_on_the_page(page: Page) -> None:
    assert "Level 0: 62% of 8 codes used" in page.text  # 5 of 8
    assert "colliding before 3" in page.text and "changed codes share 5.00%" in page.text
    assert len(page.all("circle")) == N
    assert "Item 7 · i7 · codes 0, 7" in page.section("item-map")
    assert "α differs between items" in page.text
    assert "users 1 " in page.text and "items 40 " in page.text and "density 10.000%" in page.text
    assert "items with an image 0" in page.text


def test_hostile_titles_and_run_names_are_text(run: Path, page: Page) -> None:
    assert len(page.all("script")) == 1 and HOSTILE not in page.source
    assert "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt; · i0" in page.section("item-map")
    renamed = report(run.rename(run.with_name("<b>run")))
    assert "&lt;b&gt;run" in renamed.source and not renamed.all("b")


def test_losses_of_the_generator_are_shown_over_epochs(page: Page) -> None:
    section = page.section("losses")
    assert section.count(">epoch</text>") == 3  # below the charts of graph, tokenizer and generator
    assert ">step</text>" not in section
    assert 'aria-label="Generator by epoch: loss from 1 to 0.125"' in section


def test_without_the_number_of_epochs_losses_are_shown_over_steps(run: Path) -> None:
    (run / "generator" / "training.json").unlink()
    finish(run / "generator")
    section = report(run).section("losses")
    assert section.count(">epoch</text>") == 2 and section.count(">step</text>") == 1


def test_a_missing_stage_is_named_and_the_other_parts_are_drawn(run: Path) -> None:
    (run / "tokenizer" / "items.safetensors").unlink()
    page = report(run)
    for anchor in ("item-map", "fusion"):
        assert "Left out: RUN/tokenizer/items.safetensors is missing" in page.section(anchor)
    assert "<svg" in page.section("codebooks") and not page.all("circle")


def test_a_map_without_the_data_has_codes_as_labels(run: Path) -> None:
    (run / "data" / "items.parquet").unlink()
    section = report(run).section("item-map")
    assert "Left out: titles on the map: RUN/data/items.parquet is missing" in section
    assert "<title>item 7 · codes 0, 7</title>" in section


def test_a_large_catalog_is_sampled_on_the_map_and_the_page_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "MAP_ITEMS", 10)
    page = report(run)
    assert len(page.all("circle")) == 10
    assert "t-SNE of the latent vectors of a random 10 of 40 items" in page.text


def test_a_stage_without_a_log_is_named_and_the_other_curves_are_drawn(run: Path) -> None:
    (run / "generator" / "log.jsonl").unlink()
    page = report(run)
    assert "Left out: RUN/generator/log.jsonl is missing." in page.text
    assert page.section("losses").count("<svg") == 2 and "graph/log.jsonl" not in page.text


def test_the_curves_of_an_unfinished_stage_are_drawn(run: Path) -> None:
    (run / "generator").rename(run / ".generator.part")
    page = report(run)
    assert "generator/log.jsonl" not in page.text and page.section("losses").count("<svg") == 3


def test_the_report_of_an_empty_run_says_for_each_part_that_it_is_left_out(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]
    assert "no stage is finished" in page.text and "RUN/catalog is missing" in page.text
    assert page.text.count("log.jsonl is missing or empty") == 3  # graph, tokenizer, generator
    assert "No test has been run" in page.section("results")
    for anchor in ("run", "sample-recommendations", "stages", "losses", "codebooks", "item-map", "fusion"):
        assert "Left out: " in page.section(anchor), anchor
    assert str(tmp_path) not in page.source


def test_results_of_different_splits_are_refused_in_the_report_and_do_not_stop_it(run: Path) -> None:
    (run / "results").mkdir()
    for users in (5, 6):
        record = {"dataset": "d", "split": {"users": users, "items": N}, "metrics": {"HR@10": 0.5}}
        record["metrics_history_removed"] = {"HR@10": 0.5}
        (run / "results" / f"{users}-test.json").write_text(json.dumps(record))
    page = report(run)
    assert "measured on different splits" in page.section("results") and "<svg" in page.section("codebooks")


def test_results_the_command_and_stage_seconds_are_in_tables(run: Path) -> None:
    (run / "results").mkdir()
    record = {"dataset": "d", "split": {"users": 5, "items": N}, "metrics": {"HR@10": 0.25}}
    record["metrics_history_removed"] = {"HR@10": 0.5}
    record |= {"command": "cemg-train --run r", "hardware": {"cpu": "one", "cores": 2}}
    (run / "results" / "d-cemg-test.json").write_text(json.dumps(record))
    finish(run / "graph", seconds=12.34)
    text = report(run).text
    assert "d-cemg-test 0.2500" in text and "- history removed from the list 0.5000" in text
    assert "command cemg-train --run r" in text and "hardware cpu one, cores 2" in text
    assert "graph 12.34" in text


def test_the_terms_of_the_tables_and_charts_are_explained(run: Path) -> None:
    (run / "results").mkdir()
    record = {"dataset": "d", "split": {"users": 5, "items": N}, "metrics": {"HR@10": 0.25}}
    record["metrics_history_removed"] = {"HR@10": 0.5}
    record["cold"] = {"at_most_training_interactions": 5, "targets": 3, "metrics": {"HR@10": 0.0}}
    (run / "results" / "d-cemg-test.json").write_text(json.dumps(record))
    with (run / "tokenizer" / "log.jsonl").open("a") as log:
        log.write("".join(f'\n{{"step": {step}, "rqvae/dead_0": 1.0}}' for step in range(8, 12)))
    finish(run / "tokenizer")
    page = report(run)
    assert "Cold targets: 3 test items with at most 5 training interactions." in page.text
    assert "Dead codes are codes that no item uses." in page.section("losses")
    assert "Moved items are those" in page.section("codebooks")
    assert "α is the weight" in page.section("fusion")


def test_a_report_does_not_open_figures_of_pyplot(run: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    write_report(run)
    assert pyplot.get_fignums() == before


def test_a_latent_of_one_dimension_is_drawn_too(run: Path) -> None:
    path = run / "tokenizer" / "items.safetensors"
    items = load_file(path)
    save_file(items | {"z": items["z"][:, :1].contiguous()}, path)
    finish(path.parent)
    assert len(report(run).all("circle")) == N


@pytest.mark.parametrize("spread", [0.0, 1e-8])
def test_items_with_equal_latents_are_not_drawn(run: Path, spread: float) -> None:
    path = run / "tokenizer" / "items.safetensors"
    items = load_file(path)
    save_file(items | {"z": 1 + spread * items["z"]}, path)
    finish(path.parent)
    page = report(run)
    assert "Left out: all items have the same z." in page.text and not page.all("circle")


def test_a_report_replaces_that_of_an_earlier_version(run: Path) -> None:
    (run / "report").mkdir()
    for name in ("report.md", "losses.png"):
        (run / "report" / name).write_text("old")
    write_report(run)
    assert [path.name for path in (run / "report").iterdir()] == ["report.html"]
    assert not list(run.glob(".report*"))


def test_alpha_is_called_constant_where_no_item_has_an_image() -> None:
    attention = torch.tensor([[0.0, 1.0]]).repeat(N, 1)
    present = torch.tensor([[False, True, True]]).repeat(N, 1)
    facts = fusion_facts(attention, present)
    assert facts["verdict"].startswith("α is constant")
    assert facts["verdict"].endswith(f"It is 1 on text for {N} items.")
    assert facts["present"] == {"image": 0, "text": N, "collab": N}


def test_alpha_that_differs_is_reported_with_its_spread() -> None:
    attention = torch.tensor([[0.2, 0.8], [0.8, 0.2]])
    facts = fusion_facts(attention, torch.ones(2, 3, dtype=torch.bool))
    assert facts["alpha_std_where_both"] == pytest.approx(0.3)  # half the distance between .2 and .8
    assert "differs" in facts["verdict"]


def test_a_plain_concatenation_has_no_weights_to_show(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = sections.own_settings(Run(tiny_run))
    plain = dataclasses.replace(own, tokenizer=dataclasses.replace(own.tokenizer, fusion="concat"))
    monkeypatch.setattr(sections, "own_settings", lambda run: plain)
    (block,) = sections.fusion_section(tiny_run)
    assert isinstance(block, Text) and "concatenated, so there are no weights" in block.text
