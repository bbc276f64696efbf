"""A fixture that several tests of live tries share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cemg_kernels.trie import live


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Blocks rebuilds of a live trie, between reading the catalog and publishing, until it is set."""
    gate, build = threading.Event(), live._merged

    def merged(*arguments: object) -> object:
        assert gate.wait(60)
        return build(*arguments)

    monkeypatch.setattr(live, "_merged", merged)
    yield gate
    gate.set()
