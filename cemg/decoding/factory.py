"""The choice of the path: the first plan that serves the model and agrees with the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from cemg.decoding.models.causal import CausalPlan
from cemg.decoding.models.generic import GenericPlan
from cemg.decoding.models.native import NativePlan
from cemg.decoding.models.rope_lengths import rope_of_lengths
from cemg.decoding.models.rows import RowsPlan
from cemg.decoding.models.t5 import T5Plan
from cemg.decoding.models.weights import Unsupported
from cemg.decoding.parity_check import DecoderPlan, ModelForwardError, ParityCheck, ParityError, first_line
from cemg.errors import UserError
from cemg_kernels.runtime.dispatch import choose, pick


class Candidate(NamedTuple):
    """A way to run a model: what it is called in a reason, and what builds the plan."""

    name: str
    build: Callable[[], DecoderPlan]


def make_plan(
    model: PreTrainedModel, code_tokens: range, backend: str | None, check: ParityCheck | None
) -> tuple[DecoderPlan, str]:
    """The plan of a model and the path it takes, in words, with the reasons for it.

    Candidates are tried in order: C++, PyTorch steps, the model's own forward under a tree mask, the same
    with one row per beam. One that raises, or that ``check`` finds to differ from the model, is passed over.
    Raises UserError where ``backend`` does not serve the model, and where no candidate is right.
    """
    wanted = pick("decoder", model.device, backend)
    refused: list[str] = []  # why a candidate does not take the model
    wrong: list[str] = []  # what the check found
    if wanted == "reference":
        refused.append("asked for" if backend else choose("decoder", model.device).why)
    rope = rope_of_lengths(model)
    if rope is not None:
        refused.append(f"rotary embeddings of the type {rope}, which follow the length of a sequence")
    for name, build in candidates(model, code_tokens, wanted, backend):
        try:
            plan = build()
            if check is not None:
                check.check(plan)
        except Unsupported as reason:
            if str(reason) not in refused:
                refused.append(str(reason))
        except (ModelForwardError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            wrong.append(f"{name}: {error if isinstance(error, ParityError) else first_line(error)}")
        else:
            return plan, path_of(plan, refused, wrong)
    if check is not None and wrong:
        check.refuse_nan()
    reasons = "; ".join(refused + wrong)
    if backend in ("native", "torch"):
        raise UserError(f"the {backend} decoder does not serve this model: {reasons}")
    raise UserError(
        f"{type(model).__name__} cannot be decoded here",
        cause=reasons,
        fix="use engine='transformers', or generate() with TrieLogitsProcessor",
    )


def candidates(
    model: PreTrainedModel, code_tokens: range, wanted: str, backend: str | None
) -> Iterator[Candidate]:
    """The ways to run a model, the fastest first; a named ``backend`` admits only its own.

    Where rotary embeddings follow the length of a sequence, only whole sequences without padding are right.
    """
    if rope_of_lengths(model) is not None:
        if backend not in ("native", "torch"):
            yield Candidate("one row per beam", partial(RowsPlan, model, cached=False, padded=False))
        return
    seq2seq = bool(model.config.is_encoder_decoder)
    fast = partial(T5Plan if seq2seq else CausalPlan, model, code_tokens)
    if wanted == "native":
        yield Candidate("C++", lambda: NativePlan(fast()))
    if wanted != "reference" and backend != "native":
        yield Candidate("PyTorch steps", fast)
    if backend in ("native", "torch"):
        return
    if not seq2seq:
        yield Candidate("tree mask", partial(GenericPlan, model))
    for options in RowsPlan.VARIANTS:
        yield Candidate("one row per beam", partial(RowsPlan, model, **options))


def path_of(plan: DecoderPlan, refused: list[str], wrong: list[str]) -> str:
    """What runs, and why nothing faster does: a fast path names only what the check found."""
    if isinstance(plan, (NativePlan, T5Plan, CausalPlan)):
        inner = plan.plan if isinstance(plan, NativePlan) else plan
        kind = "T5" if isinstance(inner, T5Plan) else "decoder-only"
        path, reasons = f"fast {kind}" + (" in C++" if isinstance(plan, NativePlan) else ""), wrong
    else:
        path, reasons = "the model's own forward", refused + wrong
        path += f", {plan.path}" if isinstance(plan, RowsPlan) else ""
    return f"{path}: {'; '.join(reasons)}" if reasons else path
