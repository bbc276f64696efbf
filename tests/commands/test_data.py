"""``cemg-data``: its output on stdout and stderr, the files it writes, and the input it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cemg.commands.data import main
from cemg.data import Dataset, read_dataset
from cemg.data.synthetic import planted_clusters


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "interactions.csv").write_text("user,item,timestamp\na,x,1\na,y,2\na,z,3\nb,x,1\n")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["cemg-data", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_stats_prints_table_1_to_stdout_and_notes_to_stderr(command, shop):
    code, out, err = command("stats", shop, "--min-count", 0)
    head, row = out.splitlines()
    assert code == 0
    assert row.split() == ["shop", "2", "3", "4", "2.0", "33.33", "%"]
    assert " ".join(head.split()) == "Dataset #Users #Items #Interactions Avg. Len. Sparsity"
    assert err == "note: there is no items.csv: items have no text\n"


def test_stats_as_json_can_be_parsed(command, shop):
    code, out, _ = command("stats", shop, "--min-count", 0, "--json")
    numbers = json.loads(out)
    assert code == 0
    assert (numbers["users"], numbers["items"], numbers["interactions"]) == (2, 3, 4)
    assert numbers["avg_length"] == 2 and numbers["sparsity"] == pytest.approx(1 / 3)
    assert numbers["synthetic"] is False and numbers["items_with_text"] == 0


def test_a_user_error_is_three_short_lines_and_exit_code_2(command, shop):
    code, out, err = command("stats", shop)
    assert (code, out) == (2, "")
    assert err == (
        "error: shop: none of 4 interactions is left after filtering\n"
        "  cause: the filters keep all ratings and the 5-core\n"
        "  fix:   lower min_count: cemg-data prepare … --min-count N, or cemg-train --set data.min_count=N\n"
    )


def test_a_wrong_option_also_exits_with_code_2(command, shop):
    code, _, err = command("stats", shop, "--format", "xls")
    assert code == 2 and "xls" in err


def test_prepare_writes_a_folder_that_can_be_read_and_refuses_to_overwrite_it(command, shop, tmp_path):
    out = tmp_path / "new" / "prepared"
    words = ("prepare", shop, out, "--min-count", 0, "--name", "corner shop")
    assert command(*words)[:2] == (0, f"{out}\n")
    assert Dataset.load(out).name == "corner shop"
    code, _, err = command(*words)
    assert code == 2 and "exists" in err and "--force" in err
    assert command(*words[:-1], "other", "--force")[0] == 0
    assert Dataset.load(out).name == "other"
    assert sorted(path.name for path in out.parent.iterdir()) == ["prepared"]  # nothing half-made is left


def test_force_never_replaces_another_kind_of_folder_or_one_that_contains_the_source(command, shop, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter.txt").touch()
    code, _, err = command("prepare", shop, tmp_path / "precious", "--force", "--min-count", 0)
    assert code == 2 and "not a prepared folder" in err and (tmp_path / "precious" / "letter.txt").exists()
    for out in (shop, tmp_path):
        code, _, err = command("prepare", shop, out, "--force", "--min-count", 0)
        assert code == 2 and "contains the source" in err


def test_a_failed_prepare_keeps_the_old_folder_and_leaves_nothing_else(command, shop, tmp_path):
    out = tmp_path / "prepared"
    command("prepare", shop, out, "--min-count", 0)
    code, _, _ = command("prepare", shop, out, "--force")
    assert code == 2 and Dataset.load(out).num_users == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared", "shop"]


def test_options_that_a_prepared_folder_would_ignore_are_refused(command, shop, tmp_path):
    out = tmp_path / "prepared"
    command("prepare", shop, out, "--min-count", 0)
    code, _, err = command("stats", out, "--min-count", 0, "--duplicates", "last")
    assert code == 2 and err.splitlines()[0] == (
        f"error: {out} is already prepared: min_count, duplicates would have no effect"
    )
    assert command("stats", out)[0] == 0


def test_an_image_folder_that_matches_no_item_is_reported(command, shop, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "other.jpg").touch()
    words = ("prepare", shop, tmp_path / "prepared", "--min-count", 0, "--images", tmp_path / "pictures")
    assert f"note: no file in {tmp_path}/pictures is named by an item id, such as x.jpg" in command(*words)[2]


def test_columns_can_be_given_by_role(command, shop):
    (shop / "interactions.csv").write_text("uid,sku,ts\na,x,1\n")
    assert command("stats", shop, "--min-count", 0, "--columns", "user=uid,item=sku,timestamp=ts")[0] == 0
    code, _, err = command("stats", "--interactions", shop, "--columns", "who=uid")
    assert code == 2 and "--columns who=uid is not valid" in err


@pytest.fixture
def tables(tmp_path: Path) -> list[str]:
    """The options for two tables of a shop with semicolons, cp1252, other file names and a repeated row."""
    orders = "uid;sku;ts\na;01;2020-01-01\na;02;2020-01-02\na;03;2020-01-03\na;03;2020-01-03\n"
    (tmp_path / "orders.csv").write_text(orders)
    products = "id;name;about\n01;Café;Noir\n02;Thé;Vert\n03;Eau;\n"
    (tmp_path / "products.csv").write_bytes(products.encode("cp1252"))
    return [
        "--interactions", str(tmp_path / "orders.csv"), "--items", str(tmp_path / "products.csv"),
        "--columns", "user=uid,item=sku,timestamp=ts,id=id,title=name,text=about", "--encoding", "cp1252",
        "--separator", ";",
    ]  # fmt: skip


def test_stats_and_prepare_take_the_same_options_for_tables_with_other_names(command, tables, tmp_path):
    code, out, err = command("stats", *tables, "--min-count", 0, "--json")
    numbers = json.loads(out)
    assert code == 0 and (numbers["items"], numbers["interactions"], numbers["items_with_text"]) == (3, 4, 3)
    assert "note: 1 of 4 interactions exactly repeat another one: kept; --drop-duplicates drops them\n" in err
    out_folder = tmp_path / "prepared"
    code, out, _ = command("prepare", *tables, "--min-count", 0, "--drop-duplicates", out_folder)
    data = Dataset.load(out_folder)
    assert (code, out, data.num_interactions) == (0, f"{out_folder}\n", 3)
    assert (data.item_ids, data.texts) == (["01", "02", "03"], ["Café. Noir.", "Thé. Vert.", "Eau."])


def test_data_named_twice_or_not_at_all_are_refused(command, tables, shop, tmp_path):
    code, _, err = command("stats", shop, *tables)
    assert code == 2 and "both name the data" in err
    code, _, err = command("stats")
    assert code == 2 and "no dataset is named" in err
    code, _, err = command("prepare", tmp_path / "out")
    assert code == 2 and "expected SOURCE and OUT" in err
    code, _, err = command("prepare", shop, tmp_path / "out", *tables)
    assert code == 2 and "both name the data" in err


def test_cemg_train_takes_the_same_options(tables, tmp_path, monkeypatch, capsys):
    import yaml

    from cemg.commands import train

    words = ["cemg-train", "--run", str(tmp_path / "run"), *tables, "--drop-duplicates", "--print-config"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert not ended.value.code
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    named = dict(zip((word[2:] for word in tables[::2]), tables[1::2], strict=True))
    assert data["path"] == named.pop("interactions") and data["drop_duplicates"] is True
    assert {name: data[name] for name in named} == named


def test_the_synthetic_data_set_is_complete_and_its_images_are_found(command, tmp_path):
    out = tmp_path / "toy"
    assert command("synthetic", out, "--users", 20, "--items", 60)[:2] == (0, f"{out}\n")
    data = read_dataset(out)
    assert data.synthetic and all(path.is_file() for path in data.images if path)
    assert planted_clusters(out).height == 60
    assert "synthetic" in command("stats", out)[1]


@pytest.mark.parametrize("command_name", ["stats", "prepare", "synthetic"])
def test_help_has_an_example(command, command_name):
    code, out, _ = command(command_name, "--help")
    assert code == 0 and "Examples:" in out and f" cemg-data {command_name} " in out.split("Examples:")[1]
