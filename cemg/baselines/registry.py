"""The models that ``python -m cemg.baselines`` and ``cemg-experiment`` train, and how to add one.

A model is a function from a `Job` to a `Fitted`. `MODELS` names those that come with CEMG; a Python file that
defines ``fit`` adds another, by its path: ``--model my_model.py``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cemg.data import Dataset
from cemg.dense.config import CHOICES
from cemg.errors import UserError
from cemg.evaluation import Rank

Config = TypeVar("Config")
_COUNTS = (
    "epochs", "batch_size", "patience", "dim", "state", "layers", "blocks", "heads", "cross_heads", "inner",
    "interests", "drawn", "max_length", "valid_users", "graph_epochs", "graph_negatives", "graph_batch",
    "levels", "codes", "latent", "modal_dim", "history_items", "title_tokens", "n_epochs", "max_len",
    "embedding_dim",
)  # fmt: skip
_RATES = ("dropout", "lora_dropout", "dropout_p_embed", "dropout_p_hidden", "beta2")
_NOT_NEGATIVE = (
    "weight_decay", "negatives", "graph_decay", "graph_layers", "tokenizer_epochs", "n_sample", "similar",
    "align", "orthogonality", "lora_rank",
)  # fmt: skip
# The values that settings of these names can have, in all models.
RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_COUNTS, lambda value: value >= 1, "1 or more"),
    (_RATES, lambda value: 0 <= value < 1, "in [0, 1)"),
    (("learning_rate", "temperature", "graph_rate"), lambda value: value > 0, "more than 0"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    *(
        ((name,), CHOICES[name].__contains__, f"one of {', '.join(CHOICES[name])}")
        for name in ("samples", "products", "schedule", "select")
    ),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What a model is trained on.

    Attributes:
        data: The data set. ``data.split().train`` has the training sequences; test items are not to be read.
        folder: For checkpoints. The same job resumes there.
        seed: Seed of everything random.
        device: "cpu", "cuda", "cuda:1", …
        budget: Seconds of training, after which a model stops; None for no limit.
        cache: Folder of the features of texts and images, which jobs can share; None to compute them.
        settings: Changed settings of the model, by name; values are text if they come from a command line.
    """

    data: Dataset
    folder: Path
    seed: int = 0
    device: str = "cpu"
    budget: float | None = None
    cache: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self, kind: type[Config], **fixed: Any) -> Config:
        """Return the settings of a model: a dataclass with the seed and the changed settings.

        Args:
            kind: A dataclass whose fields have defaults.
            fixed: Fields that the model's name decides, so that they cannot be changed.

        Raises:
            UserError: A setting does not exist, or its value has another type or is out of range.
        """
        defaults = dataclasses.asdict(kind())  # type: ignore[call-overload]
        allowed = [name for name in defaults if name not in (*fixed, "seed")]
        changes: dict[str, Any] = {}
        for name, value in self.settings.items():
            if name not in allowed:
                fix = f"one of {', '.join(allowed)}" if allowed else "leave it out: the model has no settings"
                raise UserError(f"--set {name}={value}: unknown setting", fix=fix)
            wanted = type(defaults[name])
            try:
                read = json.loads(value) if isinstance(value, str) and wanted is not str else value
                changes[name] = wanted(read)
                if wanted is int and changes[name] != read:
                    raise ValueError(read)
            except (ValueError, TypeError) as error:
                message = f"--set {name}={value}: {value!r} is not a valid {wanted.__name__}"
                raise UserError(message) from error
            check_range(name, changes[name], default=defaults[name])
        seed = {"seed": self.seed} if "seed" in defaults else {}
        return kind(**{**changes, **fixed, **seed})


def check_range(name: str, value: Any, *, default: Any) -> None:
    """Raise UserError for a value that a setting cannot have.

    A rule of a name counts only where the default obeys it: the model of a file can mean something else by
    the name.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value}")
    for names, is_valid, wanted in RANGES:
        if name in names and type(value) is type(default) and is_valid(default) and not is_valid(value):
            raise UserError(f"{name} must be {wanted}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained model.

    Attributes:
        rank: Ranks the catalog for histories: see `cemg.evaluation.evaluate`.
        config: Its settings, and what early stopping chose.
        further: More entries of the result file.
    """

    rank: Rank
    config: Mapping[str, Any]
    further: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_log(
        cls, rank: Rank, config: Mapping[str, Any], log: Sequence[Mapping[str, float]], *, select: str
    ) -> Fitted:
        """Return a model with the best epoch, the seconds and the log of `cemg.baselines.loop.train`."""
        best = max(log, key=lambda row: row[f"valid_{select}"])
        found: dict[str, Any] = {"best_epoch": best["epoch"], "epochs_run": len(log)}
        found |= {name: best[name] for name in ("valid_HR@10", "valid_NDCG@10")}
        found["train_seconds"] = round(sum(row["train_seconds"] for row in log), 1)
        if log[-1].get("stopped"):
            found["stopped"] = "the budget of training time was spent"
        rounded = [{name: round(value, 5) for name, value in row.items()} for row in log]
        return cls(rank, {**config, **found}, {"training": rounded})


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of `MODELS`.

    Attributes:
        title: Its name in tables.
        module: The module with its function ``fit``, or ``fit_`` and the key in `MODELS`. Empty if cemg-train
            trains it.
        source: Link to the paper.
        trains: Whether it needs a folder for checkpoints.
        config: The included configuration with which cemg-train trains it, for a model that is CEMG's own
            tokenizer and generator with other settings; empty for the others.
        asked: Whether a question trains it only if it is named.
    """

    title: str
    module: str = ""
    source: str = ""
    trains: bool = True
    config: str = ""
    asked: bool = False


LIBRARY = "cemg.baselines.library"
MODELS = {
    "popularity": Model("Popularity", "cemg.baselines.simple", trains=False),
    "memory": Model("Item memory", "cemg.baselines.simple", trains=False),
    "gru4rec": Model("GRU4Rec", "cemg.baselines.gru4rec", "https://arxiv.org/abs/1511.06939"),
    "sasrec": Model("SASRec", "cemg.baselines.dense", "https://arxiv.org/abs/1808.09781"),
    "sasrec-bce": Model(
        "SASRec, binary cross-entropy", "cemg.baselines.dense", "https://arxiv.org/abs/1808.09781"
    ),
    "bsarec": Model("BSARec", "cemg.baselines.dense", "https://arxiv.org/abs/2312.10325"),
    "llm-esr": Model("LLM-ESR", "cemg.baselines.llm_esr", "https://arxiv.org/abs/2405.20646"),
    "mmsrec": Model("MMSRec", "cemg.baselines.mmsrec", "https://arxiv.org/abs/2304.13277"),
    "missrec": Model("MISSRec", "cemg.baselines.missrec", "https://arxiv.org/abs/2308.11175"),
    "tiger": Model("TIGER", source="https://arxiv.org/abs/2305.05065", config="tiger"),
    "letter": Model("LETTER", source="https://arxiv.org/abs/2405.07314", config="letter"),
    "mmgrec": Model("MMGRec", "cemg.baselines.mmgrec", "https://arxiv.org/abs/2404.16555"),
    "llamarec": Model("LlamaRec", "cemg.baselines.llamarec", "https://arxiv.org/abs/2311.02089"),
    **{
        f"cornac-{name.lower()}": Model(
            f"{name} of cornac", LIBRARY, "https://cornac.preferred.ai", asked=True
        )
        for name in ("GRU4Rec", "SASRec", "TIGER")
    },
}
FITTED = tuple(name for name, model in MODELS.items() if not model.config)  # those that `fit` trains


def fit(name: str, job: Job) -> Fitted:
    """Train a model of `MODELS`, or that of a Python file.

    Raises:
        UserError: There is no such model, cemg-train trains it, the file cannot be read, or it defines no
            ``fit``; or as the model.
    """
    check_fitted(name)
    if name in MODELS:
        module: Any = importlib.import_module(MODELS[name].module)
        function = getattr(module, "fit_" + name.replace("-", "_"), None) or module.fit
    else:
        function = _fit_of_file(name)
    fitted = function(job)
    if not isinstance(fitted, Fitted):
        raise UserError(f"fit of {name} returned {type(fitted).__name__}", fix="return Fitted(rank, config)")
    for part in (fitted.config, fitted.further):
        for key, value in part.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                message = f"fit of {name} returned {key} = {str(value)[:80]}, which JSON cannot hold"
                raise UserError(message, cause=str(error)) from error
    return fitted


class _SettingsRead(Exception):
    """A model has read its settings."""


class _SettingsOnly(Job):
    """A job that ends when the model has read its settings."""

    __slots__ = ()

    def config(self, kind: type[Config], **fixed: Any) -> Config:
        Job.config(self, kind, **fixed)
        raise _SettingsRead


def check_settings(name: str, changes: Mapping[str, Any]) -> None:
    """Raise UserError if a model that `fit` trains does not have these settings, without training it.

    A Python file is imported: it must define ``fit``.
    A model of a file that reads its data before its settings is not checked.

    Args:
        name: The model.
        changes: Values by name, as in `Job`.
    """
    check_fitted(name)
    if name not in MODELS:
        _fit_of_file(name)
    if not changes:
        return
    try:
        fit(name, _SettingsOnly(None, Path(), settings=changes))  # type: ignore[arg-type]
    except UserError:
        raise
    except Exception:  # _SettingsRead, or what a model of a file raises without data
        return


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """Split ``["dim=128"]`` into ``{"dim": "128"}``. Raises UserError for other texts."""
    changes: dict[str, str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: not NAME=VALUE", fix="for example --set dim=128")
        changes[name] = text
    return changes


def title_of(name: str) -> str:
    """Return the name of a model in tables."""
    return MODELS[name].title if name in MODELS else Path(name).stem


def check_model(name: str, *, also: Sequence[str] = ()) -> None:
    """Raise UserError if there is no such model. ``also`` are names that the message lists, too."""
    if name not in MODELS and not (name.endswith(".py") and Path(name).is_file()):
        known = ", ".join((*also, *MODELS))
        raise UserError(f"there is no model {name}", fix=f"one of {known}; or the path of a Python file")


def check_fitted(name: str) -> None:
    """Raise UserError if there is no such model, or if cemg-train trains it."""
    check_model(name)
    if name in MODELS and name not in FITTED:
        raise UserError(
            f"{name} is a configuration of cemg-train",
            fix=f"cemg-train --config {MODELS[name].config} --data DATA --run RUN; or cemg-experiment rq1 "
            f"--models {name} --data DATA",
        )


def _fit_of_file(name: str) -> Any:
    check_model(name)
    spec = importlib.util.spec_from_file_location(f"cemg_model_{Path(name).stem}", name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for the classes of the file
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"{name} cannot be imported", cause=f"{type(error).__name__}: {error}") from error
    if not callable(getattr(module, "fit", None)):
        raise UserError(f"{name} has no function fit", fix="def fit(job: Job) -> Fitted")
    return module.fit
