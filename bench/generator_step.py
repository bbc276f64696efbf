"""A training step of the generator, ours against the Hugging Face module, in float32 and bfloat16.

    python bench/generator_step.py [--threads 2] [--batch 64] [--json PATH]

A step is forward, loss over valid codes, backward, clipping and AdamW. The model is the decoder of
``configs/beauty.yaml``, and the catalog has 12,101 random items. Histories have 4, 7 or 14 items; 7 is the
mean length in Amazon Beauty, where an epoch has 350 steps of 64 histories. The losses are compared first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from harness import Report, Work, apply_options, make_parser

from cemg.generator import BackboneConfig, GeneratorConfig, Prompter, build_backbone
from cemg.generator.forward import PlainForward, forward_of
from cemg.generator.losses import CodeLoss, Predictions
from cemg.generator.samples import Batch, Samples
from cemg.precision import has_native_bfloat16
from cemg_kernels import Trie

LEVELS, SIZE, HISTORY = 4, 256, 20
MODEL = BackboneConfig(kind="scratch", architecture="llama", layers=4, dim=128, heads=4)
ALLOWED = {"float32": 1e-5, "bfloat16": 1e-2}  # relative errors of a loss


def make_codes(items: int) -> torch.Tensor:
    """Distinct random codes [N, L], as clustered as those of a residual quantizer: eight codes per prefix."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(SIZE, (2 * items, 2), generator=generator)
    deeper = torch.randint(8, (2 * items, LEVELS - 2), generator=generator)
    codes: torch.Tensor = torch.cat((first, (first.sum(1, keepdim=True) * 8 + deeper) % SIZE), 1).unique(
        dim=0
    )
    return codes[torch.randperm(len(codes), generator=generator)[:items]]


class Trainer:
    """Steps of one model on one batch."""

    def __init__(
        self, codes: torch.Tensor, trie: Trie, histories: list[np.ndarray], *, plain: bool, dtype: str
    ) -> None:
        torch.manual_seed(0)
        self.model, vocabulary = build_backbone(MODEL, LEVELS, SIZE, history_items=HISTORY)
        self.model.train()
        prompter = Prompter(vocabulary, codes, history_items=HISTORY, seq2seq=False)
        self.batch: Batch = Samples(prompter, histories).batch(range(len(histories)))
        self.forward: Callable[[Batch], Predictions] = (
            PlainForward(self.model, vocabulary, dtype)
            if plain
            else forward_of(self.model, vocabulary, dtype)
        )
        self.loss = CodeLoss(prompter.item_tokens, trie, vocabulary, GeneratorConfig(loss="valid"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def exact_loss(self) -> float:
        """The loss without dropout."""
        self.model.eval()
        value = self.loss(self.forward(self.batch), self.batch.targets).item()
        self.model.train()
        return value

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.forward(self.batch), self.batch.targets).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def one_length(
    report: Report, options: argparse.Namespace, codes: torch.Tensor, trie: Trie, length: int
) -> None:
    """Times histories of one length after comparing the losses."""
    draw = np.random.default_rng(0)
    histories = list(draw.integers(0, len(codes), (options.batch, length)).astype(np.int32))
    trainers = {
        (plain, dtype): Trainer(codes, trie, histories, plain=plain, dtype=dtype)
        for plain in (False, True)
        for dtype in ALLOWED
    }
    expected = trainers[True, "float32"].exact_loss()
    for (_, dtype), trainer in trainers.items():
        if abs(trainer.exact_loss() - expected) > ALLOWED[dtype] * expected:
            raise SystemExit(f"the {dtype} loss differs: run pytest tests/generator/test_forward.py")
    ours: dict[str, Work] = {dtype: trainers[False, dtype].step for dtype in ALLOWED}
    peers: dict[str, Work | str] = {f"module, {dtype}": trainers[True, dtype].step for dtype in ALLOWED}
    report.case(
        f"B{options.batch} T{length}", ours, peers, "the module's loss: 1e-5 in float32, 1e-2 in bfloat16"
    )


def main() -> None:
    parser = make_parser(__doc__, rounds=15, seconds=20.0)
    parser.add_argument("--batch", type=int, default=64, help="histories per step")
    parser.add_argument("--items", type=int, default=12_101, help="items of the catalog")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 7, 14], help="items per history")
    options = parser.parse_args()
    device = apply_options(options)
    if device.type != "cpu":
        raise SystemExit("the fast step is one for CPUs; leave out --device")
    if not has_native_bfloat16("cpu"):
        print("this CPU has no native bfloat16 support: float32 only")
        del ALLOWED["bfloat16"]
    report = Report("generator_step", options, device)
    codes = make_codes(options.items)
    trie = Trie.from_codes(codes, SIZE)
    for length in options.lengths:
        one_length(report, options, codes, trie, length)
    report.finish()


if __name__ == "__main__":
    main()
