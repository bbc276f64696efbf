"""Building the trie from shuffled codes (sorting included) and from sorted codes, and querying it.

    python bench/trie_build.py [--items 1000000 100000000] [--device cuda] [--json PATH] [--plot PATH]

Peers get their input ready made: nested dicts and flashrec the rows as lists, marisa-trie the codes as
strings, xgrammar the text of its rules. Before anything is timed, a sample is looked up in each, and all
results are compared. The floor is the time, at the measured copy bandwidth, to read the codes and write the
trie once, or to read the input and write the output of a query. ``bytes_an_item`` is the size of each trie
per item, without item IDs (nested dicts: of at most 1e5 items, measured by tracemalloc). ``peak_gib`` is the
peak memory so far, of the process or, on a GPU, of torch.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from cells import random_codes
from harness import (
    NOT_RUN,
    Report,
    Work,
    apply_options,
    build_peer,
    copy_bandwidth,
    make_parser,
    missing_packages,
    peak_memory_mib,
)
from torch import Tensor
from trie_step import MAX_GRAMMAR_ITEMS, grammar_of

from cemg.decoding import dict_trie
from cemg_kernels import Trie, use_fast_kernels
from cemg_kernels.runtime import dispatch

LEVELS = 4
ITEMS, SIZES = (10**4, 10**6, 10**7), (256,)  # N and K of the cases
SAMPLE = 1000
QUERIES = ("lookup", "advance", "mask", "children")
QUERY_ROWS = 400  # prefixes or nodes per call: eight users with 50 beams
MAX_DICT_ITEMS, MAX_TRACED_ITEMS, MAX_WORDS = 10**6, 10**5, 10**7
SHIFT = 0x100  # a code as a character, past the control characters


class Marisa:
    """``marisa_trie.Trie`` over the codes as characters; making the strings is not timed."""

    def __init__(self, codes: Tensor) -> None:
        self.words = words_of(codes)

    def build(self) -> Any:
        import marisa_trie

        return marisa_trie.Trie(self.words)

    def holds(self, trie: Any) -> bool:
        return len(trie) == len(self.words) and all(word in trie for word in self.words[:SAMPLE])


class Flashrec:
    """flashrec's trie: prefixes in Python dicts, and the tables that its search reads."""

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
    """xgrammar's grammar with one rule per prefix; making the text of the rules is not timed."""

    def __init__(self, codes: Tensor, size: int) -> None:
        self.rows, self.build = codes.tolist(), grammar_of(codes, size)

    def holds(self, compiled: Any) -> bool:
        import xgrammar

        def accepts(row: list[int]) -> bool:
            matcher = xgrammar.GrammarMatcher(compiled)
            return all(matcher.accept_token(code) for code in row)

        return all(accepts(row) for row in self.rows[:SAMPLE])


def builder_of(kind: Callable[..., Any], package: str, codes: Tensor, size: int, limit: int) -> Work | str:
    """The call that builds a peer, which was checked to hold the items; or why it cannot run."""
    missing = missing_packages([package])
    if missing or len(codes) > limit:
        return missing or f"{NOT_RUN}above {limit:.0e} items"

    def checked_builder() -> Work | str:
        peer = kind(codes, size)
        work: Work = peer.build
        return work if peer.holds(peer.build()) else "failed: it does not hold the items"

    builder: Work | str = build_peer(checked_builder)
    return builder


def words_of(codes: Tensor) -> list[str]:
    """Each row of codes as a string."""
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
    """Bytes per item of nested dicts of at most ``MAX_TRACED_ITEMS`` items."""
    rows = codes[:MAX_TRACED_ITEMS]
    tracemalloc.start()
    root = dict_trie(rows)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert in_dicts(root, rows)
    return current / len(rows)


def build(report: Report, items: int, size: int, bandwidth: float) -> None:
    """Times building one catalog's trie from shuffled and from sorted codes, then its queries."""
    codes = random_codes(items, LEVELS, size)
    trie = Trie.from_codes(codes, size)
    assert torch.equal(trie.items(trie.lookup(codes[:SAMPLE])), torch.arange(min(items, SAMPLE)))
    per_item: dict[str, float] = {"cemg": trie.nbytes / items, "nested dicts": dict_bytes(codes)}
    estimate = f"they would take about {per_item['nested dicts'] * items / 2**30:.1f} GiB"
    dicts: Any = f"{NOT_RUN}above {MAX_DICT_ITEMS:.0e} items; {estimate}"
    words: Any = f"{NOT_RUN}above {MAX_WORDS:.0e} items; its words do not fit"
    peers: dict[str, Work | str] = {"nested dicts": dicts, "marisa-trie": words}
    if items <= MAX_DICT_ITEMS:
        dicts = dict_trie(codes)
        assert in_dicts(dicts, codes)
        peers["nested dicts"] = lambda: dict_trie(codes)
    if items <= MAX_WORDS:
        words = peers["marisa-trie"] = missing_packages(["marisa-trie"])
    if not words:
        marisa = Marisa(codes)
        words = marisa.build()
        assert marisa.holds(words)
        per_item["marisa-trie"] = len(words.tobytes()) / items
        peers["marisa-trie"] = marisa.build
    peers["flashrec"] = builder_of(Flashrec, "flashrec", codes, size, MAX_DICT_ITEMS)
    peers["xgrammar"] = builder_of(Grammar, "xgrammar", codes, size, MAX_GRAMMAR_ITEMS)
    moved = codes.nbytes + trie.nbytes + trie.rows.nbytes
    ordered = codes[trie.rows.long()]
    for name, rows, against in (("sorting included", codes, peers), ("sorted codes", ordered, {})):
        on_device = rows.to(report.device)
        backend = dispatch.choose("trie_build", report.device).backend
        built = Trie.from_codes(on_device, size, device=report.device)
        for part in ("code", "first_child"):
            assert torch.equal(getattr(built.arrays, part).cpu(), getattr(trie.arrays, part)), part
        leaves = built.lookup(on_device[:SAMPLE])
        assert torch.equal(built.items(leaves).cpu(), torch.arange(min(items, SAMPLE)))
        ours: dict[str, Work] = {backend: partial(Trie.from_codes, on_device, size, device=report.device)}
        report.case(f"N {items:.0e} K {size}, {name}", ours, against, f"{SAMPLE} rows looked up, arrays",
                    moved / bandwidth * 1e3, nbytes=moved, bytes_an_item=per_item,
                    peak_gib=peak_memory_mib() / 2**10)  # fmt: skip
    queries = TrieQueries(codes, trie.to(report.device))
    time_queries(report, queries, f"N {items:.0e} K {size}", dicts, words, bandwidth)


class TrieQueries:
    """The queries of one call. Half of the prefixes are items, and hardly any of the others."""

    def __init__(self, codes: Tensor, trie: Trie) -> None:
        generator = torch.Generator().manual_seed(2)
        chosen = torch.randint(len(codes), (QUERY_ROWS,), generator=generator)
        drawn = torch.randint(
            trie.codebook_size, (QUERY_ROWS, LEVELS), generator=generator, dtype=codes.dtype
        )
        even = torch.arange(QUERY_ROWS)[:, None] % 2 == 0
        self.prefixes = torch.where(even, codes[chosen], drawn)  # [B, L]
        self.trie, self.device_prefixes = trie, self.prefixes.to(trie.device)
        self.first_codes = codes[chosen, :1]  # of nodes of the first level, one per beam
        self.nodes = trie.lookup(self.first_codes.to(trie.device))
        self.next_codes = self.device_prefixes[:, 1]

    def ours(self) -> dict[str, Callable[[], Tensor]]:
        """The queries to our trie."""
        return {
            "lookup": lambda: self.trie.lookup(self.device_prefixes),
            "advance": lambda: self.trie.advance(self.nodes, self.next_codes),
            "mask": lambda: self.trie.mask(self.nodes),
            "children": lambda: self.trie.children(self.nodes)[0],
        }

    def reference(self, name: str) -> Tensor:
        """The result of plain PyTorch."""
        use_fast_kernels(False)
        try:
            return self.ours()[name]()
        finally:
            use_fast_kernels(None)

    def of_dicts(self, root: Any) -> dict[str, Callable[[], Any]]:
        """The queries to nested dicts, whose nodes are the inner dicts."""
        rows, next_codes = self.prefixes.tolist(), self.prefixes[:, 1].tolist()
        nodes = [root[code] for code in self.first_codes[:, 0].tolist()]

        def holds(row: list[int]) -> bool:
            node = root
            for code in row:
                node = node.get(code)
                if node is None:
                    return False
            return True

        return {
            "lookup": lambda: [holds(row) for row in rows],
            "advance": lambda: [
                node.get(code) is not None for node, code in zip(nodes, next_codes, strict=True)
            ],
            "mask": lambda: self.as_mask(nodes),
            "children": lambda: [sorted(node) for node in nodes],
        }

    def of_words(self, trie: Any) -> dict[str, Callable[[], Any]]:
        """The queries to marisa-trie; it has no nodes, so prefixes stand for them."""
        words, nodes = words_of(self.prefixes), words_of(self.first_codes)
        advanced = words_of(torch.cat((self.first_codes, self.prefixes[:, 1:2]), 1))

        def children(node: str) -> set[int]:
            return {ord(word[1]) - SHIFT for word in trie.iterkeys(node)}

        return {
            "lookup": lambda: [word in trie for word in words],
            "advance": lambda: [next(trie.iterkeys(word), None) is not None for word in advanced],
            "mask": lambda: self.as_mask([children(node) for node in nodes]),
            "children": lambda: [sorted(children(node)) for node in nodes],
        }

    def as_mask(self, codes: Sequence[Collection[int]]) -> Tensor:
        """bool [B, K] of the codes of each row."""
        mask = torch.zeros(len(codes), self.trie.codebook_size, dtype=torch.bool)
        for row, row_codes in enumerate(codes):
            mask[row, list(row_codes)] = True
        return mask


def same_result(name: str, ours: Tensor, theirs: Any) -> bool:
    """Whether a peer's result equals ours: existence of nodes, masks bit for bit, or lists of children."""
    if name in ("lookup", "advance"):
        return torch.equal((ours >= 0).cpu(), torch.tensor(theirs))
    if name == "mask":
        return torch.equal(ours.cpu(), theirs)
    return bool([[code for code in row if code >= 0] for row in ours.tolist()] == theirs)


def time_queries(
    report: Report, queries: TrieQueries, label: str, dicts: Any, words: Any, bandwidth: float
) -> None:
    """One case per query; a peer that is a string is the reason why it cannot run."""
    backend = dispatch.choose("trie", report.device).backend
    ours = queries.ours()
    peers = {"nested dicts": dicts if isinstance(dicts, str) else queries.of_dicts(dicts),
             "marisa-trie": words if isinstance(words, str) else queries.of_words(words)}  # fmt: skip
    for name in QUERIES:
        run = ours[name]
        theirs: dict[str, Work | str] = {
            peer: calls if isinstance(calls, str) else calls[name] for peer, calls in peers.items()
        }
        lists_words = name in ("mask", "children") and queries.trie.num_items > MAX_DICT_ITEMS
        if lists_words and not isinstance(words, str):
            theirs["marisa-trie"] = f"{NOT_RUN}above {MAX_DICT_ITEMS:.0e} items; it lists all below a node"
        result = run()
        if not torch.equal(result, queries.reference(name)):
            raise SystemExit(f"{name} differs from the reference: run pytest tests/kernels")
        for peer, work in theirs.items():
            if not isinstance(work, str):
                assert same_result(name, result, work()), f"{name}: the result of {peer} differs"
        operand = queries.device_prefixes if name == "lookup" else queries.nodes
        moved = result.nbytes + operand.nbytes
        report.case(f"{name} of {QUERY_ROWS}, {label}", {backend: run}, theirs,
                    "reference; each peer's result", moved / bandwidth * 1e3, nbytes=moved,
                    op="trie_query")  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, rounds=9, seconds=12.0)
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS, help="catalog sizes, N")
    parser.add_argument("--codes", type=int, nargs="+", default=SIZES, help="codes per level, K")
    options = parser.parse_args()
    device = apply_options(options)
    report = Report("trie_build", options, device)
    bandwidth = copy_bandwidth(device)
    for size in options.codes:
        for items in options.items:
            build(report, items, size, bandwidth)
    report.finish()


if __name__ == "__main__":
    main()
