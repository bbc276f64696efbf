"""The benchmarks: results are compared before they are timed, rows state reasons, floors, memory, targets."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cells
import engines
import harness
import latency
import memory_cost
import propagate
import pytest
import quantize
import smoke
import targets
import torch
import transformers
import trie_build
import trie_step
from cells import Cell
from harness import NOT_RUN, Report, Times, separated

from cemg.decoding import Decoder
from cemg_kernels import BipartiteGraph, Trie, residual_quantize

FIELDS = {"op", "case", "backend", "peer", "status", "ratio", "peer_p50_ms", "equal_to", "p20_ms", "p50_ms",
          "p80_ms", "bytes", "floor_ms"}  # fmt: skip
CELL = Cell("tiger", 1, 3)


def make_report(tmp_path: Path) -> Report:
    options = argparse.Namespace(json=tmp_path / "rows.json", rounds=2, seconds=1.0, full=False, profile=None)
    return Report("op", options, torch.device("cpu"))


def test_a_row_has_every_field_whether_it_was_timed_or_not(tmp_path: Path) -> None:
    report, times = make_report(tmp_path), Times((1.0, 2.0, 3.0))
    report.add(
        "timed", "native", times, {"slow": Times((8.0,)), "away": "not installed"}, "reference", 0.5, 64
    )
    report.add("skipped", "native", "over 120 s", {"slow": Times((8.0,))}, "nothing")
    timed, away, skipped = report.rows
    assert all(row.keys() >= FIELDS for row in report.rows)
    assert (timed["ratio"], timed["bytes"], away["status"]) == (4.0, 64, "not installed")
    assert skipped["status"] == "ours skipped: over 120 s"
    assert (skipped["p50_ms"], skipped["ratio"], skipped["peer_p50_ms"]) == (None, None, 8.0)
    assert "ours skipped: over 120 s" in report.table()
    peers: dict[str, Times | str] = dict.fromkeys(("a", "b"), f"{NOT_RUN}it does not use the catalog")
    report.add("sized", "native", times, {**peers, "slow": Times((8.0,))}, "nothing")
    assert [row["peer"] for row in report.rows[-3:]] == ["a", "b", "slow"]
    shared, slow = report.table().splitlines()[-2:]
    assert "2 peers" in shared and f"{NOT_RUN}it does not use the catalog" in shared and "8.000" in slow


def test_an_interrupted_benchmark_is_resumed_only_by_the_same_code_and_settings(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    report = make_report(tmp_path)
    assert report.resume(["rounds"]) == set()  # the file does not exist yet
    report.add("first", "native", Times((1.0,)), {}, "reference")
    report.add("crashed", "native", "its process ended", {}, "nothing")
    report.write()
    again = make_report(tmp_path)
    assert again.resume(["rounds"]) == {"first"} and again.rows == report.rows[:1]
    again.add("crashed", "native", Times((1.0,)), {}, "reference")
    again.write()
    assert make_report(tmp_path).resume(["rounds"]) == {"first", "crashed"}
    other = make_report(tmp_path)
    other.options.rounds = 3
    with pytest.raises(SystemExit, match=r"rows\.json .* differs in: --rounds\. Leave out --resume"):
        other.resume(["rounds"])
    other.op = "trie_step"
    with pytest.raises(SystemExit, match=r"differs in: op\."):
        other.resume([])
    for now, message in (("ba9876543210", "differs in: commit"), ("0123456789ab+", "uncommitted code")):
        monkeypatch.setattr(harness, "commit", lambda now=now: now)
        with pytest.raises(SystemExit, match=message):
            make_report(tmp_path).resume([])


def test_the_work_that_valid_saves_is_between_nothing_and_all_but_the_first_code() -> None:
    whole = replace(CELL, beams=50)
    valid = replace(whole, normalize="valid")
    assert cells.decode_rows(whole) == 3 * 50 and cells.decode_steps(whole) == 3
    crowded, sparse = replace(valid, items=10**14), replace(valid, items=10)
    assert cells.decode_rows(crowded) == pytest.approx(3 * 50) and cells.decode_steps(
        crowded
    ) == pytest.approx(3)
    assert cells.decode_rows(sparse) < 2 and cells.decode_steps(sparse) < 1
    assert 50 < cells.decode_rows(valid) < 60  # 47 items per first code, one or two per second code
    level = replace(whole, normalize="level")
    assert cells.needed_operations(valid) < cells.needed_operations(level)
    assert cells.read_bytes(valid, 0.0) < cells.read_bytes(level, 0.0)


class FakeWorker:
    """A worker without a process; it replies with the same result to each request."""

    def __init__(self, result: dict[str, Any], ms: float = 5.0) -> None:
        self.result, self.ms, self.requests = result, ms, []  # type: ignore[var-annotated]

    def request(self, content: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.requests.append(content["do"])
        extra = self.result if content["do"] in ("prepare", "first") else {}
        return {"ms": self.ms, "mib": 1.0, "parts": {"encoder": 1.0}} | extra


def test_a_skipped_cell_and_a_peer_that_was_not_run_have_rows(tmp_path: Path) -> None:
    report = make_report(tmp_path)
    workers = {"cemg": FakeWorker({"skip": "would need 30 GiB"}), latency.UNCONSTRAINED: FakeWorker({})}
    latency.one_cell(replace(CELL, items=10**4), workers, report, 1.0, 8)  # type: ignore[arg-type]
    (row,) = json.loads(report.options.json.read_text())["rows"]
    assert (row["status"], row["p50_ms"]) == ("ours skipped: would need 30 GiB", None)
    assert "ours skipped: would need 30 GiB" in latency.cell_table(report)
    workers["cemg"] = FakeWorker({"scores": [[0.0]], "codes": [[[1]]], "illegal": 0})
    latency.one_cell(replace(CELL, items=10**4), workers, report, 1.0, 8)  # type: ignore[arg-type]
    row = report.rows[-1]
    assert (row["status"], row["p50_ms"]) == (f"{NOT_RUN}it does not use the catalog", 5.0)


def test_a_long_first_search_counts_as_a_sample_and_the_same_generate_times_out_once() -> None:
    workers = {"cemg": FakeWorker({}), "slow": FakeWorker({}, ms=2 * latency.LONG_MS)}
    workers |= {name: FakeWorker({"skip": "over 120 s"}) for name in latency.GENERATE}
    results = latency.run_cell(CELL, workers, 3, 1.0)  # type: ignore[arg-type]
    assert results["times"]["slow"].samples == (2 * latency.LONG_MS,)
    assert results["times"]["cemg"].samples == (5.0,) * 3
    assert workers["slow"].requests == ["prepare", "first", "memory"]
    first, *others = latency.GENERATE
    assert results["reasons"][first] == "over 120 s" and workers[first].requests == ["prepare"]
    for name in others:
        assert results["reasons"][name] == f"{NOT_RUN}{first}, the same generate(), took over 120 s"
        assert workers[name].requests == []


def test_the_stages_of_our_engine_and_a_trace_of_its_native_calls_are_recorded(tmp_path: Path) -> None:
    engines.cemg(Cell("mmgrec", 1, 4, history=3, items=100, codes=16))
    shares = engines.stage_shares()
    assert shares.keys() == {"encoder", "decoder", "selection", "other"}
    assert sum(shares.values()) == pytest.approx(1) and all(share > 0 for share in shares.values())
    engines.trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"decode: prefill", "decode: step 1", "trie_beam_step", "projection"} <= names


@pytest.mark.skipif(find_spec("flashrec") is None, reason="not installed: flashrec")
def test_flashrec_returns_the_same_lists_as_our_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """flashrec's code on a CPU; only pinned memory and the rotation, which require a GPU, are replaced.

    flashrec reads twice as many tokens as beams before it applies the trie: here all codes of a level. It
    normalizes the first code over the codes of all levels, which adds a constant per user.
    """
    from flashrec.layers.rotary import RotaryEmbedding

    def rotate(self: Any, positions: torch.Tensor, *heads: torch.Tensor) -> list[torch.Tensor]:
        cos, sin = self.cos_sin_cache[positions.long(), None].chunk(2, -1)
        halves = [rows.view(len(rows), -1, self.head_dim).float().chunk(2, -1) for rows in heads]
        turned = [torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in halves]
        return [x.view(y.shape).to(y.dtype) for x, y in zip(turned, heads, strict=True)]

    def unpinned(make: Any) -> Any:
        return lambda *sizes, pin_memory=False, **options: make(*sizes, **options)

    monkeypatch.setattr(RotaryEmbedding, "forward", rotate)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, unpinned(getattr(torch, name)))
    shape = cells.decoder(transformers.Qwen3Config, 64, 2, 4, 2, 128, 8, head_dim=32, initializer_range=0.2,
                          rope_parameters={"rope_type": "default", "rope_theta": 1e4})  # fmt: skip
    monkeypatch.setitem(cells.MODELS, "qwen3-tiny", shape)
    cell = Cell("qwen3-tiny", 3, 8, 5, 400, 4, 16, "level", dtype="bfloat16")
    workload = engines.Workload(cell)
    with torch.inference_mode():
        codes, scores = engines.flashrec_search(workload)()
        workload.model.float()
        decoder = Decoder(workload.model, workload.catalog, workload.first_token, "level")
        ours = decoder.decode(workload.ids, workload.mask, cell.beams)
    assert engines.illegal(codes, workload.catalog) == 0
    theirs, expected = (table - table[:, :1] for table in (scores, ours.scores))
    assert torch.allclose(theirs, expected, atol=0.2)  # bfloat16 has 8 bits; scores are -5 ... -15
    clear = separated(ours.scores, 0.4)
    assert clear.sum() >= 6 and torch.equal(codes[clear], ours.codes[clear].to(codes.dtype))


@pytest.mark.parametrize("items, label, peer, full, runs", [
    (cells.ITEMS, "", latency.UNCONSTRAINED, False, True),
    (10**4, "", latency.DICT_TRIE, False, False),
    (10**4, "", latency.DICT_TRIE, True, True),
    (10**4, "", latency.UNCONSTRAINED, True, False),
    (cells.ITEMS, "RQ3 TIGER: ", latency.UNCONSTRAINED, False, True),
    (cells.ITEMS, "RQ3 LETTER: ", latency.UNCONSTRAINED, False, False),
])  # fmt: skip
def test_each_cell_selects_the_peers_that_run(
    items: int, label: str, peer: str, full: bool, runs: bool
) -> None:
    reason = latency.skip_reason(replace(CELL, items=items, label=label), peer, full)
    assert reason == "" if runs else reason.startswith(NOT_RUN)


def lists(scores: list[float], codes: list[int]) -> dict[str, Any]:
    return {"scores": [scores], "codes": [[[code] for code in codes]]}


def test_lists_are_compared_by_scores_and_except_at_ties_by_codes() -> None:
    ours = lists([-1.0, -2.0, -3.0, -3.00001], [5, 6, 7, 8])

    def against(scores: list[float], codes: list[int], dtype: str = "float32") -> str:
        first = {"cemg": ours, latency.DICT_TRIE: lists(scores, codes)}
        return latency.compare(replace(CELL, dtype=dtype), first)

    tied = against([-1.0, -2.0, -3.0, -3.00001], [5, 6, 8, 7])
    assert tied.startswith(latency.DICT_TRIE) and "within 1e-04" in tied
    with pytest.raises(SystemExit, match="1 codes"):
        against([-1.0, -2.0, -3.0, -3.00001], [5, 9, 7, 8])
    with pytest.raises(SystemExit, match=r"scores by 1\.0e-02"):
        against([-1.0, -2.01, -3.0, -3.00001], [5, 6, 7, 8])
    assert "within 5e-01" in against([-1.0, -2.01, -3.0, -3.00001], [5, 6, 7, 8], "bfloat16")
    assert latency.compare(CELL, {"cemg": ours}) == latency.NOT_COMPARED


def test_the_last_score_may_tie_with_a_pruned_one() -> None:
    assert separated(torch.tensor([[0.0, -1.0, -1.1, -2.0]]), 0.5).tolist() == [[True, False, False, False]]
    assert separated(torch.tensor([[0.0, -1.0, -2.0]]), 0.5).tolist() == [[True, True, False]]


@pytest.mark.parametrize("model", ["tiger", "decoder-4", "smollm2-135m"])
def test_a_search_reads_cached_weights_once(model: str) -> None:
    cell = Cell(model, 1, 10)
    shape = cells.MODELS[model]
    with torch.device("meta"):
        weights = sum(p.numel() for p in shape.build(1024).parameters())
    prompt = cells.matrices_of(cell).kv_per_token * cell.prompt
    once = cells.read_bytes(cell, float("inf"))
    assert 0.8 * 4 * weights < once < 4 * (weights + prompt)  # without embeddings, norms and biases
    assert once < cells.read_bytes(cell, once / 4) < cells.read_bytes(cell, 0) < cell.levels * once
    assert cells.read_bytes(replace(cell, dtype="bfloat16"), float("inf")) * 2 == once


def test_a_cell_that_needs_more_than_the_limit_or_the_free_memory_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = Cell("t5-base", 64, 50)
    assert cells.needed_bytes(large) < cells.MEMORY_LIMIT < cells.needed_bytes(large, generate=True)
    assert cells.needed_bytes(replace(CELL, items=10**7)) > cells.needed_bytes(CELL) + 64 * 10**7 - 10**6
    monkeypatch.setattr(cells, "free_bytes", lambda device: 2.0**36)
    cells.check_memory(large)
    with pytest.raises(cells.Skip, match="the limit is 20"):
        cells.check_memory(large, generate=True)
    monkeypatch.setattr(cells, "free_bytes", lambda device: 2.0**20)
    with pytest.raises(cells.Skip, match="0 are free"):
        cells.check_memory(large)


def test_the_floor_of_propagation_counts_the_bytes_that_no_cache_saves() -> None:
    users, items = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0])
    graph = BipartiteGraph.from_edges(users, items, 3, 3)  # 6 vertices, of degrees 3 1 0 2 1 1
    once = 8 * 8 + 7 * 8 + 2 * 6 * 100
    assert propagate.floor_bytes(graph, 100, float("inf")) == once
    assert propagate.floor_bytes(graph, 100, 0) == propagate.LAYERS * (once + (2 + 1) * 100)
    kept = propagate.LAYERS * (1 * 100) + once + (propagate.LAYERS - 1) * (once - 100)
    assert propagate.floor_bytes(graph, 100, 100) == kept  # the row of degree 3 stays


def test_one_wrong_code_in_a_hundred_rows_is_detected() -> None:
    x, codebooks = quantize.draw(100, 16, torch.device("cpu"))
    codes, _ = residual_quantize(x, codebooks)
    assert quantize.count_wrong(x, codebooks, codes) == 0
    codes[70, 3] = (codes[70, 3] + 1) % 16
    assert quantize.count_wrong(x, codebooks, codes) == 1


def test_a_step_with_another_parent_or_code_is_rejected() -> None:
    step = trie_step.StepCase(cells.random_codes(500, 4, 8), 8, torch.device("cpu"), users=2)
    expected = step.run("reference")
    trie_step.check(step.run("reference"), expected)
    trie_step.check(step.run_mixed("native"), step.run_mixed("reference"))
    for name in ("parents", "codes"):
        other = expected._replace(**{name: getattr(expected, name) + 1})
        with pytest.raises(AssertionError, match=f"{name} differ"):
            trie_step.check(other, expected)
    wrong = {"wrong": lambda: expected._replace(scores=expected.scores - 1)}
    peers = harness.check_peers(wrong, lambda peer: trie_step.check(peer(), expected))
    assert str(peers["wrong"]).startswith("failed: Tensor-likes are not close")


def test_the_dict_trie_agrees_with_the_trie_and_a_wrong_answer_is_detected() -> None:
    from cemg.decoding import dict_trie

    codes = cells.random_codes(300, trie_build.LEVELS, 8)
    queries = trie_build.TrieQueries(codes, Trie.from_codes(codes, 8))
    ours, theirs = queries.ours(), queries.of_dicts(dict_trie(codes))
    for name in trie_build.QUERIES:
        assert trie_build.same_result(name, ours[name](), theirs[name]())
    assert not trie_build.same_result("mask", ~ours["mask"](), theirs["mask"]())
    assert not trie_build.same_result("lookup", ours["lookup"]().flip(0), theirs["lookup"]())


def test_a_target_is_judged_by_the_best_median_and_omitted_without_rows(
    tmp_path: Path,
) -> None:
    def row(op: str, case: str, ms: float | None) -> dict[str, Any]:
        return {"op": op, "case": case, "p50_ms": ms}

    rows = [row("trie_step", "K 256 N 1e+04", 0.02), row("trie_step", "K 256 N 1e+04", 0.006),
            row("trie_step", "K 256 N 1e+08", 0.012), row("trie_step", "K 2048 N 1e+04", 9.0),
            row("trie_step", "K 256 N 1e+04 B 8", 9.0), row("latency", "tiger B1 W50", 0.3),
            row("latency", "t5-small B1 W50", None)]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "killed.json").write_text('{"rows": [')
    results = targets.targets(targets.read(sorted(tmp_path.glob("*.json"))))
    assert results == {
        targets.SELECTION: {"goal": 0.008, "measured": 0.012, "met": False},
        "TIGER's size, B 1, W 50": {"goal": 0.4, "measured": 0.3, "met": True},
        "selection, flat from 1e+04 to 1e+08 items": {"goal": 1.2, "measured": 2.0, "met": False},
    }


@pytest.mark.medium
def test_a_search_with_a_memory_is_compared_and_timed_beside_one_without(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory_cost, "EVENTS", 900)
    report = make_report(tmp_path)
    memory_cost.run_memory(report, [Cell("mmgrec", 2, 4, items=60), Cell("mmgrec", 1, 4, items=500)])
    small, large = json.loads(report.options.json.read_text())["rows"]
    for row in (small, large):
        assert row["equal_to"].startswith("a search in PyTorch") and row["peer"] == memory_cost.SEARCH
        assert min(row["p50_ms"], row["peer_p50_ms"], row["query_ms"], row["tensors_ms"]) > 0
        assert row["cost"] > -1 and row["entries"] > 10


@pytest.mark.parametrize("texts", [False, True])
def test_a_synthetic_memory_gives_mass_to_the_items_of_its_sequences(monkeypatch, texts: bool) -> None:
    monkeypatch.setattr(memory_cost, "EVENTS", 900)
    rows = torch.arange(5, 125, 3).numpy()
    memory = memory_cost.synthetic_memory(rows, 200, texts=texts)
    items, scores = memory.scores(rows[[3, 17, 8]])
    assert memory.num_items == 200 and (scores > 0).sum() > 10
    assert set(items.tolist()) <= set(rows.tolist()) or texts


def test_the_cost_of_a_memory_is_the_median_over_the_rounds() -> None:
    times = {
        memory_cost.SEARCH: Times((10.0, 20.0, 40.0)),
        memory_cost.WITH_MEMORY: Times((11.0, 24.0, 42.0)),
    }
    assert memory_cost.memory_cost(times) == pytest.approx(0.1)


def test_the_smoke_run_rejects_a_case_without_a_time_or_a_comparison(tmp_path: Path) -> None:
    path = tmp_path / "op.json"
    good = {"case": "tiny", "p50_ms": 1.0, "equal_to": "reference", "status": "ok"}
    path.write_text(json.dumps({"rows": [good, good]}))
    assert smoke.check_rows(path) == 2
    bad = (
        {"p50_ms": None, "status": "ours skipped: x"},
        {"equal_to": latency.NOT_COMPARED},
        {"equal_to": ""},
    )
    for change in bad:
        path.write_text(json.dumps({"rows": [good, good | change]}))
        with pytest.raises(AssertionError, match=r"tiny: (ours skipped: x|not compared)"):
            smoke.check_rows(path)
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(AssertionError, match="op has no rows"):
        smoke.check_rows(path)


def test_the_gpu_script_names_kernels_and_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    script = (root / "bench/gpu.sh").read_text()
    tests = set(re.findall(r"^def test_(\w+)", (root / "tests/test_gpu.py").read_text(), re.MULTILINE))
    sources = [*root.glob("kernels/cemg_kernels/**/*.py"), *root.glob("csrc/src/*.cu")]
    names = "\n".join(path.read_text() for path in sources)
    profiles = re.findall(r'^  profiled \w+ "(.+)" "(.+)"$', script, re.MULTILINE)
    assert len(profiles) == 7
    for kernels, _ in profiles:
        assert all(re.search(rf"\b{kernel}", names) for kernel in kernels.split("|")), kernels
    selections = [selection for _, selection in profiles] + re.findall(r'-k "([^$"]+)"', script)
    words = {word for selection in selections for word in re.findall(r"[a-z_]{5,}", selection)}
    words -= {"valid", "float"}  # parameters
    assert {"every_trie_operation", "log_sum_exp", "codes"} <= words
    assert [word for word in sorted(words) if not any(word in name for name in tests)] == []
