"""Runs a model in evaluation mode while it decodes, and restores its mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from cemg.decoding.protocol import DecoderState, Logits, LogitsRequest


class _Switch:
    """The number of threads that decode with a model, and the modules that were in training mode before."""

    def __init__(self) -> None:
        self.threads, self.training_modules = 0, list[nn.Module]()


_switches: WeakKeyDictionary[nn.Module, _Switch] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, every module is in evaluation mode. Threads may enter it at the same time.

    After the last block, modules that were in training mode are in training mode again.
    """
    with _lock:
        switch = _switches.setdefault(model, _Switch())
        switch.threads += 1
        for module in model.modules():
            if module.training:
                switch.training_modules.append(module)
                module.training = False
    try:
        yield
    finally:
        with _lock:
            switch.threads -= 1
            if switch.threads == 0:
                for module in switch.training_modules:
                    module.training = True
                switch.training_modules.clear()


class EvalModeState:
    """A state that runs its model in evaluation mode in every call."""

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
