"""The manifest of a stage: hashes of its files and of the stages that it was built from."""

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
STAGES = (
    "data",
    "features",
    "graph",
    "memory",
    "tokenizer",
    "catalog",
    "generator",
    "gate",
)  # in the order of training
READY = ".ready"  # published stages, with their configuration, that are not yet moved into place
OLD_KEYS = {
    "key",
    "inputs",
    "seconds",
    "files",
    "shapes",
    "versions",
    "config",
}  # of a manifest without a signature
LOGS = ("log.jsonl", CLOCK, "tensorboard")  # may differ between two builds of the same stage


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a stage.

    Attributes:
        key: Identifies settings and inputs of the stage.
        inputs: Key of each input stage.
        seconds: Wall time of the build.
        files: sha256 per file.
        bytes: Size per file.
        shapes: Shape per tensor.
        versions: Versions of the packages that built it.
        config: Settings of the stage.
        made_of: ``contents`` of each input stage.
        contents: Digest of the files without logs.
        settings: Settings of the whole run.
        sha256: Signature of the manifest.
    """

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
        """The manifest in a stage's folder. Raises DamagedError if it is missing or was changed."""
        path, fix = stage / MANIFEST, remedy(stage)
        record = read_json(path, dict[str, Any], fix=fix)
        if record.keys() != OLD_KEYS:
            check_signature(record, name=str(path), fix=fix)
        return read_json(path, cls, fix=fix)


def remedy(stage: Path) -> str:
    """The command that rebuilds a damaged stage."""
    run = stage.parent.parent if hidden(stage.parent) else stage.parent
    return f"cemg-train --run {quote(str(run))} --rebuild"


def verify(stage: Path, names: Iterable[str] | None = None) -> Manifest:
    """Verify the files of a stage, or only ``names``, and return its manifest.

    A file is hashed once per process; later calls compare its size, time and inode.

    Raises:
        DamagedError: A file is missing, was changed, or does not belong to the stage.
    """
    manifest, fix = Manifest.read(stage), remedy(stage)
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise DamagedError(f"{stage / name} is not a file of this stage", fix=fix)
        size = check_file(stage / name, fix=fix).st_size
        expected = size if manifest.bytes is None else manifest.bytes.get(name)
        if size != expected:
            cause = f"it has {size} bytes instead of {expected}"
            raise DamagedError(f"{stage / name} is damaged", cause=cause, fix=fix)
        if file_digest(stage / name, fix=fix) != manifest.files[name]:
            cause = "its sha256 differs from that in the manifest"
            raise DamagedError(f"{stage / name} is damaged", cause=cause, fix=fix)
    return manifest


def describe(
    folder: Path, *, key: str, config: Mapping[str, Any], seconds: float, made_of: Mapping[str, Manifest],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a finished stage as a JSON value. ``made_of``: the manifests of its inputs."""
    described = _describe_files(folder)
    record = {
        "key": key, "inputs": {name: manifest.key for name, manifest in made_of.items()}, "seconds": seconds,
        **described, "versions": _versions(), "config": dict(config),
        "made_of": {name: manifest.contents for name, manifest in made_of.items()},
        "contents": _contents(described["files"], config),
        "settings": None if settings is None else dict(settings),
    }  # fmt: skip
    return signed(record)


def renew(folder: Path) -> None:
    """Rewrite the manifest of a stage after a command has changed its files.

    ``contents`` does not change, so that later stages stay valid.
    """
    record = read_json(folder / MANIFEST, dict[str, Any], fix=remedy(folder))
    files.write_json(folder / MANIFEST, signed(record | _describe_files(folder)))


def place_of(run: Path, name: str) -> Path:
    """The path of a stage, or of the configuration, even if published and not yet moved into place."""
    ready = run / READY / name
    return ready if ready.exists() else run / name


def check_origin(path: Callable[[str], Path], manifest: Manifest) -> str | None:
    """The first input that changed since the stage was built from it; None if none did.

    ``path(name)`` returns the folder of a stage.
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
    """Write ``seconds.json`` of a finished training: its duration and the hashes of its files."""
    files.write_json(folder / CLOCK, signed({"seconds": seconds, "files": _hashes(folder)}))


def read_clock(folder: Path) -> float | None:
    """Duration in seconds of a finished training in ``folder``; None if it is not finished.

    Raises DamagedError if its files were changed.
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
    """The manifests of the finished stages of a run, by name. Raises DamagedError if one is damaged."""
    paths = [*run.glob(f"*/{MANIFEST}"), *(run / READY).glob(f"*/{MANIFEST}")]
    names = {path.parent.name for path in paths if not hidden(path.parent)}
    names |= {name for name in STAGES if place_of(run, name).is_dir()}
    return {name: Manifest.read(place_of(run, name)) for name in sorted(names)}


def _describe_files(folder: Path) -> dict[str, Any]:
    """Hashes and sizes of the files of a folder, and the shapes of its tensors."""
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
    """sha256 per file below a folder, without checkpoints, manifest, key and temporary files."""
    paths = sorted(p for p in folder.rglob("*") if stat.S_ISREG(os.lstat(p).st_mode))
    kept = [p for p in paths if p.name not in (KEY, MANIFEST) and not hidden(p)]
    names = {p.relative_to(folder).as_posix(): p for p in kept}
    return {name: file_digest(path) for name, path in names.items() if not name.startswith("checkpoints/")}


def _contents(hashes: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Digest of the files of a stage.

    For the data it is computed from the config: their files have the paths of pictures, which change when a
    run is moved.
    """
    if "content" in config:
        return digest(config["content"])
    return digest({name: sha for name, sha in hashes.items() if name.split("/")[0] not in LOGS})


def _versions() -> dict[str, str]:
    return {
        "cemg": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
