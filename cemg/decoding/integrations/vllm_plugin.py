"""The trie as a logits processor of vLLM, which loads it by the names of this module and of the class.

Only this module imports vLLM at its top, which takes seconds.
"""

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from cemg.decoding.integrations.vllm_processor import TrieProcessor

try:  # a subclass of the second runner's base class can raise a clear error there
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunnerProcessor
except ImportError:  # an older vLLM

    class SecondRunnerProcessor:  # type: ignore[no-redef]
        pass


class VllmTrieProcessor(TrieProcessor, LogitsProcessor, SecondRunnerProcessor):  # type: ignore[misc]
    """``TrieProcessor`` as a logits processor of vLLM's v1 engine and its first model runner.

    Raises:
        ValueError: Under the second model runner, which vLLM 0.32 chooses by default if it finds Triton.
    """

    def __init__(self, vllm_config: Any, *others: Any) -> None:
        if len(others) != 2:  # device and is_pin_memory; the second runner passes its request states
            raise ValueError(
                "the trie's logits processor does not run on vLLM's second model runner; "
                "set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
            )
        super().__init__(vllm_config, *others)
