"""What all commands share: ``-h``, ``--version``, errors on a few lines with exit code 2, and Ctrl-C.

Importing torch and transformers takes seconds. Commands import them inside their functions, so that
``--help`` prints at once.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from cemg.errors import UserError
from cemg.processes import follow_parent
from cemg.progress import console, printable
from cemg.storage.files import storage_error
from cemg.version import __version__

if TYPE_CHECKING:
    from cemg.config import RunConfig

INFORMATION = ("-h", "--help", "--version")  # options that work in a broken environment too
LIBRARIES = (
    "accelerate", "matplotlib", "peft", "polars", "sklearn", "tensorboard", "torch", "torchvision",
    "transformers",
)  # fmt: skip
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
NOTHING_WRITTEN = "nothing was written"
_interrupt_message = NOTHING_WRITTEN


class Command(TyperCommand):
    """One command; Ctrl-C ends it with one line on stderr and exit code 130."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Show required arguments by their metavars, as in ``[SOURCE] OUT``, not ``{[SOURCE] OUT}...``."""
        pieces = super().collect_usage_pieces(ctx)
        return [re.sub(r"^\{(.*)\}(\.\.\.)?$", r"\1", piece) for piece in pieces]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if _interrupt_message:
                print(f"\ninterrupted: {_interrupt_message}", file=sys.stderr)
            raise typer.Exit(130) from None


class DefaultGroup(TyperGroup):
    """Several commands, of which the first one needs no name: ``cemg-serve --run RUN``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the name of the first command where the arguments begin with an option."""
        named = bool(args) and not args[0].startswith("-")
        return super().parse_args(ctx, args if named else [next(iter(self.commands)), *args])


def command_line(**options: Any) -> typer.Typer:
    """Create the typer application of one command; ``options`` go to `typer.Typer`."""
    names = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings=names,
        rich_markup_mode=None,
        **options,
    )


def examples(*lines: str) -> str:
    """Format the examples at the end of a ``--help`` text, one per line."""
    return "\n  ".join(("\b\nExamples:", *lines))  # \b: click does not wrap these lines


def set_interrupt_message(message: str) -> None:
    """Set what Ctrl-C prints from here on: what is kept, and the command that continues; "" is nothing."""
    global _interrupt_message
    _interrupt_message = message


def _print_version(requested: bool) -> None:
    if requested:
        print(f"cemg {__version__}")
        raise typer.Exit


RunOption = Annotated[Path, typer.Option(metavar="FOLDER", help="Trained run, written by cemg-train.")]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="Device: cpu, cuda, cuda:1, …")]
NoVerifyOption = Annotated[
    bool, typer.Option("--no-verify", help="Do not check the run's files against their recorded sha256.")
]
VersionOption = Annotated[
    bool,
    typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
]


def check_device(device: str) -> None:
    """Raise UserError for an unknown device, and for a GPU that torch does not see."""
    import torch

    try:
        parsed: torch.device | None = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not a valid device", fix="--device cpu, cuda or cuda:1")
    gpus = torch.cuda.device_count() if parsed.type == "cuda" and torch.cuda.is_available() else 0
    if parsed.type == "cuda" and (parsed.index or 0) >= gpus:
        visible = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees {visible}",
            fix="cemg-doctor shows why; or use --device cpu",
        )


def check_normalize(name: str | None) -> None:
    """Raise UserError for an unknown normalization. None stands for the run's setting."""
    from cemg_kernels.constrained.softmax import Normalize

    if name not in (None, *get_args(Normalize)):
        raise UserError(f"--normalize must be one of {', '.join(get_args(Normalize))}, got {name!r}")


def check_memory(name: str | None) -> None:
    """Raise UserError for a value of --memory that does not exist."""
    if name not in (None, "off", "constant", "gate"):
        raise UserError(f"--memory must be off, constant or gate, got {name!r}")


def warn_of_normalize(config: RunConfig, name: str | None) -> None:
    """Print a warning if a model trained with loss "valid" is searched under another normalization."""
    if config.generator.loss == "valid" and name not in (None, "valid"):
        console.print(
            f"warning: this model was trained with generator.loss=valid, so --normalize {name} returns worse "
            "lists: the logits of codes that continue no item were never trained",
            soft_wrap=True,
        )


def check_result(path: Path | None, option: str = "--result") -> None:
    """Raise UserError if the path of a result file is a folder."""
    if path is not None and path.is_dir():
        file = quote(str(path / "beauty.json"))
        raise UserError(f"{option} {path} is a folder", fix=f"name a file: {option} {file}")


def _check_environment() -> None:
    try:
        from cemg_kernels import fast_kernels_enabled

        fast_kernels_enabled()
    except ValueError as error:
        raise UserError(str(error)) from None
    except ImportError as error:
        message, _, fix = str(error).partition("; ")
        if not fix.startswith("run pip install"):  # not the error of a stale native module
            raise
        raise UserError(message, fix=fix) from None


def _lacks_memory(error: Exception) -> bool:
    """Return whether an allocation failed. On the CPU, torch raises a plain RuntimeError for that."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def run(app: Callable[[], Any]) -> None:
    """Run ``app`` on ``sys.argv``.

    A UserError, an OSError or a failed allocation is printed as ``error: …``, ``cause: …`` and ``fix: …``,
    and the process exits with code 2. Of several processes, the first that fails prints its error.
    """
    set_interrupt_message(NOTHING_WRITTEN)
    follow_parent()
    for stream in (sys.stdout, sys.stderr):  # the terminal's encoding may lack a character of a title
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        _quieten()
        _run(app)


def _quieten() -> None:
    """Hide the warnings of other libraries, which a user of the commands cannot act on.

    Their errors stay. CEMG's own warnings are printed on one line each.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)  # read when transformers is imported
    for kind in (UserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind, module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    warnings.showwarning = _show_warning


def _end_quietly() -> None:
    """Exit without a message if another process of a distributed training has printed one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from cemg.distributed import first_to_fail

        if not first_to_fail():
            sys.exit(2)


def _show_warning(message: Warning | str, *location: Any, **options: Any) -> None:
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
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        lines = storage.lines() if storage is not None else [text]
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            _end_quietly()
            raise
        lines = UserError(
            "not enough memory",
            cause=str(error).split("\n")[0],
            fix="use smaller batches, fewer beams or a smaller model",
        ).lines()
    except Exception:
        _end_quietly()
        raise
    else:
        return
    _end_quietly()
    for line in (f"error: {lines[0]}", *lines[1:]):
        print(printable(line), file=sys.stderr)
    sys.exit(2)
