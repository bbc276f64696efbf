"""``python -m cemg.evaluation results/a.json results/b.json`` prints a table of result files.

``python -m cemg.evaluation --difference results/a.json results/b.json`` prints the paired differences between
two models, over the users of both.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cemg.errors import UserError
from cemg.evaluation.tables import difference_markdown, result_markdown

DIFFERENCE = "--difference"


def main(arguments: list[str]) -> str:
    """Return the table that the arguments of the command select."""
    paths = [Path(name) for name in arguments if name != DIFFERENCE]
    if DIFFERENCE not in arguments:
        return result_markdown(paths)
    if len(paths) != 2:
        raise UserError(
            f"{DIFFERENCE} compares two result files, got {len(paths)}",
            fix=f"python -m cemg.evaluation {DIFFERENCE} results/a.json results/b.json",
        )
    return difference_markdown(*paths)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]), end="")
    except UserError as error:
        sys.exit(str(error))
