"""The examples in the docstrings of ``cemg_kernels`` print the results that they show."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import cemg_kernels

MODULES = sorted({getattr(cemg_kernels, name).__module__ for name in cemg_kernels.__all__})


@pytest.mark.parametrize("name", [*MODULES, "cemg_kernels.attention.logsumexp"])
def test_the_examples_in_the_docstrings_print_their_results(name: str):
    module = importlib.import_module(name)
    public = {name: getattr(cemg_kernels, name) for name in cemg_kernels.__all__}
    try:
        failures, attempts = doctest.testmod(module, extraglobs={"torch": torch, **public})
    finally:
        cemg_kernels.use_fast_kernels(None)
    assert attempts > 0 and failures == 0
