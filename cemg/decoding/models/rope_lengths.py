"""Models whose rotary embeddings follow the length of the whole sequence.

Under rope types "dynamic" and "longrope" of ``transformers`` the frequencies of all positions change once a
sequence of the batch is longer than a bound. Keys in a cache then belong to another length, and a short
prompt is read differently beside a long one.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

FOLLOW_LENGTH = ("dynamic", "longrope")
KEYS = ("rope_type", "type")  # the second one is that of older configurations


def rope_of_lengths(model: PreTrainedModel) -> str | None:
    """The rope type of the model, in any part or layer, that follows the length; None where there is none."""
    return _find(model.config.to_dict(), inside=False)


def forget_lengths(model: Any) -> None:
    """Let the next forward depend on its own sequences alone: under "dynamic", ``transformers`` keeps the
    frequencies of the longest sequence so far."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_prefix = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else None
        for prefix, kind in (by_prefix or {"": kinds}).items():
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if kind == "dynamic" and original is not None:
                device = getattr(module, f"{prefix}inv_freq").device
                setattr(module, f"{prefix}inv_freq", original.to(device).clone())
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _find(settings: Any, *, inside: bool) -> str | None:
    """The type in a configuration as a dictionary; ``inside`` the rope parameters of a part."""
    if not isinstance(settings, dict):
        return None
    for name, value in settings.items():
        if inside and name in KEYS and value in FOLLOW_LENGTH:
            return str(value)
        found = _find(value, inside=inside or str(name).startswith("rope_"))
        if found is not None:
            return found
    return None
