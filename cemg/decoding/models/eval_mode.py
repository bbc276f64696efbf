"""Decoding runs a model without dropout, whatever mode the caller left it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from cemg.decoding.protocol import DecoderState, Logits, LogitsRequest


class _Switch:
    """How many threads decode with a model, and the modules that trained before the first of them."""

    def __init__(self) -> None:
        self.users, self.trained = 0, list[nn.Module]()


_switches: WeakKeyDictionary[nn.Module, _Switch] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode inside; afterwards those that trained before train again."""
    with _lock:
        switch = _switches.setdefault(model, _Switch())
        switch.users += 1
        for module in model.modules():
            if module.training:
                switch.trained.append(module)
                module.training = False
    try:
        yield
    finally:
        with _lock:
            switch.users -= 1
            if switch.users == 0:
                for module in switch.trained:
                    module.training = True
                switch.trained.clear()


class EvalModeState:
    """A state whose every call runs its model in evaluation mode."""

    def __init__(self, model: nn.Module, state: DecoderState) -> None:
        self.model, self.state = model, state

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, request: LogitsRequest, num_tokens: int | None = None
    ) -> Logits:
        with evaluating(self.model):
            return self.state.prefill(input_ids, attention_mask, request, num_tokens)

    def decode_step(self, tokens: Tensor, parents: Tensor, request: LogitsRequest) -> Logits:
        with evaluating(self.model):
            return self.state.decode_step(tokens, parents, request)

    def reset_to_prefill(self) -> None:
        with evaluating(self.model):
            self.state.reset_to_prefill()
