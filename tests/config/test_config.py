"""Configurations: errors name the invalid setting, and later sources override earlier ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cemg.config import RunConfig, load_config
from cemg.errors import UserError


def refusal(*overrides: str, **top: object) -> UserError:
    with pytest.raises(UserError) as error:
        load_config(None, overrides, **top)
    return error.value


def test_without_settings_the_defaults_apply():
    assert load_config(None) == RunConfig()


def test_overrides_win_over_options_over_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\ndtype: bfloat16\ngenerator: {epochs: 3, batch_size: 5}\n")
    assert (load_config(path).seed, load_config(path).generator.epochs) == (1, 3)
    config = load_config(path, ["generator.epochs=7", "generator.epochs=8"], seed=2, dtype=None)
    assert (config.seed, config.dtype) == (2, "bfloat16")
    assert (config.generator.epochs, config.generator.batch_size) == (8, 5)
    assert config.generator.clip == RunConfig().generator.clip
    assert load_config(path, ["seed=3"], seed=2).seed == 3


def test_a_misspelled_setting_is_refused_with_the_valid_names(tmp_path):
    error = refusal("generator.epoch=3")
    assert error.message == "generator.epoch is not a setting" and error.cause == "command line"
    assert "epochs" in (error.fix or "") and "batch_size" in (error.fix or "")
    assert refusal("genrator.epochs=3").message == "genrator is not a setting"
    path = tmp_path / "c.yaml"
    path.write_text("tokenizer: {level: 3}\n")
    with pytest.raises(UserError, match=r"tokenizer\.level is not a setting") as caught:
        load_config(path)
    assert caught.value.cause == str(path)


@pytest.mark.parametrize(
    "override, field",
    [
        ("generator.epochs=many", "generator.epochs"),
        ("generator.epochs=2.5", "generator.epochs"),
        ("generator.epochs=", "generator.epochs"),
        ("generator.epochs=0", "generator.epochs"),
        ("generator.learning_rate=0", "generator.learning_rate"),
        ("generator.learning_rate=.nan", "generator.learning_rate"),
        ("generator.schedule=linear", "generator.schedule"),
        ("generator.crop=1.5", "generator.crop"),
        ("decoding.normalize=all", "decoding.normalize"),
        ("generator.learning_rate=.inf", "generator.learning_rate must be a finite number"),
        ("tokenizer.commit=.nan", "tokenizer.commit must be a finite number"),
        ("data.min_rating=-.inf", "data.min_rating must be a finite number"),
        ("tokenizer.hidden=[32, 0]", "tokenizer.hidden"),
        ("decoding.beams=0", "decoding.beams"),
        ("decoding.beams=100000000", "decoding.beams must be within 1 … 100,000"),
        ("decoding.validation_beams=100001", "decoding.validation_beams must be within 1 … 100,000"),
        ("pca.dim=0", "pca.dim"),
        ("graph.layers=-1", "graph.layers"),
        ("tokenizer.hidden=wide", "tokenizer.hidden"),
        ("tokenizer.codebook_size=0", "tokenizer.codebook_size"),
        ("backbone.kind=lstm", "backbone.kind"),
        ("backbone.layers=0", "backbone.layers"),
        ("tokenizer.codebook_size=32769", "tokenizer.codebook_size must be within 1 … 32768"),
        ("tokenizer.levels=256", "tokenizer.levels must be within 1 … 255"),
        ("tokenizer.seed=3", "tokenizer.seed=3 has no effect"),
        ("backbone.pretrained=t5-small", "backbone.pretrained=t5-small has no effect"),
        ("backbone.lora_rank=8", "backbone.lora_rank=8 has no effect"),
        ("dtype=float16", "dtype"),
        ("dtype=float64", "dtype"),
        ("generator=5", "generator"),
        ("without=[colour]", "--without colour"),
    ],
)
def test_an_invalid_value_is_refused_with_the_name_of_its_field(override, field):
    message = refusal(override).message
    assert message.startswith(field), message


@pytest.mark.parametrize(
    "override", ["generator.epochs", "generator.epochs=[", "seed.x=3", "generator.epochs.x=3", "=3", "."]
)
def test_an_invalid_override_is_refused(override):
    base = ["seed=0", "generator.epochs=3"]
    assert refusal(*base, override).message


def test_scientific_notation_is_a_number():
    assert load_config(None, ["generator.learning_rate=1e-3"]).generator.learning_rate == 1e-3


def test_a_path_is_kept_as_written(tmp_path):
    for path in ("2014", "sets/a #2", "a: b"):
        assert load_config(None, data_path=path).data.path == path
    (tmp_path / "c.yaml").write_text("data: sets/a\n")
    with pytest.raises(UserError, match="data is not a section"):
        load_config(tmp_path / "c.yaml", data_path="sets/b")


def test_an_empty_section_means_its_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("generator:\n")
    assert load_config(path).generator == RunConfig().generator
    assert load_config(path, ["generator.epochs=4"]).generator.epochs == 4


@pytest.mark.parametrize(
    "content, said", [("a: [", "not valid YAML"), ("- 1", "must contain sections"), ("3", "must")]
)
def test_a_file_that_is_not_a_configuration_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as error:
        load_config(path)
    assert str(path) in error.value.message
    with pytest.raises(UserError, match="is missing"):
        load_config(tmp_path / "absent.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("seed: 1 # gr\xfcn".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.yaml is not UTF-8 text"):
        load_config(path)


def test_a_written_configuration_reads_back_unchanged(tmp_path):
    config = load_config(None, ["tokenizer.hidden=[8, 4]", "without=[text]", "generator.learning_rate=2e-4"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert load_config(path) == config


def test_the_seed_reaches_every_stage_and_without_llm_selects_the_scratch_decoder():
    config = load_config(None, ["seed=5", "backbone.kind=t5"], without=("llm",)).seeded()
    assert config.graph.seed == config.tokenizer.seed == config.generator.seed == 5
    assert (config.backbone.kind, config.backbone.layers) == ("scratch", 6)


def test_an_empty_text_is_set_and_a_wrong_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert load_config(None, ["gate.dense=runs/bsarec", "gate.dense="]).gate.dense == ""
    path = tmp_path / "settings.yaml"
    path.write_text("gate: {dense: }\n")
    assert load_config(path).gate.dense == ""
    with pytest.raises(UserError, match=r"gate\.users") as caught:
        load_config(path, ["gate.users=many"])
    assert caught.value.cause == "command line"
    path.write_text("gate: {users: many}\n")
    with pytest.raises(UserError, match=r"gate\.users") as caught:
        load_config(path)
    assert caught.value.cause == str(path)
