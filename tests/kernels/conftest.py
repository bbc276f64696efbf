"""The backends that the tests of the kernels compare."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cemg_kernels import use_fast_kernels


@pytest.fixture(params=[True, False], ids=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test on the C++ trie, then on the reference in PyTorch."""
    use_fast_kernels(request.param)
    yield
    use_fast_kernels(None)
