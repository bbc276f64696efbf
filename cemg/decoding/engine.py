"""The engine: exact trie-constrained beam search for Hugging Face models.

One prefill per user; its KV cache is shared by all W beams. T5, GPT-2, Llama, Mistral and Qwen models run on
our own decode steps (``models/t5.py``, ``models/causal.py``, ``models/native.py``), other models on their own
forward (``models/generic.py``, ``models/rows.py``).

B users, W beams, M levels, K codes per level, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.decoding.beams import (
    MARGIN,
    Beams,
    Filter,
    Recommendations,
    check_beams,
    check_prompts,
    token_count,
    trim_padding,
)
from cemg.decoding.factory import make_plan
from cemg.decoding.graphs import GraphCache
from cemg.decoding.parity_check import ParityCheck
from cemg.decoding.pretrained import load_pretrained, save_pretrained
from cemg.decoding.priors import PRIOR_WEIGHT, prior_tensors
from cemg.decoding.protocol import Logits, LogitsRequest
from cemg.decoding.shared_ids import expand_shared_ids, leaf_filter
from cemg.decoding.timings import add_seconds, recording, timed_stage
from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens, SharedFilter, TokenMap
from cemg_kernels import ItemPrior, RequestFilter, trie_beam_step
from cemg_kernels.constrained.beam_step import BeamStep, MixedStep
from cemg_kernels.constrained.prior import PriorTensors
from cemg_kernels.constrained.softmax import Normalize
from cemg_kernels.runtime.dispatch import choose
from cemg_kernels.runtime.ranges import ranges_enabled

Array = Tensor | np.ndarray | Sequence[Sequence[int]]  # [B, S] of integers
CHECKED_LEVELS = 3  # levels that the parity check compares


def check_fit(
    model: PreTrainedModel, catalog: Catalog, code_token_start: TokenMap | CodeTokens | None, normalize: str
) -> CodeTokens:
    """The token of each code.

    Raises:
        UserError: If the model lacks a code's token, if the tokens are not known, or for an unknown
            ``normalize``.
    """
    return check_tokens(vocabulary_size(model), catalog, code_token_start, normalize)


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of tokens that the model both reads and predicts. Adapters may wrap its embeddings."""
    embedding: Any = model.get_input_embeddings()
    embedding = getattr(embedding, "original_module", embedding)
    if hasattr(embedding, "get_base_layer"):
        embedding = embedding.get_base_layer()
    head = model.get_output_embeddings()
    return int(min(embedding.num_embeddings, getattr(head, "out_features", embedding.num_embeddings)))


def check_tokens(
    vocabulary: int, catalog: Catalog, code_token_start: TokenMap | CodeTokens | None, normalize: str
) -> CodeTokens:
    """Like ``check_fit``, for a model with ``vocabulary`` tokens."""
    if normalize not in get_args(Normalize):
        raise UserError(f"normalize must be vocab, level or valid, got {normalize!r}")
    tokens = catalog.code_tokens(code_token_start)
    if tokens.span.stop > vocabulary:
        size, levels = catalog.codebook_size, catalog.levels
        codes = (
            f"{levels} levels of {size} codes" if tokens.start is not None else "the codes of the token map"
        )
        raise UserError(
            "this catalog does not belong to the generator",
            cause=f"{codes} from token {tokens.span.start} on need {tokens.span.stop} tokens, "
            f"the model has {vocabulary}",
            fix="use the catalog that the model was trained on",
        )
    return tokens


class Decoder:
    """Generates the items of a catalog with a Hugging Face model and a trie-constrained beam search.

    Any encoder-decoder or decoder-only model works. Fast paths run T5, GPT-2, Llama, Mistral and Qwen; they
    copy the weights when the decoder is created, so create a new ``Decoder`` after further training.

    Args:
        model: The generator, on any device.
        catalog: The items and their semantic IDs.
        code_token_start: Code c of level m is token ``code_token_start + m·K + c``. A table [levels, K]
            (-1: no such code) or one list per level names the tokens one by one. None takes the token map
            of the catalog.
        normalize: The tokens over which the log-softmax of a code runs: ``"vocab"``, the whole vocabulary;
            ``"level"``, the K codes of the level; ``"valid"``, the codes that continue an item, among those
            that pass the filter.
        backend: ``"native"`` (C++, float32 on a CPU), ``"torch"`` (the same steps in PyTorch, on any device),
            ``"reference"`` (the model's own forward), or None for the fastest one that serves the model.
        graphs: Record one CUDA graph per bucket of prompts. None: on a GPU only.
        check: Compare each path with the model's own forward, on two short prompts and two decode steps, and
            use the next path where they differ. False saves these milliseconds.

    Attributes:
        path: The path that runs, and why no faster one does.

    Raises:
        UserError: If ``backend`` does not serve the model, or if the model lacks a token of a code.

    Example:
        ```python
        decoder = Decoder(model, catalog, code_token_start=3)
        results = decoder.decode(input_ids, attention_mask, beams=50)
        print(results.items, results.scores, results.certified)
        ```

    Source:
        Scores are sums of log-probabilities, equation 6 of the CEMG paper; see docs/method.md.
    """

    def __init__(
        self, model: PreTrainedModel, catalog: Catalog,
        code_token_start: TokenMap | CodeTokens | None = None, normalize: Normalize = "vocab", *,
        backend: str | None = None, graphs: bool | None = None, check: bool = True,
    ) -> None:  # fmt: skip
        tokens = check_fit(model, catalog, code_token_start, normalize)
        self.model, self.catalog, self.normalize = model, catalog, normalize
        self.tokens = tokens.to(model.device)
        self.code_token_start = self.tokens.start  # None for a token map
        self.causal = not model.config.is_encoder_decoder
        self.trie = catalog.trie.to(model.device)
        parity = self._parity_check() if check else None
        self.plan, self.path = make_plan(model, tokens.span, backend, parity)
        self.graphs: GraphCache | None = None
        if self.plan.steps_in_torch and (model.device.type == "cuda" if graphs is None else graphs):
            self.graphs = GraphCache(pad_left=self.causal, device=self.trie.device)
            self.path += ", CUDA graphs"

    def with_catalog(self, catalog: Catalog) -> Decoder:
        """A decoder of the same model for a catalog with other items. This one does not change.

        Args:
            catalog: A catalog with the levels, codebook sizes and tokens of this one.

        Raises:
            UserError: Its codes have other tokens.
        """
        other = copy.copy(self)
        tokens = check_fit(self.model, catalog, self.tokens.to("cpu"), self.normalize)
        other.catalog, other.trie = catalog, catalog.trie.to(self.model.device)
        if (catalog.levels, catalog.codebook_sizes) != (self.catalog.levels, self.catalog.codebook_sizes):
            raise UserError(
                "the catalog has other levels or codebooks than the decoder",
                cause=f"{list(catalog.codebook_sizes)} codes, not {list(self.catalog.codebook_sizes)}",
            )
        other.tokens = tokens.to(self.model.device)
        if self.graphs is not None:  # recordings read the trie
            other.graphs = GraphCache(pad_left=self.causal, device=other.trie.device)
        return other

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model, its token map, the catalog and ``normalize`` to a folder.

        ``AutoModelForSeq2SeqLM`` or ``AutoModelForCausalLM`` and ``Decoder.from_pretrained`` load it;
        ``Catalog.load`` loads its subfolder ``cemg_catalog``. LoRA adapters are merged into the weights.
        Other files in the folder stay.

        Args:
            folder: The folder, created if it does not exist.

        Raises:
            UserError: If the model has adapters that cannot be merged.
        """
        tokens = self.tokens.to("cpu")
        save_pretrained(folder, self.model, self.catalog, tokens=tokens, normalize=self.normalize)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, device: str = "cpu", normalize: Normalize | None = None,
        backend: str | None = None, graphs: bool | None = None, check: bool = True,
    ) -> Decoder:  # fmt: skip
        """Load a folder that ``save_pretrained`` of a ``Decoder`` or a ``Recommender`` wrote.

        Args:
            folder: The folder.
            device: The device of the model.
            normalize: None takes the saved one.
            backend: As for ``Decoder``.
            graphs: As for ``Decoder``.
            check: As for ``Decoder``.

        Raises:
            UserError: If a part of the folder is missing or damaged.
        """
        model, catalog, saved = load_pretrained(folder, device=device)
        chosen = cast(Normalize, normalize or saved)
        return cls(model, catalog, normalize=chosen, backend=backend, graphs=graphs, check=check)

    @torch.inference_mode()
    def decode(
        self, input_ids: Array, attention_mask: Array, beams: int, *,
        filter: Filter | SharedFilter | None = None, prior: ItemPrior | None = None,
        prior_weight: float | Sequence[float] = PRIOR_WEIGHT,
    ) -> Recommendations:  # fmt: skip
        """The ``beams`` best items that a beam search finds for each prompt.

        With a prior, items rank by (1 - weight) * P(generator) + weight * P(prior). Every step ranks prefixes
        by the mixture, so items that the generator finds unlikely are found if the prior has them.

        Args:
            input_ids: Integers [B, S], as a tensor, an array or lists of equal length.
            attention_mask: [B, S], 0 at padding, which may be anywhere.
            beams: The number of beams and of results per prompt.
            filter: The items that may be returned, as ``catalog.only`` and ``catalog.excluding`` make it: an
                ``ItemFilter`` for all prompts, or a ``RequestFilter`` with one request per prompt. Under
                ``normalize="valid"`` it changes scores, since the softmax runs over the codes that pass.
            prior: A distribution over items per prompt, its ids as in ``Recommendations.items``. It is
                renormalised over the items that pass the filter; a prompt of whose prior no item passes is
                ranked by the generator alone. Items that share a semantic ID count together: the mass of the
                ID is the sum of theirs.
            prior_weight: The share of the prior, 0 to 1: one number, or one per prompt. 0 gives the scores
                without prior, bit for bit; 1 ranks by the prior alone and finds no item without mass.

        Returns:
            Results [B, beams], best first. Rows with fewer legal items end with -1. ``certified`` counts the
            leading items that are proven to be the true top of the items that pass the filter. If items share
            semantic IDs, a row holds the first ``beams`` items of the best ``beams`` IDs.

        Raises:
            UserError: For fewer beams than one, for shapes that do not match, and for a prior with unknown or
                repeated items or of another number of requests.
        """
        input_ids, attention_mask = torch.as_tensor(input_ids), torch.as_tensor(attention_mask)
        leaves = leaf_filter(filter, self.catalog, self.trie)
        check_prompts(input_ids, attention_mask, beams, leaves)
        if len(input_ids) == 0:
            return Recommendations.empty(beams, self.catalog.levels)
        masses = self.prior_tensors(prior, prior_weight, filter, len(input_ids))
        results = self._decode_leaves(input_ids, attention_mask, beams, leaves, masses)
        return expand_shared_ids(results, self.catalog, filter, beams)

    @torch.inference_mode()
    def decode_exact(
        self, input_ids: Array, attention_mask: Array, top: int, beams: int, *,
        filter: Filter | SharedFilter | None = None, budget: int = 4096, prior: ItemPrior | None = None,
        prior_weight: float | Sequence[float] = PRIOR_WEIGHT,
    ) -> Recommendations:  # fmt: skip
        """The true ``top`` items of the whole catalog.

        A first search uses ``beams`` beams. Rows whose top is not proven are searched again with every prefix
        that scores at least as much as the ``top``-th item of the first search. Scores only fall as prefixes
        grow, so no other prefix can lead to a better item.

        Args:
            input_ids: As for ``decode``.
            attention_mask: As for ``decode``.
            top: The number of results per prompt.
            beams: The number of beams of the first search.
            filter: As for ``decode``.
            budget: The largest number of prefixes that the second search keeps per level. A row that needs
                more stays unproven: its ``certified`` is less than ``top``.
            prior: As for ``decode``.
            prior_weight: As for ``decode``.

        Returns:
            Results [B, top], best first.

        Raises:
            UserError: Unless ``1 <= top <= beams <= budget``, and as ``decode`` does.
        """
        if not 1 <= top <= beams <= budget:
            raise UserError(f"1 <= top <= beams <= budget must hold, got {top}, {beams} and {budget}")
        check_beams(budget)
        input_ids, attention_mask = torch.as_tensor(input_ids), torch.as_tensor(attention_mask)
        results = self.decode(
            input_ids, attention_mask, beams, filter=filter, prior=prior, prior_weight=prior_weight
        ).top(top)
        unproven = results.certified < min(top, len(self.catalog))  # also if prefixes led to too few items
        masses = None
        if bool(unproven.any()):
            masses = self.prior_tensors(prior, prior_weight, filter, len(input_ids))
        for row in unproven.nonzero().flatten().tolist():
            one = slice(row, row + 1)
            allowed = filter
            if isinstance(filter, RequestFilter | SharedFilter):
                allowed = filter.select(torch.tensor([row]))
            leaves = leaf_filter(allowed, self.catalog, self.trie)
            threshold = results.scores[one, -1].to(self.model.device) - 2 * MARGIN
            prompt = self.trim_padding(input_ids[one], attention_mask[one])
            own = None if masses is None else masses.select(one)
            better = self._search(*prompt, budget, leaves, own, threshold)
            better = expand_shared_ids(better, self.catalog, allowed, budget).top(top)
            for part, new in zip(results.tensors(), better.padded(top).tensors(), strict=True):
                part[row] = new[0]
        return results

    def trim_padding(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [B, S] as the plan reads them, without columns that hold no token."""
        return trim_padding(input_ids, attention_mask, causal=self.causal)

    def check_positions(self, mask: Tensor) -> None:
        """Raises UserError where a PyTorch step would need a token past the learned positions.

        Plans in C++ check every step themselves. A ``mask`` [B, S] on a GPU is not checked, to avoid a
        synchronization.
        """
        bounded = self.plan.steps_in_torch and self.plan.max_tokens is not None
        if bounded and mask.device.type == "cpu":
            self.plan.check_fits(int(mask.sum(1).max()) + self.catalog.levels - 1)

    def logits_request(self, level: int) -> LogitsRequest:
        """The logits of the codes of ``level``."""
        start, size = self.tokens.start, self.catalog.codebook_size
        if start is None:
            return LogitsRequest(-1, size, self.normalize == "vocab", tokens=self.tokens.table[level])
        return LogitsRequest(start + level * size, size, self.normalize == "vocab")

    def _parity_check(self) -> ParityCheck:
        levels = range(min(CHECKED_LEVELS, self.catalog.levels))
        requests = [self.logits_request(level) for level in levels]
        return ParityCheck(self.model, requests, [self.tokens.table[level] for level in levels])

    def prior_tensors(
        self, prior: ItemPrior | None, weight: float | Sequence[float], filter: Filter | SharedFilter | None,
        prompts: int,
    ) -> PriorTensors | None:  # fmt: skip
        """A checked prior as the search reads it; None without a prior, or if its weight is 0."""
        return prior_tensors(prior, weight, self.catalog, self.trie, filter, prompts)

    def _decode_leaves(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        prior: PriorTensors | None = None,
    ) -> Recommendations:  # fmt: skip
        """The results of a search, on the CPU; ``items`` are what the trie's leaves hold."""
        input_ids, attention_mask = self.trim_padding(input_ids, attention_mask)
        self.check_positions(attention_mask)
        if self.graphs is None or recording():
            return self._search(input_ids, attention_mask, beams, filter, prior)
        self.trie.filter_tensors(filter, len(input_ids))  # checks the filter, which a replay does not

        def search(
            ids: Tensor, mask: Tensor, allowed: Filter | None, own: PriorTensors | None,
            num_tokens: int | None,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            return self._beam_search(ids, mask, beams, allowed, own, num_tokens=num_tokens).tensors()

        with self.graphs.lock:  # until the results are copied
            found = self.graphs.run(search, beams, input_ids, attention_mask, filter, prior)
            return Recommendations(*found).cpu()

    def _search(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        prior: PriorTensors | None = None, threshold: Tensor | None = None,
    ) -> Recommendations:  # fmt: skip
        """``_beam_search`` for prompts on any device, its results on the CPU."""
        device = self.trie.device
        num_tokens = token_count(attention_mask) if self.plan.steps_in_torch else None
        prompts = input_ids.to(device), attention_mask.to(device)
        return self._beam_search(*prompts, beams, filter, prior, threshold, num_tokens).cpu()

    def _beam_search(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        prior: PriorTensors | None = None, threshold: Tensor | None = None, num_tokens: int | None = None,
    ) -> Recommendations:  # fmt: skip
        """A beam search, its results on the device.

        With ``threshold`` [B], only prefixes that score at least as much are kept; without it the search
        never synchronizes with a GPU. ``num_tokens``: see ``DecoderState.prefill``.
        """
        if threshold is None and self._searches_in_one_call(input_ids):
            return self._search_in_one_call(input_ids, attention_mask, beams, filter, prior)
        state = self.plan.new_state()
        with timed_stage("prefill", "decode: prefill"):
            logits = state.prefill(input_ids, attention_mask, self.logits_request(0), num_tokens)
        prefixes = Beams.at_root(len(input_ids), self.trie.device)
        for level in range(self.catalog.levels):
            if level > 0:
                rows = self._open_beams(prefixes.nodes)
                if rows is not None and not bool(rows.any()):
                    self._walk_to_leaves(prefixes)
                    break
                tokens = self.tokens.of_level(level - 1, prefixes.codes[:, :, -1])
                request = self.logits_request(level)._replace(rows=rows)
                with timed_stage("decode_steps", f"decode: step {level}"):
                    logits = state.decode_step(tokens, prefixes.parents, request)
            with timed_stage("selection"):
                prefixes.extend(self._step(logits, prefixes, beams, filter, prior))
            if threshold is not None:
                prefixes.prune_below(threshold)
        return prefixes.results(self.trie)

    def _step(
        self, logits: Logits, prefixes: Beams, beams: int, filter: Filter | None, prior: PriorTensors | None
    ) -> BeamStep | MixedStep:
        """The best prefixes that are one code longer."""
        operands = (
            logits.values, prefixes.scores, prefixes.nodes, self.trie, beams, self.normalize,
            logits.logsumexp, filter,
        )  # fmt: skip
        if prior is None:
            return trie_beam_step(*operands)
        return trie_beam_step(*operands, prior=prior, generator_scores=prefixes.generator_scores)

    def _search_in_one_call(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        prior: PriorTensors | None,
    ) -> Recommendations:  # fmt: skip
        scores, leaves, codes, pruned, timings = self.plan.beam_search(
            input_ids, attention_mask, beams=beams, trie=self.trie.arrays,
            filter=self.trie.filter_tensors(filter, len(input_ids)), normalize=self.normalize,
            requests=[self.logits_request(level) for level in range(self.catalog.levels)],
            code_tokens=self.tokens.input_table if self.tokens.start is None else None, prior=prior,
        )  # fmt: skip
        add_seconds(timings.by_stage())
        return Recommendations.of_leaves(self.trie, scores, leaves, codes, pruned)

    def _searches_in_one_call(self, prompts: Tensor) -> bool:
        """Whether one call may run the whole search.

        It must select beams with the chosen backend, no profiler may need a range per step, and no step may
        lack a position, even one that the search would skip.
        """
        if not self.plan.searches_in_one_call or ranges_enabled():
            return False
        selects_natively = choose("trie_beam_step", self.trie.device).backend == "native"
        return selects_natively and self.plan.fits(prompts.shape[1] + self.catalog.levels - 1)

    def _open_beams(self, nodes: Tensor) -> Tensor | None:
        """The beams [B, W] that need logits; None for all of them.

        Beams that are not alive need none. Under "valid", neither do beams with one item below: its codes
        have the log-probability 0. On a GPU the answer is always None, to avoid a synchronization.
        """
        if nodes.device.type != "cpu":
            return None
        is_open = nodes >= 0
        if self.normalize == "valid":
            ranks = self.trie.interval(nodes.flatten())
            is_open = (ranks[:, 1] - ranks[:, 0] > 1).view(nodes.shape)
        return None if bool(is_open.all()) else is_open

    def _walk_to_leaves(self, prefixes: Beams) -> None:
        """Extend beams with one item below, or none, to their leaves."""
        for _ in range(prefixes.codes.shape[2], self.catalog.levels):
            codes, nodes = self.trie.children(prefixes.nodes.flatten())
            codes = codes[:, 0].view(prefixes.nodes.shape)
            prefixes.codes = torch.cat((prefixes.codes, codes[:, :, None].long()), dim=2)
            prefixes.nodes = nodes[:, 0].view(prefixes.nodes.shape)
