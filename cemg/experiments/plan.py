"""Which trainings a question needs.

Source: CEMG, section 4, https://arxiv.org/abs/2512.21543: overall performance (RQ1), ablations (RQ2), cost
(RQ3), parameters (RQ4) and cold items (RQ5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cemg.baselines.registry import MODELS, check_model, title_of
from cemg.errors import UserError

CEMG = "cemg"
WITHOUT_MEMORY = ("gate.memory=false",)
ABLATIONS: dict[str, tuple[str, ...]] = {  # variant: settings of cemg-train
    "without collab": ("without=[collab]",),
    "without image": ("without=[image]",),
    "without text": ("without=[text]",),
    "without llm": ("without=[llm]",),
    "plain concatenation": ("tokenizer.fusion=concat",),
    "without memory": WITHOUT_MEMORY,
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


QUESTIONS = {
    "rq1": Question("Overall performance", (*MODELS, CEMG)),
    "rq2": Question("Ablations", (CEMG,)),
    "rq3": Question("Training time", (*MODELS, CEMG)),
    "rq4": Question("Levels, codes and weights of the tokenizer", (CEMG,)),
    "rq5": Question("Cold items", (*MODELS, CEMG)),
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
    """

    data: str
    source: Path
    model: str
    variant: str = ""
    settings: tuple[str, ...] = ()
    seed: int = 0
    base: str = ""

    @property
    def name(self) -> str:
        """The name of its folder, with the seed last."""
        parts = [self.data, Path(self.model).stem, *([_slug(self.variant)] if self.variant else [])]
        return f"{'-'.join(parts)}-seed{self.seed}"

    @property
    def config(self) -> str:
        """The included configuration of cemg-train that trains it; "" for CEMG and for other models."""
        return MODELS[self.model].config if self.model in MODELS else ""

    @property
    def title(self) -> str:
        """Its name in tables."""
        name = "CEMG" if self.model == CEMG else title_of(self.model)
        return f"{name}, {self.variant}" if self.variant else name

    def about(self) -> dict[str, str]:
        """All of it but the folder of the data, as text, for `Task.read`."""
        return {
            "data": self.data, "model": self.model, "variant": self.variant,
            "settings": " ".join(self.settings), "seed": str(self.seed), "base": self.base,
        }  # fmt: skip

    @classmethod
    def read(cls, about: Mapping[str, str]) -> Task:
        """The task that ``about`` described, without the folder of its data.

        Raises:
            KeyError: A part is missing.
            ValueError: The seed is not a number.
        """
        return cls(
            about["data"], Path(), about["model"], about["variant"], tuple(about["settings"].split()),
            int(about["seed"]), about["base"],
        )  # fmt: skip


def plan(
    questions: Sequence[str], sources: Mapping[str, Path], *, models: Sequence[str] = (), seeds: int = 1,
    settings: Sequence[str] = (),
) -> list[Task]:  # fmt: skip
    """List the trainings that questions need, each once, those of a data set together, CEMG first.

    Args:
        questions: Names of `QUESTIONS`.
        sources: Data sets by name.
        models: Models of the questions that compare models; the default ones if empty.
        seeds: Seeds 0, 1, … of each training.
        settings: Settings of CEMG for all of its trainings.

    Raises:
        UserError: A question, a model or a number of seeds that does not exist.
    """
    for name in questions:
        if name not in QUESTIONS:
            raise UserError(f"there is no question {name}", fix=f"one of {', '.join(QUESTIONS)}")
    for model in models:
        if model != CEMG:
            check_model(model)
    if seeds < 1:
        raise UserError(f"--seeds must be 1 or more, got {seeds}")
    tasks: dict[str, Task] = {}
    for data, source in sources.items():
        for seed in range(seeds):
            for task in _of_data(questions, data, source, models, tuple(settings), seed):
                tasks.setdefault(task.name, task)
    return sorted(tasks.values(), key=lambda task: list(sources).index(task.data))


def _of_data(
    questions: Sequence[str], data: str, source: Path, models: Sequence[str], settings: tuple[str, ...],
    seed: int,
) -> list[Task]:  # fmt: skip
    own = Task(data, source, CEMG, settings=settings, seed=seed)
    chosen: list[str] = []
    for name in questions:
        chosen += models or QUESTIONS[name].models
    tasks = [own] if CEMG in chosen or {"rq2", "rq4"} & {*questions} else []
    tasks += [Task(data, source, model, seed=seed) for model in chosen if model != CEMG]
    if "rq2" in questions:
        for variant, changed in ABLATIONS.items():
            base = own.name if changed == WITHOUT_MEMORY else ""
            tasks.append(Task(data, source, CEMG, variant, (*settings, *changed), seed, base))
    elif own in tasks:
        tasks.append(Task(data, source, CEMG, "without memory", (*settings, *WITHOUT_MEMORY), seed, own.name))
    if "rq4" in questions:
        for axis, (setting, values) in SWEEPS.items():
            tasks += [
                Task(data, source, CEMG, f"{axis} = {value}", (*settings, f"{setting}={value}"), seed)
                for value in values
            ]
    return tasks


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
