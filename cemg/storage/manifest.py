"""The manifest of a stage: what its files were when it was finished, and what they were made of."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

import torch
import transformers
from pydantic import ConfigDict

from cemg.errors import DamagedError
from cemg.storage import files
from cemg.storage.files import hidden
from cemg.storage.read import STRICT, check_file, check_signature, digest, file_digest, read_json, signed
from cemg.version import __version__

MANIFEST, KEY, CLOCK, CONFIG = "manifest.json", "key.json", "seconds.json", "config.yaml"
STAGES = ("data", "features", "graph", "tokenizer", "catalog", "generator")  # in the order of training
READY = ".ready"  # folder of published stages that are not in place yet, and of their configuration
OLD_KEYS = {"key", "inputs", "seconds", "files", "shapes", "versions", "config"}  # without a signature
LOGS = ("log.jsonl", CLOCK, "tensorboard")  # which differ between two builds of the same


@dataclass(frozen=True, slots=True)
class Manifest:
    """``files``: sha256 by name; ``bytes``: their sizes. ``inputs``: keys of the stages that it was made of;
    ``made_of``: their ``contents``, the digest of the files a stage was built with, logs left out.
    ``settings``: those of the whole run, as they were when the stage was built."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    key: str
    inputs: dict[str, str]
    seconds: float
    files: dict[str, str]
    shapes: dict[str, list[int]]
    versions: dict[str, str]
    config: dict[str, Any]
    bytes: dict[str, int] | None = None
    made_of: dict[str, str] | None = None
    contents: str | None = None
    settings: dict[str, Any] | None = None
    sha256: str | None = None

    @classmethod
    def read(cls, stage: Path) -> Manifest:
        """The manifest of a stage's folder. Raises DamagedError where it is missing or altered."""
        path, fix = stage / MANIFEST, remedy(stage)
        record = read_json(path, dict[str, Any], fix=fix)
        if record.keys() != OLD_KEYS:
            check_signature(record, name=str(path), fix=fix)
        return read_json(path, cls, fix=fix)


def remedy(stage: Path) -> str:
    """The command that builds a damaged stage again."""
    run = stage.parent.parent if hidden(stage.parent) else stage.parent
    return f"cemg-train --run {quote(str(run))} --rebuild"


def verify(stage: Path, names: Iterable[str] | None = None) -> Manifest:
    """The manifest of a stage whose files are those that were written: all of them, or those of ``names``.

    Hashes a file once per process; later calls compare its size, time and inode. Raises DamagedError with
    the file that is missing, altered or not of this stage.
    """
    manifest, fix = Manifest.read(stage), remedy(stage)
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise DamagedError(f"{stage / name} is not a file of this stage", fix=fix)
        size = check_file(stage / name, fix=fix).st_size
        written = size if manifest.bytes is None else manifest.bytes.get(name)
        if size != written:
            cause = f"it has {size} bytes and was written with {written}"
            raise DamagedError(f"{stage / name} is damaged", cause=cause, fix=fix)
        if file_digest(stage / name, fix=fix) != manifest.files[name]:
            cause = "its bytes do not have the sha256 that they were written with"
            raise DamagedError(f"{stage / name} is damaged", cause=cause, fix=fix)
    return manifest


def describe(
    folder: Path, *, key: str, config: Mapping[str, Any], seconds: float, made_of: Mapping[str, Manifest],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a finished stage as a JSON value; ``made_of`` are the manifests of its inputs."""
    found = _files(folder)
    record = {
        "key": key, "inputs": {name: manifest.key for name, manifest in made_of.items()}, "seconds": seconds,
        **found, "versions": _versions(), "config": dict(config),
        "made_of": {name: manifest.contents for name, manifest in made_of.items()},
        "contents": _contents(found["files"], config),
        "settings": None if settings is None else dict(settings),
    }  # fmt: skip
    return signed(record)


def renew(folder: Path) -> None:
    """Rewrite the manifest of a stage to which a command has added: the files of now.

    Its ``contents`` stay those of before: what was made of the stage is still made of it.
    """
    record = read_json(folder / MANIFEST, dict[str, Any], fix=remedy(folder))
    files.write_json(folder / MANIFEST, signed(record | _files(folder)))


def place_of(run: Path, name: str) -> Path:
    """Where a stage of a run, or its configuration, is: also one that is published and not yet in place."""
    ready = run / READY / name
    return ready if ready.exists() else run / name


def check_origin(path: Callable[[str], Path], manifest: Manifest) -> str | None:
    """The first input of a stage that is not the one that it was made of; None where all are.

    ``path`` gives the folder of a stage.
    """
    for name, key in manifest.inputs.items():
        try:
            now = Manifest.read(path(name))
        except DamagedError:
            return name
        contents = now.contents if manifest.made_of is None else manifest.made_of.get(name)
        if (now.key, now.contents) != (key, contents):
            return name
    return None


def write_clock(folder: Path, seconds: float) -> None:
    """``seconds.json`` of a training that has ended: how long it took, and the hashes of what it wrote."""
    files.write_json(folder / CLOCK, signed({"seconds": seconds, "files": _hashes(folder)}))


def read_clock(folder: Path) -> float | None:
    """The seconds of a training that has ended in ``folder``; None where it has not.

    Raises DamagedError where its files are not those that it wrote.
    """
    path = folder / CLOCK
    if not path.exists():
        return None
    record = read_json(path, dict[str, Any])
    check_signature(record, name=str(path))
    for name, sha in record["files"].items():
        if file_digest(folder / name) != sha:
            raise DamagedError(f"{folder / name} is damaged")
    return float(record["seconds"])


def stages_of(run: Path) -> dict[str, Manifest]:
    """The manifests of a run's finished stages, by name. Raises DamagedError where one is damaged."""
    found = [*run.glob(f"*/{MANIFEST}"), *(run / READY).glob(f"*/{MANIFEST}")]
    names = {path.parent.name for path in found if not hidden(path.parent)}
    names |= {name for name in STAGES if place_of(run, name).is_dir()}
    return {name: Manifest.read(place_of(run, name)) for name in sorted(names)}


def _files(folder: Path) -> dict[str, Any]:
    """Hashes and sizes of a folder's files, and the shapes of its tensors."""
    from safetensors import safe_open

    hashes = _hashes(folder)
    shapes: dict[str, list[int]] = {}
    for name in hashes:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                shapes |= {f"{name}:{k}": list(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    sizes = {name: (folder / name).stat().st_size for name in hashes}
    return {"files": hashes, "bytes": sizes, "shapes": shapes}


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of the files below a folder, by name; checkpoints, what describes the stage and temporary files
    left out."""
    paths = sorted(p for p in folder.rglob("*") if stat.S_ISREG(os.lstat(p).st_mode))
    kept = [p for p in paths if p.name not in (KEY, MANIFEST) and not hidden(p)]
    names = {p.relative_to(folder).as_posix(): p for p in kept}
    return {name: file_digest(path) for name, path in names.items() if not name.startswith("checkpoints/")}


def _contents(hashes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The digest of what a stage holds. That of the data is in their config: their files name the places of
    pictures, which a moved run changes."""
    if "content" in config:
        return digest(config["content"])
    return digest({name: sha for name, sha in hashes.items() if name.split("/")[0] not in LOGS})


def _versions() -> dict[str, str]:
    return {
        "cemg": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
