"""Result files, and tables of them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.evaluation import (
    Evaluation,
    differences_of,
    evaluate,
    hardware,
    printed_rows,
    ranks_of,
    read_result,
    result_markdown,
    result_table,
    results_of,
    write_result,
)
from cemg.evaluation.__main__ import main
from cemg.progress import print_table
from cemg.storage.read import signed


def data_of(sequences: list[list[int]], items: int, name: str = "Beauty") -> Dataset:
    blank: list[None] = [None] * items
    return Dataset(
        name=name,
        user_ids=[f"u{user}" for user in range(len(sequences))],
        item_ids=[f"i{item}" for item in range(items)],
        sequences=[np.array(sequence, dtype=np.int32) for sequence in sequences],
        titles=[""] * items,
        texts=list(blank),
        images=list(blank),
        tie_rule="as written",
    )


def write_evaluation(path: Path, evaluation: Evaluation, excluded: Evaluation | None = None) -> None:
    write_result(
        path,
        dataset="Beauty",
        command="test",
        config={"dim": 4},
        seed=1,
        hardware=hardware(),
        seconds=1.25,
        evaluation=evaluation,
        excluded=excluded,
    )


def write(path: Path, *, last: int = 2, part: str = "test", excluded: bool = False) -> None:
    scored = evaluate(
        lambda h, top: torch.arange(5)[None, :top],
        data_of([[0, 1, last]], 5).split(),
        part=part,
        progress=False,
    )
    write_evaluation(path, scored, scored if excluded else None)


def test_a_result_file_has_the_documented_keys_and_no_partial_file_remains(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a.json")
    record = json.loads((tmp_path / "deep" / "a.json").read_text())
    documented = {"dataset", "command", "config", "seed", "hardware", "seconds", "split", "metrics"}
    assert documented | {"metrics_history_removed", "cold", "targets_in_history"} <= set(record)
    assert set(record["split"]) == {"users", "items", "targets_sha256", "tie_rule"}
    assert record["metrics"]["HR@5"] == 1 and record["metrics"]["NDCG@10"] == 0.5  # rank 2: 1 / log2(4)
    assert record["metrics_history_removed"]["NDCG@10"] == 1
    assert record["cold"]["targets"] == 1
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_intervals_are_written_for_each_ranking_and_for_cold_targets(tmp_path: Path) -> None:
    write(tmp_path / "a.json", excluded=True)
    record = json.loads((tmp_path / "a.json").read_text())
    rankings = ("", "_history_removed", "_history_excluded_in_search")
    for part in (record, record["cold"]):
        for ranking in rankings:
            low, high = part[f"intervals_95{ranking}"]["HR@10"]
            assert low == pytest.approx(0.2065, abs=1e-4) and high == part[f"metrics{ranking}"]["HR@10"] == 1
    assert record["evaluated_users"] == 1


def test_the_ranks_in_a_file_are_those_of_the_evaluation_in_the_order_of_the_split(tmp_path: Path) -> None:
    sequences = [[5, 6, 7, 0], [5, 6, 3], [1, 2, 8, 9, 4, 2]]  # in another order than by length
    scored = evaluate(lambda h, top: torch.arange(10)[None, :top].expand(len(h), -1),
                      data_of(sequences, 10).split(), progress=False)  # fmt: skip
    assert scored.users.tolist() == [1, 0, 2]
    write_evaluation(tmp_path / "a.json", scored)
    ranks = ranks_of(read_result(tmp_path / "a.json"))
    assert {key: values.tolist() for key, values in ranks.items()} == {
        "metrics": [0, 3, 2],
        "metrics_history_removed": [0, 3, -1],
    }


def test_the_difference_of_two_files_is_paired_by_user(tmp_path: Path) -> None:
    """Half of the users gain one hit and none loses one: beyond chance, though the intervals overlap."""
    split = data_of([[0, 1, 2 + user % 2] for user in range(40)], 10).split()
    better = evaluate(lambda h, top: torch.arange(2, 4)[None].expand(len(h), -1), split, progress=False)
    worse = evaluate(lambda h, top: torch.arange(2, 3)[None].expand(len(h), -1), split, progress=False)
    write_evaluation(tmp_path / "a.json", better)
    write_evaluation(tmp_path / "b.json", worse)
    found = differences_of((read_result(tmp_path / "a.json"), read_result(tmp_path / "b.json")))
    hits = found["metrics"]["HR@10"]
    assert hits["mean"] == 0.5 and 0.3 < hits["low"] < 0.5 < hits["high"] < 0.7
    text = main(["--difference", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    low, high = hits["low"], hits["high"]
    assert f"| HR@10, history kept | +0.5000 | {low:+.4f} … {high:+.4f} |" in text
    assert "| a minus b | difference | 95 % interval |" in text


def test_a_difference_needs_two_files_with_ranks_of_the_same_users(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    with pytest.raises(UserError, match="compares two result files, got 1"):
        main(["--difference", str(tmp_path / "a.json")])
    record = json.loads((tmp_path / "a.json").read_text())
    del record["ranks"]
    (tmp_path / "old.json").write_text(json.dumps(signed(record)))
    with pytest.raises(UserError, match=r"old.json has no ranks"):
        main(["--difference", str(tmp_path / "a.json"), str(tmp_path / "old.json")])
    write(tmp_path / "valid.json", part="valid")
    with pytest.raises(UserError, match="different splits"):
        main(["--difference", str(tmp_path / "a.json"), str(tmp_path / "valid.json")])


def test_a_table_shows_the_difference_to_the_model_that_a_file_is_compared_with(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    record["compared"] = {"model": "memory", "differences": differences_of((record, record))}
    (tmp_path / "a.json").write_text(json.dumps(signed(record)))
    rows = result_markdown([tmp_path / "a.json"], paper=False).splitlines()
    shown = [
        f"| {label} |" + " +.0000 |" * 6
        for label in ("- minus memory", "  95 % lower bound", "  95 % upper bound")
    ]
    assert rows[-3:] == shown  # those with the history removed are the same
    removed = record["compared"]["differences"]["metrics_history_removed"]
    removed["HR@5"] = {"mean": -0.1, "low": -0.2, "high": 0.1}
    (tmp_path / "a.json").write_text(json.dumps(signed(record)))
    rows = result_markdown([tmp_path / "a.json"], paper=False).splitlines()
    assert rows[-6:-3] == shown
    starts = (
        "| - minus memory, history removed | -.1000 |",
        "|   95 % lower bound | -.2000 |",
        "|   95 % upper bound | +.1000 |",
    )
    assert all(row.startswith(start) for row, start in zip(rows[-3:], starts, strict=True))


@pytest.mark.parametrize("width", [20, 80, 300])
def test_a_table_is_printed_in_full_width(width: int, tmp_path: Path) -> None:
    name = "a-result-file-with-a-name-of-more-than-fifty-characters-in-all"
    write(tmp_path / f"{name}.json")
    out = io.StringIO()
    print_table(result_table([tmp_path / f"{name}.json"]), Console(file=out, width=width))
    row = next(line for line in out.getvalue().splitlines() if name in line)
    assert row.split() == [name, *["1.0000"] * 3, *["0.5000"] * 3] and "…" not in out.getvalue()


def test_hardware_does_not_name_the_host() -> None:
    about = json.dumps(hardware())
    assert os.uname().nodename not in about and '"cpu"' in about and torch.__version__ in about


def test_a_table_has_the_results_of_one_split_and_those_that_papers_print(tmp_path: Path) -> None:
    write(tmp_path / "one.json")
    write(tmp_path / "two.json")
    text = result_markdown([tmp_path / "one.json", tmp_path / "two.json"])
    rows = text.splitlines()
    ours = "1.0000 | 1.0000 | 1.0000 | 0.5000 | 0.5000 | 0.5000 |"
    half = "0.3967 | 0.3967 | 0.3967 | 0.0000 | 0.0000 | 0.0000 |"  # Wilson: 1 of 1, 0.2065 to 1
    assert rows[0] == "| model | HR@5 | HR@10 | HR@20 | NDCG@5 | NDCG@10 | NDCG@20 |"
    assert rows[2] == f"| one | {ours}" and rows[10] == f"| two | {ours}"
    assert rows[3] == rows[5] == f"|   ± (95 %) | {half}"
    assert rows[4] == "| - history removed from the list |" + " 1.0000 |" * 6
    assert rows[6] == f"| - cold targets (1) | {ours}" and rows[7] == rows[9] == rows[3]
    assert rows[8] == "| - cold targets, history removed |" + " 1.0000 |" * 6
    assert "| CEMG (CEMG paper) |  | 0.0665 |  |  | 0.0348 |  |" in rows
    assert "| TIGER (TIGER paper) |  | 0.0648 |  |  | 0.0384 |  |" in rows
    out = io.StringIO()
    Console(file=out, width=80).print(result_table([tmp_path / "one.json"], paper=False))
    assert out.getvalue().count("1.0000") == 18 and "CEMG paper" not in out.getvalue()


def test_files_that_differ_only_in_the_seed_are_one_row_with_an_interval(tmp_path: Path) -> None:
    names = ["a-seed0.json", "a-seed1.json", "b-seed0.json"]
    for name, last in zip(names, (2, 2, 2), strict=True):
        write(tmp_path / name, last=last)
    record = json.loads((tmp_path / "a-seed1.json").read_text())
    record["metrics"]["HR@5"] = 0.5
    (tmp_path / "a-seed1.json").write_text(json.dumps(signed(record)))
    text = result_markdown([tmp_path / name for name in names], paper=False)
    assert "| a (2 seeds) | 0.7500 (SD 0.3536) | 1.0000 (SD 0.0000) |" in text
    assert "| b-seed0 | 1.0000 |" in text


def test_a_table_with_printed_results_fits_into_eighty_columns(tmp_path: Path) -> None:
    write(tmp_path / "beauty-sasrec-ce-seed0.json")
    out = io.StringIO()
    Console(file=out, width=80).print(result_table([tmp_path / "beauty-sasrec-ce-seed0.json"]))
    assert "…" not in out.getvalue() and "CEMG, cold items (CEMG paper)" in out.getvalue()


def test_results_of_different_targets_are_not_put_in_one_table(tmp_path: Path) -> None:
    write(tmp_path / "one.json", last=2)
    write(tmp_path / "two.json", last=3)
    with pytest.raises(UserError, match="different splits") as caught:
        result_table([tmp_path / "one.json", tmp_path / "two.json"])
    assert "targets_sha256" in str(caught.value)


def test_results_of_validation_and_test_are_not_put_in_one_table(tmp_path: Path) -> None:
    write(tmp_path / "one.json")
    write(tmp_path / "two.json", part="valid")
    with pytest.raises(UserError, match="different splits"):
        result_markdown([tmp_path / "one.json", tmp_path / "two.json"])


@pytest.mark.parametrize("content, message", [("{", "is not valid JSON"), ("{}", "is not a result file")])
def test_a_file_that_is_not_a_result_file_is_refused_and_named(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=f"x.json {message}"):
        result_table([tmp_path / "x.json"])


def test_a_missing_file_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        result_table([tmp_path / "none.json"])
    with pytest.raises(UserError, match="no result"):
        result_table([])


def test_printed_results_exist_for_the_three_data_sets_of_the_paper() -> None:
    assert [len(printed_rows(name)) for name in ("Beauty", "sports", "yelp", "ml-100k")] == [13, 12, 12, 0]
    assert [r.hr10 for r in printed_rows("yelp") if r.model == "CEMG"] == [0.0458]


def test_only_complete_results_of_the_run_itself_are_listed(tmp_path: Path) -> None:
    """Messages name a copy, a result of another generator, and a missing file; the other files are listed."""

    def put(name: str, **further: object) -> None:
        write(tmp_path / name)
        record = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(signed(record | {"generator_key": "g"} | further)))

    put("d-popularity-test.json", config={"model": "popularity"})
    put("d-cemg-test.json", beside="d-popularity-test.json")
    good, wrong = results_of(tmp_path, "*-test.json", generator="g")
    assert [path.name for path in good] == ["d-cemg-test.json", "d-popularity-test.json"] and wrong == []
    assert results_of(tmp_path, "*-test.json", generator="h")[0] == []
    (tmp_path / "d-copy-test.json").write_bytes((tmp_path / "d-cemg-test.json").read_bytes())
    assert "is a copy of d-cemg-test.json" in results_of(tmp_path, "*-test.json", generator="g")[1][0]
    (tmp_path / "d-copy-test.json").unlink()
    (tmp_path / "d-popularity-test.json").rename(tmp_path / "kept")
    assert "d-popularity-test.json is missing" in results_of(tmp_path, "*-test.json", generator="g")[1][0]
    (tmp_path / "kept").rename(tmp_path / "d-popularity-test.json")
    (tmp_path / "d-cemg-test.json").unlink()
    assert "beside" in results_of(tmp_path, "*-test.json", generator="g")[1][0]
