"""One constrained step of beam search: mask, softmax, the best W, advance; and building the trie.

    python bench/trie_step.py [--items 10000 1000000] [--device cuda] [--json PATH] [--plot PATH]

Scores and logits are random; every beam stands on a random node of level 1. "floor": the bytes of the logits
and of the children's codes at the machine's copy bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from engines import random_catalog
from harness import Report, Work, arguments, copy_bandwidth, optional, start
from torch import Tensor

from cemg_kernels import Trie, dispatch, trie_beam_step

WIDTH, LEVELS = 50, 4
MOST_FOR_DICT = 10**6


class Step:
    """One user's W beams after the first code, and the logits of the second."""

    def __init__(self, codes: Tensor, size: int, device: torch.device) -> None:
        self.codes, self.size, self.trie = codes, size, Trie.from_codes(codes, size).to(device)
        generator = torch.Generator().manual_seed(0)
        first = codes[:, 0].unique()
        first = first[torch.randperm(len(first), generator=generator)[:WIDTH]]
        self.first = first.repeat(WIDTH // len(first) + 1)[:WIDTH]  # [W]
        self.nodes = self.trie.lookup(self.first[:, None].to(device))[None].contiguous()
        self.logits = torch.randn(1, WIDTH, size, generator=generator).to(device)
        self.scores = -torch.rand(1, WIDTH, generator=generator).sort().values.to(device)

    def ours(self, backend: str) -> Work:
        return lambda: trie_beam_step(
            self.logits, self.scores, self.nodes, self.trie, WIDTH, "valid", backend=backend
        )

    def finish(self, masked: Tensor) -> Tensor:
        """What every peer does after its mask [W, K]: log-softmax, add, the best W. Their scores."""
        total = self.scores[0, :, None] + masked.log_softmax(1).nan_to_num(nan=float("-inf"))
        return total.flatten().topk(WIDTH).values

    def dict_trie(self) -> Work | str:
        """``PrefixConstrainedLogitsProcessor`` of transformers over nested dicts."""
        if len(self.codes) > MOST_FOR_DICT:
            return f"nested dicts of more than {MOST_FOR_DICT:.0e} items"
        from transformers import PrefixConstrainedLogitsProcessor

        from cemg.decoding import dict_trie

        root = dict_trie(self.codes)
        process = PrefixConstrainedLogitsProcessor(lambda _, tokens: list(root[int(tokens[-1])]), WIDTH)
        logits, tokens = self.logits[0].cpu(), self.first[:, None]
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

        def run() -> Tensor:
            mask = torch.full((WIDTH, self.size), float("-inf"))
            for beam, first in enumerate(self.first.tolist()):
                legal = {ord(word[1]) - shift for word in trie.iterkeys(chr(shift + first))}
                places = list(legal)
                mask[beam, places] = 0
            return self.finish(self.logits[0] + mask.to(self.logits.device))

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
        nodes = trie.bootstrap_node_ids(prefixes, WIDTH, 1, device)
        tokens = torch.arange(self.size, device=device).repeat(WIDTH, 1)  # [W, K]: every code a candidate
        return lambda: self.finish(trie.mask_candidates(prefixes, tokens, self.logits[0], 1, nodes))

    def bitmask(self) -> Work | str:
        """xgrammar's kernel that applies a ready bitmask: the mask's computation is not counted."""
        missing = optional(["xgrammar"])
        if missing:
            return missing
        import xgrammar

        mask = xgrammar.allocate_token_bitmask(WIDTH, self.size)
        allowed = self.trie.mask(self.nodes[0]).cpu()
        for beam in range(WIDTH):
            for word in range(mask.shape[1]):
                bits = allowed[beam, word * 32 : word * 32 + 32].tolist()
                value = sum(1 << i for i, bit in enumerate(bits) if bit)
                mask[beam, word] = value - (1 << 32) if value >= 1 << 31 else value
        mask = mask.to(self.logits.device)

        def run() -> Tensor:
            logits = self.logits[0].clone()
            xgrammar.apply_token_bitmask_inplace(logits, mask)
            return self.finish(logits)

        return run


def one_step(report: Report, items: int, size: int, bandwidth: float) -> None:
    codes = random_catalog(items, LEVELS, size).codes
    step = Step(codes, size, report.device)
    backends = [dispatch.choose("trie_beam_step", report.device).backend]
    wanted = trie_beam_step(step.logits, step.scores, step.nodes, step.trie, WIDTH, "valid",
                            backend="reference").scores[0]  # fmt: skip
    ours = {backend: step.ours(backend) for backend in backends}
    peers: dict[str, Work | str] = {
        "dict trie + transformers' processor": step.dict_trie(),
        "marisa-trie": step.marisa(),
        "xgrammar bitmask (mask given)": step.bitmask(),
        "flashrec's dense table": step.flashrec(),
    }
    for run in ours.values():
        torch.testing.assert_close(run().scores[0], wanted, rtol=0, atol=1e-5)
    for name, peer in peers.items():
        if not isinstance(peer, str):
            try:
                found: Any = peer()
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            except (AssertionError, RuntimeError, TypeError) as error:
                peers[name] = f"failed: {str(error).splitlines()[0][:80]}"
    children = int(step.trie.mask(step.nodes[0]).sum())
    moved = step.logits.nbytes + children * step.trie.arrays.code.element_size()
    report.case(f"K {size} N {items:.0e}", ours, peers, "reference, scores within 1e-5",
                moved / bandwidth * 1e3, nbytes=moved,
                bytes_an_item=step.trie.nbytes / items)  # fmt: skip


def build(report: Report, items: int, size: int) -> None:
    """From shuffled codes to a trie, sorting included."""
    codes = random_catalog(items, LEVELS, size).codes.to(torch.int32).to(report.device)
    ours: dict[str, Work] = {"native": lambda: Trie.from_codes(codes, size, device=report.device)}
    peers: dict[str, Work | str] = {"nested dicts": f"more than {MOST_FOR_DICT:.0e} items"}
    if items <= MOST_FOR_DICT:
        from cemg.decoding import dict_trie

        rows = codes.cpu()
        root = dict_trie(rows)
        sample = rows[:1000].long()
        assert all(int(row[3]) in root[int(row[0])][int(row[1])][int(row[2])] for row in sample)
        trie = Trie.from_codes(codes, size)
        assert torch.equal(trie.items(trie.lookup(sample)).cpu(), torch.arange(len(sample)))
        peers["nested dicts"] = lambda: dict_trie(rows)
    report.case(f"build K {size} N {items:.0e}", ours, peers, "1,000 rows looked up", nbytes=codes.nbytes)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=15, seconds=6.0)
    parser.add_argument("--items", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    options = parser.parse_args()
    device = start(options)
    report = Report("trie_step", options, device)
    bandwidth = copy_bandwidth(device)
    for size in (256, 2048):
        for items in options.items:
            one_step(report, items, size, bandwidth)
    for items in options.items:
        if items >= 10**6:
            build(report, items, 256)
    report.finish()


if __name__ == "__main__":
    main()
