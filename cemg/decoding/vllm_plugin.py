"""Deprecated alias of ``cemg.decoding.integrations.vllm_plugin``, kept for one release."""

import warnings

from cemg.decoding.integrations.vllm_plugin import VllmTrieProcessor

__all__ = ["VllmTrieProcessor"]

warnings.warn(
    "cemg.decoding.vllm_plugin is deprecated; use cemg.decoding.integrations.vllm_plugin:VllmTrieProcessor",
    DeprecationWarning,
    stacklevel=2,
)
