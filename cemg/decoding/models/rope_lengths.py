"""Models whose rotary embeddings depend on the length of the whole sequence.

Under the rope types "dynamic" and "longrope" of ``transformers``, the frequencies of all positions change
when a sequence of the batch exceeds a bound. Cached keys then belong to another length, and the logits of a
short prompt depend on whether a long one is in its batch.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

DEPEND_ON_LENGTH = ("dynamic", "longrope")
KEYS = ("rope_type", "type")  # older configurations use the second one


def rope_of_lengths(model: PreTrainedModel) -> str | None:
    """The rope type that depends on the length, in any part or layer of the model; None if there is none."""
    return _find(model.config.to_dict(), inside=False)


def forget_lengths(model: Any) -> None:
    """Make the next forward independent of earlier ones.

    Under "dynamic", ``transformers`` keeps the frequencies of the longest sequence so far.
    """
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
    """The type in a configuration dictionary. ``inside``: ``settings`` are the rope parameters of a part."""
    if not isinstance(settings, dict):
        return None
    for name, value in settings.items():
        if inside and name in KEYS and value in DEPEND_ON_LENGTH:
            return str(value)
        rope_type = _find(value, inside=inside or str(name).startswith("rope_"))
        if rope_type is not None:
            return rope_type
    return None
