"""The code blocks of README.md and docs/ run, their commands parse, and their generated parts are current."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from cemg.commands import recommend
from cemg.commands.console import DefaultGroup
from cemg.config import load_config
from cemg.decoding import Decoder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- no test[^\n]*-->\n)?```(python|bash|text)\n(.*?)```", re.DOTALL)
START, SIZE, LEVELS, ITEMS = 32_100, 256, 4, 80
ELSEWHERE = {"pip", "python3", ".", "curl", "unzip", "git", "vllm"}  # programs that are not part of CEMG
CHECKPOINT_SETTINGS = {  # a checkpoint's own settings, which the snippets must not be affected by
    "do_sample": True, "top_k": 20, "repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "num_beams": 4,
    "forced_bos_token_id": 1, "forced_eos_token_id": 1, "min_length": 9, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return [text for skip, kind, text in BLOCK.findall(page.read_text()) if kind == language and not skip]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- Python


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """The files that the snippets read: a run, a T5 checkpoint with its tokenizer, codes, an index."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(tiny_run)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(SIZE, (ITEMS, LEVELS), generator=generator)
    torch.save(codes, folder / "codes.pt")
    rows = [[f"<{'abcd'[m]}_{code}>" for m, code in enumerate(row)] for row in codes.tolist()]
    index = {str(i): row for i, row in enumerate([*rows, rows[0]])}  # the last item shares the first one's ID
    (folder / "Beauty.index.json").write_text(json.dumps(index))
    save_checkpoint(folder / "checkpoint")
    return folder


def save_checkpoint(folder: Path) -> None:
    """A T5 of one layer, width 16, whose code tokens follow 32,100 others as in T5's own vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    names = [f"word{i}" for i in range(START)]
    names += [f"<{'abcd'[m]}_{code}>" for m in range(LEVELS) for code in range(SIZE)]
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
    config = T5Config(vocab_size=len(names), eos_token_id=1, decoder_start_token_id=0, **shape)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(CHECKPOINT_SETTINGS))
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="word2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="word0").save_pretrained(folder)


@pytest.fixture
def in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
@pytest.mark.usefixtures("in_workspace")
def test_the_python_blocks_of_a_page_run(page: Path):
    for block in blocks(page, "python"):
        names: dict[str, Any] = {}
        exec(compile(block, name_of(page), "exec"), names)
        for expression, shown in re.findall(r"^print\((.*)\)  # (tensor\(.*)$", block, re.MULTILINE):
            assert str(eval(expression, names)) == shown


@pytest.mark.usefixtures("in_workspace")
def test_the_recommender_of_the_readme_prints_lines_of_the_printed_form(capsys: pytest.CaptureFixture[str]):
    page = ROOT / "README.md"
    block = next(text for text in blocks(page, "python") if "from_run" in text)
    exec(block, {})
    shown = next(text for text in blocks(page, "text") if "proven" in text).splitlines()
    *items, last = capsys.readouterr().out.splitlines()
    assert len(items) == len(shown) - 1
    assert all(re.fullmatch(r"item-\d{4} .* -\d+\.\d+", line) for line in (*items, *shown[:-1]))
    assert re.sub(r"\d", "", last) == re.sub(r"\d", "", shown[-1])


@pytest.mark.usefixtures("in_workspace")
def test_the_tables_of_the_tutorial_have_the_columns_that_are_printed_today(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert command(recommend.main, "--run", "runs/demo", "--history", "item-0012", "--top", 3) == 0
    printed = next(line for line in capsys.readouterr().out.splitlines() if "item" in line)
    tables = [text for text in blocks(ROOT / "docs" / "getting-started.md", "text") if text.startswith("┏")]
    assert tables and all(
        re.findall(r"[\w-]+", t.splitlines()[1]) == re.findall(r"[\w-]+", printed) for t in tables
    )


@pytest.mark.usefixtures("in_workspace")
def test_the_decoder_and_the_processor_of_the_checkpoint_page_return_the_same_items():
    page = ROOT / "docs" / "checkpoints.md"
    found, generated = {}, {}
    exec(next(text for text in blocks(page, "python") if "decoder.decode(" in text), found)
    exec(next(text for text in blocks(page, "python") if "plain_generation(" in text), generated)
    assert generated["items"].tolist() == found["found"].items[0].tolist()


@pytest.mark.usefixtures("in_workspace")
def test_the_decoder_that_the_checkpoint_page_saves_returns_the_same_results_after_loading():
    names: dict[str, Any] = {}
    text = blocks(ROOT / "docs" / "checkpoints.md", "python")
    exec(next(block for block in text if "save_pretrained(" in block and "index.json" in block), names)
    assert len(names["catalog"]) == ITEMS + 1
    prompt = torch.tensor([[START + 4, START + SIZE + 3, START + 2 * SIZE, START + 3 * SIZE + 9, 1]])
    found = names["decoder"].decode(prompt, torch.ones_like(prompt), 10)
    again = Decoder.from_pretrained("beauty").decode(prompt, torch.ones_like(prompt), 10)
    assert torch.equal(again.items, found.items) and torch.equal(again.scores, found.scores)


# ---- commands


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the bash blocks of a page, without comments and environment variables."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word == "&&":
                    yield from [words] if words else []
                    words = []
                elif word.startswith(">"):
                    break
                elif words or not re.fullmatch(r"[A-Z_0-9]+=.*", word):
                    words.append(word)


def checked(words: list[str]) -> None:
    """Fail where a command of a page has an option, a file or a target that does not exist."""
    program, *arguments = words
    if program.startswith("cemg-"):
        parse(program, arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "accelerate":
        module = arguments.index("-m") + 1
        assert arguments[module] == "cemg.commands.train"
        parse("cemg-train", arguments[module + 1 :])
    elif program == "opentelemetry-instrument":
        checked(arguments)
    elif program == "serve":  # of Ray Serve
        module, _, name = arguments[1].partition(":")
        source = Path(*module.split(".")).with_suffix(".py")
        assert f"def {name}(" in (ROOT / source).read_text()
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    elif program in ("python", "bash", "pytest"):
        files = [ROOT / word for word in arguments if word.endswith((".py", ".sh"))]
        assert all(file.is_file() for file in files)
        sources = "".join(file.read_text() for file in [*(ROOT / "bench").glob("*.py"), *files])
        options = [word for word in arguments if word.startswith("--") and program == "python"]
        assert all(f'"{option}"' in sources for option in options)
    else:
        assert program in ELSEWHERE


def parse(program: str, arguments: list[str]) -> None:
    """Parse the arguments as the command line itself does; resolve the names of settings."""
    command: Any = typer.main.get_command(generator().APPS[program])
    if isinstance(command, DefaultGroup) and arguments[0] not in command.commands:
        arguments = [next(iter(command.commands)), *arguments]
    if hasattr(command, "commands"):
        program, command, arguments = arguments[0], command.commands[arguments[0]], arguments[1:]
    context = command.make_context(program, list(arguments))
    config = context.params.get("config")
    settings = context.params.get("set") or []
    load_config(ROOT / config if config and (ROOT / config).exists() else None, settings)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name_of)
def test_the_commands_of_a_page_exist_with_their_options(page: Path):
    for words in commands(page):
        checked(words)


def test_extras_that_a_page_installs_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        for names in re.findall(r"pip install -e '?\.\[([a-z0-9,-]+)\]", page.read_text()):
            assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in names.split(","))


# ---- generated parts and links


def script(path: str) -> ModuleType:
    """A script of docs/ as a module."""
    name = f"docs_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / path)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str((ROOT / "docs" / path).parent))  # as for a script
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def generator() -> ModuleType:
    return script("generate.py")


def test_generated_pages_and_tables_are_current():
    stale = [name_of(page) for page, text in generator().pages().items() if page.read_text() != text]
    assert not stale, "run python docs/generate.py"


def test_the_scripts_draw_the_figures_of_the_concepts_and_of_the_pipeline(tmp_path: Path):
    for name, draw in script("figures/concepts.py").DRAWINGS.items():
        draw().savefig(tmp_path / f"{name}.png")
        assert (ROOT / "docs" / "figures" / f"{name}.png").is_file()
    script("figures/pipeline.py").draw(tmp_path / "pipeline.png")


def test_every_figure_is_shown_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"figures/{path.name})" in text for path in (ROOT / "docs" / "figures").glob("*.png"))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_top_level_pages_lead_to_files_and_headings(name: str):
    slugify = pytest.importorskip("markdown.extensions.toc").slugify
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            text = (ROOT / path).read_text() if anchor else ""
            assert (ROOT / path).exists(), target
            assert not anchor or anchor in {slugify(h, "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_site

    site = load_site(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(site)  # raises Abort after a warning
    assert (tmp_path / "site" / "index.html").is_file()
