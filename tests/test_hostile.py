"""Hostile input: text that is not markup, files that never end, archives and images that grow."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from cemg.commands import console, recommend
from cemg.errors import UserError
from cemg.progress import plain_console, printable

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")
TITLE = "[/b] :smile: [red]\x1b[2J\x1b]0;owned\x07\nsecond line\ud800\u202e"


def test_a_title_is_printed_as_text_on_one_line():
    shown = printable(TITLE)
    assert shown == r"[/b] :smile: [red]\x1b[2J\x1b]0;owned\x07\nsecond line\ud800\u202e"
    assert printable("Café – 100 % コーヒー") == "Café – 100 % コーヒー"


def test_a_console_does_not_read_markup_or_emoji():
    out = io.StringIO()
    terminal = plain_console()
    terminal.file = out
    terminal.print("[/b] [red]a[/red] :smile:")
    assert out.getvalue() == "[/b] [red]a[/red] :smile:\n"


def test_recommendations_with_hostile_titles_are_a_table(tiny_run, tmp_path, command, capsys, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    titles = {f"item-{row:04d}": "[/b]\x1b[31mTitle\nof two lines" for row in range(60)}
    (run / "catalog" / "added_titles.json").write_text(json.dumps(titles))
    monkeypatch.setenv("COLUMNS", "160")
    assert command(recommend.main, "--run", run, "--user", "user-0001", "--top", 3) == 0
    printed = capsys.readouterr().out
    assert printed.count(r"[/b]\x1b[31mTitle\nof two lines") == 3
    assert "\x1b[31m" not in printed


def test_an_error_with_escape_sequences_is_printed_as_text(monkeypatch, capsys):
    def fail() -> None:
        raise UserError("user '\x1b[31mred' is unknown", cause="[/b]")

    with pytest.raises(SystemExit):
        console.run(fail)
    assert capsys.readouterr().err == "error: user '\\x1b[31mred' is unknown\n  cause: [/b]\n"


def test_a_letter_that_the_terminal_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.run(lambda: print("Café"))
    sys.stdout.flush()
    assert raw.getvalue() == b"Caf\\xe9\n"
