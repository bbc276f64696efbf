"""Which trainings a question needs.

Source: CEMG, section 4, https://arxiv.org/abs/2512.21543: overall performance (RQ1), ablations (RQ2), cost
(RQ3), parameters (RQ4) and cold items (RQ5).
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cemg.baselines.registry import MODELS, check_model, check_settings, parse_settings, title_of
from cemg.config import load_config
from cemg.data.choices import SPLITS
from cemg.errors import UserError
from cemg.experiments.settings import CEMG, by_model
from cemg.settings import config_file, preset_for
from cemg.tokenizer import TokenizerConfig

LEAVE_ONE_OUT = "leave-one-out"
NEW_ITEMS = "new items"  # variant: items left out of the training, added to the catalog afterwards
ABLATIONS: dict[str, tuple[str, ...]] = {  # variant: settings of cemg-train
    "without collab": ("without=[collab]",),
    "without image": ("without=[image]",),
    "without text": ("without=[text]",),
    "without llm": ("without=[llm]",),
    "plain concatenation": ("tokenizer.fusion=concat",),
    "without memory": ("gate.memory=false",),
}
SWEEPS: dict[str, tuple[str, tuple[float | int, ...]]] = {  # axis of RQ4: setting and values
    "M": ("tokenizer.levels", (2, 3, 4, 5)),
    "K": ("tokenizer.codebook_size", (64, 128, 256, 512)),
    "α": ("tokenizer.commit", (0.25, 0.5, 1.0, 2.0)),
    "β": ("tokenizer.diversity", (0.0, 0.01, 0.1, 1.0)),
}


@dataclass(frozen=True, slots=True)
class Question:
    """An experiment of the paper.

    Attributes:
        title: What it asks.
        models: What it trains by default.
    """

    title: str
    models: tuple[str, ...]


DEFAULT = tuple(name for name, model in MODELS.items() if not model.asked)
QUESTIONS = {
    "rq1": Question("Overall performance", (*DEFAULT, CEMG)),
    "rq2": Question("Ablations", (CEMG,)),
    "rq3": Question("Training time and latency", ("tiger", "letter", "mmgrec", CEMG)),
    "rq4": Question("Levels, codes and weights of the tokenizer", (CEMG,)),
    "rq5": Question("Cold and new items", (*DEFAULT, CEMG)),
}


@dataclass(frozen=True, slots=True)
class Task:
    """One training with its test.

    Attributes:
        data: Name of the data set in the names of files.
        source: Folder or file that cemg-data reads.
        model: A name of ``MODELS``, the path of a Python file, or "cemg".
        variant: What differs from the defaults, for tables; "" for nothing.
        settings: NAME=VALUE, as for ``--set``.
        seed: Seed of everything random.
        base: The task whose finished run this one starts from: it changes the gate only.
        split: One of SPLITS.
    """

    data: str
    source: Path
    model: str
    variant: str = ""
    settings: tuple[str, ...] = ()
    seed: int = 0
    base: str = ""
    split: str = LEAVE_ONE_OUT

    @property
    def name(self) -> str:
        """The name of its folder, with the seed last."""
        data = self.data if self.split == LEAVE_ONE_OUT else f"{self.data}-{self.split}"
        parts = [data, Path(self.model).stem, *([_slug(self.variant)] if self.variant else [])]
        return f"{'-'.join(parts)}-seed{self.seed}"

    @property
    def has_search(self) -> bool:
        """Whether it also has a result of the search by semantic IDs alone, which is not that of its base."""
        return self.model == CEMG and self.variant != "without memory"

    @property
    def table(self) -> str:
        """The data set and the split, as the title of its tables."""
        return self.data if self.split == LEAVE_ONE_OUT else f"{self.data}, split in time"

    @property
    def config(self) -> str:
        """The included configuration of cemg-train that trains it; "" for CEMG and for other models."""
        return MODELS[self.model].config if self.model in MODELS else ""

    @property
    def runs_pipeline(self) -> bool:
        """Whether cemg-train trains it."""
        return self.model == CEMG or bool(self.config)

    @property
    def is_deterministic(self) -> bool:
        """Whether its results are the same with every seed."""
        return self.model in MODELS and not MODELS[self.model].trains

    @property
    def title(self) -> str:
        """Its name in tables."""
        name = "CEMG" if self.model == CEMG else title_of(self.model)
        return f"{name}, {self.variant}" if self.variant else name

    def belongs_to(self, question: str) -> bool:
        """Whether a question of `QUESTIONS` shows its results."""
        sweep, ablation = " = " in self.variant, self.variant in ABLATIONS
        plain = self.variant in ("", "without memory")
        if question in ("rq2", "rq4"):
            return self.model == CEMG and (self.variant == "" or (ablation if question == "rq2" else sweep))
        return plain or (question == "rq5" and self.variant == NEW_ITEMS)

    @property
    def changed(self) -> tuple[str, ...]:
        """The settings that ``--set`` has changed, without those of the variant."""
        return self.settings[: len(self.settings) - len(_settings_of(self.variant))]

    def about(self) -> dict[str, str]:
        """All of it but the folder of the data, as text, for `Task.read`."""
        return {
            "data": self.data, "model": self.model, "variant": self.variant,
            "settings": _joined(self.settings), "seed": str(self.seed), "base": self.base,
            "split": self.split,
        }  # fmt: skip

    @classmethod
    def read(cls, about: Mapping[str, str]) -> Task:
        """The task that ``about`` described, without the folder of its data.

        Raises:
            KeyError: A part is missing.
            ValueError: The seed is not a number.
        """
        return cls(
            about["data"], Path(), about["model"], about["variant"], tuple(shlex.split(about["settings"])),
            int(about["seed"]), about["base"], about["split"],
        )  # fmt: skip


def plan(
    questions: Sequence[str], sources: Mapping[str, Path], *, models: Sequence[str] = (), seeds: int = 1,
    settings: Sequence[str] = (), splits: Sequence[str] = (LEAVE_ONE_OUT,),
) -> list[Task]:  # fmt: skip
    """List the trainings that questions need, each once, those of a data set together, CEMG first.

    Args:
        questions: Names of `QUESTIONS`.
        sources: Data sets by name.
        models: Models of the questions that compare models; the default ones if empty.
        seeds: Seeds 0, 1, … of each training; deterministic models have a task for seed 0 only.
        settings: NAME=VALUE, for all trainings of CEMG, and MODEL:NAME=VALUE for those of another model.
        splits: Splits of SPLITS; each model is trained on each of them.

    Raises:
        UserError: A question, a model, a split or a number of seeds that does not exist; or settings of a
            model that is not trained.
    """
    for name in questions:
        if name not in QUESTIONS:
            fix = f"one of {', '.join(QUESTIONS)}; separate several models or data sets by commas"
            raise UserError(f"there is no question {name}", fix=fix)
    models = list(dict.fromkeys(_model(name) for name in models))
    trained = by_model(settings, _trained(questions, models))
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"there is no split {split}", fix=f"one of {', '.join(SPLITS)}")
    if seeds < 1:
        raise UserError(f"--seeds must be 1 or more, got {seeds}")
    tasks: dict[str, Task] = {}
    for data, source in sources.items():
        for split, seed in itertools.product(splits, range(seeds)):
            make = partial(Task, data, source, seed=seed, split=split)
            for task in _of_data(questions, models, trained, make):
                _check_names(tasks.setdefault(task.name, task), task)
    _check_titles(tasks.values())
    return sorted(tasks.values(), key=lambda task: list(sources).index(task.data))


def _check_names(first: Task, second: Task) -> None:
    """Raise UserError if two different tasks would have the same folder."""
    if first != second:
        raise UserError(
            f"two tasks have the name {first.name}",
            cause=f"{first.model} on {first.table} ({first.source}), and {second.model} on {second.table} "
            f"({second.source})",
            fix="rename a file or a folder, or use one --out folder for each",
        )


def _check_titles(tasks: Iterable[Task]) -> None:
    """Raise UserError for a file whose name is the title of another row in the tables."""
    files = {task.model for task in tasks if task.model != CEMG and task.model not in MODELS}
    for model in sorted(files):
        title = title_of(model).lower()
        others = {title_of(other).lower() for other in (*MODELS, *(files - {model}))}
        if title in others or title.startswith(CEMG):
            raise UserError(
                f"{model} would have the title of another model in the tables",
                fix="rename the file; names that begin with cemg are those of CEMG",
            )


def _model(name: str) -> str:
    """A model as `MODELS` spells it, or the path of a file. Raises UserError if there is no such model."""
    spelled = name.strip()
    titles = {model.title.lower(): known for known, model in MODELS.items()}
    known = titles.get(spelled.lower(), spelled.lower().replace("_", "-"))
    if known == CEMG or known in MODELS:
        return known
    check_model(spelled, also=(CEMG,))
    path = os.path.normpath(spelled)
    return f"./{path}" if path.startswith("-") else path  # else it would be read as an option


def _trained(questions: Sequence[str], models: Sequence[str]) -> list[str]:
    """The models that questions train, CEMG first."""
    chosen = [model for name in questions for model in (models or QUESTIONS[name].models)]
    own = [CEMG] if CEMG in chosen or {"rq2", "rq4"} & {*questions} else []
    return own + [model for model in dict.fromkeys(chosen) if model != CEMG]


def _of_data(
    questions: Sequence[str], models: Sequence[str], settings: Mapping[str, tuple[str, ...]],
    make: Callable[..., Task],
) -> list[Task]:  # fmt: skip
    """The tasks of one data set, split and seed, which ``make`` fills in."""
    trained = _trained(questions, models)
    tasks = [make(model=model, settings=settings.get(model, ())) for model in trained]
    tasks = [task for task in tasks if not (task.seed and task.is_deterministic)]
    if CEMG not in trained:
        return tasks
    own, compared = tasks[0], CEMG in models or not models

    def variant(name: str, *, base: str = "") -> None:
        changed = (*own.settings, *_settings_of(name))
        tasks.append(make(model=CEMG, variant=name, settings=changed, base=base))

    if "rq2" in questions:
        for name in ABLATIONS:
            variant(name, base=own.name if name == "without memory" else "")
    elif compared and {*questions} - {"rq4"}:
        variant("without memory", base=own.name)
    if "rq5" in questions and compared and own.split == LEAVE_ONE_OUT:
        variant(NEW_ITEMS)
    if "rq4" in questions:
        for axis, (setting, values) in SWEEPS.items():
            for value in values:  # the default one is that of the run without a variant
                same = _default(setting, own.settings) == value
                variant(f"{axis} = {value}", base=own.name if same else "")
    return tasks


def _settings_of(variant: str) -> tuple[str, ...]:
    """The settings of CEMG that a variant changes."""
    axis, equals, value = variant.partition(" = ")
    return (f"{SWEEPS[axis][0]}={value}",) if equals else ABLATIONS.get(variant, ())


def _joined(settings: Sequence[str]) -> str:
    """Settings as text that `shlex.split` takes apart; those without spaces or quotes are not quoted."""
    return " ".join(shlex.quote(one) if re.search(r"[\s'\"\\]", one) else one for one in settings)


def _default(setting: str, settings: Sequence[str]) -> float | int:
    """The value of a setting of the tokenizer that a training has without a variant."""
    given = {
        name: float(text) for name, _, text in (one.partition("=") for one in settings) if name == setting
    }
    value: float | int = given.get(setting, getattr(TokenizerConfig(), setting.partition(".")[2]))
    return value


def check_task(task: Task, items: int) -> None:
    """Raise UserError if a setting of a task does not exist or is invalid.

    Args:
        task: The task.
        items: Number of items of its data, which chooses the preset of CEMG.
    """
    if not task.runs_pipeline:
        check_settings(task.model, parse_settings(task.settings))
    elif task.config:
        load_config(config_file(Path(task.config)), task.settings)
    else:
        for preset in ("", preset_for(items))[bool(task.base) :]:  # as cemg-train reads them
            load_config(None, task.settings, preset=preset)


def _slug(text: str) -> str:
    spelled = text.replace("α", "alpha").replace("β", "beta")
    return re.sub(r"[^a-z0-9.]+", "-", spelled.lower()).strip("-")


def sources_of(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Find data sets: paths, folders under ``data/``, or "synthetic", which is written to ``folder``.

    Raises:
        UserError: One does not exist, or two have the same name.
    """
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name)
        if name == "synthetic" and not path.exists():
            path = _synthetic(folder)
        elif not path.exists() and (Path("data") / name).exists():
            path = Path("data") / name
        elif not path.exists():
            known = [p.name for p in sorted(Path("data").glob("*")) if p.is_dir()]
            raise UserError(
                f"there is no data set {name}",
                cause=f"neither {path} nor {Path('data') / name} exists",
                fix=f"a folder or file that cemg-data reads; or {', '.join([*known, 'synthetic'])}",
            )
        label = _slug(path.name.split(".")[0]) or "data"
        if label in found:
            raise UserError(
                f"--data {found[label]} and --data {path} both have the name {label}",
                fix="rename one of them, or use one --out folder for each",
            )
        found[label] = path
    return found


def _synthetic(folder: Path) -> Path:
    from cemg.data.synthetic import synthetic_dataset

    path = folder / "synthetic"
    if not (path / "dataset.json").exists():
        synthetic_dataset(path / "world").save(path)
    return path
