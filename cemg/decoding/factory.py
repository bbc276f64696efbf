"""Chooses the plan of a model: the fastest one that supports it and agrees with the model's own forward."""

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
from cemg.decoding.parity_check import ModelForwardError, ParityCheck, ParityError, first_line
from cemg.decoding.protocol import DecoderPlan, Unsupported
from cemg.errors import UserError
from cemg_kernels.runtime.dispatch import choose, pick


class Candidate(NamedTuple):
    """A way to run a model: its name in reasons, and what builds its plan."""

    name: str
    build: Callable[[], DecoderPlan]


def make_plan(
    model: PreTrainedModel, code_tokens: range, backend: str | None, parity: ParityCheck | None
) -> tuple[DecoderPlan, str]:
    """The plan of a model, and its path: what runs, and why nothing faster does.

    Candidates are tried in order: C++, PyTorch steps, the model's own forward under a tree mask, and the same
    with one row per beam. A candidate is skipped if it does not support the model, or if ``parity`` finds
    that it differs from the model.

    Raises:
        UserError: If ``backend`` does not serve the model, or if no candidate is correct.
    """
    chosen = pick("decoder", model.device, backend)
    unsupported: list[str] = []  # why a candidate does not support the model
    mismatches: list[str] = []  # what the parity check found
    if chosen == "reference":
        unsupported.append("asked for" if backend else choose("decoder", model.device).why)
    rope = rope_of_lengths(model)
    if rope is not None:
        unsupported.append(f"rotary embeddings of the type {rope}, which depend on the sequence length")
    for name, build in candidates(model, code_tokens, chosen, backend):
        try:
            plan = build()
            if parity is not None:
                parity.check(plan)
        except Unsupported as reason:
            if str(reason) not in unsupported:
                unsupported.append(str(reason))
        except (ModelForwardError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            mismatches.append(f"{name}: {error if isinstance(error, ParityError) else first_line(error)}")
        else:
            return plan, path_of(plan, unsupported, mismatches)
    if parity is not None and mismatches:
        parity.refuse_nan()
    reasons = "; ".join(unsupported + mismatches)
    if backend in ("native", "torch"):
        raise UserError(f"the {backend} decoder does not serve this model: {reasons}")
    raise UserError(
        f"{type(model).__name__} cannot be decoded here",
        cause=reasons,
        fix="use engine='transformers', or generate() with TrieLogitsProcessor",
    )


def candidates(
    model: PreTrainedModel, code_tokens: range, chosen: str, backend: str | None
) -> Iterator[Candidate]:
    """The ways to run a model, fastest first; a requested ``backend`` admits only its own.

    If rotary embeddings depend on the sequence length, only whole sequences without padding are correct.
    """
    if rope_of_lengths(model) is not None:
        if backend not in ("native", "torch"):
            yield Candidate("one row per beam", partial(RowsPlan, model, cached=False, padded=False))
        return
    seq2seq = bool(model.config.is_encoder_decoder)
    fast = partial(T5Plan if seq2seq else CausalPlan, model, code_tokens)
    if chosen == "native":
        yield Candidate("C++", lambda: NativePlan(fast()))
    if chosen != "reference" and backend != "native":
        yield Candidate("PyTorch steps", fast)
    if backend in ("native", "torch"):
        return
    if not seq2seq:
        yield Candidate("tree mask", partial(GenericPlan, model))
    for options in RowsPlan.VARIANTS:
        yield Candidate("one row per beam", partial(RowsPlan, model, **options))


def path_of(plan: DecoderPlan, unsupported: list[str], mismatches: list[str]) -> str:
    """What runs, and why nothing faster does. A fast path names only mismatches."""
    reasons = unsupported + mismatches if plan.uses_model_forward else mismatches
    return f"{plan.describe()}: {'; '.join(reasons)}" if reasons else plan.describe()
