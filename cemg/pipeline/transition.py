"""Retraining a run: finished stages are replaced only with consent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cemg.artifacts import check_generator, recorded_settings
from cemg.config import RunConfig, config_text, generator_of, load_config
from cemg.data import Dataset
from cemg.errors import DamagedError, UserError
from cemg.pipeline.changes import IMAGES, data_changed, settings_changed
from cemg.settings import flat
from cemg.storage import files
from cemg.storage.manifest import CONFIG, STAGES, Manifest, check_origin, verify
from cemg.storage.read import read_json, read_tensors, read_text
from cemg.storage.run import PENDING, Run

DISCARDED = "the interrupted retraining"
REMOVED = "that cemg-catalog added are removed"  # wording of a question
BESIDE = ("memory", "generator", "gate")  # stages that the catalog is not built from


class Transition:
    """One training of a run, from the first question to the commit.

    Args:
        run: The run.
        asked: The settings of this training.
        agree: ``agree(changes, damaged)`` is called once before finished stages are replaced, and raises to
            refuse. None replaces them without a question.
        rebuild: Whether damaged stages are rebuilt without a question.
    """

    def __init__(
        self, run: Run, asked: RunConfig, *, agree: Callable[[list[str], bool], None] | None = None,
        rebuild: bool = False,
    ) -> None:  # fmt: skip
        self.run, self.asked, self.agree, self.rebuild = run, asked, agree, rebuild
        self.pending = run.folder / PENDING
        self.before = read_text(self.pending) if self.pending.is_file() else None
        self.agreed = agree is None
        self.named = agree is None  # whether the user agreed to lose added items

    def begin(self) -> None:
        """Ask about changed settings, then write them: an interrupted training continues with them."""
        pending, own = _readable(self.pending), _trained_with(self.run)
        if pending is not None and self.run.approved() and _alike(pending, self.asked):
            self.agreed = self.named = True  # the user agreed when that training started
        base = own if self.run.finished() else pending
        changes = [] if base is None else settings_changed(base, self.asked)
        changes += self._discarded(own, pending)
        if changes and not self.agreed and self._valuable():
            self._ask(changes, catalog=base is not None and _remakes_catalog(base, self.asked))
        if self.agreed and self.run.started():
            self.run.approve()
        elif not self.agreed and self.run.finished():
            self.run.abandon()  # discards stages that an earlier training built
        files.write_text(self.pending, config_text(self.asked))

    def guard(self, name: str, old: Path, config: Mapping[str, Any]) -> None:
        """Called by `Run.stage` before it builds a stage that replaces the one in ``old``."""
        loses = name == "catalog" and not self.named and _added_items(self.run) > 0
        if self.agreed and not loses:
            return
        try:
            manifest = verify(old)
        except DamagedError as error:
            if self.run.finished() and (loses or not self.rebuild):
                reason = f"{error.message}: {error.cause}" if error.cause else error.message
                self._ask([reason], damaged=True, catalog=loses)
            return
        foreign = self._foreign(name, manifest)
        if name == "gate" and not foreign:
            return  # it is fitted again in a minute, and the generator stays
        if loses or (self._valuable() and not (foreign and self.rebuild)):
            changes = [foreign] if foreign else self._changes(name, old, manifest, config)
            self._ask(changes, damaged=bool(foreign), catalog=loses if foreign else name not in BESIDE)

    def _foreign(self, name: str, manifest: Manifest) -> str | None:
        """Why a stage seems to be copied from another run; None if it is not.

        It is foreign if it was built from other stages than those present, or if later stages were built
        from another version of it that the current settings produce.
        """
        key = self.run.keys[name]
        made_of = check_origin(self.run.path, manifest)
        if manifest.key == key and made_of is not None:
            return f"its {name} was not built from the {made_of} that is there now"
        for other in STAGES:
            with suppress(DamagedError):
                if Manifest.read(self.run.path(other)).inputs.get(name) == key != manifest.key:
                    return f"its {other} was not built from the {name} that is there now"
        path = self.run.path(CONFIG)
        if name == "generator" and path.is_file() and generator_of(path) == key != manifest.key:
            return f"{path} names another generator than {self.run.path(name)}"
        return None

    def data_guard(self, data: Dataset, images: list[str | None]) -> Callable[..., None]:
        """`guard` for the data stage; it also reports how the data differ."""

        def guard(name: str, old: Path, config: Mapping[str, Any]) -> None:
            self.new_data = (data, images)
            self.guard(name, old, config)

        return guard

    def _changes(self, name: str, old: Path, manifest: Manifest, config: Mapping[str, Any]) -> list[str]:
        if name == "data":
            data, images = self.new_data
            known = read_json(old / IMAGES, list[str | None])
            return data_changed(Dataset.load(old), data, old_images=known, new_images=images)
        before, after = flat(manifest.config), flat(config)
        names = [n for n in before | after if before.get(n) != after.get(n)]
        changes = [f"{name}: {n}: {before.get(n)} → {after.get(n)}" for n in names]
        return changes or [f"{name}: it was built by another version, or from other inputs"]

    def _ask(self, changes: list[str], *, damaged: bool = False, catalog: bool = False) -> None:
        """``catalog``: whether the catalog is rebuilt and loses its added items."""
        added = _added_items(self.run) if catalog else 0
        if added:
            changes = [*changes, f"catalog: the {added} items {REMOVED}"]
        assert self.agree is not None
        self.agree(changes, damaged)
        self.agreed, self.named = True, self.named or catalog
        self.run.approve()

    def _discarded(self, own: RunConfig | None, pending: RunConfig | None) -> list[str]:
        """An interrupted retraining of a finished run that has other settings than this one."""
        if self.agreed or not self.run.finished() or not self.pending.exists() or not self.run.retrained():
            return []
        changes = settings_changed(own, pending) if own is not None and pending is not None else []
        return [f"{DISCARDED} with {', '.join(changes)}" if changes else DISCARDED]

    def _valuable(self) -> bool:
        """Whether there is a trained generator, or a training with a checkpoint."""
        return self.run.finished() or self.run.path("generator").exists() or self.run.trains()

    def withdraw(self) -> None:
        """After an error that the settings caused: they are not resumed, and the run is what it was."""
        if self.before is not None:
            files.write_text(self.pending, self.before)
        elif self.run.finished() or not any(self.run.path(name).exists() for name in STAGES):
            self.pending.unlink(missing_ok=True)
            self.run.abandon()

    def commit(self) -> None:
        """The new stages and their settings become the run's own."""
        self.run.commit(config_text(self.asked, generator=self.run.keys["generator"]))


def _readable(path: Path) -> RunConfig | None:
    try:
        return load_config(path, of_run=True) if path.is_file() else None
    except UserError:
        return None


def _trained_with(run: Run) -> RunConfig | None:
    """The settings in config.yaml; if that belongs to another run, those that the stages record."""
    own = _readable(run.path(CONFIG))
    if own is None:
        return None
    try:
        check_generator(run)
    except DamagedError:
        return recorded_settings(run) or own
    return own


def _alike(one: RunConfig, other: RunConfig) -> bool:
    return one.data == other.data and not settings_changed(one, other)


def _remakes_catalog(old: RunConfig, new: RunConfig) -> bool:
    """Whether changed settings change a stage before the generator, and so rebuild the catalog."""
    parts = ["memory", "backbone", "generator", "decoding", "gate", "dtype", "without"]
    parts += ["data"] if old.data.path and new.data.path else []  # their contents are compared later
    one, other = ({k: v for k, v in c.to_dict().items() if k not in parts} for c in (old, new))
    return one != other or {*old.without} - {"llm"} != {*new.without} - {"llm"}


def _added_items(run: Run) -> int:
    """Number of items that were added to the catalog after training; damaged files are ignored."""
    catalog = run.path("catalog")

    def counted(*ways: Callable[[], int]) -> int:
        found = 0
        for way in ways:
            with suppress(UserError, KeyError, TypeError, ValueError, IndexError):
                found = found or way()
        return found

    trained = counted(
        lambda: Manifest.read(run.path("tokenizer")).shapes["items.safetensors:codes"][0],
        lambda: int(read_json(catalog / "uniqueness.json", dict[str, Any])["items"]),
    )
    now = counted(
        lambda: Manifest.read(catalog).shapes["catalog.safetensors:codes"][0],
        lambda: len(read_json(catalog / "catalog.json", dict[str, Any])["item_ids"]),
        lambda: len(read_tensors(catalog / "catalog.safetensors")["codes"]),
    )
    return max(0, now - trained) if trained else 0
