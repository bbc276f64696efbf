"""``python -m cemg.baselines`` on a prepared toy folder."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from cemg.baselines.__main__ import main
from cemg.commands import data
from cemg.data.dataset import Dataset


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sequences = [((s + np.arange(6)) % 30).astype(np.int32) for s in rng.integers(30, size=60)]
    blank: list[None] = [None] * 30
    ids = [str(i) for i in range(60)]
    toy = Dataset("toy", ids, ids[:30], sequences, [""] * 30, list(blank), list(blank), "as written")
    toy.save(tmp_path / "toy")
    return tmp_path / "toy"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cemg.baselines", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_popularity_writes_its_result(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "toy-popularity.json"
    assert call(monkeypatch, "--data", prepared, "--model", "popularity", "--out", out) == 0
    record = json.loads(out.read_text())
    assert record["config"] == {"model": "popularity", "seed": 0} and record["split"]["users"] == 60
    assert 0 <= record["metrics"]["NDCG@20"] <= record["metrics"]["HR@20"] <= 1


@pytest.mark.parametrize("model", ["sasrec", "bsarec"])
def test_a_model_trains_is_evaluated_and_records_its_command_line(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    out, folder = tmp_path / "result.json", tmp_path / "run"
    words = ["--data", prepared, "--model", model, "--loss", "bce", "--out", out, "--run", folder]
    settings = ["dim=8", "dropout=0.1", "norm_first=true", "schedule=constant"]
    chosen = ["--epochs", 2, "--seed", 5, "--users-fold", "1/3"]
    chosen += [word for setting in settings for word in ("--set", setting)]
    assert call(monkeypatch, *words, *chosen) == 0
    record = json.loads(out.read_text())
    config = record["config"]
    assert (config["model"], config["loss"], config["dim"], config["dropout"]) == (model, "bce", 8, 0.1)
    assert (config["seed"], config["fold"], config["folds"], config["epochs_run"]) == (5, 1, 3, 2)
    assert [row["epoch"] for row in record["training"]] == [1, 2]
    assert max(row["valid_NDCG@10"] for row in record["training"]) == round(config["valid_NDCG@10"], 5)
    assert config["norm_first"] is True and "--set dim=8" in record["command"]
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "checkpoint.safetensors",
        "dense.json",
        "dense.safetensors",
        "log.json",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--run", "r", "--set", "width=3"], "unknown setting"),
        (["--run", "r", "--set", "dim=wide"], "'wide' is not a valid int"),
        (["--run", "r", "--set", "dim=2.5"], "'2.5' is not a valid int"),
        (["--run", "r", "--set", "dim"], "not NAME=VALUE"),
        (["--run", "r", "--set", "loss=ce"], "this setting has an option"),
        (["--run", "r", "--set", "model=bsarec"], "unknown setting"),
        (["--run", "r", "--budget", "0"], "--budget must be more than 0"),
        (["--run", "r", "--users-fold", "2"], "not fold/folds"),
        (["--run", "r", "--users-fold", "2/2"], "fold must be in 0 … 1"),
        ([], "needs a folder"),
    ],
)
def test_a_user_error_names_the_mistake_and_exits_with_code_2(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    needed = ["--data", prepared, "--model", "sasrec", "--out", tmp_path / "x.json"]
    assert call(monkeypatch, *needed, *words) == 2
    assert sorted(tmp_path.iterdir()) == before
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said


def test_the_memory_needs_no_training_and_records_its_constants_and_its_validation(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "toy-memory.json"
    assert call(monkeypatch, "--data", prepared, "--model", "memory", "--out", out) == 0
    record = json.loads(out.read_text())
    assert record["config"]["model"] == "memory" and record["constants"]["text_weight"] == 0
    assert record["metrics"]["HR@5"] == 1  # item i + 1 follows item i
    assert record["validation"]["metrics"].keys() == record["metrics"].keys()


SOURCES = {  # content of a file that needs an option, and that option
    "other columns": (b"uid,sku,ts\n", b"%d,%d,%d\n", ["--columns", "user=uid,item=sku,timestamp=ts"]),
    "another encoding": (b"user,item,timestamp\n", b"%d,\xe9%d,%d\n", ["--encoding", "latin-1"]),
    "few interactions": (b"user,item,timestamp\n", b"%d,%d,%d\n", ["--min-count", "0"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_needs_options_is_prepared_as_the_fix_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    head, row, options = SOURCES[name]
    users = 3 if name == "few interactions" else 6
    rows = [row % (user, item, item) for user in range(users) for item in range(users)]
    source, out = tmp_path / "my log.csv", tmp_path / "result.json"
    source.write_bytes(head + b"".join(rows))
    words = ["--model", "popularity", "--out", out]
    assert call(monkeypatch, "--data", source, *words) == 2
    (fix,) = re.findall("fix: +(.*)", capsys.readouterr().err)
    command, _, advice = fix.partition(", with an option as below")
    assert options[0] in advice
    prepare = [str(tmp_path / "prepared") if word == "OUT" else word for word in shlex.split(command)]
    assert prepare[:2] == ["cemg-data", "prepare"]
    monkeypatch.setattr(sys, "argv", [*prepare, *options])
    with pytest.raises(SystemExit) as caught:
        data.main()
    assert not caught.value.code, capsys.readouterr().err
    assert call(monkeypatch, "--data", tmp_path / "prepared", *words) == 0 and out.is_file()


def test_an_error_that_no_option_solves_keeps_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.csv").touch()
    words = ["--data", tmp_path / "log.csv", "--model", "popularity", "--out", tmp_path / "result.json"]
    assert call(monkeypatch, *words) == 2
    assert "cemg-data" not in capsys.readouterr().err
