"""The trie as a logits processor of vLLM, which loads it by the name of this module and of the class.

Apart from ``vllm_processor``, so that nothing else imports vLLM, which takes seconds.
"""

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from cemg.decoding.integrations.vllm_processor import TrieProcessor

try:  # the second model runner takes another kind, and says of ours that it is none, but not what to do
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as OfTheSecondRunner
except ImportError:  # an older vLLM

    class OfTheSecondRunner:  # type: ignore[no-redef]
        pass


class VllmTrieProcessor(TrieProcessor, LogitsProcessor, OfTheSecondRunner):  # type: ignore[misc]
    """``TrieProcessor`` as vLLM's v1 engine and its first model runner know its kind.

    Raises ValueError under the second runner, which vLLM 0.32 takes of its own accord where it finds
    Triton.
    """

    def __init__(self, vllm_config: Any, *others: Any) -> None:
        if len(others) != 2:  # device and is_pin_memory; the second runner passes its request states
            raise ValueError(
                "the trie's logits processor does not run on vLLM's second model runner; "
                "set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
            )
        super().__init__(vllm_config, *others)
