"""One constrained step of beam search: mask, softmax, the best W candidates, advance in the trie.

    python bench/trie_step.py [--items 10000 1000000] [--alone] [--device cuda] [--json PATH] [--plot PATH]

Scores and logits are random, for one user and for eight; every beam is at a random node of level 1. The floor
is the time of the codes of the beams' children, of the logits that count (the children's, or the level's) and
for the softmax of its result, at the measured copy bandwidth; from a cache they take less.

Cases: "over the level" normalizes as flashrec does, whose fused step is the peer. "over the vocabulary" gets
its log-sum-exp from the model's head. "under a filter" allows half of the items and excludes twenty more per
user; the peers build a trie of each user's items, our filter needs none. "under a prior" mixes in the masses
of 1,350 random items per user; the peer is the step without a prior. On a GPU, our step is also timed in
a CUDA graph, the way the decoder runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from cells import random_codes
from harness import (
    NOT_RUN,
    Report,
    Times,
    Work,
    apply_options,
    build_peer,
    check_peers,
    copy_bandwidth,
    failure,
    make_parser,
    measure,
    missing_packages,
    separated,
)
from torch import Tensor

from cemg_kernels import ItemFilter, ItemPrior, RequestFilter, Trie, trie_beam_step, trie_softmax
from cemg_kernels.constrained.beam_step import BeamStep, MixedStep
from cemg_kernels.constrained.prior import PriorTensors
from cemg_kernels.constrained.softmax import Normalize
from cemg_kernels.runtime import dispatch

WIDTH, LEVELS = 50, 4
SIZES, ITEMS, USERS = (256, 2048), (10**4, 10**5, 10**6, 10**7), (1, 8)  # K, N and B of the cases
ALLOWED_SHARE, EXCLUDED = 0.5, 20  # of a filter: the share it allows, and the items it excludes per user
ENTRIES, PRIOR_WEIGHT = 1350, 0.6  # of a prior: items with mass per user, and its share in the mixture
TOLERANCE = 1e-5  # of a score
STEPS_PER_GRAPH = 20  # in one CUDA graph, so the launch of the graph hardly counts
MAX_DICT_ITEMS = 10**6
MAX_GRAMMAR_ITEMS = 10**4  # compiling takes two seconds, and 200 times as long for 10 times the items


class StepCase:
    """The beams of each user after the first code, W per user, and the logits of the second code."""

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
        self.flat_logits = self.logits.flatten(0, 1)  # [B * W, K]
        self.scores = -torch.rand(users, WIDTH, generator=generator).sort().values.to(device)

    def run(
        self, backend: str | None, normalize: Normalize = "valid", filter: RequestFilter | None = None
    ) -> BeamStep:
        logsumexp = self.logsumexp if normalize == "vocab" else None
        operands = self.logits, self.scores, self.nodes, self.trie, WIDTH, normalize, logsumexp, filter
        return trie_beam_step(*operands, backend=backend)

    def run_mixed(self, backend: str | None) -> MixedStep:
        """The step under a prior."""
        operands = self.logits, self.scores, self.nodes, self.trie, WIDTH, "valid"
        return trie_beam_step(*operands, prior=self.prior, generator_scores=self.scores, backend=backend)

    @cached_property
    def prior(self) -> PriorTensors:
        """Masses of some items per user."""
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randint(len(self.codes), (self.users, ENTRIES), generator=generator)
        items = [row.unique() for row in drawn]
        masses = [torch.rand(len(row), generator=generator, dtype=torch.float64) ** 8 for row in items]
        return ItemPrior(items, masses).on(self.trie, PRIOR_WEIGHT)

    @cached_property
    def logsumexp(self) -> Tensor:
        """The log-sum-exp over a vocabulary of four such levels, [B, W]."""
        return self.logits.logsumexp(2) + math.log(LEVELS)

    @cached_property
    def allowed(self) -> Tensor:
        """Half of the items, bool [N], and ``one_per_first_code``: transformers rejects a prefix without a
        continuation."""
        drawn = torch.rand(len(self.codes), generator=torch.Generator().manual_seed(1))
        return (drawn < ALLOWED_SHARE) | self.one_per_first_code

    @cached_property
    def one_per_first_code(self) -> Tensor:
        """One item per first code, bool [N]."""
        item_of = torch.full((self.size,), -1)
        item_of[self.codes[:, 0].long()] = torch.arange(len(self.codes))
        chosen = torch.zeros(len(self.codes), dtype=torch.bool)
        chosen[item_of[item_of >= 0]] = True
        return chosen

    @cached_property
    def excluded(self) -> Tensor:
        """Some of the allowed items per user, [B, EXCLUDED]."""
        candidates = (self.allowed & ~self.one_per_first_code).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(2)
        return candidates[torch.randint(len(candidates), (self.users, EXCLUDED), generator=generator)]

    @cached_property
    def filter(self) -> RequestFilter:
        """The allowed items without the excluded items of each user."""
        allowed = ItemFilter.from_mask(self.trie, self.allowed.to(self.trie.device))
        return allowed & RequestFilter.excluding(self.trie, self.excluded)

    def needed_bytes(self, normalize: Normalize = "valid") -> int:
        """Bytes of the codes of the beams' children, and of their logits or those of the whole level."""
        children = int(self.trie.mask(self.nodes.flatten()).sum())
        logits = self.logits.nbytes if normalize == "level" else children * self.logits.element_size()
        return logits + children * self.trie.arrays.code.element_size()

    def select(self, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scores, parents and codes [B, W] of the best beams, from masked logits [B * W, K].

        Every peer uses it after its mask.
        """
        totals = self.scores.flatten()[:, None] + masked.log_softmax(1).nan_to_num(nan=float("-inf"))
        scores, index = totals.view(self.users, -1).topk(WIDTH)
        return scores, index // self.size, index % self.size

    def dict_trie(self) -> Work | str:
        """``PrefixConstrainedLogitsProcessor`` of transformers over nested dicts."""
        if len(self.codes) > MAX_DICT_ITEMS:
            return f"{NOT_RUN}nested dicts of more than {MAX_DICT_ITEMS:.0e} items"
        from transformers import PrefixConstrainedLogitsProcessor

        from cemg.decoding import dict_trie

        root = dict_trie(self.codes)
        process = PrefixConstrainedLogitsProcessor(lambda _, tokens: list(root[int(tokens[-1])]), WIDTH)
        logits, tokens = self.flat_logits.cpu(), self.first[:, None]
        return lambda: self.select(process(tokens, logits).to(self.logits.device))

    def dict_tries(self) -> Work | str:
        """The same, with one trie per user that holds the user's items."""
        if len(self.codes) * self.users > MAX_DICT_ITEMS:
            return f"{NOT_RUN}nested dicts of more than {MAX_DICT_ITEMS:.0e} items"
        from transformers import PrefixConstrainedLogitsProcessor

        from cemg.decoding import dict_trie

        roots = []
        for excluded in self.excluded:
            allowed = self.allowed.clone()
            allowed[excluded] = False
            roots.append(dict_trie(self.codes[allowed]))
        process = PrefixConstrainedLogitsProcessor(
            lambda user, tokens: list(roots[user][int(tokens[-1])]), WIDTH
        )
        logits, tokens = self.flat_logits.cpu(), self.first[:, None]
        return lambda: self.select(process(tokens, logits).to(self.logits.device))

    def marisa(self) -> Work | str:
        """``marisa_trie.Trie`` over the codes as characters, which lists each beam's continuations."""
        missing = missing_packages(["marisa-trie"])
        if missing or len(self.codes) > MAX_DICT_ITEMS:
            return missing or f"{NOT_RUN}more than {MAX_DICT_ITEMS:.0e} items"
        import marisa_trie

        shift = 0x100  # past the control characters
        words = ["".join(chr(shift + c) for c in row) for row in self.codes.tolist()]
        trie = marisa_trie.Trie(words)

        def run() -> tuple[Tensor, ...]:
            mask = torch.full((self.rows, self.size), float("-inf"))
            for beam, first in enumerate(self.first.tolist()):
                legal = {ord(word[1]) - shift for word in trie.iterkeys(chr(shift + first))}
                mask[beam, list(legal)] = 0
            return self.select(self.flat_logits + mask.to(self.logits.device))

        return run

    @cached_property
    def flashrec_trie(self) -> Any:
        """flashrec's trie: a dense table of the continuations of each node, read for every candidate.

        The table holds the first two levels only, the ones that this step needs. More levels would make it
        larger, not faster.
        """
        from flashrec.search.trie import build_trie_from_sequences

        pairs = self.codes[:, 0].long() * self.size + self.codes[:, 1]
        distinct = pairs.unique().tolist()  # type: ignore[no-untyped-call]
        trie = build_trie_from_sequences([divmod(pair, self.size) for pair in distinct])
        trie.finalize_index(token_base=0, vocab_size=self.size)
        trie._ensure_gpu_cache(self.logits.device)
        if self.logits.is_cuda:
            trie._next_node = trie._next_node.long()  # for int32, PyTorch runs instead of the kernel
        return trie

    def flashrec(self) -> Work | str:
        """A mask from flashrec's trie, then an advance."""
        missing = missing_packages(["flashrec"])
        if missing:
            return missing
        trie, device = self.flashrec_trie, self.logits.device
        prefixes = self.first[:, None].long().to(device)
        nodes = trie.bootstrap_node_ids(prefixes, self.rows, 1, device)
        tokens = torch.arange(self.size, device=device).repeat(self.rows, 1)  # every code is a candidate
        first_beams = torch.arange(self.users, device=device)[:, None] * WIDTH  # of each user

        def run() -> tuple[Tensor, ...]:
            scores, parents, codes = self.select(
                trie.mask_candidates(prefixes, tokens, self.flat_logits, 1, nodes)
            )
            children = trie.advance_node_ids(nodes, (parents + first_beams).flatten(), codes.flatten())
            return scores, parents, codes, children

        return run

    def flashrec_fused(self) -> Work | str:
        """Log-softmax over the level, then flashrec's fused kernel: mask, the best W, histories, advance."""
        missing = missing_packages(["flashrec"])
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
            result = genrec_mask_topk_expand(
                self.scores, self.logits.log_softmax(2), tokens, select_k=WIDTH, node_ids=nodes, col=1,
                token_ids=history, invalid_node=trie._invalid_node, workspace=workspace, **tables,
            )  # fmt: skip
            return result.vals, result.parents, result.tokens, result.node_ids

        if device.type == "cuda":  # the kernel writes into the workspace, its PyTorch substitute does not
            buffer = workspace.get("vals", (self.users, WIDTH), torch.float32, device)
            if run()[0].data_ptr() != buffer.data_ptr():
                return "failed: its kernel did not run"
        return run

    def bitmask(self) -> Work | str:
        """xgrammar's kernel that applies a bitmask; computing the mask is not timed."""
        missing = missing_packages(["xgrammar"])
        if missing:
            return missing
        import xgrammar

        allowed = self.trie.mask(self.nodes.flatten()).cpu()
        bits = torch.nn.functional.pad(allowed, (0, -self.size % 32)).view(self.rows, -1, 32).long()
        mask = (bits << torch.arange(32)).sum(2).to(torch.int32).to(self.logits.device)

        def run() -> tuple[Tensor, ...]:
            logits = self.flat_logits.clone()
            xgrammar.apply_token_bitmask_inplace(logits, mask)
            return self.select(logits)

        return run

    def grammar(self) -> Work | str:
        """xgrammar the way a beam search has to use it: one rule per prefix of the catalog, one matcher per
        beam. A matcher is forked from its parent's, accepts the chosen code and fills in the next mask."""
        missing = missing_packages(["xgrammar"])
        if missing or len(self.codes) > MAX_GRAMMAR_ITEMS:
            return missing or f"{NOT_RUN}a grammar of more than {MAX_GRAMMAR_ITEMS:.0e} items"
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
            logits = self.flat_logits.clone()
            code_mask = mask[:, : -(-self.size // 32)].to(logits.device)
            xgrammar.apply_token_bitmask_inplace(logits, code_mask.contiguous())
            return self.select(logits)

        return run


def grammar_of(codes: Tensor, size: int) -> Callable[[], Any]:
    """A call that compiles xgrammar's grammar of the rows of codes [N, L].

    One rule per prefix and one character per code. The tokens are the codes, and ``size`` for the end.
    """
    import xgrammar

    words = [chr(0x4E00 + code) for code in range(size)]
    below: dict[tuple[int, ...], set[int]] = {}
    levels = codes.shape[1]
    for row in codes.tolist():
        for level in range(levels):
            below.setdefault(tuple(row[:level]), set()).add(row[level])

    def name(prefix: tuple[int, ...]) -> str:
        return "x".join(["root", *map(str, prefix)])

    def alternative(prefix: tuple[int, ...], code: int) -> str:
        inner = len(prefix) + 1 < levels
        return f'"{words[code]}"' + (f" {name((*prefix, code))}" if inner else "")

    rules = "\n".join(
        f"{name(prefix)} ::= " + " | ".join(alternative(prefix, code) for code in sorted(following))
        for prefix, following in below.items()
    )
    kind = xgrammar.VocabType.RAW
    info = xgrammar.TokenizerInfo([*words, "</s>"], vocab_type=kind, stop_token_ids=[size])
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
    return lambda: compiler.compile_grammar(rules)


def flashrec_name(part: str) -> str:
    """The name of a peer of flashrec; its PyTorch code runs without CUDA or if its kernels do not build."""
    if missing_packages(["flashrec"]):
        return f"flashrec's {part}"
    from flashrec.kernel import try_load_beam_trie

    return f"flashrec's {part}" + ("" if try_load_beam_trie() else ", PyTorch")


def check(result: Sequence[Tensor], expected: BeamStep | MixedStep) -> None:
    """AssertionError if scores differ, or if parents or codes differ at a score that is not a tie."""
    scores, parents, codes = (part.to(expected.scores.device) for part in result[:3])
    torch.testing.assert_close(scores, expected.scores, rtol=0, atol=TOLERANCE)
    clear = separated(expected.scores, 2 * TOLERANCE)
    for name, ours, right in (("parents", parents, expected.parents), ("codes", codes, expected.codes)):
        assert torch.equal(ours[clear].long(), right[clear].long()), f"{name} differ"


def time_in_graph(run: Work, report: Report) -> Times | str:
    """The time of one step in a CUDA graph of ``STEPS_PER_GRAPH`` steps, or why there is no graph."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(STEPS_PER_GRAPH):
                run()
    except RuntimeError as error:
        return failure(error)
    taken = measure({"graph": graph.replay}, report.device, report.options.rounds, report.options.seconds)
    return Times(tuple(ms / STEPS_PER_GRAPH for ms in taken["graph"].samples))


def time_step(
    report: Report, case: StepCase, label: str, peers: Mapping[str, Callable[[], Work | str]],
    bandwidth: float, normalize: Normalize = "valid", filter: RequestFilter | None = None,
) -> None:  # fmt: skip
    """Times our step against the peers that ``peers`` build, on a GPU also in a CUDA graph."""
    backend = dispatch.choose("trie_beam_step", report.device).backend

    def ours(name: str = backend) -> BeamStep:
        return case.run(name, normalize, filter)

    expected = ours("reference")
    check(ours(), expected)
    runnable = {} if report.options.alone else {name: build_peer(make) for name, make in peers.items()}
    runnable = check_peers(runnable, lambda peer: check(peer(), expected))
    moved = case.needed_bytes(normalize)
    floor, equal = moved / bandwidth * 1e3, f"reference: scores within {TOLERANCE:.0e}, parents, codes"
    report.case(label, {backend: ours}, runnable, equal, floor, nbytes=moved,
                bytes_an_item=case.trie.nbytes / len(case.codes))  # fmt: skip
    if report.device.type == "cuda":
        name = f"{backend}, in a CUDA graph"
        report.add(label, name, time_in_graph(ours, report), {}, equal, floor, moved)
        report.write()


def one_step(report: Report, case: StepCase, label: str, bandwidth: float) -> None:
    """The step under "valid", against all peers."""
    peers = {
        "dict trie + transformers' processor": case.dict_trie,
        "marisa-trie": case.marisa,
        "xgrammar, one matcher per beam": case.grammar,
        "xgrammar's bitmask, the mask given": case.bitmask,
        flashrec_name("dense table"): case.flashrec,
    }
    time_step(report, case, label, peers, bandwidth)


def over_the_level(report: Report, case: StepCase, label: str, bandwidth: float) -> None:
    """The step with flashrec's normalization, against its fused kernel."""
    peers = {flashrec_name("fused step"): case.flashrec_fused}
    time_step(report, case, f"{label}, over the level", peers, bandwidth, "level")


def over_the_vocabulary(report: Report, case: StepCase, label: str, bandwidth: float) -> None:
    """The step with the log-sum-exp given, as the model's head computes it."""
    time_step(report, case, f"{label}, over the vocabulary", {}, bandwidth, "vocab")


def under_a_filter(report: Report, case: StepCase, label: str, bandwidth: float) -> None:
    """The step under "valid" with a filter per user."""
    if len(case.codes) > max(ITEMS):
        return  # drawing the items takes too long
    peers = {"dict tries of what is left, transformers' processor": case.dict_tries}
    time_step(report, case, f"{label}, under a filter", peers, bandwidth, filter=case.filter)


def under_a_prior(report: Report, case: StepCase, label: str, bandwidth: float) -> None:
    """The step under "valid" that mixes in a prior, against the step without one."""
    backend = dispatch.choose("trie_beam_step", report.device).backend
    check(case.run_mixed(backend), case.run_mixed("reference"))
    peers: dict[str, Work | str] = {"the step without a prior": lambda: case.run(backend)}
    moved = case.needed_bytes()
    report.case(f"{label}, under a prior", {backend: lambda: case.run_mixed(backend)}, peers,
                f"reference: scores within {TOLERANCE:.0e}, parents, codes", moved / bandwidth * 1e3,
                nbytes=moved)  # fmt: skip


def softmax(report: Report, case: StepCase, label: str, bandwidth: float) -> None:
    """The log-probabilities alone, against torch with a mask."""
    backend, nodes = dispatch.choose("trie_softmax", report.device).backend, case.nodes.flatten()
    allowed = case.trie.mask(nodes)

    def masked(mask: Tensor) -> Tensor:
        return case.flat_logits.masked_fill(~mask, float("-inf")).log_softmax(1)

    def ours(name: str) -> Tensor:
        return trie_softmax(case.flat_logits, nodes, case.trie, "valid", backend=name)

    expected = ours("reference")
    for result in (ours(backend), masked(allowed)):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)
    peers: dict[str, Work | str] = {
        "torch, the mask given": lambda: masked(allowed),
        "torch, the trie's mask": lambda: masked(case.trie.mask(nodes)),
    }
    peers = {} if report.options.alone else peers
    moved = case.needed_bytes() + expected.nbytes
    report.case(f"softmax, {label}", {backend: lambda: ours(backend)}, peers,
                f"reference within {TOLERANCE:.0e}", moved / bandwidth * 1e3, nbytes=moved,
                op="trie_softmax")  # fmt: skip


STEPS = (one_step, over_the_level, over_the_vocabulary, under_a_filter, under_a_prior, softmax)


def main() -> None:
    parser = make_parser(__doc__, rounds=15, seconds=6.0)
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS, help="catalog sizes, N")
    parser.add_argument("--users", type=int, nargs="+", default=USERS, help="users per batch, B")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="codes per level, K")
    parser.add_argument("--alone", action="store_true", help="time our steps without any peers")
    options = parser.parse_args()
    device = apply_options(options)
    report = Report("trie_step", options, device)
    bandwidth = copy_bandwidth(device)
    for size in options.sizes:
        for items in options.items:
            codes = random_codes(items, LEVELS, size)
            for users in options.users:
                case = StepCase(codes, size, device, users)
                label = f"K {size} N {items:.0e}" + (f" B {users}" if users > 1 else "")
                for run in STEPS:
                    run(report, case, label, bandwidth)
    report.finish()


if __name__ == "__main__":
    main()
