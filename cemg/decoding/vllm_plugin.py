"""The name of ``cemg.decoding.integrations.vllm_plugin`` in version 0.1, kept for one release."""

import warnings

from cemg.decoding.integrations.vllm_plugin import VllmTrieProcessor

__all__ = ["VllmTrieProcessor"]

warnings.warn(
    "cemg.decoding.vllm_plugin moved; name cemg.decoding.integrations.vllm_plugin:VllmTrieProcessor",
    DeprecationWarning,
    stacklevel=2,
)
