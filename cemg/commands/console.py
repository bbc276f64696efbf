"""Running a command: the user's mistakes end in a few lines on stderr and exit code 2, not in a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_args

import torch

from cemg.errors import UserError
from cemg.progress import printable
from cemg_kernels import fast_kernels_enabled
from cemg_kernels.trie_softmax import Normalize


def check_device(device: str) -> None:
    """UserError for what is no device, and for a GPU that torch does not see."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is no device", fix="--device cpu, cuda or cuda:1") from None
    gpus = torch.cuda.device_count() if found.type == "cuda" and torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= gpus:
        sees = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees {sees}",
            fix="cemg-doctor tells why; or --device cpu",
        )


def check_normalize(name: str | None) -> None:
    """UserError for what is no normalisation; None is the run's own."""
    if name not in (None, *get_args(Normalize)):
        raise UserError(f"--normalize must be {', '.join(get_args(Normalize))}, got {name!r}")


def check_result(path: Path | None, option: str = "--result") -> None:
    """UserError where a result file is to be written over a folder."""
    if path is not None and path.is_dir():
        raise UserError(f"{option} {path} is a folder", fix=f"name a file: {option} {path / 'beauty.json'}")


def _check_environment() -> None:
    try:
        fast_kernels_enabled()
    except ValueError as error:
        raise UserError(str(error)) from None


def run(app: Callable[[], Any]) -> None:
    """Run ``app`` on ``sys.argv``; a UserError, or what the system refuses, is printed as ``error: …``, cause
    and fix; exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack a letter of a title
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_environment()
        app()
    except UserError as error:
        lines = error.lines()
    except OSError as error:
        lines = [f"{error.filename}: {error.strerror}" if error.filename else str(error)]
    else:
        return
    for line in (f"error: {lines[0]}", *lines[1:]):
        print(printable(line), file=sys.stderr)
    sys.exit(2)
