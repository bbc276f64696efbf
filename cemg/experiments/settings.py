"""``--set`` of ``cemg-experiment``: NAME=VALUE for CEMG, MODEL:NAME=VALUE for another model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from cemg.baselines.registry import MODELS
from cemg.errors import UserError

CEMG = "cemg"
OPTIONS = {  # settings that an option has
    "seed": "--seeds",
    "dtype": "--dtype",
    "generator.budget_hours": "--budget",
}


def by_model(settings: Sequence[str], models: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Sort settings by the model that they belong to.

    Args:
        settings: NAME=VALUE for CEMG, or MODEL:NAME=VALUE; MODEL is a name, or that of a file without .py.
        models: The models that are trained.

    Raises:
        UserError: No model of that name is trained, or an option has this setting.
    """
    names = {_name(model): model for model in models}
    found: dict[str, list[str]] = {}
    for given in settings:
        before, colon, after = given.partition(":")
        has_model = colon and "=" not in before
        name, setting = (before.strip(), after) if has_model else (CEMG, given)
        if name not in names:
            known = ", ".join(f"{one}:NAME=VALUE" if one != CEMG else "NAME=VALUE" for one in names)
            raise UserError(f"--set {given}: no {name} is trained", fix=f"--set with one of {known}")
        _check_options(given, setting, names[name])
        found.setdefault(names[name], []).append(setting)
    return {model: tuple(of_model) for model, of_model in found.items()}


def _name(model: str) -> str:
    return model if model in MODELS or model == CEMG else Path(model).stem


def _check_options(given: str, setting: str, model: str) -> None:
    """Raise UserError for a setting that an option has, or that is one of the data."""
    name = setting.partition("=")[0].strip()
    option = OPTIONS.get(name)
    if option == "--budget" and model == CEMG:  # which --budget does not stop
        option = None
    if option or name.endswith(".seed"):
        raise UserError(f"--set {given}: an option has this setting", fix=option or "--seeds")
    if name in ("fold", "folds") and model != CEMG:
        raise UserError(f"--set {given}: an experiment trains on all users", fix="leave it out")
    if name.startswith("data.") and name != "data.texts":
        raise UserError(
            f"--set {given}: all models are trained on the same data",
            fix="prepare it with this option, cemg-data prepare SOURCE FOLDER …, and then --data FOLDER",
        )
