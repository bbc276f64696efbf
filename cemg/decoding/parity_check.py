"""Compares a plan with the model's own forward, once for every Decoder.

Two prompts of different lengths, the shorter one padded, and two decode steps whose beams change parents. The
reference is the model's own forward over whole sequences, without cache, padding or mask. If the model has a
local window, a prompt longer than the window is compared too.

B prompts, W beams, S prompt tokens, K codes per level, V vocabulary, n steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.decoding.models.eval_mode import evaluating
from cemg.decoding.models.rope_lengths import forget_lengths, rope_of_lengths
from cemg.decoding.models.rows import forward_arguments, start_token
from cemg.decoding.protocol import DecoderPlan, Logits, LogitsRequest
from cemg.errors import UserError

LONG, SHORT = 9, 5  # tokens of the two prompts
BEAMS = 2
PARENTS = ((0, 0), (1, 0))  # of the beams of each step; the second step swaps them
LONGEST_WINDOW = 4096  # tokens
MAX_MULTIPLY_ADDS = 2e11  # of a comparison past the window: about two seconds on two CPU cores
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window")
MATMUL = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}  # float32, TF32 and bfloat16 products


class ParityError(Exception):
    """A plan's log-probabilities differ from the model's; the message says by how much."""


class ModelForwardError(UserError):
    """The model's own forward raises, so no plan can be compared with it."""


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts, the tokens of the decode steps, and the model's own logits.

    ``prompts``: B tensors [1, S]; ``tokens`` [n, B, W], one row per step; ``expected``: logits [B, W, V]
    after the prompt (W = 1) and after each step.
    """

    prompts: list[Tensor]
    tokens: Tensor
    expected: list[Tensor]


class ParityCheck:
    """The model's own logits, computed once and compared with any number of plans.

    The prompts are deterministic: their tokens are chosen by arithmetic.

    Args:
        model: The model.
        requests: The logits of the first levels, at most three.
        code_tokens: For each of these levels, the tokens [K] of its codes; -1 for a code without a token.

    Raises:
        UserError: From ``check``, if the model's own forward fails.
    """

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[LogitsRequest], code_tokens: Sequence[Tensor]
    ) -> None:
        self.model, self.requests = model, list(requests)
        self.code_tokens = [level[level >= 0].cpu() for level in code_tokens]
        self.precision = precision_of(model)

    def check(self, plan: DecoderPlan) -> None:
        """Raises ParityError if the plan's log-probabilities differ by more than rounding."""
        with torch.no_grad():
            for number, case in enumerate(self.cases):
                for step, logits in enumerate(self._run(plan, case)):
                    self._compare(logits, number, step)

    def refuse_nan(self) -> None:
        """Raises UserError if the model's own logits are NaN."""
        if any(bool(logits.isnan().any()) for case in self.cases for logits in case.expected):
            raise UserError(
                "the model's logits are not numbers (NaN)",
                cause=f"its own forward in {self.model.dtype} returns NaN for a prompt of code tokens",
                fix="restore the weights from a good checkpoint; in float16, use bfloat16 or float32",
            )

    @cached_property
    def cases(self) -> list[Case]:
        """The prompts and the model's own logits; the first access runs the model."""
        limit = self._max_prompt_tokens()
        long = max(1, min(LONG, limit))
        lengths: list[tuple[int, ...]] = [(long, max(1, min(SHORT, long - 1)))]
        window = self._window()
        if window is not None and window + 2 <= limit:
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

    def _max_prompt_tokens(self) -> int:
        """The number of tokens that a prompt may have, so that the steps fit too."""
        config: Any = self.model.config.get_text_config(decoder=True)
        most = getattr(config, "max_position_embeddings", None)
        return (most if isinstance(most, int) and most > 0 else 2**30) - len(self.requests) + 1

    def _window(self) -> int | None:
        """The model's shortest local window; None if there is none, or if a longer prompt costs too much."""
        config: Any = self.model.config.get_text_config(decoder=True)
        sizes = [getattr(config, name, None) for name in WINDOWS]
        window = min((size for size in sizes if isinstance(size, int) and size > 0), default=None)
        if window is None or window > LONGEST_WINDOW:
            return None
        products = sum(weight.numel() for weight in self.model.parameters()) * BEAMS * window
        affordable = MAX_MULTIPLY_ADDS * (1 if self.model.device.type == "cpu" else 100)
        return window if products <= affordable else None

    def _case(self, lengths: tuple[int, ...]) -> Case:
        device = self.model.device
        all_tokens = torch.cat(self.code_tokens)
        prompts = []
        for row, length in enumerate(lengths):
            index = (torch.arange(length) * 7 + torch.arange(length) ** 2 + 5 * row + 1) % len(all_tokens)
            prompts.append(all_tokens[index][None].to(device))
        steps = len(self.requests) - 1
        tokens = torch.empty(steps, len(lengths), BEAMS, dtype=torch.int64)
        for step in range(steps):
            for row in range(len(lengths)):
                level = self.code_tokens[step]
                tokens[step, row] = level[(torch.arange(BEAMS) * (len(level) // 2) + row + step) % len(level)]
        tokens = tokens.to(device)
        expected = [self._expected(prompt, tokens[:, row]) for row, prompt in enumerate(prompts)]
        return Case(prompts, tokens, [torch.stack(parts) for parts in zip(*expected, strict=True)])

    def _expected(self, prompt: Tensor, tokens: Tensor) -> list[Tensor]:
        """The model's own logits [W, V] after one prompt [1, S] and after each step's ``tokens`` [n, W]."""
        beams = tokens.new_empty(BEAMS, 0)  # [W, n] the tokens of each beam so far
        beams_by_step = [beams]
        for step, added in enumerate(tokens):
            beams = torch.cat((beams[list(PARENTS[step])], added[:, None]), dim=1)
            beams_by_step.append(beams)
        if rope_of_lengths(self.model) is not None:  # the prefix of a longer sequence has other logits
            logits = [self._logits(prompt, beams, 1)[:, 0] for beams in beams_by_step]
            return [logits[0][:1], *logits[1:]]
        # A beam and the beam that it extends have a common prefix, so one forward over the last step has the
        # logits of all steps: row PARENTS[1][w] of step 1 is the prefix of row w.
        last = self._logits(prompt, beams, len(tokens) + 1)  # [W, n + 1, V]
        after_prompt = last[:1, 0]
        if len(tokens) < 2:
            return [after_prompt, *last[:, 1:].unbind(1)]
        first_step = last[:, 1].clone()
        first_step[list(PARENTS[1])] = last[:, 1]
        return [after_prompt, first_step, last[:, 2]]

    def _logits(self, prompt: Tensor, beams: Tensor, last: int) -> Tensor:
        """The model's own logits [W, last, V] at the last positions of one prompt [1, S], followed by the
        tokens ``beams`` [W, n] of each beam."""
        forget_lengths(self.model)
        rows = prompt.expand(BEAMS, -1)
        inputs: dict[str, Tensor | bool] = {"use_cache": False} if "use_cache" in self._arguments else {}
        if self.model.config.is_encoder_decoder:
            start = beams.new_full((BEAMS, 1), start_token(self.model))
            inputs |= {"input_ids": rows, "decoder_input_ids": torch.cat((start, beams), dim=1)}
        else:
            inputs |= {"input_ids": torch.cat((rows, beams), dim=1)}
        logits: Tensor = self.model(**inputs).logits[:, -last:]
        return logits

    @cached_property
    def _arguments(self) -> set[str]:
        return forward_arguments(self.model)

    def _run(self, plan: DecoderPlan, case: Case) -> list[Logits]:
        """The plan's logits. Prompts are padded on the right for an encoder, else on the left."""
        pad_right = bool(self.model.config.is_encoder_decoder)
        longest = max(prompt.shape[1] for prompt in case.prompts)
        ids = torch.zeros(len(case.prompts), longest, dtype=torch.int64, device=case.prompts[0].device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(case.prompts):
            columns = slice(0, prompt.shape[1]) if pad_right else slice(longest - prompt.shape[1], longest)
            ids[row, columns], mask[row, columns] = prompt[0], 1
        state = plan.new_state()
        logits = [state.prefill(ids, mask, self.requests[0])]
        for step, tokens in enumerate(case.tokens):
            parents = torch.tensor(PARENTS[step], device=ids.device).expand(len(ids), -1)
            logits.append(state.decode_step(tokens, parents, self.requests[step + 1]))
        return logits

    def _compare(self, logits: Logits, number: int, step: int) -> None:
        """Compare log-probabilities of a level's codes, normalized as the request says.

        With ε the relative rounding of one product, σ the standard deviation of the model's logits over the
        vocabulary and a the largest of them, the root mean square of the differences must be at most
        max(2⁸ · 2⁻²³, 8 ε) σ + ε a, and the largest difference at most 8 times that. Independent roundings
        add up like their square root: 60 operations of ε / 2 give 4 ε σ, and a logit is itself rounded by
        ε a. 24 random layers use a quarter of the bound in half precision and a twentieth in float32. A model
        whose own forward amplifies roundings beyond that bound is allowed 4 times its own error.
        """
        model_logits, request = self.cases[number].expected[step].float(), self.requests[step]
        expected = Logits.of(model_logits, request)
        if bool(model_logits.isnan().any()):
            if not bool(logits.values.isfinite().all()):  # a T5 in float16 may overflow where a plan does not
                raise ParityError("its logits are NaN, as the model's own are")
            return
        finite = expected.values > float("-inf")
        if not torch.equal(finite, logits.values > float("-inf")) or bool(logits.values.isnan().any()):
            raise ParityError("its logits are not finite where the model's are")
        finite_logits = model_logits[model_logits.isfinite()]
        allowed = max(2**8 * 2.0**-23, 8 * self.precision) * float(finite_logits.std())
        allowed += self.precision * float(finite_logits.abs().amax())
        differences = (_log_probs(logits) - _log_probs(expected))[finite]
        largest = float(differences.abs().amax())
        error = max(_rms(differences), largest / 8)
        if not error <= allowed:
            rounded = Logits.of(self._rounded_cases[number].expected[step].float(), request)
            noise = _rms((_log_probs(rounded) - _log_probs(expected))[finite])
            if noise <= allowed or not error <= 4 * noise:
                raise ParityError(f"its log-probabilities differ from the model's by {largest:.2g}")

    @cached_property
    def _rounded_cases(self) -> list[Case]:
        """The cases with the output of every innermost module moved by one rounding up or down."""
        innermost = [module for module in self.model.modules() if next(module.children(), None) is None]
        hooks = [module.register_forward_hook(self._add_rounding) for module in innermost]
        try:
            with evaluating(self.model):
                return [self._case(tuple(p.shape[1] for p in case.prompts)) for case in self.cases]
        finally:
            for hook in hooks:
                hook.remove()

    def _add_rounding(self, module: Any, inputs: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        numbers = torch.arange(out.numel(), device=out.device).view(out.shape)
        sign = (numbers * 12.9898).sin().sign()
        return out + (out.float() * sign * max(self.precision, torch.finfo(out.dtype).eps)).to(out.dtype)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _log_probs(logits: Logits) -> Tensor:
    """[B, W, K] over the vocabulary if its log-sum-exp is known, else over the level."""
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
    """The type of an error and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
