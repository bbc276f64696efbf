"""What all commands share: `-h`, `--version`, errors as a few lines with exit code 2, and Ctrl-C.

torch and transformers take seconds to import, so a command imports them inside its function: ``--help``
answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from cemg import __version__
from cemg.errors import UserError
from cemg.files import storage_error
from cemg.progress import console, printable

if TYPE_CHECKING:
    from cemg.config import RunConfig

INFORMATION = ("-h", "--help", "--version")  # which need no working environment
LIBRARIES = (
    "accelerate", "matplotlib", "peft", "polars", "sklearn", "tensorboard", "torch", "torchvision",
    "transformers",
)  # fmt: skip
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
NOTHING = "nothing was written"
_kept = NOTHING  # what an interrupted command leaves behind


class Command(TyperCommand):
    """One command; Ctrl-C ends it with one line on stderr and exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {_kept}", file=sys.stderr)
            raise typer.Exit(130) from None


def command_line(**options: Any) -> typer.Typer:
    """The application of one command, in the manner of all of them."""
    names = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings=names, **options
    )


def say_if_interrupted(kept: str) -> None:
    """From here on, Ctrl-C prints ``kept``: what stays, and the command that continues."""
    global _kept
    _kept = kept


def _print_version(asked: bool) -> None:
    if asked:
        print(f"cemg {__version__}")
        raise typer.Exit


NoVerifyOption = Annotated[
    bool, typer.Option("--no-verify", help="Read the run's files without comparing them with their hashes.")
]
VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
]


def check_device(device: str) -> None:
    """UserError for what is no device, and for a GPU that torch does not see."""
    import torch

    try:
        found: torch.device | None = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is no device", fix="--device cpu, cuda or cuda:1")
    gpus = torch.cuda.device_count() if found.type == "cuda" and torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= gpus:
        sees = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees {sees}",
            fix="cemg-doctor tells why; or --device cpu",
        )


def check_normalize(name: str | None) -> None:
    """UserError for what is no normalisation; None is the run's own."""
    from cemg_kernels.constrained.softmax import Normalize

    if name not in (None, *get_args(Normalize)):
        raise UserError(f"--normalize must be {', '.join(get_args(Normalize))}, got {name!r}")


def warn_of_normalize(config: RunConfig, name: str | None) -> None:
    """Say so where a model of loss "valid" is searched under another normalisation."""
    if config.generator.loss == "valid" and name not in (None, "valid"):
        console.print(
            f"warning: this model was trained with generator.loss=valid, so --normalize {name} gives worse "
            "lists: codes that continue no item were never trained",
            soft_wrap=True,
        )


def check_result(path: Path | None, option: str = "--result") -> None:
    """UserError where a result file is to be written over a folder."""
    if path is not None and path.is_dir():
        raise UserError(f"{option} {path} is a folder", fix=f"name a file: {option} {path / 'beauty.json'}")


def _check_environment() -> None:
    from cemg_kernels import fast_kernels_enabled

    try:
        fast_kernels_enabled()
    except ValueError as error:
        raise UserError(str(error)) from None


def _lacks_memory(error: Exception) -> bool:
    """Whether an error is a refused allocation; torch raises a RuntimeError for one on the CPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def run(app: Callable[[], Any]) -> None:
    """Run ``app`` on ``sys.argv``; a UserError, or what the system refuses, is printed as ``error: …``, cause
    and fix; exit code 2."""
    say_if_interrupted(NOTHING)
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack a letter of a title
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        _quieten()
        _run(app)


def _quieten() -> None:
    """Keep the notices of other libraries off the terminal: a user can do nothing about them. Their errors
    stay, and so do CEMG's own warnings, as one line each."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)  # read when transformers is imported
    for kind in (UserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind, module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    console.print(f"warning: {message}", soft_wrap=True)


def _run(app: Callable[[], Any]) -> None:
    try:
        if not set(sys.argv[1:]) & {*INFORMATION}:
            _check_environment()
        app()
    except UserError as error:
        lines = error.lines()
    except OSError as error:
        storage = storage_error(error)
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        lines = storage.lines() if storage is not None else [named]
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        lines = UserError(
            "not enough memory",
            cause=str(error).split("\n")[0],
            fix="smaller batches, fewer beams, or a smaller model",
        ).lines()
    else:
        return
    for line in (f"error: {lines[0]}", *lines[1:]):
        print(printable(line), file=sys.stderr)
    sys.exit(2)
