"""Tasks run once, resume, fail alone, and end in a report whose tables are of one split each."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cemg.artifacts import RunArtifacts
from cemg.commands import experiment, latency
from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.experiments import Store, Task, plan, work, write_experiment_report
from cemg.experiments.store import START
from cemg.experiments.tables import boards
from cemg.experiments.work import Options, Source, command_of, run_task, run_tasks

from .test_tables import example_result

QUICK = ["popularity", "memory"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def options(**changes: Any) -> Options:
    return Options(
        sources={("toy", "leave-one-out"): Source(360, changes.pop("sha256", "a" * 64))}, **changes
    )


def run(store: Store, tasks: list[Task]) -> list[str]:
    return run_tasks(tasks, store, options())


def test_finished_tasks_are_not_repeated_and_their_seconds_become_the_estimate(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = plan(["rq1"], {"toy": source}, models=QUICK)
    assert run(store, tasks) == [] and all(store.finished(task) for task in tasks)
    monkeypatch.setattr(work, "run_task", None)  # would fail
    assert run(store, tasks) == []
    took = json.loads((store.path(tasks[0]) / "took.json").read_text())["seconds"]
    expected = START + 2 * max(took - START, 0)  # a process starts once, however large the data are
    assert store.seconds(tasks[0], {"toy": 720}) == pytest.approx(expected)


def test_a_damaged_result_is_made_again(store: Store, source: Path) -> None:
    (task,) = plan(["rq1"], {"toy": source}, models=["popularity"])
    run(store, [task])
    result = store.path(task) / "result.json"
    whole = result.read_text()
    result.write_text(whole[: len(whole) // 2])
    assert not store.finished(task)
    assert (
        run(store, [task]) == [] and json.loads(result.read_text())["metrics"] == json.loads(whole)["metrics"]
    )


def test_a_task_lacks_all_results_if_it_lacks_one(store: Store, source: Path) -> None:
    (task,) = [one for one in plan(["rq1"], {"toy": source}, models=["tiger"])]
    store.begin(task, options().identity(task))
    for name in ("result.json", "free.json"):
        assert not store.finished(task)
        (store.path(task) / name).write_text(json.dumps(example_result()))
    assert store.finished(task) and len(store.results(task)) == 2
    (store.path(task) / "free.json").write_text("{")
    assert store.results(task) == {}


def test_results_without_a_description_are_refused_and_damaged_seconds_only_left_out(
    store: Store, source: Path
) -> None:
    (task,) = plan(["rq1"], {"toy": source}, models=["popularity"])
    run(store, [task])
    for damaged in ("[]", "{", '{"model": "popularity", "gate_only": false, "seconds": "x"}'):
        (store.path(task) / "took.json").write_text(damaged)
        assert store.seconds(task, {"toy": 10**6}) == START + 4  # what the model takes elsewhere
    (store.path(task) / "task.json").unlink()
    with pytest.raises(UserError, match=r"has results, but no task\.json"):
        run(store, [task])


def test_a_model_file_that_failed_may_be_corrected(store: Store, source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("import nothing_of_this_name\n")
    (task,) = plan(["rq1"], {"toy": source}, models=[str(mine)])
    assert run(store, [task]) == [task.name]
    mine.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n"
        "from cemg.baselines.registry import Fitted\n\n"
        "@dataclass\nclass Config:\n    first: int = 0\n\n"
        "def fit(job):\n"
        "    return Fitted(lambda histories, top: torch.arange(top).repeat(len(histories), 1), {})\n"
    )
    (task,) = plan(["rq1"], {"toy": source}, models=[str(mine)])
    assert run(store, [task]) == [] and store.finished(task)


def test_a_failed_task_names_its_log_and_does_not_keep_others_from_running(
    store: Store, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def fit(job):\n    raise ValueError('no luck')\n")
    tasks = plan(["rq1"], {"toy": source}, models=[str(wrong), "popularity"])
    assert run(store, tasks) == [tasks[0].name]
    printed = capsys.readouterr().err.replace("\n", "")
    assert "ValueError: no luck" in printed and "log.txt" in printed and "│" not in printed
    assert not store.finished(tasks[0]) and store.finished(tasks[1])


def test_a_folder_of_another_task_is_refused(store: Store, source: Path) -> None:
    (task,) = plan(["rq1"], {"toy": source}, models=["popularity"])
    run(store, [task])
    with pytest.raises(UserError, match=r"was trained with data_sha256 .aaa.*, this task has .bbb") as caught:
        run_tasks([task], store, options(sha256="b" * 64))
    assert str(store.path(task)) in str(caught.value)
    about = json.loads((store.path(task) / "task.json").read_text())
    (store.path(task) / "task.json").write_text(json.dumps(about | {"format": "9"}))
    with pytest.raises(UserError, match="has format 9"):
        run(store, [task])


def test_a_task_with_another_budget_or_precision_is_not_taken_for_this_one(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "run_command", lambda command, log: 1)  # each task stays unfinished
    planned = plan(["rq1"], {"toy": source}, models=["sasrec", "cemg"])
    tasks = {task.model: task for task in planned if not task.base}
    for name, other, message in (
        ("sasrec", options(budget=2), "is unfinished, and has another budget"),
        ("cemg", options(dtype="bfloat16"), "dtype 'float32', this task has 'bfloat16'"),
    ):
        run(store, [tasks[name]])
        store.check(tasks[name], other.identity(tasks[name]))  # nothing was trained
        (store.path(tasks[name]) / "run").mkdir()
        (store.path(tasks[name]) / "run" / "checkpoint").touch()
        with pytest.raises(UserError, match=message):
            run_tasks([tasks[name]], store, other)
    (popularity,) = plan(["rq1"], {"toy": source}, models=["popularity"])
    assert options(budget=2).identity(popularity) == options().identity(popularity)


def test_a_training_that_ended_by_itself_counts_for_each_budget_and_a_stopped_one_for_its_own(
    store: Store, source: Path
) -> None:
    (task,) = plan(["rq1"], {"toy": source}, models=["sasrec"])
    for about, stopped in (("none", False), ("0.5 h", False), ("0.5 h", True)):
        own = options() if about == "none" else options(budget=0.5)
        store.remove(task)
        store.begin(task, own.identity(task))
        config = {"stopped": "the budget was spent"} if stopped else {}
        (store.path(task) / "result.json").write_text(json.dumps(example_result(config=config)))
        store.check(task, own.identity(task))
        for other in (options(budget=2), options()):
            if not stopped:
                store.check(task, other.identity(task))
    with pytest.raises(UserError, match="was stopped by its budget") as caught:
        store.check(task, options().identity(task))
    assert "it has 0.5 h, this command none" in str(caught.value.cause)
    assert "--budget 0.5" in str(caught.value.fix) and f"delete {store.path(task)}" in str(caught.value.fix)


MODEL = """
import torch
from cemg.baselines.registry import Fitted, Job

def fit(job: Job) -> Fitted:
    return Fitted(lambda histories, top: torch.arange(top).repeat(len(histories), 1), {"model": "first"})
"""


def test_an_edited_model_file_is_another_model(store: Store, source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    tasks = plan(["rq1"], {"toy": source}, models=[str(tmp_path / "mine.py")])
    assert run(store, tasks) == []
    (tmp_path / "mine.py").write_text(MODEL.replace("first", "second"))
    with pytest.raises(UserError, match="was trained with file_sha256"):
        run(store, tasks)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "mine.py").write_text(MODEL)
    moved = plan(["rq1"], {"toy": source}, models=[str(tmp_path / "moved" / "mine.py")])
    store.check(moved[0], options().identity(moved[0]))  # the same file in another folder


def test_a_report_or_a_plan_of_other_settings_is_refused(
    source: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rq1", "--data", source, "--models", "popularity", "--out", tmp_path / "out"]
    assert command(experiment.main, *words) == 0
    data = Dataset.load(source)
    first, *others = data.sequences
    dataclasses.replace(data, sequences=[first[::-1], *others]).save(source)
    for option in ("--report-only", "--dry-run"):
        assert command(experiment.main, *words, option) == 2
        assert "was trained with data_sha256" in capsys.readouterr().err


def test_a_folder_prepared_with_a_split_in_time_is_not_leave_one_out(source: Path) -> None:
    data = Dataset.load(source)
    cuts = np.array([[len(s) - 2, len(s) - 1] for s in data.sequences], dtype=np.int32)
    timed = dataclasses.replace(data, cuts=cuts)
    with pytest.raises(UserError, match="was prepared with a split in time") as caught:
        Source.of(timed, "leave-one-out")
    assert "--split time" in str(caught.value) and Source.of(timed, "time").interactions == 360


def test_two_processes_do_not_share_a_folder(store: Store) -> None:
    with store.locked(), pytest.raises(UserError, match="in use by process") as caught, store.locked():
        pass
    assert "--out" in str(caught.value)


def test_a_budget_and_settings_go_to_the_baselines(store: Store, source: Path) -> None:
    sasrec, own = (plan(["rq1"], {"toy": source}, models=[name])[0] for name in ("sasrec", "cemg"))
    words = command_of(sasrec, store, options(budget=0.5))
    assert words[words.index("--budget") + 1] == "0.5"
    assert "--budget" not in command_of(own, store, options(budget=0.5))
    words = command_of(dataclasses.replace(sasrec, settings=("epochs=2", "dim=8")), store, options())
    assert words[-4:] == ["--epochs", "2", "--set", "dim=8"]


def test_cemg_is_collected_and_without_its_memory_continues_from_its_run(
    store: Store, tiny_run: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, without = plan(["rq1"], {"toy": source}, models=["cemg"])
    assert run_task(without, store, options()) == f"{own.name} is not finished"
    commands: list[list[str]] = []

    def train(command: list[str], log: int) -> int:
        commands.append(command)
        folder = Path(command[command.index("--run") + 1])
        if not folder.exists():
            shutil.copytree(tiny_run, folder)
        results = folder / "results"
        results.mkdir(exist_ok=True)
        for name in ("popularity", "cemg", "cemg-gate"):
            record = example_result() | {"model": name}
            (results / f"toy-{name}-test.json").write_text(json.dumps(record))
        return 0

    monkeypatch.setattr(work, "run_command", train)
    assert run_task(own, store, options()) == "" and run_task(without, store, options()) == ""
    assert "--data" in commands[0] and "--data" not in commands[1]  # the second one changes the gate only
    assert "gate.memory=false" in commands[1]
    assert (store.path(without) / "run" / "generator").is_dir()
    assert set(store.results(own)) == {"CEMG", "CEMG, search alone"}
    assert set(store.results(without)) == {"CEMG, without memory"}


def test_a_model_tested_on_a_sample_has_a_table_with_the_others_on_the_same_users(
    store: Store, source: Path
) -> None:
    popularity, memory = plan(["rq1"], {"toy": source}, models=QUICK)
    assert run(store, [memory]) == []
    assert run_tasks([popularity, memory], store, options(users=20)) == []  # memory is not tested again
    assert "--users" in command_of(popularity, store, options(users=20))
    found = [("toy", task.title, store.results(task)[task.title]) for task in (popularity, memory)]
    small, whole = boards(found, {})
    assert list(small.rows) == ["Popularity", "Item memory"] and list(whole.rows) == ["Item memory"]
    assert [records[0]["evaluated_users"] for records in small.rows.values()] == [20, 20]
    page = write_experiment_report(store, [popularity, memory], ["rq1"]).read_text()
    assert "a sample of 20 of 60 users" in page and "toy, 20 users" in page
    assert store.finished(popularity, users=20) and not store.finished(popularity, users=0)
    assert run(store, [popularity]) == []  # on all users, without a question
    assert "subset" not in store.results(popularity)["Popularity"]["split"]
    assert all(store.finished(popularity, users=users) for users in (0, 20, 30))


def test_tiger_is_tested_on_all_users_and_does_not_record_a_sample(store: Store, source: Path) -> None:
    (tiger,) = plan(["rq1"], {"toy": source}, models=["tiger"])
    identity = options(users=20).identity(tiger)
    assert "users" not in identity
    store.begin(tiger, identity | {"users": "all"})  # as earlier versions wrote it
    store.check(tiger, identity)
    for name in ("result.json", "free.json"):
        (store.path(tiger) / name).write_text(json.dumps(example_result()))
    assert store.finished(tiger, users=20)


def test_the_model_of_the_documentation_is_trained(store: Store, source: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) < 60
    (tmp_path / "my_model.py").write_text(code)
    settings = ["my_model:dim=72", "my_model:patience=30"]
    (task,) = plan(["rq1"], {"toy": source}, models=[str(tmp_path / "my_model.py")], settings=settings)
    assert run(store, [task]) == []
    record = store.results(task)["my_model"]
    assert record["metrics_history_removed"]["HR@5"] > 0.4  # 0.17 at random
    assert (record["config"]["dim"], record["config"]["patience"]) == (72, 30)
    page = write_experiment_report(store, [task], ["rq1"]).read_text()
    assert "Changed settings: my_model: dim=72 patience=30." in page
    assert (store.path(task) / "run" / "checkpoint.safetensors").exists()


def test_the_command_plans_runs_and_reports(
    source: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["rq1", "rq5", "--data", source, "--models", "popularity,memory", "--out", out]
    assert command(experiment.main, *words, "--dry-run") == 0
    assert "toy-memory-seed0" in capsys.readouterr().err and not out.exists()
    slow = ["rq1", *words[2:4], "--models", "llamarec", "--budget", "0.01", "--users", "50", "--out", out]
    assert command(experiment.main, *slow, "--dry-run") == 0
    assert "about 87 s in all" in capsys.readouterr().err  # a start, 36 s of training and 50 users
    assert command(experiment.main, *words) == 0
    page = (out / "report.html").read_text()
    for text in (
        "RQ1: Overall performance",
        "History kept",
        "Item memory",
        "60 users, 30 items",
        "Read from the source: 60 users, 30 items and 360 interactions.",
        "report of a CEMG experiment",
        "Coverage and popularity of the recommendations",
    ):
        assert text in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["model"], row["ranking"]) for row in rows[:2]] == [
        ("Popularity", "history kept"), ("Popularity", "history removed from the list"),
    ]  # fmt: skip
    memory = next(row for row in rows if row["model"] == "Item memory")
    stored = json.loads((out / "tasks" / "toy-memory-seed0" / "result.json").read_text())
    assert float(memory["HR@10"]) == stored["metrics"]["HR@10"]
    assert float(memory["coverage@10"]) == stored["spread"]["metrics"]["coverage@10"]


def test_the_report_has_all_tasks_of_the_folder_and_all_questions_that_were_asked(
    source: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    out = tmp_path / "out"
    words = ["--data", source, "--out", out]
    assert command(experiment.main, "rq5", *words, "--models", "popularity") == 0
    assert command(experiment.main, "rq1", *words, "--models", " Memory ", "--report-only") == 0
    page = (out / "report.html").read_text()
    assert "RQ1, overall performance" in page and "RQ5, cold items" in page
    assert "Without a result: toy-memory-seed0." in page
    assert command(experiment.main, "rq1", *words, "--models", "memory") == 0
    models = [row["model"] for row in csv.DictReader((out / "results.csv").open())]
    assert models == ["Popularity", "Popularity", "Item memory", "Item memory"]
    assert command(experiment.main, "rq1", "--report-only", "--out", out) == 0
    assert [row["model"] for row in csv.DictReader((out / "results.csv").open())] == models


def test_both_splits_are_trained_and_have_tables_of_their_own(
    tmp_path: Path, command: Callable[..., int]
) -> None:
    rng = np.random.default_rng(0)
    rows = [(u, (s + step) % 20, int(t) + step) for u in range(80) for s, t in [rng.integers(20, size=2)]
            for step in range(6)]  # fmt: skip
    lines = ["user,item,timestamp", *(f"{u},i{i},{t}" for u, i, t in rows)]
    (tmp_path / "ring.csv").write_text("\n".join(lines) + "\n")
    words = ["rq1", "--data", tmp_path / "ring.csv", "--models", "popularity,memory"]
    out = tmp_path / "out"
    assert command(experiment.main, *words, "--split", "leave-one-out,time", "--out", out) == 0
    records = [json.loads((out / "tasks" / f"{name}-seed0" / "result.json").read_text())
               for name in ("ring-memory", "ring-time-memory")]  # fmt: skip
    assert "split" not in records[0]["split"] and records[1]["split"]["split"].startswith("in time")
    assert records[1]["split"]["users"] < records[0]["split"]["users"] == 80
    assert records[1]["metrics_history_removed"]["HR@5"] > 0.5  # the next item of the ring; 0.25 at random
    page = (out / "report.html").read_text()
    assert (
        "80 users, 20 items, split leave-one-out" in page and "items, split in time, at 80% and 90%" in page
    )
    (out / "report.html").unlink()
    assert command(experiment.main, "rq1", "--report-only", "--out", out) == 0  # all tasks of the folder
    assert "ring, split in time" in (out / "report.html").read_text()
    moved = out.rename(tmp_path / "moved")
    assert command(experiment.main, *words, "--out", moved) == 0  # nothing to do, wherever the folder is
    assert (moved / "tasks" / "ring-memory-seed0" / "result.json").stat().st_mtime <= (
        moved / "tasks" / "ring-time-memory-seed0" / "result.json"
    ).stat().st_mtime


def test_what_is_missing_is_named_in_the_report(store: Store, source: Path) -> None:
    tasks = plan(["rq1"], {"toy": source}, models=QUICK)
    run(store, tasks[:1])
    page = write_experiment_report(store, tasks, ["rq1"]).read_text()
    assert "Without a result: toy-memory-seed0." in page and "Popularity" in page
    result = store.path(tasks[0]) / "result.json"
    result.write_text(result.read_text().replace('"seed": 0', '"seed": 1', 1))
    page = write_experiment_report(store, tasks, ["rq1"]).read_text()
    assert "toy-popularity-seed0 (damaged: result.json)" in page


@pytest.mark.parametrize("name", ["data.json", "latency/toy.json"])
def test_damaged_parts_of_a_report_are_named_with_what_to_do(store: Store, source: Path, name: str) -> None:
    tasks = plan(["rq3"], {"toy": source}, models=["popularity"])
    run(store, tasks)
    (store.folder / "latency").mkdir()
    (store.folder / name).write_text('{"toy": {"users": 3}, "rows": [{"model": "CEMG"}]}')
    with pytest.raises(UserError, match=f"{name} does not have the expected content") as raised:
        write_experiment_report(store, tasks, ["rq3"])
    (store.folder / name).unlink()
    assert raised.value.fix == f"delete {store.folder / name}" and write_experiment_report(
        store, tasks, ["rq3"]
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["rq7", "--data", "synthetic"], "there is no question rq7"),
        (["rq1", "--data", "nowhere"], "there is no data set nowhere"),
        (["rq1", "--data", "synthetic", "--budget", "0"], "--budget must be more than 0"),
        (["rq1", "--data", "synthetic", "--users", "-1"], "--users must be 0 or more"),
        (["rq1", "--data", "synthetic", "--models", "sasrc"], "one of cemg, popularity"),
        (["rq1", "--data", "synthetic", "--split", "time"], "the synthetic data set has no times"),
        (["rq1", "--data", "synthetic", "--split", "random"], "there is no split random"),
        (["rq1"], "--data is missing"),
        (["rq1", "--data", "synthetic", "--dtype", "int8"], "--dtype must be"),
        (["rq1", "--data", "synthetic", "--split", ","], "--split , names nothing"),
        (["rq1", "--data", "synthetic", "--models", ","], "--models , names nothing"),
        (["rq1", "--data", ","], "--data is missing"),
        (["rq1", "--report-only"], "there is no experiment in"),
        (["rq1", "--data", "synthetic", "--models", "cemg", "--set", "sasrec:dim=8"], "no sasrec is trained"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, command: Callable[..., int], capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(experiment.main, *words, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "models, setting, message",
    [
        ("cemg", "generator.nonsense=3", "generator.nonsense"),
        ("cemg", "generator.epochs=many", "generator.epochs"),
        ("tiger", "tiger:nonsense=3", "nonsense is not a setting"),
        ("sasrec", "sasrec:nonsense=3", "nonsense=3: unknown setting"),
        ("sasrec", "sasrec:dim", "not NAME=VALUE"),
        ("gru4rec", "gru4rec:patience=0", "patience must be 1 or more, got 0"),
        ("gru4rec", "gru4rec:select=foo", "select must be one of NDCG@10, HR@10"),
        ("missrec", "missrec:dim=-5", "dim must be 1 or more, got -5"),
        ("missrec", "missrec:temperature=0", "temperature must be more than 0, got 0"),
        ("sasrec", "sasrec:learning_rate=NaN", "learning_rate must be finite, got nan"),
    ],
)
def test_settings_are_checked_before_anything_is_written(
    models: str, setting: str, message: str, source: Path, tmp_path: Path, command: Callable[..., int], capsys
) -> None:
    words = ["rq1", "--data", source, "--models", models, "--set", setting, "--out", tmp_path / "out"]
    for more in ([], ["--dry-run"]):
        assert command(experiment.main, *words, *more) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_latencies_are_measured_in_turns_once_and_reported(
    store: Store, tiny_run: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = RunArtifacts.open(tiny_run).load_data()
    data.save(tmp_path / "shop")
    tasks = plan(["rq3"], {"toy": tmp_path / "shop"}, models=["popularity", "cemg"])
    for task in tasks:
        store.begin(task, options().identity(task))
        for name in ("result.json", "search.json"):
            (store.path(task) / name).write_text(json.dumps(example_result(hardware={"threads": 1})))
        shutil.copytree(tiny_run, store.path(task) / "run")
    ran: list[list[str]] = []

    def here(words: list[str], log: int) -> int:
        ran.append(words)
        return command(lambda: latency.app(), *words[3:], "--rounds", 2)

    monkeypatch.setattr(work, "run_command", here)
    assert work.measure_latencies(tasks, store, options()) == [] and len(ran) == 1
    assert (
        work.measure_latencies(tasks, store, options()) == [] and len(ran) == 1
    )  # nothing is measured again
    rows = store.latencies("toy")["rows"]
    assert [(row["model"], row["engine"], row["histories"]) for row in rows[:4]] == [
        ("CEMG, search alone", "cemg", 1), ("CEMG", "cemg", 1), ("CEMG, search alone", "transformers", 1),
        ("Popularity", "its own", 1),
    ]  # fmt: skip
    assert all(0 < row["p25_ms"] <= row["p50_ms"] <= row["p75_ms"] for row in rows) and len(rows) == 8
    page = write_experiment_report(store, tasks, ["rq3"]).read_text()
    assert "Time of 10 recommendations, median and quartiles" in page and "ms, 8 at once" in page
    del ran[:]
    store.remove(tasks[1])  # with other models they are measured again
    work.measure_latencies(tasks, store, options())
    assert len(ran) == 1
