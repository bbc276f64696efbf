"""Calls every public function of ``cemg_kernels`` with random arguments, in C++ and in PyTorch.

    python tests/kernels/boundary_draws.py --seed 0 --count 50

Each draw starts from valid arguments and changes up to two of them: shape, dtype, stride, range, device,
layout or type. C++ must return what the reference returns, or both must raise ValueError or TypeError
(UserError is a ValueError). Each draw is written to stderr before it runs, so that a crash can be repeated
with ``--call NAME --seed S --count 1``. The environment variable ``CEMG_NATIVE`` names another build of the
module. Prints the counts of each call as JSON, and exits with 1 if a draw failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from boundary_changes import INTEGERS, changed
from torch import Tensor

if os.environ.get("CEMG_NATIVE"):  # another build of the module, such as one under AddressSanitizer
    spec = importlib.util.spec_from_file_location("cemg_kernels._native", os.environ["CEMG_NATIVE"])
    assert spec is not None and spec.loader is not None
    sys.modules["cemg_kernels._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cemg_kernels._native"])

from cemg_kernels import (
    BipartiteGraph,
    ItemFilter,
    ItemPrior,
    LiveTrie,
    RequestFilter,
    Trie,
    backends,
    lightgcn_propagate,
    residual_quantize,
    trie_beam_step,
    trie_softmax,
    use_fast_kernels,
)
from cemg_kernels.constrained.prior import PriorTensors

REJECTIONS = (ValueError, TypeError)
Arguments = dict[str, Any]
Case = Callable[[random.Random], tuple[Arguments, Callable[[Arguments], Any]]]
CALLS: dict[str, Case] = {}
ITEMS, LEVELS, SIZE = 40, 3, 6


def call(name: str) -> Callable[[Case], Case]:
    def register(case: Case) -> Case:
        CALLS[name] = case
        return case

    return register


def numbers(rng: random.Random, high: int, *shape: int, low: int = 0) -> Tensor:
    drawn = [rng.randrange(low, high) for _ in range(int(np.prod(shape)))]
    return torch.tensor(drawn, dtype=torch.int64).view(*shape)


def reals(rng: random.Random, *shape: int) -> Tensor:
    drawn = [rng.gauss(0, 3) for _ in range(int(np.prod(shape)))]
    return torch.tensor(drawn, dtype=torch.float32).view(*shape)


def made_trie(seed: int = 0, ids: bool = False) -> Trie:
    every = torch.cartesian_prod(*[torch.arange(SIZE)] * LEVELS)
    codes = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:ITEMS]]
    return Trie.from_codes(codes, SIZE, torch.arange(ITEMS) * 3 + 1 if ids else None)


TRIES = made_trie(), made_trie(0, True)
OTHER = made_trie(1)


def any_filter(rng: random.Random, trie: Trie, rows: int) -> Any:
    """None, a filter of the trie, or something that is not one."""
    requests = rng.choice((1, 2, rows)) if rows else 1
    one = ItemFilter.from_mask(trie, numbers(rng, 2, ITEMS).bool())
    return rng.choice((
        None, None, one, ItemFilter.everything(trie), ~one,
        ItemFilter.stack([rng.choice((None, one)) for _ in range(requests)] + [one])
        if requests > 1 else ItemFilter.stack([one]),
        RequestFilter.excluding(trie, numbers(rng, 3 * ITEMS, requests, 4)),
        ItemFilter.everything(OTHER), RequestFilter.excluding(OTHER, [[1]] * requests), one.open, "all",
    ))  # fmt: skip


def left_open(trie: Trie, filter: ItemFilter | RequestFilter) -> Tensor:
    """Which codes a filter allows below each node, for each request."""
    requests = filter.num_requests if isinstance(filter, RequestFilter) else 1
    return trie.mask(torch.arange(trie.num_nodes).repeat(requests), filter=filter)


def on_nodes(method: str, dim: int) -> Case:
    def case(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
        trie, shape = rng.choice(TRIES), [rng.randrange(7) for _ in range(dim)]
        given: Arguments = {
            "nodes": numbers(rng, trie.num_nodes, *shape, low=-1).to(rng.choice(INTEGERS[3:5]))
        }
        if method == "advance":
            given["codes"] = numbers(rng, SIZE, *shape)
        if method != "interval":
            given["filter"] = any_filter(rng, trie, int(np.prod(shape)))
        return given, lambda a: getattr(trie, method)(
            *(a[name] for name in ("nodes", "codes") if name in a),
            **({"filter": a["filter"]} if "filter" in a else {}),
        )

    return case


for name, dim in (("advance", 2), ("children", 1), ("mask", 1), ("items", 2), ("interval", 1)):
    call(f"Trie.{name}")(on_nodes(name, dim))


@call("Trie.lookup")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie, rows = rng.choice(TRIES), rng.randrange(6)
    given = {"prefixes": numbers(rng, SIZE, rows, rng.randrange(LEVELS + 1)),
             "filter": any_filter(rng, trie, rows)}  # fmt: skip
    return given, lambda a: trie.lookup(a["prefixes"], filter=a["filter"])


@call("Trie.ranks_of")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = rng.choice(TRIES)
    return {"ids": numbers(rng, 3 * ITEMS, rng.randrange(6), 2, low=-1)}, lambda a: trie.ranks_of(a["ids"])


@call("Trie.from_codes")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    items = rng.randrange(1, 30)
    given = {"codes": torch.unique(numbers(rng, SIZE, items, LEVELS), dim=0), "codebook_size": SIZE}
    given["item_ids"] = rng.choice((None, torch.arange(len(given["codes"])) * 2))

    def build(a: Arguments) -> Any:
        trie = Trie.from_codes(a["codes"], a["codebook_size"], a["item_ids"])
        return trie.codes_by_rank(), trie.ids_by_rank, trie.arrays.code, trie.arrays.first_child

    return given, build


@call("Trie.to")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = made_trie()
    device = rng.choice(
        ("cpu", "cpu:0", torch.device("cpu"), "tpu", "nonsense", "", 3.5, None, "cuda:99", -1)
    )
    moved = rng.choice((trie, ItemFilter.everything(trie), RequestFilter.excluding(trie, [[1]])))
    return {"device": device}, lambda a: str(moved.to(a["device"]).device)


@call("ItemFilter.from_mask")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = rng.choice(TRIES)
    given = {"allowed": numbers(rng, 2, ITEMS).bool()}
    return given, lambda a: ItemFilter.from_mask(trie, a["allowed"]).by_rank()


@call("ItemFilter.from_items")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = rng.choice(TRIES)
    ids = trie.ids_by_rank[numbers(rng, ITEMS, rng.randrange(9))]
    return {"ids": ids}, lambda a: ItemFilter.from_items(trie, a["ids"]).open


@call("ItemFilter, combined")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = rng.choice(TRIES)
    one, two = (any_filter(rng, trie, 4) for _ in range(2))
    operation = rng.choice(
        (lambda a, b: a & b, lambda a, b: a | b, lambda a, b: ItemFilter.stack([a, b, None]))
    )

    def combine(_: Arguments) -> Any:
        return left_open(trie, operation(one, two))

    return {}, combine


for name in ("without_ranks", "allows_ranks"):

    @call(f"ItemFilter.{name}")
    def _(rng: random.Random, name: str = name) -> tuple[Arguments, Callable[[Arguments], Any]]:
        trie = rng.choice(TRIES)
        base = ItemFilter.from_mask(trie, numbers(rng, 2, ITEMS).bool())

        def call_method(a: Arguments) -> Any:
            found = getattr(base, name)(a["ranks"])
            return found if isinstance(found, Tensor) else found.open

        return {"ranks": numbers(rng, ITEMS, rng.randrange(9))}, call_method


@call("RequestFilter.excluding")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = rng.choice(TRIES)
    ids = numbers(rng, 3 * ITEMS, rng.randrange(1, 5), rng.randrange(6), low=-1)
    return {"ids": ids}, lambda a: left_open(trie, RequestFilter.excluding(trie, a["ids"]))


@call("RequestFilter.select")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = rng.choice(TRIES)
    base = RequestFilter.excluding(trie, numbers(rng, ITEMS, 4, 3))
    base = base & ItemFilter.stack([ItemFilter.everything(trie), None, None, None])
    return {"requests": numbers(rng, 4, rng.randrange(1, 6))}, lambda a: left_open(
        trie, base.select(a["requests"])
    )


@call("RequestFilter.with_filters")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = rng.choice(TRIES)
    base = RequestFilter.excluding(trie, numbers(rng, ITEMS, 3, 3))
    filters = [any_filter(rng, trie, 3) for _ in range(rng.choice((3, 3, 3, 2, 4, 0)))]
    return {}, lambda _: left_open(trie, base.with_filters(filters))


def step_operands(rng: random.Random, *shape: int) -> Arguments:
    trie = rng.choice(TRIES)
    normalize = rng.choice(("vocab", "level", "valid", "none"))
    given: Arguments = {
        "trie": trie, "logits": reals(rng, *shape, SIZE),
        "nodes": numbers(rng, trie.num_nodes, *shape, low=-1).to(rng.choice(INTEGERS[3:5])),
        "normalize": normalize, "logsumexp": reals(rng, *shape) + 9 if normalize == "vocab" else None,
        "filter": any_filter(rng, trie, int(np.prod(shape))),
    }  # fmt: skip
    return given


@call("trie_softmax")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    return step_operands(rng, rng.randrange(6)), lambda a: trie_softmax(**a)


@call("trie_beam_step")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    shape = rng.randrange(4), rng.randrange(5)
    given = step_operands(rng, *shape) | {"scores": -reals(rng, *shape).abs(), "width": rng.randrange(1, 9)}

    def step(a: Arguments) -> Any:
        found = trie_beam_step(**a)
        return found if a["normalize"] == "vocab" else (found.scores, found.pruned)

    return given, step


@call("trie_beam_step, with a prior")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    shape = rng.randrange(4), rng.randrange(5)
    given = step_operands(rng, *shape) | {
        "scores": -reals(rng, *shape).abs(), "generator_scores": -reals(rng, *shape).abs(),
        "width": rng.randrange(1, 9),
    }  # fmt: skip
    count, weight = rng.randrange(1, ITEMS), rng.choice((0.0, 0.3, 1.0))
    items = [rng.sample(range(ITEMS), count) for _ in range(shape[0])]
    tensors = ItemPrior(items, [[rng.random() + 0.1 for _ in row] for row in items]).on(TRIES[0], weight)
    given |= tensors._asdict()

    def step(a: Arguments) -> Any:
        prior = PriorTensors(a["ranks"], a["sums"], a["weight"])
        others = {name: value for name, value in a.items() if name not in PriorTensors._fields}
        found = trie_beam_step(**others, prior=prior)
        return found.scores.shape, found.pruned.shape  # the last bits of exp and log may differ

    return given, step


@call("ItemPrior")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie, requests, count = TRIES[0], rng.randrange(1, 4), rng.randrange(1, 9)
    items = torch.tensor([rng.sample(range(ITEMS), count) for _ in range(requests)])
    given = {"items": items, "mass": reals(rng, requests, count).abs() + 0.1, "weight": rng.random()}
    return given, lambda a: tuple(ItemPrior(a["items"], a["mass"]).on(trie, a["weight"]))


@call("residual_quantize")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    dim = rng.randrange(1, 20)
    given = {
        "x": reals(rng, rng.randrange(20), dim),
        "codebooks": reals(rng, rng.randrange(1, 4), rng.randrange(1, 40), dim),
        "code_dtype": rng.choice((*INTEGERS[:5], torch.float32, "int64", None, torch.int64)),
    }
    return given, lambda a: residual_quantize(a["x"], a["codebooks"], code_dtype=a["code_dtype"])


def bounded(found: Tensor) -> Any:
    """The sums; only their shape if some are huge or not finite, as these depend on the order of addition."""
    return found.detach() if bool((found.detach().abs() < 1e30).all()) else list(found.shape)


def edges(rng: random.Random) -> Arguments:
    users, items, count = rng.randrange(1, 6), rng.randrange(1, 7), rng.randrange(30)
    return {"users": numbers(rng, users, count), "items": numbers(rng, items, count), "num_users": users,
            "num_items": items}  # fmt: skip


@call("BipartiteGraph.from_edges")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    def build(a: Arguments) -> Any:
        graph = BipartiteGraph.from_edges(**a)
        return graph.row_ptr, graph.neighbours, graph.inv_sqrt_degree

    given = edges(rng)
    return given, build


@call("BipartiteGraph")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    sizes = edges(rng)
    made = BipartiteGraph.from_edges(**sizes)
    given = {name: getattr(made, name) for name in BipartiteGraph.__slots__ if name != "__weakref__"}
    x = reals(rng, made.num_users + made.num_items, 5)
    return given, lambda a: bounded(lightgcn_propagate(BipartiteGraph(**a), x, 2))


@call("lightgcn_propagate")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    graph = BipartiteGraph.from_edges(**edges(rng))
    given: Arguments = {"x": reals(rng, graph.num_users + graph.num_items, rng.randrange(40))}
    given["layers"] = rng.randrange(4)
    given["table_dtype"] = rng.choice((None, torch.bfloat16, torch.float16, "bfloat16"))

    return given, lambda a: bounded(
        lightgcn_propagate(graph, a["x"], a["layers"], table_dtype=a["table_dtype"])
    )


@call("LiveTrie")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    trie = TRIES[0]
    held = {tuple(row) for row in trie.codes_by_rank().tolist()}
    new = numbers(rng, SIZE, 3, LEVELS)
    new = torch.unique(
        torch.stack([row for row in new if tuple(row.tolist()) not in held] or [new[0]]), dim=0
    )
    given = {"codes": new, "ids": torch.arange(100, 100 + len(new)), "gone": numbers(rng, ITEMS, 3)}
    restricting = any_filter(rng, trie, 2)

    def live(a: Arguments) -> Any:
        catalog = LiveTrie(trie)
        catalog.snapshot().restrict(restricting)
        catalog.add(a["codes"], a["ids"])
        catalog.wait(30)
        catalog.remove(a["gone"])
        now = catalog.snapshot()
        return now.trie.codes_by_rank(), now.trie.ids_by_rank, now.allowed.open if now.allowed else None

    return given, live


@call("use_fast_kernels and backends")
def _(rng: random.Random) -> tuple[Arguments, Callable[[Arguments], Any]]:
    device = rng.choice(("cpu", torch.device("cpu"), "nonsense", 1.5, None, "cuda:99", ""))
    enabled = rng.choice((True, False, None, "no", [], 2, torch.tensor([1, 2])))

    def switch(_: Arguments) -> Any:
        try:
            backends(device)
            use_fast_kernels(enabled)
        finally:
            use_fast_kernels(True)

    return {}, switch


def result_of(run: Callable[[Arguments], Any], given: Arguments) -> Any:
    """What a call returns, or the exception that it raises."""
    try:
        return run(given)
    except Exception as error:
        return error


def differ(one: Any, other: Any) -> bool:
    """Whether two results, tensors or tuples of tensors, differ; floats may differ by rounding."""
    if isinstance(one, tuple | list):
        return len(one) != len(other) or any(differ(a, b) for a, b in zip(one, other, strict=True))
    if not isinstance(one, Tensor):
        return bool(one != other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    if not one.is_floating_point():
        return not torch.equal(one, other)
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 2e-2
    return not torch.allclose(one.detach(), other.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)


def check_draw(run: Callable[[Arguments], Any], given: Arguments) -> tuple[str, str]:
    """What is wrong with a draw, empty if nothing is; and whether it was answered or rejected."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    dense = {name: t for name, t in tensors.items() if not t.is_meta and t.layout is torch.strided}
    before = {name: t.clone() for name, t in dense.items() if not t.is_quantized}
    use_fast_kernels(True)
    ours = result_of(run, given)
    use_fast_kernels(False)
    reference = result_of(run, given)
    use_fast_kernels(True)
    if isinstance(ours, Exception) or isinstance(reference, Exception):
        for where, found in (("C++", ours), ("PyTorch", reference)):
            if isinstance(found, Exception) and not isinstance(found, REJECTIONS):
                return f"{where} raises {type(found).__name__}: {str(found)[:300]}", ""
        if type(ours) is not type(reference):
            return f"C++ returns {str(ours)[:200]!r}, PyTorch {str(reference)[:200]!r}", ""
        return "", "rejected"
    if any(differ(kept, given[name]) for name, kept in before.items()):
        return "the call changed its arguments", ""
    return ("C++ and PyTorch differ", "") if differ(ours, reference) else ("", "answered")


def described(given: Arguments) -> str:
    def one(value: Any) -> str:
        if not isinstance(value, Tensor):
            return f"{type(value).__name__} {str(value)[:60]}"
        return f"{value.dtype} {list(value.shape)} strides {value.layout is torch.strided and value.stride()}"

    return "; ".join(f"{name}: {one(value)}" for name, value in given.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--count", type=int, default=50, help="draws per call")
    parser.add_argument("--call", choices=CALLS, help="run only this call")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    counts: dict[str, dict[str, int]] = {}
    failed = False
    for name, case in CALLS.items():
        if options.call not in (None, name):
            continue
        own = counts[name] = {"answered": 0, "rejected": 0, "failed": 0}
        for seed in range(options.seed, options.seed + options.count):
            rng = random.Random(f"{name} {seed}")
            given, run = case(rng)
            changeable = [key for key in given if key != "trie"]
            for key in rng.sample(changeable, min(len(changeable), rng.choice((0, 1, 1, 1, 2)))):
                given[key] = changed(given[key], rng)
            print(f"{name} --seed {seed}: {described(given)}", file=sys.stderr, flush=True)
            wrong, outcome = check_draw(run, given)
            own[outcome or "failed"] += 1
            if wrong:
                failed = True
                print(f"FAILED {name} --seed {seed}: {wrong}; {described(given)}")
    print(json.dumps(counts))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
