"""Dry run of a training: which stages it would build or reuse, and why. The run is not changed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cemg.config import RunConfig
from cemg.data import Dataset
from cemg.errors import DamagedError
from cemg.pipeline import Pipeline
from cemg.settings import flat
from cemg.storage.manifest import MANIFEST, STAGES, Manifest, verify
from cemg.storage.run import Run

REUSED, MISSING = "reused", "built: it does not exist yet"


def plan(
    folder: Path, config: RunConfig, *, device: str = "cpu", data: Dataset | None = None
) -> dict[str, str]:
    """Each stage, in order, with "reused" or "built: …" and the reason.

    Works on a temporary folder with links to the stages of ``folder``.

    Raises:
        UserError: The data cannot be read or the settings do not fit them, as in a training.
    """
    with tempfile.TemporaryDirectory() as name:
        shadow = Path(name) / folder.name
        shadow.mkdir()
        for stage in STAGES:
            if (folder / stage).is_dir():
                (shadow / stage).symlink_to((folder / stage).resolve(), target_is_directory=True)
        run = _Plan(shadow)
        pipeline = Pipeline(run, config, device=device, data=data)
        for stage in STAGES:
            if stage == "generator" and {run.verdicts["data"], run.verdicts["catalog"]} != {REUSED}:
                run.stage(stage, {}, lambda _: None, inputs=("data", "catalog"))  # its key depends on both
            else:
                getattr(pipeline, stage)()
        return run.verdicts


class _Plan(Run):
    """A run whose stages are compared but not built. ``verdicts`` has the results."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.verdicts: dict[str, str] = {}

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        inputs: tuple[str, ...] = (),
        **others: Any,
    ) -> Path:
        key = self.key_of(config, inputs)
        self.keys[name] = key
        self.verdicts[name] = self._verdict(name, key, config, inputs)
        return self.path(name)

    def _verdict(self, name: str, key: str, config: Mapping[str, Any], inputs: tuple[str, ...]) -> str:
        folder = self.path(name)
        if not (folder / MANIFEST).exists():
            return MISSING
        changed = next((i for i in inputs if self.verdicts[i] != REUSED), None)
        if changed is not None:
            return f"built: {changed} is built again"
        try:
            manifest = verify(folder)
        except DamagedError:
            return "built: it is damaged"
        return REUSED if manifest.key == key else f"built: {_difference(name, manifest, config)}"


def _difference(name: str, manifest: Manifest, config: Mapping[str, Any]) -> str:
    if name == "data":
        return "the data have changed"
    before, after = flat(manifest.config), flat(config)
    names = [n for n in before | after if before.get(n) != after.get(n)]
    changes = [f"{n}: {before.get(n)} → {after.get(n)}" for n in names[:5]]
    return ", ".join(changes) or "it was built by another version of CEMG, or from other inputs"
