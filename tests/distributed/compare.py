"""Trains on several processes and, in the main one, alone, and compares the losses of each step.

``torchrun --nproc_per_node 4 tests/distributed/compare.py OUT [CASE …]`` writes the largest differences to
OUT (JSON). ``… compare.py OUT killed FOLDER STEP`` trains one generator with checkpoints in FOLDER and writes
the losses. The last process kills itself in this step, unless it was restarted. ``killed graph FOLDER STEP``
and ``killed tokenizer FOLDER STEP`` train it again without an interruption, and write both losses and whether
the results are equal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cemg.distributed import ALONE, World
from cemg.generator import BackboneConfig, GeneratorConfig, Prompter, build_backbone, weights_of
from cemg.generator.item_tokens import add_item_embedding
from cemg.generator.samples import Samples
from cemg.generator.training import train_generator
from cemg.graph import GraphConfig, lightgcn
from cemg.graph.lightgcn import train_lightgcn
from cemg.storage.checkpoint import Checkpoint
from cemg.tokenizer import RQVAE, Catalog, TokenizerConfig
from cemg.tokenizer.training import train_tokenizer

USERS, ITEMS, LEVELS, SIZE = 60, 96, 3, 5
CATALOG = Catalog.from_codes(torch.cartesian_prod(*[torch.arange(SIZE)] * LEVELS)[:ITEMS], SIZE)
GPT2 = BackboneConfig(layers=2, dim=16, heads=2, dropout=0.0)
LLAMA = replace(GPT2, architecture="llama", dropout=0.2)
T5 = BackboneConfig(kind="t5", layers=1, dim=16, heads=2, head_dim=8, dropout=0.2)
PLAIN = GeneratorConfig(
    history_items=6, batch_size=16, epochs=20, learning_rate=3e-3, validate_every=10, checkpoint_seconds=1000
)
VALID = replace(PLAIN, loss="valid", item_tokens=True, item_loss=0.5, label_smoothing=0.1, crop=0.3)
ITEM_TOKENS = replace(VALID, item_loss=0.0)
GENERATORS: dict[str, tuple[BackboneConfig, GeneratorConfig, bool, bool]] = {
    # backbone, training, whether the process alone computes the same parts, whether weights are divided
    "gpt2": (GPT2, PLAIN, False, False),
    "llama with dropout": (LLAMA, VALID, True, False),
    "t5 with dropout": (T5, replace(PLAIN, epochs=4), True, False),
    "llama, checkpointed": (LLAMA, replace(VALID, gradient_checkpointing=True), True, False),
    "gpt2, divided": (GPT2, replace(PLAIN, epochs=6), False, True),
    "gpt2 with dropout, divided, two steps each": (
        replace(GPT2, dropout=0.2), replace(VALID, epochs=6, accumulation_steps=2), True, True
    ),
    "untied llama, divided": (
        replace(LLAMA, dropout=0.0, tied=False), replace(ITEM_TOKENS, epochs=6), False, True
    ),
}  # fmt: skip
TOKENIZERS: dict[str, dict[str, Any]] = {
    "tokenizer": {},
    "tokenizer, h": {"recon_target": "h"},
    "tokenizer, letter": {"collab_loss": 0.1, "diversity_kind": "clusters", "clusters": 3},
}
CASES = ("graph", *TOKENIZERS, *GENERATORS)
Losses = list[dict[str, float]]
Train = Callable[[World], tuple[Losses, torch.Tensor]]


def histories() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, ITEMS, draw.integers(4, 9)).astype(np.int32) for _ in range(USERS)]


def graph(world: World, checkpoint: Checkpoint | None = None) -> tuple[Losses, torch.Tensor]:
    """LightGCN: 100 epochs of three or four steps, of columns that the processes divide unevenly."""
    losses: Losses = []
    config = GraphConfig(dim=9, layers=2, epochs=100, batch_size=128)
    made = train_lightgcn(
        histories(), ITEMS, config=config, log=lambda _, values: losses.append(values), world=world,
        checkpoint=checkpoint,
    )  # fmt: skip
    return losses, made.values


def tokenizer(
    world: World, checkpoint: Checkpoint | None = None, **values: Any
) -> tuple[Losses, torch.Tensor]:
    """RQ-VAE: 100 steps; the last batch of an epoch has a row that not every process gets."""
    draw, losses = torch.Generator().manual_seed(0), list[dict[str, float]]()
    features = {
        k: torch.randn(ITEMS + 1, w, generator=draw) for k, w in (("image", 6), ("text", 5), ("collab", 4))
    }
    present = {k: torch.rand(ITEMS + 1, generator=draw) < 0.8 for k in features}
    config = TokenizerConfig(
        levels=2,
        codebook_size=8,
        dim=8,
        latent=4,
        hidden=(16,),
        epochs=25,
        batch_size=32,
        reseed_every=5,
        **values,
    )
    made = train_tokenizer(
        features, present, config=config, log=lambda _, values: losses.append(values), world=world,
        checkpoint=checkpoint,
    )  # fmt: skip
    return losses, made.model.codebooks.detach()


def generator(
    world: World, backbone: BackboneConfig, config: GeneratorConfig, *, folder: Path
) -> tuple[Losses, torch.Tensor]:
    """A generator, and the sums of its weights; 20 epochs of a decoder are 100 steps."""
    torch.manual_seed(0)
    model, vocabulary = build_backbone(backbone, LEVELS, SIZE, history_items=6)
    if config.item_tokens:
        add_item_embedding(model, ITEMS)
        vocabulary = replace(vocabulary, items=ITEMS)
    if not world.main:  # which main's weights replace
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    prompter = Prompter(vocabulary, CATALOG.codes, history_items=6, seq2seq=model.config.is_encoder_decoder)
    losses: Losses = []

    def log(step: int, values: dict[str, float]) -> None:
        losses.append(values | {"step": step})

    scores = count()  # the last validation is the best
    train_generator(
        model, vocabulary, prompter, histories(), CATALOG.trie, validate=lambda _: float(next(scores)),
        config=config, folder=folder, log=log if world.main else None, world=world,
    )  # fmt: skip
    return losses, torch.stack([p.double().sum() for p in weights_of(model).values()])


def resumable(world: World, folder: Path, *, accumulation_steps: int = 1, die_at: int = -1) -> Losses:
    """Losses of a generator that writes a checkpoint after each step."""
    config = replace(VALID, checkpoint_seconds=0, accumulation_steps=accumulation_steps)
    if die_at >= 0:
        die_in(die_at)
    return generator(world, LLAMA, config, folder=folder)[0]


def die_in(step: int, owner: Any = Samples, name: str = "batch") -> None:
    """Kill this process in a step, counted from 0, by the calls of a function."""
    function, made = getattr(owner, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        made[0] += 1
        if made[0] > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, counted)


def killed_stage(world: World, name: str, folder: Path, *, die_at: int) -> dict[str, Any]:
    """Losses of a training that was killed, and of one that was not; whether their results are equal."""
    train = {"graph": graph, "tokenizer": partial(tokenizer, **TOKENIZERS["tokenizer, letter"])}[name]
    if die_at >= 0:
        die_in(die_at, *{"graph": (lightgcn, "_step"), "tokenizer": (RQVAE, "forward")}[name])
    checkpoint = Checkpoint(folder, stage=name, identity="", seconds=0) if world.main else None
    losses, final = train(world, checkpoint)
    whole, whole_final = train(world)
    return {"resumed": losses, "whole": whole, "equal": torch.equal(final, whole_final)}


def difference(world: World, train: Train, alone: Train, *, exact: bool = False) -> float:
    """The largest difference of a loss between all processes and the main one alone.

    With ``exact``, final values count too. Others differ without an effect on the losses: Adam scales a
    gradient that is nothing but rounding like any other.
    """
    losses, final = train(world)
    if not world.main:
        return 0.0
    expected, expected_final = alone(ALONE)
    assert [row.keys() for row in losses] == [row.keys() for row in expected]
    pairs = [
        (row[k], other[k])
        for row, other in zip(losses, expected, strict=True)
        for k in other
        if k != "rqvae/explained_h"  # a quotient of two numbers that both become 0
    ]
    if exact:
        pairs += zip(final.flatten().tolist(), expected_final.flatten().tolist(), strict=True)
    return max(abs(one - other) for one, other in pairs)


def compared(world: World, name: str, folder: Path) -> float:
    """The difference in one of CASES."""
    world.sharded = False
    if name == "graph":
        return difference(world, graph, graph, exact=True)
    if name in TOKENIZERS:
        train = partial(tokenizer, **TOKENIZERS[name])
        return difference(world, train, train, exact=True)
    backbone, config, same_parts, world.sharded = GENERATORS[name]
    steps = config.accumulation_steps * (world.size if same_parts else 1)
    alone = replace(config, accumulation_steps=steps, gradient_checkpointing=False)
    return difference(
        world,
        partial(generator, backbone=backbone, config=config, folder=folder / name),
        partial(generator, backbone=backbone, config=alone, folder=folder / f"{name}, alone"),
        exact=same_parts and not world.sharded,
    )


def main() -> None:
    torch.set_num_threads(1)
    out, world = Path(sys.argv[1]), World.join("cpu")
    if sys.argv[2:3] == ["killed"]:
        dies = world.rank == world.size - 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        *names, folder, step = sys.argv[3:]
        resume = partial(killed_stage, world, *names) if names else partial(resumable, world)
        found: Any = resume(Path(folder), die_at=int(step) if dies else -1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = {name: compared(world, name, Path(folder)) for name in sys.argv[2:] or CASES}
    if world.main:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
