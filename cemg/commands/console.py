"""Running a command: the user's mistakes end in a few lines on stderr and exit code 2, not in a traceback."""

from __future__ import annotations

import sys

import torch
import typer

from cemg.errors import UserError


def check_device(device: str) -> None:
    """UserError for a GPU where torch sees none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees no GPU",
            fix="cemg-doctor tells why; or --device cpu",
        )


def run(app: typer.Typer) -> None:
    """Run ``app`` on ``sys.argv``; a UserError is printed as ``error: …``, cause and fix; exit code 2."""
    try:
        app()
    except UserError as error:
        print("error:", *error.lines()[:1], file=sys.stderr)
        for line in error.lines()[1:]:
            print(line, file=sys.stderr)
        sys.exit(2)
