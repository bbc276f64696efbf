"""Limits forked processes to one OpenMP thread, so that they do not deadlock.

After a fork, only the calling thread exists in the child. OpenMP still assigns work to the threads of the
parent and waits for them forever. Threads that the child starts itself get their own OpenMP threads.
"""

from __future__ import annotations

import os

import torch

from .dispatch import native, native_available


def watch_forks() -> None:
    """Makes all children forked from now on start with one thread. Does nothing on systems without fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    if native_available():  # may use another OpenMP library than torch
        native().use_one_thread()
