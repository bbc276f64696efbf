"""One constrained step of beam search: mask, softmax, the best W, advance.

    python bench/trie_step.py [--items 10000 1000000] [--alone] [--device cuda] [--json PATH] [--plot PATH]

Scores and logits are random, of one user and of eight; every beam stands on a random node of level 1.
"floor": at the machine's copy bandwidth, the codes of the beams' children, the logits that count
(theirs, or the level's) and for the softmax its result; from a cache they take less. A step "over the level"
normalises as flashrec does, whose fused step is the peer; one "over the vocabulary" takes its log-sum-exp as
the model's head gives it. A step "under a filter" admits half of the items,
and leaves out twenty more of each user's; the peers hold a trie of their own of each user's items, which a
filter of ours makes needless. On a GPU our step is timed once more in a CUDA graph, as the decoder runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from cells import random_codes
from harness import (
    NOT_ASKED,
    Report,
    Times,
    Work,
    apart,
    arguments,
    built,
    checked,
    copy_bandwidth,
    failure,
    measure,
    optional,
    start,
)
from torch import Tensor

from cemg_kernels import ItemFilter, RequestFilter, Trie, trie_beam_step, trie_softmax
from cemg_kernels.constrained.beam_step import BeamStep
from cemg_kernels.constrained.softmax import Normalize
from cemg_kernels.runtime import dispatch

WIDTH, LEVELS = 50, 4
SIZES, ITEMS, USERS = (256, 2048), (10**4, 10**5, 10**6, 10**7), (1, 8)  # K, N and B of the cases
SHARE, EXCLUDED = 0.5, 20  # of a filter: what it admits, and how many it leaves out a user
TOLERANCE = 1e-5  # of a score
IN_GRAPH = 20  # steps of one CUDA graph, so that its launch is no part of a step
MOST_FOR_DICT = 10**6
MOST_FOR_GRAMMAR = 10**4  # two seconds to compile, ten times the items two hundred times as long


class Step:
    """W beams of each user after the first code, and the logits of the second."""

    def __init__(self, codes: Tensor, size: int, device: torch.device, users: int) -> None:
        self.codes, self.size = codes, size
        self.trie = Trie.from_codes(codes.to(device), size, device=device)
        self.users, self.rows = users, users * WIDTH
        generator = torch.Generator().manual_seed(0)
        first = codes[:, 0].bincount().nonzero()[:, 0]
        first = first[torch.randperm(len(first), generator=generator)[: self.rows]]
        self.first = first.repeat(self.rows // len(first) + 1)[: self.rows]  # [B * W]
        self.nodes = self.trie.lookup(self.first[:, None].to(device)).view(users, WIDTH)
        self.logits = torch.randn(users, WIDTH, size, generator=generator).to(device)
        self.flat = self.logits.flatten(0, 1)  # [B * W, K]
        self.scores = -torch.rand(users, WIDTH, generator=generator).sort().values.to(device)

    def run(
        self, backend: str | None, normalize: Normalize = "valid", filter: RequestFilter | None = None
    ) -> BeamStep:
        total = self.total if normalize == "vocab" else None
        operands = self.logits, self.scores, self.nodes, self.trie, WIDTH, normalize, total, filter
        return trie_beam_step(*operands, backend=backend)

    @cached_property
    def total(self) -> Tensor:
        """The log-sum-exp of a vocabulary of four such levels, [B, W]."""
        return self.logits.logsumexp(2) + math.log(LEVELS)

    @cached_property
    def shared(self) -> Tensor:
        """Half of the items, bool [N], and one below each first code: transformers refuses a prefix that
        nothing continues.
        """
        return (torch.rand(len(self.codes), generator=torch.Generator().manual_seed(1)) < SHARE) | self.kept

    @cached_property
    def kept(self) -> Tensor:
        """One item below each first code, bool [N]."""
        one = torch.full((self.size,), -1)
        one[self.codes[:, 0].long()] = torch.arange(len(self.codes))
        kept = torch.zeros(len(self.codes), dtype=torch.bool)
        kept[one[one >= 0]] = True
        return kept

    @cached_property
    def left_out(self) -> Tensor:
        """Some of each user's shared items, [B, EXCLUDED]."""
        some = (self.shared & ~self.kept).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(2)
        return some[torch.randint(len(some), (self.users, EXCLUDED), generator=generator)]

    @cached_property
    def filter(self) -> RequestFilter:
        """What the users share, less what is left out of each."""
        shared = ItemFilter.from_mask(self.trie, self.shared.to(self.trie.device))
        return shared & RequestFilter.excluding(self.trie, self.left_out)

    def needed_bytes(self, normalize: Normalize = "valid") -> int:
        """The codes of the beams' children, and their logits or the whole level's."""
        children = int(self.trie.mask(self.nodes.flatten()).sum())
        logits = self.logits.nbytes if normalize == "level" else children * self.logits.element_size()
        return logits + children * self.trie.arrays.code.element_size()

    def finish(self, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What every peer does after its mask [B * W, K]: log-softmax, add, the best W. Their scores, parents
        and codes [B, W]."""
        total = self.scores.flatten()[:, None] + masked.log_softmax(1).nan_to_num(nan=float("-inf"))
        scores, places = total.view(self.users, -1).topk(WIDTH)
        return scores, places // self.size, places % self.size

    def dict_trie(self) -> Work | str:
        """``PrefixConstrainedLogitsProcessor`` of transformers over nested dicts."""
        if len(self.codes) > MOST_FOR_DICT:
            return f"{NOT_ASKED}nested dicts of more than {MOST_FOR_DICT:.0e} items"
        from transformers import PrefixConstrainedLogitsProcessor

        from cemg.decoding import dict_trie

        root = dict_trie(self.codes)
        process = PrefixConstrainedLogitsProcessor(lambda _, tokens: list(root[int(tokens[-1])]), WIDTH)
        logits, tokens = self.flat.cpu(), self.first[:, None]
        return lambda: self.finish(process(tokens, logits).to(self.logits.device))

    def dict_tries(self) -> Work | str:
        """The same, each user's of the items that this user may get."""
        if len(self.codes) * self.users > MOST_FOR_DICT:
            return f"{NOT_ASKED}nested dicts of more than {MOST_FOR_DICT:.0e} items"
        from transformers import PrefixConstrainedLogitsProcessor

        from cemg.decoding import dict_trie

        roots = []
        for own in self.left_out:
            allowed = self.shared.clone()
            allowed[own] = False
            roots.append(dict_trie(self.codes[allowed]))
        process = PrefixConstrainedLogitsProcessor(
            lambda user, tokens: list(roots[user][int(tokens[-1])]), WIDTH
        )
        logits, tokens = self.flat.cpu(), self.first[:, None]
        return lambda: self.finish(process(tokens, logits).to(self.logits.device))

    def marisa(self) -> Work | str:
        """``marisa_trie.Trie`` over the codes as characters, asked for each beam's continuations."""
        missing = optional(["marisa-trie"])
        if missing or len(self.codes) > MOST_FOR_DICT:
            return missing or f"{NOT_ASKED}more than {MOST_FOR_DICT:.0e} items"
        import marisa_trie

        shift = 0x100  # clear of the control characters
        words = ["".join(chr(shift + c) for c in row) for row in self.codes.tolist()]
        trie = marisa_trie.Trie(words)

        def run() -> tuple[Tensor, ...]:
            mask = torch.full((self.rows, self.size), float("-inf"))
            for beam, first in enumerate(self.first.tolist()):
                legal = {ord(word[1]) - shift for word in trie.iterkeys(chr(shift + first))}
                places = list(legal)
                mask[beam, places] = 0
            return self.finish(self.flat + mask.to(self.logits.device))

        return run

    @cached_property
    def flashrec_trie(self) -> Any:
        """flashrec's trie: a dense table of what may follow each node, looked up for every candidate.

        The table holds the first two levels alone, all that this step asks about: deeper ones would make it
        larger, not faster.
        """
        from flashrec.search.trie import build_trie_from_sequences

        pairs = self.codes[:, 0].long() * self.size + self.codes[:, 1]
        trie = build_trie_from_sequences([divmod(pair, self.size) for pair in pairs.unique().tolist()])
        trie.finalize_index(token_base=0, vocab_size=self.size)
        trie._ensure_gpu_cache(self.logits.device)
        if self.logits.is_cuda:
            trie._next_node = trie._next_node.long()  # its kernel refuses int32, and PyTorch steps in
        return trie

    def flashrec(self) -> Work | str:
        """A mask by that trie, then an advance."""
        missing = optional(["flashrec"])
        if missing:
            return missing
        trie, device = self.flashrec_trie, self.logits.device
        prefixes = self.first[:, None].long().to(device)
        nodes = trie.bootstrap_node_ids(prefixes, self.rows, 1, device)
        tokens = torch.arange(self.size, device=device).repeat(self.rows, 1)  # every code a candidate
        begins = torch.arange(self.users, device=device)[:, None] * WIDTH  # of a user's beams

        def run() -> tuple[Tensor, ...]:
            scores, parents, codes = self.finish(trie.mask_candidates(prefixes, tokens, self.flat, 1, nodes))
            grown = trie.advance_node_ids(nodes, (parents + begins).flatten(), codes.flatten())
            return scores, parents, codes, grown

        return run

    def flashrec_fused(self) -> Work | str:
        """Log-softmax over the level, then its kernel of mask, the best W, histories and advance in one."""
        missing = optional(["flashrec"])
        if missing:
            return missing
        from flashrec.kernel import GenrecFusedWorkspace, genrec_mask_topk_expand

        trie, device, workspace = self.flashrec_trie, self.logits.device, GenrecFusedWorkspace()
        prefixes = self.first[:, None].long().to(device)
        nodes = trie.bootstrap_node_ids(prefixes, self.rows, 1, device).long().view(self.users, WIDTH)
        tokens = torch.arange(self.size, device=device).expand(*self.logits.shape).contiguous()
        history = torch.zeros(self.users, WIDTH, LEVELS, dtype=torch.int64, device=device)
        tables = {"allow_table": trie._allow_table, "next_node": trie._next_node}

        def run() -> tuple[Tensor, ...]:
            found = genrec_mask_topk_expand(
                self.scores, self.logits.log_softmax(2), tokens, select_k=WIDTH, node_ids=nodes, col=1,
                token_ids=history, invalid_node=trie._invalid_node, workspace=workspace, **tables,
            )  # fmt: skip
            return found.vals, found.parents, found.tokens, found.node_ids

        if device.type == "cuda":  # its results are the workspace's, unless PyTorch stepped in
            own = workspace.get("vals", (self.users, WIDTH), torch.float32, device)
            if run()[0].data_ptr() != own.data_ptr():
                return "failed: its kernel did not run"
        return run

    def bitmask(self) -> Work | str:
        """xgrammar's kernel that applies a ready bitmask: the mask's computation is not counted."""
        missing = optional(["xgrammar"])
        if missing:
            return missing
        import xgrammar

        allowed = self.trie.mask(self.nodes.flatten()).cpu()
        bits = torch.nn.functional.pad(allowed, (0, -self.size % 32)).view(self.rows, -1, 32).long()
        mask = (bits << torch.arange(32)).sum(2).to(torch.int32).to(self.logits.device)

        def run() -> tuple[Tensor, ...]:
            logits = self.flat.clone()
            xgrammar.apply_token_bitmask_inplace(logits, mask)
            return self.finish(logits)

        return run

    def grammar(self) -> Work | str:
        """xgrammar as a beam search has to use it: a rule a prefix of the catalog, a matcher a beam, which is
        forked from its parent's, takes the code that was chosen, and fills in the mask of the next."""
        missing = optional(["xgrammar"])
        if missing or len(self.codes) > MOST_FOR_GRAMMAR:
            return missing or f"{NOT_ASKED}a grammar of more than {MOST_FOR_GRAMMAR:.0e} items"
        import xgrammar

        compiled = grammar_of(self.codes, self.size)()
        parents = [xgrammar.GrammarMatcher(compiled) for _ in range(self.rows)]
        mask = xgrammar.allocate_token_bitmask(self.rows, self.size + 1)
        chosen = self.first.tolist()

        def run() -> tuple[Tensor, ...]:
            for row, (parent, code) in enumerate(zip(parents, chosen, strict=True)):
                beam = parent.fork()
                beam.accept_token(code)
                beam.fill_next_token_bitmask(mask, row)
            logits = self.flat.clone()
            own = mask[:, : -(-self.size // 32)].to(logits.device)
            xgrammar.apply_token_bitmask_inplace(logits, own.contiguous())
            return self.finish(logits)

        return run


def grammar_of(codes: Tensor, size: int) -> Callable[[], Any]:
    """What compiles xgrammar's grammar of the rows of codes [N, L]: a rule a prefix, a character a code; its
    tokens are the codes, and the end as ``size``."""
    import xgrammar

    words = [chr(0x4E00 + code) for code in range(size)]
    below: dict[tuple[int, ...], set[int]] = {}
    levels = codes.shape[1]
    for row in codes.tolist():
        for level in range(levels):
            below.setdefault(tuple(row[:level]), set()).add(row[level])

    def name(prefix: tuple[int, ...]) -> str:
        return "x".join(["root", *map(str, prefix)])

    def goes_on(prefix: tuple[int, ...], code: int) -> str:
        more = len(prefix) + 1 < levels
        return f'"{words[code]}"' + (f" {name((*prefix, code))}" if more else "")

    rules = "\n".join(
        f"{name(prefix)} ::= " + " | ".join(goes_on(prefix, code) for code in sorted(own))
        for prefix, own in below.items()
    )
    kind = xgrammar.VocabType.RAW
    info = xgrammar.TokenizerInfo([*words, "</s>"], vocab_type=kind, stop_token_ids=[size])
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
    return lambda: compiler.compile_grammar(rules)


def of_flashrec(what: str) -> str:
    """A peer's name: without CUDA, or where its kernels do not build, its PyTorch code runs instead."""
    if optional(["flashrec"]):
        return f"flashrec's {what}"
    from flashrec.kernel import try_load_beam_trie

    return f"flashrec's {what}" + ("" if try_load_beam_trie() else ", PyTorch")


def check(found: Sequence[Tensor], wanted: BeamStep) -> None:
    """AssertionError where scores differ, or parents and codes where a score is no tie."""
    scores, parents, codes = (part.to(wanted.scores.device) for part in found[:3])
    torch.testing.assert_close(scores, wanted.scores, rtol=0, atol=TOLERANCE)
    alone = apart(wanted.scores, 2 * TOLERANCE)
    for name, mine, theirs in (("parents", parents, wanted.parents), ("codes", codes, wanted.codes)):
        assert torch.equal(mine[alone].long(), theirs[alone].long()), f"other {name}"


def in_a_graph(run: Work, report: Report) -> Times | str:
    """A step among ``IN_GRAPH`` of one CUDA graph, or why there is none."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_GRAPH):
                run()
    except RuntimeError as error:
        return failure(error)
    taken = measure({"graph": graph.replay}, report.device, report.options.rounds, report.options.seconds)
    return Times(tuple(ms / IN_GRAPH for ms in taken["graph"].samples))


def timed(
    report: Report, step: Step, label: str, peers: Mapping[str, Callable[[], Work | str]], bandwidth: float,
    normalize: Normalize = "valid", filter: RequestFilter | None = None,
) -> None:  # fmt: skip
    """A case: our step against the peers that these make, and on a GPU in a CUDA graph too."""
    backend = dispatch.choose("trie_beam_step", report.device).backend

    def ours(name: str = backend) -> BeamStep:
        return step.run(name, normalize, filter)

    wanted = ours("reference")
    check(ours(), wanted)
    made = {} if report.options.alone else {name: built(make) for name, make in peers.items()}
    made = checked(made, lambda peer: check(peer(), wanted))
    moved = step.needed_bytes(normalize)
    floor, equal = moved / bandwidth * 1e3, f"reference: scores within {TOLERANCE:.0e}, parents, codes"
    report.case(label, {backend: ours}, made, equal, floor, nbytes=moved,
                bytes_an_item=step.trie.nbytes / len(step.codes))  # fmt: skip
    if report.device.type == "cuda":
        report.add(label, f"{backend}, in a CUDA graph", in_a_graph(ours, report), {}, equal, floor, moved)
        report.write()


def one_step(report: Report, step: Step, label: str, bandwidth: float) -> None:
    """The step under "valid", against all peers."""
    peers = {
        "dict trie + transformers' processor": step.dict_trie,
        "marisa-trie": step.marisa,
        "xgrammar, a matcher a beam": step.grammar,
        "xgrammar's bitmask, the mask given": step.bitmask,
        of_flashrec("dense table"): step.flashrec,
    }
    timed(report, step, label, peers, bandwidth)


def over_the_level(report: Report, step: Step, label: str, bandwidth: float) -> None:
    """The step as flashrec normalises it, against its fused kernel."""
    peers = {of_flashrec("fused step"): step.flashrec_fused}
    timed(report, step, f"{label}, over the level", peers, bandwidth, "level")


def over_the_vocabulary(report: Report, step: Step, label: str, bandwidth: float) -> None:
    """The step whose log-sum-exp the model's head has taken already."""
    timed(report, step, f"{label}, over the vocabulary", {}, bandwidth, "vocab")


def under_a_filter(report: Report, step: Step, label: str, bandwidth: float) -> None:
    """The step under "valid" where a user may get some of the items."""
    if len(step.codes) > max(ITEMS):
        return  # too long to draw
    peers = {"dict tries of what is left, transformers' processor": step.dict_tries}
    timed(report, step, f"{label}, under a filter", peers, bandwidth, filter=step.filter)


def softmax(report: Report, step: Step, label: str, bandwidth: float) -> None:
    """The log-probabilities alone, against torch over a mask."""
    backend, nodes = dispatch.choose("trie_softmax", report.device).backend, step.nodes.flatten()
    allowed = step.trie.mask(nodes)

    def masked(mask: Tensor) -> Tensor:
        return step.flat.masked_fill(~mask, float("-inf")).log_softmax(1)

    def ours(name: str) -> Tensor:
        return trie_softmax(step.flat, nodes, step.trie, "valid", backend=name)

    wanted = ours("reference")
    for found in (ours(backend), masked(allowed)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    peers: dict[str, Work | str] = {
        "torch, the mask given": lambda: masked(allowed),
        "torch, the trie's mask": lambda: masked(step.trie.mask(nodes)),
    }
    peers = {} if report.options.alone else peers
    moved = step.needed_bytes() + wanted.nbytes
    report.case(f"softmax, {label}", {backend: lambda: ours(backend)}, peers,
                f"reference within {TOLERANCE:.0e}", moved / bandwidth * 1e3, nbytes=moved,
                op="trie_softmax")  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=15, seconds=6.0)
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="codes a level, K")
    parser.add_argument(
        "--alone", action="store_true", help="no peers: nothing takes a turn between our steps"
    )
    options = parser.parse_args()
    device = start(options)
    report = Report("trie_step", options, device)
    bandwidth = copy_bandwidth(device)
    for size in options.sizes:
        for items in options.items:
            codes = random_codes(items, LEVELS, size)
            for users in options.users:
                step = Step(codes, size, device, users)
                label = f"K {size} N {items:.0e}" + (f" B {users}" if users > 1 else "")
                for case in (one_step, over_the_level, over_the_vocabulary, under_a_filter, softmax):
                    case(report, step, label, bandwidth)
    report.finish()


if __name__ == "__main__":
    main()
