"""Presets and printed configurations: their record, their precedence, and the help of every setting."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from cemg.commands import train
from cemg.config import RunConfig, load_config
from cemg.errors import UserError
from cemg.features.backbones import LITE0_WEIGHTS
from cemg.features.text import resolve_text_model
from cemg.settings import explained, explanations, preset_names

ROOT = Path(__file__).parents[2]

PARTS = [
    f.default_factory for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default_factory)
]


def test_the_default_encoders_are_installed_with_the_package():
    from importlib.util import find_spec

    config = load_config(None)
    assert (config.text.model, config.text.pooling) == ("minilm", "mean")
    assert resolve_text_model(config.text.model) != "minilm" and find_spec(LITE0_WEIGHTS)
    assert config.image.backbone == "efficientnet-lite0"


def test_the_paper_has_its_own_encoders():
    config = load_config(None, preset="paper")
    assert (config.text.model, config.text.pooling) == ("bert-base-uncased", "cls")
    assert config.image.backbone == "vgg16"


def test_there_is_a_preset_for_each_size_and_one_for_the_paper():
    assert preset_names() == ["large", "medium", "paper", "small"]
    for name in preset_names():
        assert load_config(None, preset=name) != RunConfig()


def test_a_preset_overrides_the_defaults_and_the_file_overrides_the_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("generator: {epochs: 3}\n")
    config = load_config(tmp_path / "c.yaml", ["generator.batch_size=7"], preset="small")
    assert (config.generator.epochs, config.generator.batch_size) == (3, 7)
    assert config.generator.loss == "valid"  # the preset's
    assert config.generator.clip == RunConfig().generator.clip  # the default


def test_an_unknown_preset_is_refused_with_the_valid_names():
    with pytest.raises(UserError, match="unknown preset 'huge'") as error:
        load_config(None, preset="huge")
    assert error.value.fix == "use --preset large or medium or paper or small"


@pytest.mark.parametrize("kind", [RunConfig, *PARTS])
def test_every_setting_is_explained_in_one_line(kind):
    about = explanations(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    assert [n for n in names if n not in about] == []
    assert all(10 < len(about[n]) < 120 or about[n].startswith("Of ") for n in names)


@pytest.mark.parametrize(("name", "preset"), [("beauty", "medium"), ("ml-100k", "small")])
def test_the_settings_of_a_measured_data_set_are_the_preset_of_its_size_and_its_encoders(name, preset):
    written = load_config(ROOT / "configs" / f"{name}.yaml")
    encoders = {"text": written.text, "image": written.image}
    assert written == dataclasses.replace(load_config(None, preset=preset), **encoders)


def test_a_printed_configuration_reads_back_unchanged(tmp_path):
    config = load_config(None, ["tokenizer.hidden=[8, 4]", "data.path=a #2", "seed=3"], preset="medium")
    (tmp_path / "c.yaml").write_text(explained(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_print_config_prints_every_setting_and_starts_nothing(tmp_path, command, capsys):
    run = tmp_path / "run"
    arguments = ("--run", run, "--data", "sets/a", "--preset", "medium", "--set", "generator.epochs=4")
    assert command(train.main, *arguments, "--print-config") == 0
    printed = capsys.readouterr().out
    expected = load_config(None, ["generator.epochs=4"], data_path="sets/a", preset="medium")
    assert yaml.safe_load(printed) == expected.to_dict()
    settings = [line for line in printed.splitlines() if ":" in line and not line.startswith("#")]
    assert len(settings) > 60 and all("  # " in line for line in settings)
    assert not run.exists()


def test_the_configurations_of_the_package_can_be_used_by_name(tmp_path, monkeypatch, command, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("beauty", "beauty.yaml", "configs/beauty.yaml"):
        assert command(train.main, "--run", "r", "--data", "d", "--config", name, "--print-config") == 0
        assert yaml.safe_load(capsys.readouterr().out)["tokenizer"]["epochs"] == 150
    (tmp_path / "beauty.yaml").write_text("tokenizer: {epochs: 3}\n")  # a file of one's own comes first
    arguments = ("--run", "r", "--data", "d", "--config", "beauty.yaml", "--print-config")
    assert command(train.main, *arguments) == 0
    assert yaml.safe_load(capsys.readouterr().out)["tokenizer"]["epochs"] == 3
    assert command(train.main, "--run", "r", "--data", "d", "--config", "elsewhere/beauty.yaml") == 2
