"""What vLLM loads by name: ``logits_processors=["cemg.decoding.vllm_plugin:VllmTrieProcessor"]``.

Apart from ``vllm_processor``, so that nothing else imports vLLM, which takes seconds.
"""

from vllm.v1.sample.logits_processor import LogitsProcessor

from cemg.decoding.vllm_processor import TrieProcessor


class VllmTrieProcessor(TrieProcessor, LogitsProcessor):  # type: ignore[misc]
    """``TrieProcessor`` as vLLM's v1 engine knows its kind."""
