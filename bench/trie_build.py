"""Building the trie from codes: shuffled, sorting included, and from codes that are sorted already.

    python bench/trie_build.py [--items 1000000 100000000] [--device cuda] [--json PATH] [--plot PATH]

Peers get what they need ready made: nested dicts the rows as lists, marisa-trie the codes as strings. Before
time is taken, a sample is looked up in each. "floor": the codes read and the trie written once, at the
machine's copy bandwidth. ``bytes_an_item`` holds what a trie takes, without item ids (nested dicts: of at
most 1e5 items, as tracemalloc counts them), ``peak_gib`` the most held by then, by the
process or, on a GPU, by torch.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import torch
from cells import random_codes
from harness import Report, Work, arguments, copy_bandwidth, optional, peak_mib, start
from torch import Tensor

from cemg.decoding import dict_trie
from cemg_kernels import Trie

LEVELS = 4
SAMPLE = 1000
MOST_FOR_DICT, MOST_FOR_TRACE, MOST_FOR_WORDS = 10**6, 10**5, 10**7
SHIFT = 0x100  # a code as a character, clear of the control characters


class Marisa:
    """``marisa_trie.Trie`` over the codes as characters; the strings are made before."""

    def __init__(self, codes: Tensor) -> None:
        self.words = ["".join(chr(SHIFT + code) for code in row) for row in codes.tolist()]

    def build(self) -> Any:
        import marisa_trie

        return marisa_trie.Trie(self.words)

    def holds(self, trie: Any) -> bool:
        return len(trie) == len(self.words) and all(word in trie for word in self.words[:SAMPLE])


def in_dicts(root: Any, codes: Tensor) -> bool:
    """Whether the nested dicts hold a sample of the rows."""
    for row in codes[:SAMPLE].tolist():
        node = root
        for code in row:
            if code not in node:
                return False
            node = node[code]
    return True


def dict_bytes(codes: Tensor) -> float:
    """Bytes an item of nested dicts, of at most ``MOST_FOR_TRACE`` items."""
    rows = codes[:MOST_FOR_TRACE]
    tracemalloc.start()
    kept = dict_trie(rows)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert in_dicts(kept, rows)
    return current / len(rows)


def build(report: Report, items: int, size: int, bandwidth: float) -> None:
    """Both cases of one catalog."""
    codes = random_codes(items, LEVELS, size)
    trie = Trie.from_codes(codes, size)
    assert torch.equal(trie.items(trie.lookup(codes[:SAMPLE])), torch.arange(min(items, SAMPLE)))
    by_item: dict[str, float] = {"cemg": trie.nbytes / items, "nested dicts": dict_bytes(codes)}
    peers: dict[str, Work | str] = {
        "nested dicts": f"more than {MOST_FOR_DICT:.0e} items" if items > MOST_FOR_DICT else "",
        "marisa-trie": optional(["marisa-trie"]) if items <= MOST_FOR_WORDS else "its words do not fit",
    }
    if not peers["nested dicts"]:
        assert in_dicts(dict_trie(codes), codes)
        peers["nested dicts"] = lambda: dict_trie(codes)
    if not peers["marisa-trie"]:
        marisa = Marisa(codes)
        built = marisa.build()
        assert marisa.holds(built)
        by_item["marisa-trie"] = len(built.tobytes()) / items
        peers["marisa-trie"] = marisa.build
    moved = codes.nbytes + trie.nbytes + trie.arrays.rows.nbytes
    ordered = codes[trie.rows.long()]
    for name, rows, against in (("sorting included", codes, peers), ("sorted codes", ordered, {})):
        there = rows.to(report.device)
        backend = "native" if report.device.type == "cpu" else "torch"
        ours: dict[str, Work] = {backend: lambda: Trie.from_codes(there, size, device=report.device)}  # noqa: B023
        report.case(f"N {items:.0e} K {size}, {name}", ours, against, f"{SAMPLE} rows looked up",
                    moved / bandwidth * 1e3, nbytes=moved, bytes_an_item=by_item,
                    peak_gib=peak_mib() / 2**10)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=9, seconds=12.0)
    parser.add_argument("--items", type=int, nargs="+", default=[10**6, 10**7])
    parser.add_argument("--codes", type=int, nargs="+", default=[256], help="codes a level, K")
    options = parser.parse_args()
    device = start(options)
    report = Report("trie_build", options, device)
    bandwidth = copy_bandwidth(device)
    for size in options.codes:
        for items in options.items:
            build(report, items, size, bandwidth)
    report.finish()


if __name__ == "__main__":
    main()
