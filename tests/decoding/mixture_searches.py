"""Random searches under an item prior, against brute force over the whole catalog.

    python -m tests.decoding.mixture_searches --searches 100000 --backend native

Each draw has a random trie of 1 to 4 levels, random logits of every prefix, a batch of prompts, a prior and a
weight per prompt, a filter and a normalisation. It counts as one search per prompt, by ``decode`` and by
``decode_exact``; ``score_all`` is compared too. Two items whose scores differ by less than ``TOLERANCE`` may
change places. The backend "model" searches with a tiny T5 instead, in one C++ call where that exists. Prints
the counts, and exits with 1 if a score, a certified result or an exact result is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from cemg.decoding import Decoder, Recommendations, score_all
from cemg.decoding.protocol import DecoderPlan, Logits, LogitsRequest
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, ItemPrior, RequestFilter, trie_beam_step
from cemg_kernels.trie.filter_tensors import Filter

from . import conftest

TOLERANCE = 8 * 2**-18  # four sums of float32 below 128, with two roundings each
NEG_INF = float("-inf")
WRONG = ("wrong", "wrong_exact", "wrong_scores")
WEIGHTS = (0.0, 1e-9, 1e-3, 0.5, 0.5, 0.7, 1 - 1e-9, 1.0)


@dataclass
class TableState:
    """Logits by table: of level m, those of prefix p after prompt b are ``tables[m][b, p]``."""

    tables: list[Tensor]
    extra: Tensor
    prompts: Tensor = field(default_factory=lambda: torch.empty(0))
    prefixes: Tensor = field(default_factory=lambda: torch.empty(0))
    level: int = 0

    def prefill(
        self, input_ids: Tensor, mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        self.prompts = input_ids[:, 0]
        self.reset_to_prefill()
        return self._logits(request)

    def reset_to_prefill(self) -> None:
        self.prefixes, self.level = torch.zeros(len(self.prompts), 1, dtype=torch.int64), 0

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        size = self.tables[0].shape[2]
        codes = (tokens - self.level * size).clamp(0, size - 1)  # dead beams have any token
        self.prefixes = self.prefixes.gather(1, parents) * size + codes
        self.level += 1
        return self._logits(request)

    def _logits(self, request: LogitsRequest) -> Logits:
        values = self.tables[self.level][self.prompts[:, None], self.prefixes]
        if request.rows is not None:  # logits of the others are arbitrary
            values = torch.where(request.rows[..., None], values, torch.randn_like(values))
        total = torch.logaddexp(values.logsumexp(-1), self.extra) if request.logsumexp else None
        return Logits(values, total)


class TablePlan(DecoderPlan):
    """A stand-in for a model."""

    uses_model_forward: ClassVar[bool] = True

    def __init__(self, tables: list[Tensor], extra: Tensor) -> None:
        self.tables, self.extra = tables, extra

    def new_state(self) -> TableState:
        return TableState(self.tables, self.extra)


class Device:
    """A stand-in for a model's device."""

    device = torch.device("cpu")


def table_decoder(catalog: Catalog, normalize: Any, tables: list[Tensor], extra: Tensor) -> Decoder:
    decoder = object.__new__(Decoder)
    model: Any = Device()
    decoder.model, decoder.catalog, decoder.normalize, decoder.trie = model, catalog, normalize, catalog.trie
    decoder.tokens, decoder.causal, decoder.graphs = catalog.code_tokens(0), False, None
    decoder.plan, decoder.path = TablePlan(tables, extra), "tables"
    return decoder


def random_catalog(rng: random.Random) -> Catalog:
    levels, size = rng.randint(1, 4), rng.randint(1, 6)
    most = size**levels
    rows = rng.sample(range(most), rng.randint(1, min(most, 120)))
    codes = torch.tensor(rows)[:, None] // size ** torch.arange(levels - 1, -1, -1) % size
    return Catalog.from_codes(codes, size)


def random_tables(
    catalog: Catalog, prompts: int, *, normalize: str, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Some codes have the probability 0; under "valid" almost: a prefix with one item has 1."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for level in range(catalog.levels):
        shape = prompts, catalog.codebook_size**level, catalog.codebook_size
        table = torch.randn(shape, generator=generator) * 3
        none = torch.rand(shape, generator=generator) < 0.1
        tables.append(table.masked_fill(none, -12.0 if normalize == "valid" else NEG_INF))
    return tables, torch.randn((), generator=generator)


def random_prior(rng: random.Random, items: int, prompts: int) -> ItemPrior:
    """Masses down to 1e-8 of the largest; a few requests have none."""
    drawn = np.random.default_rng(rng.randrange(2**32))
    counts = [0 if rng.random() < 0.05 else rng.randint(1, min(items, 40)) for _ in range(prompts)]
    chosen = [drawn.choice(items, count, replace=False) for count in counts]
    return ItemPrior(chosen, [10.0 ** (-8 * drawn.random(count)) for count in counts])


def random_filter(rng: random.Random, catalog: Catalog, prompts: int) -> Filter | None:
    trie, items = catalog.trie, len(catalog)

    def one() -> ItemFilter:
        return ItemFilter.from_mask(trie, torch.tensor([rng.random() < 0.7 for _ in range(items)]))

    kind = rng.choice(("none", "one", "excluded", "both"))
    if kind in ("none", "one"):
        return one() if kind == "one" else None
    left_out = [rng.sample(range(items), rng.randint(0, min(items, 9))) for _ in range(prompts)]
    excluded = RequestFilter.excluding(trie, left_out)
    return excluded if kind == "excluded" else excluded & one()


def allowed_items(filter: Filter | None, catalog: Catalog, prompts: int) -> Tensor:
    """Which items pass, by catalog row: bool [B, N]."""
    if filter is None:
        return torch.ones(prompts, len(catalog), dtype=torch.bool)
    nodes = catalog.trie.lookup(catalog.codes).repeat(prompts)
    return (catalog.trie.items(nodes, filter=filter) >= 0).view(prompts, -1)


def generator_scores(
    catalog: Catalog, normalize: str, tables: list[Tensor], extra: Tensor, allowed: Tensor
) -> Tensor:
    """The generator's scores of all items by teacher forcing, float64 [B, N]."""
    size, codes = catalog.codebook_size, catalog.codes
    total = torch.zeros(allowed.shape, dtype=torch.float64)
    for level, table in enumerate(tables):
        prefix = (codes[:, :level] * size ** torch.arange(level - 1, -1, -1)).sum(1)
        logits = table[:, prefix].double()  # [B, N, K]
        if normalize == "valid":
            same = prefix[:, None] == prefix[None]  # [N, N]
            has_code = torch.nn.functional.one_hot(codes[:, level], size).bool()
            legal = (same[None, :, :, None] & has_code[None, None] & allowed[:, None, :, None]).any(2)
            logits = logits.masked_fill(~legal, NEG_INF)
        norm = logits.logsumexp(-1)
        norm = torch.logaddexp(norm, extra.double()) if normalize == "vocab" else norm
        own = logits.gather(2, codes[None, :, level, None].expand(len(table), -1, -1))[..., 0]
        total += torch.where(norm == NEG_INF, NEG_INF, own - norm)
    return total


def mixture(generator: Tensor, prior: ItemPrior, weights: list[float], allowed: Tensor) -> Tensor:
    """The definition, in float64: [B, N]."""
    mass = torch.zeros_like(generator)
    begin = 0
    for row, count in enumerate(prior.counts.tolist()):
        own = slice(begin, begin + count)
        mass[row, torch.from_numpy(prior.items[own])] = torch.from_numpy(prior.mass[own])
        begin += count
    mass = mass * allowed
    total = mass.sum(1, keepdim=True)
    weight = torch.tensor(weights, dtype=torch.float64)[:, None] * (total > 0)
    generator = generator.masked_fill(~allowed, NEG_INF)
    return torch.logaddexp(
        torch.log1p(-weight) + generator, weight.log() + (mass / total.clamp_min(1e-300)).log()
    )


def wrong_rows(found: Recommendations, expected: Tensor, counts: Tensor) -> Tensor:
    """Which rows have a wrong score, or do not lead with ``counts`` [B] items of the true top: bool [B]."""
    exists = found.items >= 0
    true = expected.gather(1, found.items.clamp_min(0)).masked_fill(~exists, NEG_INF)
    both = exists & (true > NEG_INF)
    off = both & ((found.scores.double() - true).abs() > TOLERANCE)
    impossible = exists & (true == NEG_INF)
    best = expected.topk(min(expected.shape[1], found.items.shape[1]), dim=1).values
    best = torch.nn.functional.pad(best, (0, found.items.shape[1] - best.shape[1]), value=NEG_INF)
    leading = torch.arange(found.items.shape[1]) < counts[:, None]
    misplaced = leading & ~((true >= best - TOLERANCE) | ((best == NEG_INF) & ~exists))
    return (off | impossible | misplaced).any(1)


def count_wrong(seed: int, prompts: int, backend: str) -> dict[str, int]:
    """Runs one draw and returns its numbers of searches, certified results, and wrong results."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    catalog, normalize = random_catalog(rng), rng.choice(("vocab", "level", "valid"))
    tables, extra = random_tables(catalog, prompts, normalize=normalize, seed=seed)
    decoder = table_decoder(catalog, normalize, tables, extra)
    filter = random_filter(rng, catalog, prompts)
    allowed = allowed_items(filter, catalog, prompts)
    generator = generator_scores(catalog, normalize, tables, extra, allowed)

    def step(*arguments: Any, **options: Any) -> Any:
        return trie_beam_step(*arguments, **options, backend=backend)

    with patch("cemg.decoding.engine.trie_beam_step", step):
        ids = torch.arange(prompts)[:, None]
        return compare(rng, decoder, (ids, torch.ones_like(ids)), filter, allowed, generator)


def compare(
    rng: random.Random, decoder: Decoder, batch: tuple[Tensor, Tensor], filter: Filter | None,
    allowed: Tensor, generator: Tensor,
) -> dict[str, int]:  # fmt: skip
    prompts, items = allowed.shape
    prior = random_prior(rng, items, prompts)
    weights = [rng.choice(WEIGHTS) for _ in range(prompts)]
    expected = mixture(generator, prior, weights, allowed)
    beams = rng.randint(1, 8)
    top = rng.randint(1, beams)
    options: Any = {"filter": filter, "prior": prior, "prior_weight": weights}
    found = decoder.decode(*batch, beams, **options)
    exact = decoder.decode_exact(*batch, top, beams, **options)
    proven = exact.certified >= (exact.items >= 0).sum(1)
    scores = score_all(decoder, *batch, **options).double()
    equal = torch.isclose(scores, expected, rtol=0, atol=TOLERANCE)  # also if both are -inf
    wrong = wrong_rows(found, expected, found.certified)
    wrong_exact = wrong_rows(exact, expected, torch.where(proven, top, exact.certified))
    return {
        "searches": prompts, "certified": int(found.certified.sum()), "proven": int(proven.sum()),
        "wrong": int(wrong.sum()), "wrong_exact": int(wrong_exact.sum()),
        "wrong_scores": int((~equal).any(1).sum()),
    }  # fmt: skip


def run(searches: int, backend: str, seed: int, prompts: int = 32) -> dict[str, int]:
    """Runs draws until there are as many searches; returns the sums of their counts."""
    counts: dict[str, int] = {}
    draw = count_model_wrong if backend == "model" else count_wrong
    while counts.get("searches", 0) < searches:
        one = draw(seed, prompts, backend)
        counts = {name: counts.get(name, 0) + value for name, value in one.items()}
        if any(one[name] for name in WRONG):
            print(f"wrong: --seed {seed} {one}", file=sys.stderr)
        seed += 1
    return counts


def count_model_wrong(seed: int, prompts: int, backend: str) -> dict[str, int]:
    """The same with a tiny T5, whose ``score_all`` without prior gives the generator's scores."""
    rng = random.Random(seed)
    model = MODELS["t5"] = MODELS.get("t5") or conftest.make_model("t5")
    catalog = conftest.random_catalog(rng.randint(1, 120), seed)
    decoder = Decoder(model, catalog, conftest.START, rng.choice(("vocab", "level", "valid")), check=False)
    filter = random_filter(rng, catalog, prompts)
    allowed = allowed_items(filter, catalog, prompts)
    ids = torch.tensor(
        [[rng.randrange(conftest.START, conftest.VOCABULARY) for _ in range(4)] for _ in range(prompts)]
    )
    batch = ids, torch.ones_like(ids)
    generator = score_all(decoder, *batch, filter=filter).double()
    return compare(rng, decoder, batch, filter, allowed, generator)


MODELS: dict[str, Any] = {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--searches", type=int, default=100_000)
    parser.add_argument("--backend", default="native", help="native, torch, reference, triton or model")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = run(given.searches, given.backend, given.seed)
    print(json.dumps(counts))
    sys.exit(any(counts[name] for name in WRONG))


if __name__ == "__main__":
    main()
