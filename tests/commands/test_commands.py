"""The output of the commands, and the exact text of their errors."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from cemg import progress
from cemg.commands import catalog, evaluate, recommend, train
from cemg.tokenizer import Catalog, symbol
from cemg_kernels import use_fast_kernels

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_train_writes_results_a_report_and_the_configuration(tiny_run):
    for name in ("config.yaml", "report/report.html", "results/synthetic-cemg-test.json"):
        assert (tiny_run / name).is_file(), name
    record = json.loads((tiny_run / "results" / "synthetic-cemg-test.json").read_text())
    assert set(record["metrics"]) == {f"{m}@{k}" for m in ("HR", "NDCG") for k in (5, 10, 20)}
    assert record["metrics_history_removed"].keys() == record["metrics"].keys()


def test_train_reports_which_backends_the_environment_or_the_option_selects(
    tiny_run, tmp_path, feature_cache, command, monkeypatch
):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setenv("CEMG_FAST_KERNELS", "0")
    try:
        for option, backend in (((), "reference"), (("--fast-kernels",), "native")):
            said = io.StringIO()
            monkeypatch.setattr(progress.console, "_file", said)
            assert command(train.main, "--run", run, "--cache", feature_cache, *option) == 0
            lines = [line for line in said.getvalue().splitlines() if "kernels" in line]
            assert len(lines) == 1 and lines[0].startswith(f"kernels by backend: {backend} ")
    finally:
        monkeypatch.undo()
        use_fast_kernels(None)


def test_both_engines_give_the_same_metrics_when_a_run_is_evaluated_again(tiny_run, tmp_path, command):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    expected = json.loads((run / "results" / "synthetic-cemg-test.json").read_text())
    for engine in ("cemg", "transformers"):
        copy = tmp_path / f"{engine}.json"
        words = ("--run", run, "--engine", engine, "--memory", "off", "--result", copy)
        assert command(evaluate.main, *words) == 0
        found = json.loads(copy.read_text())
        assert found["metrics"] == expected["metrics"] and found["config"]["engine"] == engine


def test_search_studies_are_printed_and_saved(tiny_run, tmp_path, command, capsys):
    """With one beam per item (50), the search is exact, so its metrics equal those of the exact study."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    arguments = ("--run", run, "--users", 30, "--memory", "off")
    assert command(evaluate.main, *arguments, "--beams", 50, "--result", tmp_path / "whole.json") == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert not {"exact", "certificate", "engines"} & whole.keys()
    capsys.readouterr()
    studies = ("--exact", "--certified", "--compare")
    assert command(evaluate.main, *arguments, "--beams", 20, *studies, "--result", tmp_path / "r.json") == 0
    printed = capsys.readouterr().out
    for part in (
        "synthetic: 30 users",
        "exact, history removed",
        "of the first 10",
        "transformers",
        "wrongly certified in total: 0",
        "normalize=vocab",
    ):
        assert part in printed, part
    found = json.loads((tmp_path / "r.json").read_text())
    exact, engines = found["exact"], found["engines"]
    assert exact["metrics"] == whole["metrics"]
    assert exact["metrics_history_removed"] == whole["metrics_history_removed"]
    assert exact["beam_metrics"] == found["metrics"] and exact["users"] == 30
    assert exact["certified_wrong"] == 0 and exact["worst_score_difference"] < 1e-4
    assert exact["equal@10"] <= exact["overlap@10"] <= 1 and 0 <= exact["certified"] <= 20
    shares = [row["first_ten"] for row in found["certificate"]]
    assert [row["beams"] for row in found["certificate"]] == [10, 20, 50, 100]
    assert shares == sorted(shares) and shares[2:] == [1, 1]  # nothing is pruned
    assert engines["engines"]["cemg"]["metrics"] == engines["engines"]["transformers"]["metrics"]
    assert engines["users_that_differ"] == 0 and engines["worst_score_difference"] < 1e-4


def test_evaluating_a_sample_keeps_the_results_of_the_whole_test_set(tiny_run, tmp_path, command):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    whole = (run / "results" / "synthetic-cemg-test.json").read_text()
    assert command(evaluate.main, "--run", run, "--users", 7) == 0
    assert (run / "results" / "synthetic-cemg-test.json").read_text() == whole
    assert json.loads((run / "results" / "synthetic-cemg-test-7-users.json").read_text())["split"]["subset"]
    assert command(evaluate.main, "--run", run, "--users", 1000) == 0  # of 40: the whole test again
    again = json.loads((run / "results" / "synthetic-cemg-test.json").read_text())
    assert again["metrics"] == json.loads(whole)["metrics"] and "subset" not in again["split"]


def test_another_search_or_a_study_keeps_the_results_of_the_runs_own_search(tiny_run, tmp_path, command):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    whole = (run / "results" / "synthetic-cemg-test.json").read_text()
    for arguments in (("--beams", 5), ("--engine", "transformers"), ("--all", "--certified")):
        assert command(evaluate.main, "--run", run, "--memory", "off", *arguments) == 0
    assert (run / "results" / "synthetic-cemg-test.json").read_text() == whole
    assert {path.name.removeprefix("synthetic-cemg-test-") for path in (run / "results").glob("*test-*")} == {
        "cemg-5-beams.json", "transformers-10-beams.json", "certificate.json",
    }  # fmt: skip


def test_a_damaged_stage_is_built_again_by_the_command_that_the_error_prints(
    tiny_run, tmp_path, command, capsys, feature_cache
):
    """Uses the settings of the run, since those of the synthetic data set would train for minutes."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    kept = (run / "config.yaml").read_text(), (run / "catalog" / "catalog.safetensors").read_bytes()
    (run / "generator" / "weights.safetensors").unlink()
    err = refusal(command, capsys, recommend.main, "--run", run, "--history", "item-0001")
    errors = (err, refusal(command, capsys, train.main, "--run", run))
    typed, again = (text.splitlines()[-1].partition("cemg-train ")[2].split() for text in errors)
    assert typed == again
    assert typed == ["--run", str(run), "--rebuild"]
    assert command(train.main, *typed, "--cache", feature_cache) == 0
    said = capsys.readouterr().err
    assert "continues with its own settings" in " ".join(said.split())
    assert [line for line in said.splitlines() if line.endswith("started")] == ["generator: started"]
    assert ((run / "config.yaml").read_text(), (run / "catalog" / "catalog.safetensors").read_bytes()) == kept
    assert command(recommend.main, "--run", run, "--history", "item-0001") == 0


def test_a_configuration_without_data_uses_the_data_of_the_run(tiny_run, tmp_path, command, feature_cache):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    own = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({k: own[k] for k in own if k != "data"} | {"seed": 0}))
    assert command(train.main, "--run", run, "--cache", feature_cache, "--config", tmp_path / "c.yaml") == 0
    assert yaml.safe_load((run / "config.yaml").read_text()) == own  # 40 users and all


def test_a_training_that_dies_leaves_the_run_unchanged_and_can_be_continued(
    tiny_run, tmp_path, command, capsys, monkeypatch, feature_cache
):
    from cemg.pipeline import Pipeline

    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    kept = (run / "config.yaml").read_text()
    err = refusal(command, capsys, train.main, "--run", run, "--data", tmp_path / "no #1", "--force")
    assert not (run / ".config.next.yaml").exists() and not (run / ".next").exists()
    assert err.splitlines()[-1] == f"error: {tmp_path}/no #1 does not exist"

    class PowerCut(BaseException):  # no error that the settings may have caused
        pass

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Pipeline, "generator", lambda self: (_ for _ in ()).throw(PowerCut()))
        command(train.main, "--run", run, "--cache", feature_cache, "--set", "generator.epochs=2", "--force")
    assert (run / "config.yaml").read_text() == kept
    assert command(recommend.main, "--run", run, "--history", "item-0001") == 0
    assert command(train.main, "--run", run, "--cache", feature_cache) == 0
    assert "epochs: 2\n" in (run / "config.yaml").read_text() and not (run / ".config.next.yaml").exists()
    assert json.loads((run / "generator" / "training.json").read_text())["epochs"] == 2


def test_studies_may_use_another_normalization_than_the_run(tiny_run, tmp_path, command):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert command(evaluate.main, "--run", run, "--users", 7, "--compare", "--normalize", "level") == 0
    found = json.loads((run / "results" / "synthetic-cemg-test-7-users-engines-level.json").read_text())
    assert found["studies_normalize"] == "level" and found["engines"]["worst_score_difference"] < 1e-4
    assert command(evaluate.main, "--run", run, "--normalize", "item") == 2


def test_recommend_prints_titles_scores_and_codes(tiny_run, command, capsys):
    from cemg.data import Dataset

    data = Dataset.load(tiny_run / "data")
    arguments = ("--run", tiny_run, "--history", "item-0001 item-0002,item-0003", "--top", 5)
    assert command(recommend.main, *arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["history"] == ["item-0001", "item-0002", "item-0003"] and len(answer["items"]) == 5
    codes = Catalog.load(tiny_run / "catalog").codes
    for item in answer["items"]:
        row = data.item_ids.index(item["item"])
        assert item["title"] == data.titles[row] and item["score"] < 0
        assert item["codes"] == [symbol(level, code) for level, code in enumerate(codes[row].tolist())]
    assert any(item["title"] for item in answer["items"])  # an item without a text has no title
    assert command(recommend.main, *arguments) == 0
    table = capsys.readouterr().out
    for item in answer["items"]:
        line = next(line for line in table.splitlines() if item["item"] in line)
        assert all(part in line for part in (item["title"], f"{item['score']:.3f}", *item["codes"]))
    assert "the first 5 of 5 are proven" in table  # 50 beams for 50 items
    assert command(recommend.main, *arguments, "--beams", 5) == 0
    assert "; --exact proves all" in capsys.readouterr().out


def test_a_user_and_a_file_of_histories_get_the_same_recommendations(tiny_run, tmp_path, command, capsys):
    from cemg.data import Dataset

    data = Dataset.load(tiny_run / "data")
    own = [[data.item_ids[row] for row in data.sequences[user]] for user in range(70)[: data.num_users]]
    own.append(["item-0001"])
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(items) + "\n" for items in own))
    arguments = ("--run", tiny_run, "--top", 3, "--beams", 50, "--normalize", "level")
    assert command(recommend.main, *arguments, "--histories", tmp_path / "h.jsonl") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["history"] for answer in answers] == own
    assert command(recommend.main, *arguments, "--user", data.user_ids[7], "--json") == 0
    one = json.loads(capsys.readouterr().out)
    assert [item["item"] for item in one["items"]] == [item["item"] for item in answers[7]["items"]]
    assert one["history"] == own[7] and len(one["items"]) == 3
    assert one["items"][0]["score"] == pytest.approx(answers[7]["items"][0]["score"], abs=1e-4)


def test_items_of_the_history_are_excluded_on_request(tiny_run, command, capsys):
    history = "item-0001,item-0002,item-0003"
    command(
        recommend.main, "--run", tiny_run, "--history", history, "--top", 50, "--exclude-history", "--json"
    )
    items = {item["item"] for item in json.loads(capsys.readouterr().out)["items"]}
    assert len(items) == 47 and not items & set(history.split(","))


def test_added_items_get_codes_and_titles_and_existing_items_keep_theirs(tiny_run, tmp_path, command, capsys):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = Catalog.load(run / "catalog")
    (tmp_path / "new.csv").write_text(
        "item,title,text\nn1,First,a plain rudder\nn2,Second,sturdy telescope\n"
    )
    assert command(catalog.main, "add", "--run", run, "--items", tmp_path / "new.csv") == 0
    printed = capsys.readouterr().out.splitlines()
    after = Catalog.load(run / "catalog")
    assert after.item_ids == [*before.item_ids, "n1", "n2"]
    assert torch.equal(after.codes[:50], before.codes) and len(after.codes.unique(dim=0)) == 52
    assert command(catalog.main, "show", "--run", run, "--item", "n2") == 0
    assert printed[1] == f"n2 {capsys.readouterr().out.strip()}"
    assert command(recommend.main, "--run", run, "--history", "n1", "--top", 52, "--beams", 60, "--json") == 0
    titles = {i["item"]: i["title"] for i in json.loads(capsys.readouterr().out)["items"]}
    assert len(titles) == 52 and (titles["n1"], titles["n2"]) == ("First", "Second")
    words = ("--run", run, "--memory", "off", "--result", tmp_path / "r.json")
    assert command(evaluate.main, *words) == 0  # the old items alone
    whole = json.loads((tiny_run / "results" / "synthetic-cemg-test.json").read_text())
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == whole["metrics"]
    (tmp_path / "more.csv").write_text("item,text\nn3,a rudder\n")
    assert command(catalog.main, "add", "--run", run, "--items", tmp_path / "more.csv") == 0
    assert "n3" in Catalog.load(run / "catalog").item_ids
    command(recommend.main, "--run", run, "--history", "n1", "--top", 60, "--beams", 60, "--json")
    assert "First" in capsys.readouterr().out  # titles outlive the next addition
    (tmp_path / "latin.tsv").write_bytes("sku\tname\tabout\nn4\tCafé\ta rudder\n05\tThé\t\n".encode("cp1252"))
    named = ("--columns", "id=sku,title=name,text=about", "--encoding", "cp1252")
    assert command(catalog.main, "add", "--run", run, "--items", tmp_path / "latin.tsv", *named) == 0
    assert Catalog.load(run / "catalog").item_ids[-2:] == ["n4", "05"]


# ---- errors: exit code 2, nothing on stdout, these lines on stderr


def refusal(command, capsys, main, *arguments: object) -> str:
    capsys.readouterr()
    assert command(main, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_an_unknown_item_is_refused(tiny_run, command, capsys):
    err = refusal(command, capsys, recommend.main, "--run", tiny_run, "--history", "item-0001 item-77")
    assert err == (
        "error: item 'item-77' is not in the catalog of 50 items\n"
        "  fix:   use ids as the catalog has them, such as 'item-0001'\n"
    )


def test_an_empty_history_is_refused(tiny_run, command, capsys):
    err = refusal(command, capsys, recommend.main, "--run", tiny_run, "--history", " , ")
    fix = """write it as --history "12 7 105", or --history '["12", "a, b"]'"""
    assert err == f"error: --history names no item\n  fix:   {fix}\n"


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ((), "give exactly one of --history, --user, --histories and --all-users"),
        (
            ("--history", "item-0001", "--user", "1"),
            "give exactly one of --history, --user, --histories and --all-users",
        ),
        (("--user", "nobody"), "user 'nobody' is not among the 40 users of this run"),
        (
            ("--history", "item-0001", "--normalize", "item"),
            "--normalize must be one of vocab, level, valid, got 'item'",
        ),
        (("--history", "item-0001", "--device", "gpu"), "--device gpu is not a valid device"),
        (("--history", "item-0001", "--device", "meta"), "--device meta is not a valid device"),
    ],
)
def test_an_impossible_request_is_refused(tiny_run, command, capsys, arguments, first):
    err = refusal(command, capsys, recommend.main, "--run", tiny_run, *arguments)
    assert err.splitlines()[0] == f"error: {first}"


def test_errors_of_the_system_and_the_environment_are_printed_in_one_line(
    tmp_path, command, capsys, monkeypatch
):
    from cemg_kernels.runtime import dispatch

    (tmp_path / "file").touch()
    err = refusal(command, capsys, train.main, "--run", tmp_path / "file")
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/file") and "File exists" in err
    monkeypatch.setattr(dispatch, "_override", None)
    monkeypatch.setattr(dispatch, "_environment", "yes")
    err = refusal(command, capsys, train.main, "--run", tmp_path / "run")
    assert err == "error: CEMG_FAST_KERNELS must be 0 or 1, got 'yes'; unset it for the default, 1\n"


@pytest.mark.parametrize("main", [recommend.main, evaluate.main], ids=["recommend", "evaluate"])
def test_a_missing_run_is_refused(tmp_path, command, capsys, main):
    extra = ("--history", "1") if main is recommend.main else ()
    err = refusal(command, capsys, main, "--run", tmp_path / "no", *extra)
    assert err == (
        f"error: there is no run {tmp_path}/no\n"
        f"  fix:   train one: cemg-train --data DATA --run {tmp_path}/no\n"
    )


def test_an_unknown_setting_is_refused_before_anything_is_written(tmp_path, command, capsys):
    err = refusal(command, capsys, train.main, "--run", tmp_path / "run", "--set", "generator.epoch=3")
    first, cause, fix = err.splitlines()[-3:]
    assert first == "error: generator.epoch is not a setting"
    assert cause == "  cause: command line"
    assert fix.startswith(
        "  fix:   did you mean generator.epochs? use one of history_items, epochs, batch_size, learning_rate"
    )
    assert not (tmp_path / "run").exists()


def test_an_invalid_value_is_refused_with_the_name_of_its_field(tmp_path, command, capsys):
    arguments = ("--run", tmp_path / "run", "--set", "generator.batch_size=0")
    err = refusal(command, capsys, train.main, *arguments)
    assert err.splitlines()[-1] == "error: generator.batch_size must be at least 1, got 0"


@pytest.mark.parametrize("main", [train.main, recommend.main, evaluate.main])
def test_a_missing_device_is_refused(tmp_path, command, capsys, monkeypatch, main):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    extra = ("--history", "1") if main is recommend.main else ()
    err = refusal(command, capsys, main, "--run", tmp_path / "run", "--device", "cuda", *extra)
    assert err == (
        f"error: --device cuda: torch {torch.__version__} sees no GPU\n"
        "  fix:   cemg-doctor shows why; or use --device cpu\n"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    err = refusal(command, capsys, main, "--run", tmp_path / "run", "--device", "cuda:1", *extra)
    assert err.splitlines()[0] == f"error: --device cuda:1: torch {torch.__version__} sees 1 GPU"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--users", 0), "error: --users must be at least 1, got 0\n"),
        (("--users", -3), "error: --users must be at least 1, got -3\n"),
        (("--beams", 0), "error: --beams must be at least 1, got 0\n"),
        (
            ("--normalize", "level"),
            "error: --normalize level applies to the studies only, and no study is selected\n"
            "  fix:   add --exact, --certified or --compare\n",
        ),
        (("--result", "."), "error: --result . is a folder\n  fix:   name a file: --result beauty.json\n"),
    ],
)
def test_an_impossible_evaluation_is_refused(tiny_run, command, capsys, arguments, error):
    assert refusal(command, capsys, evaluate.main, "--run", tiny_run, *arguments) == error


def test_an_unknown_part_is_refused(tiny_run, command, capsys):
    err = refusal(command, capsys, evaluate.main, "--run", tiny_run, "--part", "train")
    assert err == "error: --part must be test or valid, got 'train'\n"


def test_all_users_and_a_sample_of_users_together_are_refused(tiny_run, command, capsys):
    err = refusal(command, capsys, evaluate.main, "--run", tiny_run, "--all", "--users", 3)
    assert err == "error: --all and --users exclude each other\n  fix:   leave one of them out\n"


@pytest.mark.parametrize(
    "content, said",
    [
        ("item,text\nitem-0001,a\n", "item item-0001 is already in the catalog"),
        ("item,text\nx,a\nx,b\n", "item x occurs more than once"),
        ("item,text\nx,a\n,b\n", "line 3: column 'item' is empty"),
        ("id,text\nx,a\n", "line 1: no column 'item'; the columns are id, text"),
        ("item,price\nx,3\n", "needs a title, text or image column"),
        ("", "is empty"),
    ],
)
def test_items_that_cannot_be_added_are_refused_and_the_catalog_stays_unchanged(
    tiny_run, tmp_path, command, capsys, content, said
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (tmp_path / "new.csv").write_text(content)
    err = refusal(command, capsys, catalog.main, "add", "--run", run, "--items", tmp_path / "new.csv")
    assert err.splitlines()[0].startswith(f"error: {tmp_path}/new.csv") and said in err.splitlines()[0]
    assert len(Catalog.load(run / "catalog")) == 50


def test_a_run_in_use_is_refused(tiny_run, command, capsys, tmp_path):
    import fcntl

    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with (run / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (run / ".lock").write_text("4242")
        err = refusal(command, capsys, train.main, "--run", run)
    assert err.splitlines()[-2:] == [
        f"error: {run} is in use by process 4242", "  fix:   wait, or use another --run",
    ]  # fmt: skip
