"""Which tasks a question needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cemg.errors import UserError
from cemg.experiments import QUESTIONS, Task, plan
from cemg.experiments.plan import DEFAULT, sources_of

SOURCES = {"shop": Path("shop.csv")}


def names(*questions: str, **options: object) -> list[str]:
    return [task.name for task in plan(questions, SOURCES, **options)]  # type: ignore[arg-type]


def test_rq1_has_every_model_and_cemg_with_and_without_its_memory() -> None:
    expected = ["cemg", *DEFAULT, "cemg-without-memory"]
    assert sorted(names("rq1")) == sorted(f"shop-{name}-seed0" for name in expected)


def test_cemg_comes_before_what_starts_from_its_run() -> None:
    for question in QUESTIONS:
        tasks = plan([question], SOURCES)
        done: set[str] = set()
        for task in tasks:
            assert not task.base or task.base in done
            done.add(task.name)


def test_questions_share_their_tasks() -> None:
    both = names("rq1", "rq2", "rq5")
    assert len(both) == len(set(both)) and set(both) == {
        *names("rq1"),
        *names("rq2"),
        "shop-cemg-new-items-seed0",
    }


def test_seeds_and_data_sets_multiply() -> None:
    tasks = plan(["rq1"], {"a": Path("a"), "b": Path("b")}, models=["sasrec"], seeds=2)
    assert [task.name for task in tasks] == [
        "a-sasrec-seed0",
        "a-sasrec-seed1",
        "b-sasrec-seed0",
        "b-sasrec-seed1",
    ]


def test_settings_are_those_of_all_trainings_of_cemg_and_of_no_other() -> None:
    tasks = plan(["rq1", "rq2"], SOURCES, settings=["generator.epochs=2"])
    assert all(("generator.epochs=2" in task.settings) == (task.model == "cemg") for task in tasks)
    without = {task.variant: task.settings[1:] for task in tasks if task.variant}
    assert without["without image"] == ("without=[image]",)
    assert without["without memory"] == ("gate.memory=false",)


def test_settings_of_another_model_are_named_with_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    models = ["sasrec", "tiger", str(tmp_path / "mine.py"), "cemg"]
    given = ["sasrec:dim=8", "tiger:generator.epochs=3", "mine:text=a b: 'c'", "cemg:text.model=a:b"]
    tasks = plan(["rq1"], SOURCES, models=models, settings=given)
    found = {task.title: task.settings for task in tasks}
    assert found["SASRec"] == ("dim=8",) and found["TIGER"] == ("generator.epochs=3",)
    assert found["mine"] == ("text=a b: 'c'",) and found["CEMG"] == ("text.model=a:b",)
    assert {task.title: task.changed for task in tasks}["CEMG, without memory"] == ("text.model=a:b",)
    for task in tasks:
        assert Task.read(task.about()).settings == task.settings
    assert Task("d", Path(), "cemg", settings=("without=[text]",)).about()["settings"] == "without=[text]"


@pytest.mark.parametrize(
    "setting, message",
    [
        ("gru4rec:dim=8", "no gru4rec is trained"),
        ("seed=3", "an option has this setting"),
        ("graph.seed=3", "an option has this setting"),
        ("tiger:generator.budget_hours=1", "an option has this setting"),
        ("data.min_count=3", "all models are trained on the same data"),
        ("sasrec:folds=2", "an experiment trains on all users"),
    ],
)
def test_settings_that_tasks_must_share_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(["rq1"], SOURCES, models=["cemg", "sasrec", "tiger"], settings=[setting])


def test_a_deterministic_model_has_one_seed_and_a_name_in_any_spelling_is_one_model() -> None:
    tasks = plan(["rq1"], SOURCES, models=["SASRec", " popularity ", "sasrec", "LLM_ESR"], seeds=2)
    assert plan(["rq1"], SOURCES, models=["item memory"])[0].model == "memory"
    assert [task.name for task in tasks] == [
        "shop-sasrec-seed0", "shop-popularity-seed0", "shop-llm-esr-seed0", "shop-sasrec-seed1",
        "shop-llm-esr-seed1",
    ]  # fmt: skip


def test_rq4_sweeps_each_parameter_alone() -> None:
    assert "shop-cemg-without-memory-seed0" not in names("rq4")
    tasks = [task for task in plan(["rq4"], SOURCES) if " = " in task.variant]
    assert len(tasks) == 16 and len({task.name for task in tasks}) == 16
    assert all(len(task.settings) == 1 for task in tasks)
    copies = {task.variant: task.base for task in tasks if task.base}  # the defaults are not trained again
    assert copies == dict.fromkeys(["M = 4", "K = 256", "α = 1.0", "β = 0.01"], "shop-cemg-seed0")
    other = plan(["rq4"], SOURCES, settings=["tokenizer.levels=3"])
    copies = {task.variant for task in other if task.base and " = " in task.variant}
    assert copies == {"M = 3", "K = 256", "α = 1.0", "β = 0.01"}


def test_each_question_shows_its_own_tasks() -> None:
    tasks = plan([*QUESTIONS], SOURCES, models=["sasrec", "cemg"])
    shown = {name: {t.variant for t in tasks if t.belongs_to(name)} for name in QUESTIONS}
    assert shown["rq1"] == shown["rq3"] == {"", "without memory"}
    assert shown["rq5"] == {"", "without memory", "new items"}
    assert "without image" in shown["rq2"] and "M = 2" not in shown["rq2"]
    assert len(shown["rq4"]) == 17
    assert all(t.belongs_to("rq1") or t.model == "cemg" for t in tasks)


def test_a_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    (task,) = plan(["rq1"], SOURCES, models=[str(tmp_path / "mine.py")])
    assert (task.name, task.title) == ("shop-mine-seed0", "mine")


@pytest.mark.parametrize(
    "questions, options, message",
    [
        (["rq9"], {}, "there is no question rq9"),
        (["rq1"], {"models": ["sasrc"]}, "there is no model sasrc"),
        (["rq1"], {"seeds": 0}, "--seeds must be 1 or more"),
    ],
)
def test_unknown_names_are_refused_with_those_that_exist(questions, options, message) -> None:
    with pytest.raises(UserError, match=message):
        plan(questions, SOURCES, **options)


def test_models_and_data_that_would_share_a_folder_or_a_row_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("mine.py", "other/mine.py", "SASRec.py", "cemg_v2.py", "Popularity.py"):
        (tmp_path / name).write_text("")
    mine, other = str(tmp_path / "mine.py"), str(tmp_path / "other" / "mine.py")
    with pytest.raises(UserError, match="two tasks have the name shop-mine-seed0"):
        plan(["rq1"], SOURCES, models=[mine, other])
    for name in ("SASRec.py", "cemg_v2.py", "Popularity.py"):
        with pytest.raises(UserError, match="would have the title of another model"):
            plan(["rq1"], SOURCES, models=[str(tmp_path / name)])
    sources = {"shop": Path("shop"), "shop-time": Path("shop-time")}
    with pytest.raises(UserError, match="two tasks have the name shop-time-sasrec-seed0"):
        plan(["rq1"], sources, models=["sasrec"], splits=["leave-one-out", "time"])
    assert len(plan(["rq1", "rq5"], SOURCES, models=[mine])) == 1  # the same task of two questions


def test_data_sets_are_paths_or_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "beauty").mkdir(parents=True)
    (tmp_path / "Shop 1.csv").write_text("")
    found = sources_of(["beauty", "Shop 1.csv"], tmp_path)
    assert found == {"beauty": Path("data/beauty"), "shop-1": Path("Shop 1.csv")}
    with pytest.raises(UserError, match="there is no data set bauty") as caught:
        sources_of(["bauty"], tmp_path)
    assert "beauty, synthetic" in str(caught.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "beauty").write_text("")
    with pytest.raises(UserError, match="both have the name beauty"):
        sources_of(["beauty", "other/beauty"], tmp_path)


def test_titles_name_the_model_and_the_variant() -> None:
    assert Task("shop", Path("x"), "gru4rec").title == "GRU4Rec"
    assert Task("shop", Path("x"), "cemg", "without image").title == "CEMG, without image"
