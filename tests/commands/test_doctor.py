"""cemg-doctor reports the versions, device and backends of this machine."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from cemg.commands.doctor import app
from cemg_kernels import backends, use_fast_kernels
from cemg_kernels.runtime import dispatch


def test_json_contains_the_versions_and_the_backend_of_every_operation():
    result = CliRunner().invoke(app, ["--json", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        found["versions"]["torch"]
    )
    assert found["native"]["built"] == "yes"
    assert "native bfloat16" in found["device"]["cpu"]
    assert found["backends"] == {op: f"{c.backend}: {c.why}" for op, c in backends("cpu").items()}


def test_a_missing_native_module_is_reported_with_the_fix(monkeypatch):
    monkeypatch.delenv("CEMG_FAST_KERNELS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_native", None)
        use_fast_kernels(None)
        result = CliRunner().invoke(app, ["--device", "cpu"])
    use_fast_kernels(None)
    assert result.exit_code == 0
    assert "pip install -e ." in result.output and "not built" in result.output


def test_an_unknown_device_is_refused_with_exit_code_2():
    result = CliRunner().invoke(app, ["--device", "abacus"])
    assert result.exit_code == 2 and "try cpu or cuda" in result.output


def test_a_missing_package_is_listed_with_the_extra_that_installs_it(monkeypatch):
    dispatch.choose("trie_softmax", torch.device("cpu"))  # what is found of Triton is remembered
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["--device", "cpu"])
    assert "cemg[gpu]" in result.output and "cemg[vision]" in result.output
