"""The check of a plan against the model itself, made once for every Decoder.

Two prompts of different lengths, the shorter one padded, and two beam steps whose beams change parents.
The reference is the model's own forward over whole sequences, without cache, padding or mask. Where the model
has a local window, a prompt longer than the window is checked too. B prompts, W beams, S prompt tokens,
K codes per level, V vocabulary, n steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.decoding.models.eval_mode import evaluating
from cemg.decoding.models.layers import DecoderState, Logits, LogitsRequest
from cemg.decoding.models.rope_lengths import forget_lengths, rope_of_lengths
from cemg.decoding.models.rows import accepted, start_token
from cemg.errors import UserError

LONG, SHORT = 9, 5  # tokens of the two prompts
BEAMS = 2
PARENTS = ((0, 0), (1, 0))  # of the beams of each step: the second one swaps them
LONGEST_WINDOW = 4096  # tokens
MOST_PRODUCTS = 2e11  # multiply-adds of a check past the window: about two seconds on two CPU cores
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window")
MATMUL = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}  # float32, TF32 and bfloat16 products


class DecoderPlan(Protocol):
    """A model, arranged for decoding."""

    def new_state(self) -> DecoderState:
        """A state for one batch."""
        ...


class ParityError(Exception):
    """A plan's log-probabilities are not the model's; the message says by how much."""


class ModelForwardError(UserError):
    """The model's own forward raises, so no plan can be compared with it."""


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts of these lengths [B] and what the model itself answers.

    ``prompts``: B times [1, S]; ``codes`` [n, B, W] tokens fed at each step; ``answers``: the logits
    [B, W, V] after the prompt (W = 1) and after each step.
    """

    prompts: list[Tensor]
    codes: Tensor
    answers: list[Tensor]


class ParityCheck:
    """What the model's own forward answers, computed once and compared with any number of plans.

    ``requests`` of the first levels, at most three; ``tokens``: of each of these levels, tokens [K] of codes,
    −1 where a code has none. Nothing is drawn: tokens are chosen by arithmetic. Raises UserError where the
    model's own forward fails.
    """

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[LogitsRequest], tokens: Sequence[Tensor]
    ) -> None:
        self.model, self.requests = model, list(requests)
        self.tokens = [level[level >= 0].cpu() for level in tokens]
        self.precision = precision_of(model)

    def check(self, plan: DecoderPlan) -> None:
        """Raises ParityError where the plan's log-probabilities differ by more than rounding."""
        with torch.no_grad():
            for number, case in enumerate(self.cases):
                for step, mine in enumerate(self._run(plan, case)):
                    self._compare(mine, number, step)

    def refuse_nan(self) -> None:
        """Raises UserError where the model's own logits are not numbers."""
        if any(bool(answer.isnan().any()) for case in self.cases for answer in case.answers):
            raise UserError(
                "the model's logits are not numbers (NaN)",
                cause=f"its own forward in {self.model.dtype} returns NaN for a prompt of code tokens",
                fix="restore the weights from a good checkpoint; in float16, use bfloat16 or float32",
            )

    @cached_property
    def cases(self) -> list[Case]:
        """The prompts and the model's answers; the first call runs the model."""
        places = self._places()
        long = max(1, min(LONG, places))
        lengths: list[tuple[int, ...]] = [(long, max(1, min(SHORT, long - 1)))]
        window = self._window()
        if window is not None and window + 2 <= places:
            lengths.append((window + 2,))
        try:
            with torch.no_grad(), evaluating(self.model):
                return [self._case(each) for each in lengths]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ModelForwardError(
                "the model's own forward fails on a prompt of code tokens",
                cause=first_line(error),
                fix="check that the model runs: model(input_ids=torch.tensor([[TOKEN]]))",
            ) from error

    def _places(self) -> int:
        """The tokens that a prompt may have."""
        config: Any = self.model.config.get_text_config(decoder=True)
        most = getattr(config, "max_position_embeddings", None)
        return (most if isinstance(most, int) and most > 0 else 2**30) - len(self.requests) + 1

    def _window(self) -> int | None:
        """The shortest local window of the model, where a prompt past it costs little."""
        config: Any = self.model.config.get_text_config(decoder=True)
        sizes = [getattr(config, name, None) for name in WINDOWS]
        window = min((size for size in sizes if isinstance(size, int) and size > 0), default=None)
        if window is None or window > LONGEST_WINDOW:
            return None
        products = sum(weight.numel() for weight in self.model.parameters()) * BEAMS * window
        affordable = MOST_PRODUCTS * (1 if self.model.device.type == "cpu" else 100)
        return window if products <= affordable else None

    def _case(self, lengths: tuple[int, ...]) -> Case:
        device = self.model.device
        everything = torch.cat(self.tokens)
        prompts = []
        for row, length in enumerate(lengths):
            place = (torch.arange(length) * 7 + torch.arange(length) ** 2 + 5 * row + 1) % len(everything)
            prompts.append(everything[place][None].to(device))
        steps = len(self.requests) - 1
        codes = torch.empty(steps, len(lengths), BEAMS, dtype=torch.int64)
        for step in range(steps):
            for row in range(len(lengths)):
                own = self.tokens[step]
                codes[step, row] = own[(torch.arange(BEAMS) * (len(own) // 2) + row + step) % len(own)]
        codes = codes.to(device)
        answers = [self._answers(prompt, codes[:, row]) for row, prompt in enumerate(prompts)]
        return Case(prompts, codes, [torch.stack(parts) for parts in zip(*answers, strict=True)])

    def _answers(self, prompt: Tensor, codes: Tensor) -> list[Tensor]:
        """Logits [W, V] after one prompt [1, S] and after each step's tokens ``codes`` [n, W]."""
        fed = codes.new_empty(BEAMS, 0)  # [W, n] the tokens of each beam so far
        for step, tokens in enumerate(codes):
            fed = torch.cat((fed[list(PARENTS[step])], tokens[:, None]), dim=1)
        if rope_of_lengths(self.model) is not None:  # a prefix of a longer sequence is another sequence
            every = [codes.new_empty(BEAMS, 0)]
            for step, tokens in enumerate(codes):
                every.append(torch.cat((every[-1][list(PARENTS[step])], tokens[:, None]), dim=1))
            answers = [self._logits(prompt, each, 1)[:, 0] for each in every]
            return [answers[0][:1], *answers[1:]]
        # A beam that another one grew from has the same prefix, so the rows of the last step answer for all
        # steps: row PARENTS[1][w] of step 1 is the prefix of row w.
        logits = self._logits(prompt, fed, len(codes) + 1)  # [W, n + 1, V]
        first = logits[:1, 0]
        if len(codes) < 2:
            return [first, *logits[:, 1:].unbind(1)]
        swapped = logits[:, 1].clone()
        swapped[list(PARENTS[1])] = logits[:, 1]
        return [first, swapped, logits[:, 2]]

    def _logits(self, prompt: Tensor, fed: Tensor, last: int) -> Tensor:
        """The model's own logits [W, last, V] at the last places of one prompt [1, S] and of each beam's
        tokens ``fed`` [W, n]."""
        forget_lengths(self.model)
        rows = prompt.expand(BEAMS, -1)
        inputs: dict[str, Tensor | bool] = {"use_cache": False} if "use_cache" in self._names else {}
        if self.model.config.is_encoder_decoder:
            start = fed.new_full((BEAMS, 1), start_token(self.model))
            inputs |= {"input_ids": rows, "decoder_input_ids": torch.cat((start, fed), dim=1)}
        else:
            inputs |= {"input_ids": torch.cat((rows, fed), dim=1)}
        logits: Tensor = self.model(**inputs).logits[:, -last:]
        return logits

    @cached_property
    def _names(self) -> set[str]:
        return accepted(self.model)

    def _run(self, plan: DecoderPlan, case: Case) -> list[Logits]:
        """What the plan answers: prompts padded to the longest, an encoder's right, a decoder's left."""
        right = bool(self.model.config.is_encoder_decoder)
        longest = max(prompt.shape[1] for prompt in case.prompts)
        ids = torch.zeros(len(case.prompts), longest, dtype=torch.int64, device=case.prompts[0].device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(case.prompts):
            place = slice(0, prompt.shape[1]) if right else slice(longest - prompt.shape[1], longest)
            ids[row, place], mask[row, place] = prompt[0], 1
        state = plan.new_state()
        found = [state.prefill(ids, mask, self.requests[0])]
        for step, tokens in enumerate(case.codes):
            parents = torch.tensor(PARENTS[step], device=ids.device).expand(len(ids), -1)
            found.append(state.decode_step(tokens, parents, self.requests[step + 1]))
        return found

    def _compare(self, mine: Logits, number: int, step: int) -> None:
        """The log-probabilities of a level's codes, over what its LogitsRequest normalizes them.

        With ε the relative rounding of one product, σ the standard deviation of the model's logits over the
        vocabulary and a the largest of them, the root mean square of the differences must stay within
        max(2⁸ · 2⁻²³, 8 ε) σ + ε a, and the largest difference within 8 times that. Independent roundings
        add up like their square root: 60 operations of ε / 2 give 4 ε σ, and a logit is itself rounded by
        ε a; 24 random layers use a quarter of the bound in half precision and a twentieth in float32. A model
        whose own forward amplifies roundings beyond that bound is allowed 4 times what it shows.
        """
        theirs, request = self.cases[number].answers[step].float(), self.requests[step]
        reference = Logits.of(theirs, request)
        if bool(theirs.isnan().any()):
            if not bool(mine.values.isfinite().all()):  # of a T5 in float16, a plan's may well be
                raise ParityError("its logits are NaN, as the model's own are")
            return
        held = reference.values > float("-inf")
        if not torch.equal(held, mine.values > float("-inf")) or bool(mine.values.isnan().any()):
            raise ParityError("its logits are not finite where the model's are")
        finite = theirs[theirs.isfinite()]
        allowed = max(2**8 * 2.0**-23, 8 * self.precision) * float(finite.std())
        allowed += self.precision * float(finite.abs().amax())
        apart = (_log_probs(mine) - _log_probs(reference))[held]
        worst = float(apart.abs().amax())
        error = max(_rms(apart), worst / 8)
        if not error <= allowed:
            rounded = Logits.of(self._rounded[number].answers[step].float(), request)
            noise = _rms((_log_probs(rounded) - _log_probs(reference))[held])
            if noise <= allowed or not error <= 4 * noise:
                raise ParityError(f"its log-probabilities differ from the model's by {worst:.2g}")

    @cached_property
    def _rounded(self) -> list[Case]:
        """The cases again, with the output of every innermost module moved by one rounding up or down."""
        innermost = [module for module in self.model.modules() if next(module.children(), None) is None]
        hooks = [module.register_forward_hook(self._round) for module in innermost]
        try:
            with evaluating(self.model):
                return [self._case(tuple(p.shape[1] for p in case.prompts)) for case in self.cases]
        finally:
            for hook in hooks:
                hook.remove()

    def _round(self, module: Any, inputs: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        numbers = torch.arange(out.numel(), device=out.device).view(out.shape)
        sign = (numbers * 12.9898).sin().sign()
        return out + (out.float() * sign * max(self.precision, torch.finfo(out.dtype).eps)).to(out.dtype)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _log_probs(logits: Logits) -> Tensor:
    """[B, W, K] over the vocabulary where its log-sum-exp is known, else over the level."""
    if logits.logsumexp is None:
        return logits.values.log_softmax(-1)
    return logits.values - logits.logsumexp[:, :, None]


def precision_of(model: PreTrainedModel) -> float:
    """The largest relative rounding among the model's weights and products: 2⁻⁷ for fewer than 16 bits."""
    dtypes = {weight.dtype for weight in model.parameters()}
    eps = [
        torch.finfo(dtype).eps if dtype.is_floating_point and dtype.itemsize > 1 else 2.0**-7
        for dtype in dtypes
    ]
    return max(MATMUL[torch.get_float32_matmul_precision()], *eps)


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
