"""Building the trie from codes, shuffled (sorting included) and sorted already, and asking it.

    python bench/trie_build.py [--items 1000000 100000000] [--device cuda] [--json PATH] [--plot PATH]

Peers get what they need ready made: nested dicts and flashrec the rows as lists, marisa-trie the codes as
strings, xgrammar the text of its rules. Before
time is taken, a sample is looked up in each, and every answer compared. "floor": the codes read and the trie
written once, of a question what goes in and out, at the machine's copy bandwidth. ``bytes_an_item`` holds
what a trie takes, without item ids (nested dicts: of at most 1e5 items, as tracemalloc counts them),
``peak_gib`` the most held by then, by the process or, on a GPU, by torch.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from cells import random_codes
from harness import NOT_ASKED, Report, Work, arguments, built, copy_bandwidth, optional, peak_mib, start
from torch import Tensor
from trie_step import MOST_FOR_GRAMMAR, grammar_of

from cemg.decoding import dict_trie
from cemg_kernels import Trie
from cemg_kernels.runtime import dispatch

LEVELS = 4
ITEMS, SIZES = (10**4, 10**6, 10**7), (256,)  # N and K of the cases
SAMPLE = 1000
QUESTIONS = ("lookup", "advance", "mask", "children")
ASKED = 400  # prefixes or nodes a call: eight users of 50 beams
MOST_FOR_DICT, MOST_FOR_TRACE, MOST_FOR_WORDS = 10**6, 10**5, 10**7
SHIFT = 0x100  # a code as a character, clear of the control characters


class Marisa:
    """``marisa_trie.Trie`` over the codes as characters; the strings are made before."""

    def __init__(self, codes: Tensor) -> None:
        self.words = words_of(codes)

    def build(self) -> Any:
        import marisa_trie

        return marisa_trie.Trie(self.words)

    def holds(self, trie: Any) -> bool:
        return len(trie) == len(self.words) and all(word in trie for word in self.words[:SAMPLE])


class Flashrec:
    """flashrec's trie: prefixes in Python's dicts, and the tables its search reads."""

    def __init__(self, codes: Tensor, size: int) -> None:
        self.rows, self.size = codes.tolist(), size

    def build(self) -> Any:
        from flashrec.search.trie import build_trie_from_sequences

        trie = build_trie_from_sequences(self.rows)
        trie.finalize_index(token_base=0, vocab_size=self.size)
        trie._ensure_gpu_cache(torch.device("cpu"))
        return trie

    def holds(self, trie: Any) -> bool:
        return all(
            row[level] in trie.children[tuple(row[:level])]
            for row in self.rows[:SAMPLE]
            for level in range(LEVELS)
        )


class Grammar:
    """xgrammar's grammar with a rule a prefix; the text of the rules is made before."""

    def __init__(self, codes: Tensor, size: int) -> None:
        self.rows, self.build = codes.tolist(), grammar_of(codes, size)

    def holds(self, compiled: Any) -> bool:
        import xgrammar

        def takes(row: list[int]) -> bool:
            matcher = xgrammar.GrammarMatcher(compiled)
            return all(matcher.accept_token(code) for code in row)

        return all(takes(row) for row in self.rows[:SAMPLE])


def builder_of(kind: Callable[..., Any], package: str, codes: Tensor, size: int, most: int) -> Work | str:
    """A peer's way to build, which was looked into; or why there is none."""
    missing = optional([package])
    if missing or len(codes) > most:
        return missing or f"{NOT_ASKED}above {most:.0e} items"

    def checked() -> Work | str:
        peer = kind(codes, size)
        work: Work = peer.build
        return work if peer.holds(peer.build()) else "failed: it does not hold the items"

    found: Work | str = built(checked)
    return found


def words_of(codes: Tensor) -> list[str]:
    return ["".join(chr(SHIFT + code) for code in row) for row in codes.tolist()]


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
    """Both cases of one catalog, then its questions."""
    codes = random_codes(items, LEVELS, size)
    trie = Trie.from_codes(codes, size)
    assert torch.equal(trie.items(trie.lookup(codes[:SAMPLE])), torch.arange(min(items, SAMPLE)))
    by_item: dict[str, float] = {"cemg": trie.nbytes / items, "nested dicts": dict_bytes(codes)}
    would_take = f"they would take about {by_item['nested dicts'] * items / 2**30:.1f} GiB"
    dicts: Any = f"{NOT_ASKED}above {MOST_FOR_DICT:.0e} items; {would_take}"
    words: Any = f"{NOT_ASKED}above {MOST_FOR_WORDS:.0e} items; its words do not fit"
    peers: dict[str, Work | str] = {"nested dicts": dicts, "marisa-trie": words}
    if items <= MOST_FOR_DICT:
        dicts = dict_trie(codes)
        assert in_dicts(dicts, codes)
        peers["nested dicts"] = lambda: dict_trie(codes)
    if items <= MOST_FOR_WORDS:
        words = peers["marisa-trie"] = optional(["marisa-trie"])
    if not words:
        marisa = Marisa(codes)
        words = marisa.build()
        assert marisa.holds(words)
        by_item["marisa-trie"] = len(words.tobytes()) / items
        peers["marisa-trie"] = marisa.build
    peers["flashrec"] = builder_of(Flashrec, "flashrec", codes, size, MOST_FOR_DICT)
    peers["xgrammar"] = builder_of(Grammar, "xgrammar", codes, size, MOST_FOR_GRAMMAR)
    moved = codes.nbytes + trie.nbytes + trie.arrays.rows.nbytes
    ordered = codes[trie.rows.long()]
    for name, rows, against in (("sorting included", codes, peers), ("sorted codes", ordered, {})):
        there = rows.to(report.device)
        backend = dispatch.choose("trie_build", report.device).backend
        made = Trie.from_codes(there, size, device=report.device)
        for part in ("code", "first_child"):
            assert torch.equal(getattr(made.arrays, part).cpu(), getattr(trie.arrays, part)), part
        assert torch.equal(made.items(made.lookup(there[:SAMPLE])).cpu(), torch.arange(min(items, SAMPLE)))
        ours: dict[str, Work] = {backend: lambda: Trie.from_codes(there, size, device=report.device)}  # noqa: B023
        report.case(f"N {items:.0e} K {size}, {name}", ours, against, f"{SAMPLE} rows looked up, arrays",
                    moved / bandwidth * 1e3, nbytes=moved, bytes_an_item=by_item,
                    peak_gib=peak_mib() / 2**10)  # fmt: skip
    ask(report, Questions(codes, trie.to(report.device)), f"N {items:.0e} K {size}", dicts, words, bandwidth)


class Questions:
    """What is asked of a trie, in one call: half of the prefixes are items, of the rest hardly any."""

    def __init__(self, codes: Tensor, trie: Trie) -> None:
        generator = torch.Generator().manual_seed(2)
        chosen = torch.randint(len(codes), (ASKED,), generator=generator)
        drawn = torch.randint(trie.codebook_size, (ASKED, LEVELS), generator=generator, dtype=codes.dtype)
        self.prefixes = torch.where(torch.arange(ASKED)[:, None] % 2 == 0, codes[chosen], drawn)  # [B, L]
        self.trie, self.there = trie, self.prefixes.to(trie.device)
        self.firsts = codes[chosen, :1]  # of nodes of the first level, one a beam
        self.nodes, self.next = trie.lookup(self.firsts.to(trie.device)), self.there[:, 1]

    def ours(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "lookup": lambda: self.trie.lookup(self.there),
            "advance": lambda: self.trie.advance(self.nodes, self.next),
            "mask": lambda: self.trie.mask(self.nodes),
            "children": lambda: self.trie.children(self.nodes)[0],
        }

    def reference(self, name: str) -> Tensor:
        """The answer of plain PyTorch."""
        dispatch.use_fast_kernels(False)
        try:
            return self.ours()[name]()
        finally:
            dispatch.use_fast_kernels(None)

    def of_dicts(self, root: Any) -> dict[str, Callable[[], Any]]:
        """Nested dicts, whose nodes are the inner dicts."""
        rows, nexts = self.prefixes.tolist(), self.prefixes[:, 1].tolist()
        nodes = [root[code] for code in self.firsts[:, 0].tolist()]

        def walk(row: list[int]) -> bool:
            node = root
            for code in row:
                node = node.get(code)
                if node is None:
                    return False
            return True

        return {
            "lookup": lambda: [walk(row) for row in rows],
            "advance": lambda: [node.get(code) is not None for node, code in zip(nodes, nexts, strict=True)],
            "mask": lambda: self.as_mask(nodes),
            "children": lambda: [sorted(node) for node in nodes],
        }

    def of_words(self, trie: Any) -> dict[str, Callable[[], Any]]:
        """marisa-trie, which has no nodes: their prefixes stand for them."""
        words = words_of(self.prefixes)
        nodes = words_of(self.firsts)
        grown = words_of(torch.cat((self.firsts, self.prefixes[:, 1:2]), 1))

        def below(node: str) -> set[int]:
            return {ord(word[1]) - SHIFT for word in trie.iterkeys(node)}

        return {
            "lookup": lambda: [word in trie for word in words],
            "advance": lambda: [next(trie.iterkeys(word), None) is not None for word in grown],
            "mask": lambda: self.as_mask([below(node) for node in nodes]),
            "children": lambda: [sorted(below(node)) for node in nodes],
        }

    def as_mask(self, codes: Sequence[Collection[int]]) -> Tensor:
        """bool [B, K] of the codes of each row."""
        mask = torch.zeros(len(codes), self.trie.codebook_size, dtype=torch.bool)
        for row, own in enumerate(codes):
            mask[row, list(own)] = True
        return mask


def same_answer(name: str, ours: Tensor, theirs: Any) -> bool:
    """Nodes against whether there is one, masks bit for bit, lists of children against padded rows."""
    if name in ("lookup", "advance"):
        return bool(((ours >= 0).cpu() == torch.tensor(theirs)).all())
    if name == "mask":
        return torch.equal(ours.cpu(), theirs)
    return [[code for code in row if code >= 0] for row in ours.tolist()] == theirs


def ask(report: Report, asked: Questions, label: str, dicts: Any, words: Any, bandwidth: float) -> None:
    """A case a question; a peer that is a string is the reason why it is not there."""
    backend = dispatch.choose("trie", report.device).backend
    ours = asked.ours()
    peers = {"nested dicts": dicts if isinstance(dicts, str) else asked.of_dicts(dicts),
             "marisa-trie": words if isinstance(words, str) else asked.of_words(words)}  # fmt: skip
    for name in QUESTIONS:
        run = ours[name]
        theirs: dict[str, Work | str] = {
            peer: had if isinstance(had, str) else had[name] for peer, had in peers.items()
        }
        lists = name in ("mask", "children") and asked.trie.num_items > MOST_FOR_DICT
        if lists and not isinstance(words, str):
            theirs["marisa-trie"] = f"{NOT_ASKED}above {MOST_FOR_DICT:.0e} items; it lists all below a node"
        found = run()
        if not torch.equal(found, asked.reference(name)):
            raise SystemExit(f"{name} differs from the reference: run pytest tests/kernels")
        for peer, work in theirs.items():
            if not isinstance(work, str):
                assert same_answer(name, found, work()), f"{name}: {peer} answers otherwise"
        moved = found.nbytes + (asked.there.nbytes if name == "lookup" else asked.nodes.nbytes)
        report.case(f"{name} of {ASKED}, {label}", {backend: run}, theirs, "reference; each peer's answer",
                    moved / bandwidth * 1e3, nbytes=moved, op="trie_query")  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=9, seconds=12.0)
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS)
    parser.add_argument("--codes", type=int, nargs="+", default=SIZES, help="codes a level, K")
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
