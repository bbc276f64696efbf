"""The files of a stage are verified against its manifest, and the error names the file that differs."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cemg.data import Dataset
from cemg.errors import DamagedError, UserError
from cemg.pipeline import changes
from cemg.progress import console
from cemg.storage.manifest import Manifest, check_origin, read_clock, renew, stages_of, verify, write_clock
from cemg.storage.read import digest
from cemg.storage.run import Run


def build(folder: Path) -> None:
    save_file({"codes": torch.zeros(3, 2)}, folder / "t.safetensors")
    (folder / "log.jsonl").write_text('{"step": 0}')


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    return Run(tmp_path / "run").stage("a", {"x": 1}, build)


def test_an_unchanged_stage_is_verified(stage: Path) -> None:
    manifest = verify(stage)
    assert set(manifest.files) == {"t.safetensors", "log.jsonl"} and manifest.config == {"x": 1}
    assert manifest.bytes == {name: (stage / name).stat().st_size for name in manifest.files}


@pytest.mark.parametrize("size", [0, 40, -1])
def test_a_shorter_file_is_named_with_both_sizes(stage: Path, size: int) -> None:
    whole = (stage / "t.safetensors").read_bytes()
    (stage / "t.safetensors").write_bytes(whole[:size])
    with pytest.raises(DamagedError, match=r"t\.safetensors is damaged") as error:
        verify(stage)
    assert error.value.cause == f"it has {len(whole[:size])} bytes instead of {len(whole)}"
    assert f"cemg-train --run {stage.parent}" in (error.value.fix or "")


def test_a_flipped_bit_is_detected_although_size_and_time_are_unchanged(stage: Path) -> None:
    path = stage / "t.safetensors"
    content, status = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DamagedError, match="sha256"):
        verify(stage)


def test_only_the_files_that_are_read_are_verified(stage: Path) -> None:
    (stage / "log.jsonl").write_text("")
    verify(stage, ["t.safetensors"])
    with pytest.raises(DamagedError, match=r"log\.jsonl is damaged"):
        verify(stage)


def test_a_missing_file_and_an_unknown_file_are_named(stage: Path) -> None:
    with pytest.raises(DamagedError, match=r"more\.json is not a file of this stage"):
        verify(stage, ["more.json"])
    (stage / "t.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"t\.safetensors is missing"):
        verify(stage)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "0" * 64}, {"files": {}}, {"config": {"x": 2}}, {"seconds": 1e9}, {"contents": "0"},
        {"sha256": "0" * 64}, {"more": 1}, {"inputs": {"b": "c"}},
    ],
)  # fmt: skip
def test_an_altered_manifest_is_refused(stage: Path, change: dict[str, object]) -> None:
    path = stage / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        Manifest.read(stage)


def test_a_manifest_of_an_earlier_version_still_names_its_files(stage: Path) -> None:
    path = stage / "manifest.json"
    record = json.loads(path.read_text())
    for name in ("sha256", "bytes", "made_of", "contents", "settings"):
        del record[name]
    path.write_text(json.dumps(record))
    verify(stage)
    (stage / "t.safetensors").write_bytes(b"other")
    with pytest.raises(DamagedError, match="sha256"):
        verify(stage)


def test_a_zero_length_file_of_a_finished_stage_is_never_reused(stage: Path, monkeypatch) -> None:
    """The output names the file, and the stage is rebuilt."""
    (stage / "t.safetensors").write_bytes(b"")
    monkeypatch.setattr(console, "_file", io.StringIO())
    run = Run(stage.parent)
    run.stage("a", {"x": 1}, build)
    run.commit("x: 1")
    assert torch.equal(load_file(stage / "t.safetensors")["codes"], torch.zeros(3, 2))
    assert "t.safetensors is damaged" in console.file.getvalue()  # type: ignore[attr-defined]


def chain(folder: Path, value: float) -> Run:
    """A run whose stage b has stage a, which contains ``value``, as its input."""
    run = Run(folder)

    def write(stage: Path) -> None:
        save_file({"x": torch.full((2,), value)}, stage / "x.safetensors")

    run.stage("a", {}, write)
    run.stage("b", {}, write, inputs=("a",))
    run.commit("")
    return run


def test_a_stage_of_another_run_is_detected_even_if_both_have_the_same_configuration(tmp_path: Path) -> None:
    one, other = chain(tmp_path / "one", 1.0), chain(tmp_path / "other", 2.0)
    assert one.keys == other.keys
    one.check_whole()
    (tmp_path / "one" / "a").rename(tmp_path / "gone")
    (tmp_path / "other" / "a").rename(tmp_path / "one" / "a")
    with pytest.raises(UserError, match="b was not built from the a that is there now"):
        one.check_whole()
    assert check_origin(one.path, Manifest.read(tmp_path / "one" / "b")) == "a"


def test_a_rebuilt_stage_with_other_files_rebuilds_the_stages_after_it(tmp_path: Path) -> None:
    chain(tmp_path / "run", 1.0)
    (tmp_path / "run" / "a" / "x.safetensors").write_bytes(b"")
    chain(tmp_path / "run", 2.0)  # as on a GPU, where the same need not come out twice
    assert load_file(tmp_path / "run" / "b" / "x.safetensors")["x"].tolist() == [2.0, 2.0]


def test_files_that_a_command_adds_to_a_stage_do_not_rebuild_later_stages(tmp_path: Path) -> None:
    run = chain(tmp_path / "run", 1.0)
    (tmp_path / "run" / "a" / "added.json").write_text("{}")
    renew(tmp_path / "run" / "a")
    assert "added.json" in verify(tmp_path / "run" / "a").files
    run.check_whole()


def test_a_temporary_file_of_a_killed_process_is_not_part_of_a_stage(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"1")
    (tmp_path / ".weights.safetensors.77.part").write_bytes(b"2")
    write_clock(tmp_path, 3.0)
    (tmp_path / ".weights.safetensors.77.part").unlink()
    assert read_clock(tmp_path) == 3.0


def test_hidden_folders_are_not_stages(stage: Path) -> None:
    (stage.parent / ".a.old").mkdir()
    (stage.parent / ".a.old" / "manifest.json").write_text("{")
    assert list(stages_of(stage.parent)) == ["a"]


def test_a_finished_training_is_recognized_by_its_files(tmp_path: Path) -> None:
    assert read_clock(tmp_path) is None
    (tmp_path / "weights").write_text("1")
    write_clock(tmp_path, 2.5)
    assert read_clock(tmp_path) == 2.5
    (tmp_path / "weights").write_text("20")
    with pytest.raises(DamagedError, match="weights is damaged"):
        read_clock(tmp_path)


def test_moved_data_are_the_same_data(tmp_path: Path) -> None:
    """Prepared data contain the paths of their images, but moving them rebuilds no other stage."""

    def contents(place: str) -> str | None:
        def write(stage: Path) -> None:
            (stage / "items").write_text(place)

        return Manifest.read(Run(tmp_path / place).stage("data", {"content": "c"}, write)).contents

    assert contents("here") == contents("there")


@pytest.mark.parametrize("cuts", [None, np.array([[1, 2], [0, 1], [2, 2]], np.int32)])
def test_the_digest_of_the_data_is_that_of_their_json_text(
    cuts: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset(
        name='a "name"', user_ids=["u", "v", "w"], item_ids=["ä", "b"], tie_rule="source",
        sequences=[np.array(s, np.int32) for s in ([0, 1], [1], [0, 0, 1])], titles=["", "T"],
        texts=[None, "x, y"], images=[None, None], cuts=cuts,
    )  # fmt: skip
    monkeypatch.setattr(changes, "BLOCK", 2)
    sequences = [row.tolist() for row in data.sequences]
    parts = [
        data.name, data.user_ids, data.item_ids, sequences, data.titles, data.texts, ["sha", None],
        data.tie_rule, *([] if cuts is None else [cuts.tolist()]),
    ]  # fmt: skip
    assert changes.content_digest(data, ["sha", None]) == digest(parts)
