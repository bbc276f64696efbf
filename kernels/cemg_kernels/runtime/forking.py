"""A process that was forked computes on one thread: OpenMP's other threads are its parent's.

After a fork only the thread that called it goes on. OpenMP does not know that, hands work to the others and
waits for ever. Threads that the child starts itself have helpers of their own.
"""

from __future__ import annotations

import os

import torch

from .dispatch import native, native_available


def watch_forks() -> None:
    """From now on, forked children begin with one thread; a system without forks needs nothing."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    if native_available():  # whose OpenMP need not be torch's
        native().use_one_thread()
