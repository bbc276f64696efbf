"""Power cuts and failing disks: a simulated disk keeps what was flushed, and any part of what was not."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from cemg.serve.rows import Event
from cemg.serve.store import Store

CUTS = int(os.environ.get("CEMG_TEST_CUTS", "100"))
COMPILER = shutil.which("gcc") or shutil.which("cc")
SECTOR = 512
CALLS = "120"  # of one writer
pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library of disk.c."""
    path = tmp_path_factory.mktemp("disk") / "disk.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    source = Path(__file__).with_name("disk.c")
    subprocess.run([COMPILER, *flags, "-o", path, source, "-ldl"], check=True)
    return path


def write(
    library: Path, folder: Path, *, synchronous: str = "FULL", calls: int = 120, fail: str = ""
) -> Path:
    """Run disk_writer.py. Returns the record of what it wrote."""
    folder.mkdir()
    log = folder.with_suffix(".log")
    disk = {"LD_PRELOAD": str(library), "CEMG_DISK_FOLDER": f"{folder}/", "CEMG_DISK_LOG": str(log)}
    command = [sys.executable, Path(__file__).with_name("disk_writer.py"), folder, synchronous, CALLS]
    fails = {"CEMG_DISK_FAIL": fail} if fail else {}
    subprocess.run(command, check=True, timeout=120, env=os.environ | disk | fails)
    return log


def records(log: Path) -> list[tuple[str, str, int, bytes]]:
    """Kind, name of the file, offset and data of each operation."""
    content, at, found = log.read_bytes(), 0, []
    while at < len(content):
        kind, path_size, offset, size = struct.unpack_from("4q", content, at)
        path_at = at + 32
        at = path_at + path_size + (size if kind == ord("w") else 0)
        found.append((chr(kind), Path(content[path_at : path_at + path_size].decode()).name, offset,
                      content[path_at + path_size : at]))  # fmt: skip
    return found


def cut(operations: list[tuple[str, str, int, bytes]], folder: Path, rng: random.Random) -> None:
    """Write the files as a power cut after ``operations`` leaves them.

    All that was written before the last flush of a file is there. Of each later write, all is there, or
    nothing, or some of its sectors.
    """
    last = {name: index for index, (kind, name, _, _) in enumerate(operations) if kind == "s"}
    files: dict[str, bytearray] = defaultdict(bytearray)
    for index, (kind, name, offset, data) in enumerate(operations):
        if kind == "u":
            files.pop(name, None)
            continue
        content, flushed = files[name], index <= last.get(name, -1) or name == "notes"
        fate = "all" if flushed else rng.choice(["all", "all", "none", "part"])
        if kind == "s" or fate == "none":
            continue
        if kind == "t":
            del content[offset:]
            continue
        content.extend(bytes(max(offset + len(data) - len(content), 0)))
        for start in range(0, len(data), SECTOR):
            if fate == "all" or rng.random() < 0.5:
                sector = data[start : start + SECTOR]
                content[offset + start : offset + start + len(sector)] = sector
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def lost(folder: Path) -> list[str]:
    """What was noted as acknowledged and is not in the store. Fails if the store is not consistent."""
    with Store.open(folder / "store.sqlite") as store:
        stored = [event.event_id for event in store.events_after(0)]
        assert store.count_events() == len(stored) == len(set(stored))
        assert [change.version for change in store.changes_after(0)] == list(range(1, store.version + 1))
        batches = defaultdict(int)
        for name in stored:
            batches[name.split("-")[0]] += 1
        assert set(batches.values()) <= {1, 9}, "a batch was stored in part"
        missing = []
        for kind, *words in map(str.split, (folder / "notes").read_text().splitlines()):
            if kind == "events":
                missing += sorted(set(words) - set(stored))
            elif kind == "item" and int(words[0]) > store.version:
                missing.append(f"version {words[0]}")
        assert store.append_events([Event("new", "ann", "item")]) == [True]
    return missing


def losses(library: Path, folder: Path, synchronous: str, cuts: int) -> int:
    """After how many of the power cuts something acknowledged was lost."""
    rng = random.Random(3)
    operations = records(write(library, folder / "written", synchronous=synchronous))
    begin = next(index for index, operation in enumerate(operations) if operation[1] == "notes")
    assert sum(kind == "s" and name == "store.sqlite" for kind, name, _, _ in operations[begin:]) > 5
    count = 0
    for number in range(cuts):
        place = folder / f"cut-{number}"
        cut(operations[: rng.randrange(begin, len(operations))], place, rng)
        count += bool(lost(place))
        shutil.rmtree(place)
    return count


def test_nothing_acknowledged_is_lost_in_a_power_cut(library, tmp_path):
    """CEMG_TEST_CUTS is the number of cuts."""
    assert losses(library, tmp_path, "FULL", CUTS) == 0


def test_the_simulation_finds_losses_without_a_flush_per_commit(library, tmp_path):
    assert losses(library, tmp_path, "NORMAL", 30) > 0


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("seed", range(4))
def test_failing_writes_and_flushes_lose_nothing_and_store_nothing_refused(library, tmp_path, code, seed):
    folder = tmp_path / "written"
    write(library, folder, fail=f"{int(code)} 25 {seed}")
    lines = [line.split() for line in (folder / "notes").read_text().splitlines()]
    refused = [line[1:] for line in lines if line[0] == "refused" and line[1:]]
    assert 10 < len(refused) < len(lines) - 10
    assert lost(folder) == []
    with Store.open(folder / "store.sqlite") as store:
        stored = {event.event_id for event in store.events_after(0, 10**6)}
    while lines.pop()[0] == "refused":  # the flush may have failed after the disk had the rows
        refused.pop()
    assert not stored & {name for names in refused for name in names}
