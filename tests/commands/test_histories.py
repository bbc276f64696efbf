"""``cemg-recommend --histories`` writes one line per input line, whatever the lines contain."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest

from cemg.commands import recommend
from cemg.commands.histories import in_batches, parse_history, read_requests
from cemg.commands.items import read_ids
from cemg.errors import UserError

KNOWN = {"12", "7", "a b", "x, y", "é"}
LINES: dict[str, tuple[bytes, list[str], list[str], str | None]] = {  # served, unknown, error
    "a list": (b'["12", "7"]', ["12", "7"], [], None),
    "integers": (b"[12, 7]", ["12", "7"], [], None),
    "whole floats": (b"[12.0, 7.0]", ["12", "7"], [], None),
    "blanks and commas in ids": (b'["a b", "x, y"]', ["a b", "x, y"], [], None),
    "letters beyond ASCII": ('["é"]'.encode(), ["é"], [], None),
    "blanks around": (b'  ["12"] \t', ["12"], [], None),
    "a Windows line end": (b'["12"]\r', ["12"], [], None),
    "an object": (b'{"history": ["12"]}', ["12"], [], None),
    "an object with a user": (b'{"user": "u1", "history": ["12"]}', ["12"], [], None),
    "a user": (b'{"user": "u1"}', ["7"], [], None),
    "a user that is a number": (b'{"user": 5}', ["12"], [], None),
    "other keys": (b'{"id": 3, "history": ["12"]}', ["12"], [], None),
    "an unknown item": (b'["12", "13"]', ["12"], ["13"], None),
    "only unknown items": (b'["13", "14"]', [], ["13", "14"], "no item of the history is in the catalog"),
    "a blank line": (b"", [], [], "the history is empty"),
    "an empty list": (b"[]", [], [], "the history is empty"),
    "an empty object": (b"{}", [], [], "expected a list of item ids, or an object"),
    "an unknown user": (b'{"user": "nobody"}', [], [], "user 'nobody' is not in the data of this run"),
    "a user without items": (b'{"user": "cold"}', [], [], "the history is empty"),
    "not JSON": (b"item-2", [], [], "not a valid line of UTF-8 JSON"),
    "half a list": (b'["12"', [], [], "not a valid line of UTF-8 JSON"),
    "two lists": (b'["12"] ["7"]', [], [], "not a valid line of UTF-8 JSON"),
    "a number": (b"12", [], [], "expected a list of item ids, or an object"),
    "a list of lists": (b'[["12"]]', [], [], "is not a valid id"),
    "nothing for an item": (b'["12", null]', [], [], "'None' is not a valid id"),
    "true for an item": (b"[true]", [], [], "'True' is not a valid id"),
    "a text for a history": (b'{"history": "12"}', [], [], "expected a list of item ids, got str"),
    "bytes that are not text": (b'["\xff"]', [], [], "not a valid line of UTF-8 JSON"),
    "nested deeply": (b"[" * 100_000, [], [], "not a valid line of UTF-8 JSON"),
    "an integer of 5,000 digits": (b"[" + b"1" * 5000 + b"]", [], [], "not a valid line of UTF-8 JSON"),
}


def history_of(user: str) -> list[str] | None:
    return {"u1": ["7"], "5": ["12"], "cold": []}.get(user)


@pytest.mark.parametrize("name", LINES)
def test_an_invalid_line_gets_an_error_and_the_other_lines_are_served(name, tmp_path):
    line, served, unknown, error = LINES[name]
    (tmp_path / "h.jsonl").write_bytes(b'["12"]\n' + line + b'\n["7"]\n')
    before, found, after = read_requests(tmp_path / "h.jsonl", KNOWN, history_of)
    assert (before.history, after.history, after.line) == (["12"], ["7"], 3)
    assert (found.history, found.unknown, found.line) == (served, unknown, 2)
    assert (found.error is None) == (error is None) and (error or "") in (found.error or "")


def test_lines_are_served_in_batches_and_invalid_lines_are_left_out_of_them(tmp_path):
    lines = [line for line, *_ in LINES.values()]
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines * 3)))
    batches = list(in_batches(read_requests(tmp_path / "h.jsonl.gz", KNOWN, history_of), 4))
    assert [r.line for batch in batches for r in batch] == list(range(1, 3 * len(lines) + 1))
    assert max(sum(r.error is None for r in batch) for batch in batches) == 4
    assert max(map(len, batches)) <= 8


def test_a_byte_order_mark_and_a_missing_final_newline_are_accepted(tmp_path):
    (tmp_path / "h.jsonl").write_bytes(b'\xef\xbb\xbf["12"]\n["7"]')
    assert [r.history for r in read_requests(tmp_path / "h.jsonl", KNOWN, history_of)] == [["12"], ["7"]]


def test_a_truncated_file_is_refused_with_the_line_number(tmp_path):
    whole = gzip.compress(b'["12"]\n' * 50_000, mtime=0)
    (tmp_path / "h.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"h\.jsonl\.gz, line \d+: the file cannot be read"):
        list(read_requests(tmp_path / "h.jsonl.gz", KNOWN, history_of))


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("12 7", ["12", "7"]), ("12,7", ["12", "7"]), ('["a b", "x, y"]', ["a b", "x, y"]), (" [12]", ["12"]),
        ("", []), (" ", []), ("[]", []),
    ],
)  # fmt: skip
def test_a_history_on_the_command_line_can_be_ids_or_a_json_list(text, items):
    assert parse_history(text) == items


@pytest.mark.parametrize("text", [" , ", "[1,", "[null]", "[" * 100_000])
def test_a_history_without_ids_is_refused(text):
    with pytest.raises(UserError, match="--history"):
        parse_history(text)


def test_every_line_gets_an_answer_and_the_exit_code_reports_failures(tiny_run, tmp_path, command, capsys):
    lines = ['["item-0001", "item-0002"]', "", '["item-0003", "gone"]', '{"user": "nobody"}', '["gone"]']
    (tmp_path / "h.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ("--run", tiny_run, "--top", 3, "--beams", 10)
    assert command(recommend.main, *arguments, "--histories", tmp_path / "h.jsonl") == 3
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert [len(answer["items"]) for answer in answers] == [3, 0, 3, 0, 0]
    assert answers[0].keys() == {"history", "certified", "ranked_by", "items"}
    assert answers[1] == {"line": 2, "error": "the history is empty", "items": []}
    assert (answers[2]["history"], answers[2]["unknown"]) == (["item-0003"], ["gone"])
    assert (answers[3]["user"], answers[3]["line"]) == ("nobody", 4)
    assert answers[4]["unknown"] == ["gone"]
    assert printed.err.splitlines()[-1] == '3 of 5 lines could not be served; see their "error"'


def test_stdin_is_served_line_by_line(tiny_run, command, capsys, monkeypatch, tmp_path):
    (tmp_path / "h.jsonl").write_text('["item-0001"]\n{"user": "0", "history": ["item-0002"]}\n')
    with (tmp_path / "h.jsonl").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        arguments = ("--run", tiny_run, "--top", 2, "--beams", 5, "--histories", "-")
        assert command(recommend.main, *arguments) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["history"] for answer in answers] == [["item-0001"], ["item-0002"]]
    assert answers[1]["user"] == "0"


def test_a_caller_that_waits_for_each_answer_before_writing_the_next_line_gets_it(monkeypatch):
    ours, theirs = os.pipe()
    with open(ours) as stdin, open(theirs, "wb", buffering=0) as caller:
        monkeypatch.setattr(sys, "stdin", stdin)
        batches = in_batches(read_requests(Path("-"), KNOWN, history_of), 64)
        caller.write(b'["12"]\n')
        assert [request.history for request in next(batches)] == [["12"]]
        caller.write(b'["7"]\n\n["12"]\n["12", ')  # the last line is not whole yet
        assert [request.line for request in next(batches)] == [2, 3, 4]
        caller.write(b'"7"]')
        caller.close()
        assert [(request.line, request.history) for request in next(batches)] == [(5, ["12", "7"])]
        assert next(batches, None) is None


def test_a_closed_stdin_is_refused(tiny_run, command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert command(recommend.main, "--run", tiny_run, "--histories", "-") == 2
    assert "--histories - reads stdin, which is closed" in capsys.readouterr().err


@pytest.mark.parametrize("separator", [",", " "])
def test_a_word_of_many_ids_is_not_taken_for_a_file_name(separator):
    ids = [f"item-{number:04}" for number in range(1000)]
    assert read_ids(separator.join(ids), option="--only") == ids


def test_a_file_of_histories_that_does_not_exist_is_refused_and_an_empty_one_has_no_answers(
    tiny_run, tmp_path, command, capsys
):
    assert command(recommend.main, "--run", tiny_run, "--histories", tmp_path / "none") == 2
    assert f"{tmp_path / 'none'} does not exist" in capsys.readouterr().err
    (tmp_path / "h.jsonl").touch()
    assert command(recommend.main, "--run", tiny_run, "--histories", tmp_path / "h.jsonl") == 0
    assert capsys.readouterr().out == ""


def test_ids_with_spaces_can_be_given_as_a_json_list(tiny_run, command, capsys):
    plain = ("--run", tiny_run, "--top", 2, "--beams", 5, "--json", "--history")
    found = []
    for history in ("item-0001 item-0002", '["item-0001", "item-0002"]'):
        assert command(recommend.main, *plain, history) == 0
        found.append(json.load(io.StringIO(capsys.readouterr().out)))
    assert found[0] == found[1]
