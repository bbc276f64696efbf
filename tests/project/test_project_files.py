"""The files that hosts and tools read: workflows, issue forms, citation, pre-commit hooks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from cemg.errors import UserError
from cemg.evaluation import read_result
from cemg.experiments import Store

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = ("bug", "performance", "question")


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_has_a_time_limit_and_pinned_actions(path: Path):
    workflow = load(path)
    assert workflow[True] and workflow["permissions"] == {"contents": "read"}  # YAML 1.1 reads "on" as true
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


def test_every_make_target_of_a_workflow_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {target for path in WORKFLOWS for target in re.findall(r"run: make (\S+)", path.read_text())}
    assert {"lint", "test", "docs", "bench"} <= called <= targets


def test_the_tests_run_on_the_oldest_python_that_is_supported():
    versions = load(ROOT / ".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("name", FORMS)
def test_every_issue_form_requests_the_output_of_cemg_doctor(name: str):
    body = load(ROOT / f".github/ISSUE_TEMPLATE/{name}.yml")["body"]
    fields = {field["id"]: field for field in body if "id" in field}
    assert "cemg-doctor" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"].get("validations", {}).get("required", False) == (name != "question")
    assert "cemg-doctor" in PROJECT["scripts"]


def test_the_citation_has_the_version_and_license_of_the_package():
    citation = load(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2512.21543"


def test_pre_commit_hooks_use_tools_that_make_venv_installs():
    installed = {re.split(r"[<>=\[]", name)[0] for name in PROJECT["optional-dependencies"]["dev"]}
    packages = {"end-of-file-fixer": "pre-commit-hooks", "trailing-whitespace-fixer": "pre-commit-hooks"}
    for repository in load(ROOT / ".pre-commit-config.yaml")["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
            assert packages.get(tool, tool) in installed


def test_the_results_that_the_docs_show_are_as_they_were_written():
    signed = [
        path for path in (ROOT / "results").glob("**/*.json") if '"sha256": "' in path.read_text()[-200:]
    ]
    changed = []
    for path in signed:
        try:
            read_result(path)
        except UserError as error:
            changed.append(f"{path}: {error.cause}")
    assert len(signed) > 100 and not changed
    for folder in (ROOT / "results/experiments").iterdir():
        store = Store(folder)
        assert not [task.name for task in store.tasks() if store.damaged(task)]
