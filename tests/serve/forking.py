"""Starts ``cemg-serve`` many times with one import of its modules, for tests.

Each line of stdin is JSON: the file for its output, Python code, and the arguments of the command. The answer
is the process id. The exit code is written beside the output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import cemg.serve.app
import cemg.serve.server  # noqa: F401


def run(log: str, code: str, arguments: list[str]) -> None:
    """Become a server, and end the process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.argv, status = ["cemg-serve", *arguments], 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f"{log}.exit").write_text(str(status))
    os._exit(status)


signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(*json.loads(line))
    print(child, flush=True)
