"""``python -m cemg.evaluation results/a.json results/b.json`` prints a table of result files."""

from __future__ import annotations

import sys
from pathlib import Path

from cemg.errors import UserError
from cemg.evaluation.results import result_markdown

if __name__ == "__main__":
    try:
        print(result_markdown([Path(name) for name in sys.argv[1:]]), end="")
    except UserError as error:
        sys.exit(str(error))
