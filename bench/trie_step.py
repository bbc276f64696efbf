"""One constrained step of beam search: mask, softmax, the best W, advance.

    python bench/trie_step.py [--items 10000 1000000] [--device cuda] [--json PATH] [--plot PATH]

Scores and logits are random, of one user and of eight; every beam stands on a random node of level 1.
"floor": the bytes of the logits and of the children's codes at the machine's copy bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from cells import random_catalog
from harness import Report, Work, arguments, copy_bandwidth, optional, start
from torch import Tensor

from cemg_kernels import Trie, dispatch, trie_beam_step

WIDTH, LEVELS = 50, 4
MOST_FOR_DICT = 10**6
MOST_FOR_GRAMMAR = 10**4  # two seconds to compile, ten times the items two hundred times as long


class Step:
    """W beams of each user after the first code, and the logits of the second."""

    def __init__(self, codes: Tensor, size: int, device: torch.device, users: int) -> None:
        self.codes, self.size, self.trie = codes, size, Trie.from_codes(codes, size).to(device)
        self.users, self.rows = users, users * WIDTH
        generator = torch.Generator().manual_seed(0)
        first = codes[:, 0].unique()
        first = first[torch.randperm(len(first), generator=generator)[: self.rows]]
        self.first = first.repeat(self.rows // len(first) + 1)[: self.rows]  # [B * W]
        self.nodes = self.trie.lookup(self.first[:, None].to(device)).view(users, WIDTH)
        self.logits = torch.randn(users, WIDTH, size, generator=generator).to(device)
        self.flat = self.logits.flatten(0, 1)  # [B * W, K]
        self.scores = -torch.rand(users, WIDTH, generator=generator).sort().values.to(device)

    def ours(self, backend: str) -> Work:
        return lambda: trie_beam_step(
            self.logits, self.scores, self.nodes, self.trie, WIDTH, "valid", backend=backend
        )

    def finish(self, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What every peer does after its mask [B * W, K]: log-softmax, add, the best W. Their scores, parents
        and codes [B, W]."""
        total = self.scores.flatten()[:, None] + masked.log_softmax(1).nan_to_num(nan=float("-inf"))
        scores, places = total.view(self.users, -1).topk(WIDTH)
        return scores, places // self.size, places % self.size

    def dict_trie(self) -> Work | str:
        """``PrefixConstrainedLogitsProcessor`` of transformers over nested dicts."""
        if len(self.codes) > MOST_FOR_DICT:
            return f"nested dicts of more than {MOST_FOR_DICT:.0e} items"
        from transformers import PrefixConstrainedLogitsProcessor

        from cemg.decoding import dict_trie

        root = dict_trie(self.codes)
        process = PrefixConstrainedLogitsProcessor(lambda _, tokens: list(root[int(tokens[-1])]), WIDTH)
        logits, tokens = self.flat.cpu(), self.first[:, None]
        return lambda: self.finish(process(tokens, logits).to(self.logits.device))

    def marisa(self) -> Work | str:
        """``marisa_trie.Trie`` over the codes as characters, asked for each beam's continuations."""
        missing = optional(["marisa-trie"])
        if missing or len(self.codes) > MOST_FOR_DICT:
            return missing or f"more than {MOST_FOR_DICT:.0e} items"
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

    def flashrec(self) -> Work | str:
        """flashrec's trie: a dense table of what may follow each node, looked up for every candidate.

        The table holds the first two levels alone, all that this step asks about: deeper ones would make it
        larger, not faster. Without CUDA its PyTorch code runs.
        """
        missing = optional(["flashrec"])
        if missing:
            return missing
        from flashrec.search.trie import build_trie_from_sequences

        pairs = self.codes[:, 0].long() * self.size + self.codes[:, 1]
        trie = build_trie_from_sequences([divmod(pair, self.size) for pair in pairs.unique().tolist()])
        trie.finalize_index(token_base=0, vocab_size=self.size)
        device = self.logits.device
        prefixes = self.first[:, None].long().to(device)
        nodes = trie.bootstrap_node_ids(prefixes, self.rows, 1, device)
        tokens = torch.arange(self.size, device=device).repeat(self.rows, 1)  # every code a candidate
        begins = torch.arange(self.users, device=device)[:, None] * WIDTH  # of a user's beams

        def run() -> tuple[Tensor, ...]:
            scores, parents, codes = self.finish(trie.mask_candidates(prefixes, tokens, self.flat, 1, nodes))
            grown = trie.advance_node_ids(nodes, (parents + begins).flatten(), codes.flatten())
            return scores, parents, codes, grown

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
            return missing or f"a grammar of more than {MOST_FOR_GRAMMAR:.0e} items"
        import xgrammar

        words = [chr(0x4E00 + code) for code in range(self.size)]  # a character a code
        below: dict[tuple[int, ...], set[int]] = {}
        for row in self.codes.tolist():
            for level in range(LEVELS):
                below.setdefault(tuple(row[:level]), set()).add(row[level])

        def name(prefix: tuple[int, ...]) -> str:
            return "x".join(["root", *map(str, prefix)])

        def goes_on(prefix: tuple[int, ...], code: int) -> str:
            more = len(prefix) + 1 < LEVELS
            return f'"{words[code]}"' + (f" {name((*prefix, code))}" if more else "")

        rules = [
            f"{name(prefix)} ::= " + " | ".join(goes_on(prefix, code) for code in sorted(codes))
            for prefix, codes in below.items()
        ]
        vocabulary = [*words, "</s>"]
        info = xgrammar.TokenizerInfo(
            vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[self.size]
        )
        compiled = xgrammar.GrammarCompiler(info).compile_grammar("\n".join(rules))
        parents = [xgrammar.GrammarMatcher(compiled) for _ in range(self.rows)]
        mask = xgrammar.allocate_token_bitmask(self.rows, len(vocabulary))
        chosen = self.first.tolist()

        def run() -> tuple[Tensor, ...]:
            for row, (parent, code) in enumerate(zip(parents, chosen, strict=True)):
                beam = parent.fork()
                beam.accept_token(code)
                beam.fill_next_token_bitmask(mask, row)
            logits = self.flat.clone()
            xgrammar.apply_token_bitmask_inplace(logits, mask[:, : -(-self.size // 32)].contiguous())
            return self.finish(logits)

        return run


def one_step(report: Report, items: int, size: int, users: int, bandwidth: float) -> None:
    codes = random_catalog(items, LEVELS, size).codes
    step = Step(codes, size, report.device, users)
    backends = [dispatch.choose("trie_beam_step", report.device).backend]
    wanted = trie_beam_step(step.logits, step.scores, step.nodes, step.trie, WIDTH, "valid",
                            backend="reference")  # fmt: skip
    ours = {backend: step.ours(backend) for backend in backends}
    peers: dict[str, Work | str] = {
        "dict trie + transformers' processor": step.dict_trie(),
        "marisa-trie": step.marisa(),
        "xgrammar, a matcher a beam": step.grammar(),
        "xgrammar's bitmask, the mask given": step.bitmask(),
        "flashrec's dense table": step.flashrec(),
    }
    for run in ours.values():
        torch.testing.assert_close(run().scores, wanted.scores, rtol=0, atol=1e-5)
    for name, peer in peers.items():
        if not isinstance(peer, str):
            try:
                found: Any = peer()
                torch.testing.assert_close(found[0], wanted.scores, rtol=0, atol=1e-5)
            except (AssertionError, RuntimeError, TypeError) as error:
                peers[name] = f"failed: {str(error).splitlines()[0][:80]}"
    children = int(step.trie.mask(step.nodes.flatten()).sum())
    moved = step.logits.nbytes + children * step.trie.arrays.code.element_size()
    label = f"K {size} N {items:.0e}" + (f" B {users}" if users > 1 else "")
    report.case(label, ours, peers, "reference, scores within 1e-5",
                moved / bandwidth * 1e3, nbytes=moved,
                bytes_an_item=step.trie.nbytes / items)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=15, seconds=6.0)
    parser.add_argument("--items", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    device = start(options)
    report = Report("trie_step", options, device)
    bandwidth = copy_bandwidth(device)
    for size in (256, 2048):
        for items in options.items:
            for users in options.users:
                one_step(report, items, size, users, bandwidth)
    report.finish()


if __name__ == "__main__":
    main()
