"""The engine: exact trie-constrained beam search for Hugging Face models.

The prompt runs once a user and its keys and values are shared by all W beams, which are queries. T5, GPT-2,
Llama, Mistral and Qwen run on states of our own (``t5.py``, ``causal.py``), other models on their own
forward (``generic.py``).

B users, W beams, M levels, K codes a level, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

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
    trimmed,
)
from cemg.decoding.factory import make_plan
from cemg.decoding.graphs import Graphs
from cemg.decoding.members import leaf_filter, with_members
from cemg.decoding.models.causal import CausalPlan
from cemg.decoding.models.layers import LogitsRequest
from cemg.decoding.models.native import NativePlan
from cemg.decoding.models.t5 import T5Plan
from cemg.decoding.parity_check import ParityCheck
from cemg.decoding.pretrained import load_pretrained, save_pretrained
from cemg.decoding.timings import add_seconds, recording, timed_stage
from cemg.errors import UserError
from cemg.tokenizer import Catalog, CodeTokens, SharedFilter, TokenMap
from cemg_kernels import RequestFilter, trie_beam_step
from cemg_kernels.constrained.softmax import Normalize
from cemg_kernels.runtime.dispatch import choose
from cemg_kernels.runtime.ranges import ranges_enabled

Array = Tensor | np.ndarray | Sequence[Sequence[int]]  # [B, S] of integers


def check_fit(
    model: PreTrainedModel, catalog: Catalog, code_token_start: TokenMap | CodeTokens | None, normalize: str
) -> CodeTokens:
    """The token of each code. Raises UserError where the model lacks one, or they are not known, and for an
    unknown ``normalize``."""
    return check_tokens(known_tokens(model), catalog, code_token_start, normalize)


def known_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model both reads and predicts; adapters may lie over its embeddings."""
    embedding: Any = model.get_input_embeddings()
    embedding = getattr(embedding, "original_module", embedding)
    if hasattr(embedding, "get_base_layer"):
        embedding = embedding.get_base_layer()
    head = model.get_output_embeddings()
    return min(embedding.num_embeddings, getattr(head, "out_features", embedding.num_embeddings))


def check_tokens(
    tokens: int, catalog: Catalog, code_token_start: TokenMap | CodeTokens | None, normalize: str
) -> CodeTokens:
    """As ``check_fit``, for a model of so many tokens."""
    if normalize not in get_args(Normalize):
        raise UserError(f"normalize must be vocab, level or valid, got {normalize!r}")
    known = catalog.code_tokens(code_token_start)
    if known.span.stop > tokens:
        size, levels = catalog.codebook_size, catalog.levels
        codes = (
            f"{levels} levels of {size} codes" if known.start is not None else "the codes of the token map"
        )
        raise UserError(
            "this catalog does not belong to the generator",
            cause=f"{codes} from token {known.span.start} on need {known.span.stop} tokens, "
            f"the model has {tokens}",
            fix="use the catalog that the model was trained on",
        )
    return known


class Decoder:
    """``Decoder(model, catalog, code_token_start).decode(input_ids, attention_mask, beams)``.

    Any Hugging Face T5 or decoder-only model. Code c of level m is token ``code_token_start + m·K + c``, or
    entry [m, c] of ``code_token_start`` where that is a table [levels, K] (-1: no such code) or one list per
    level, or the token that the catalog names.
    ``normalize`` says over which tokens the log-softmax runs: the whole vocabulary, the level's K codes, or
    the valid ones, those that pass the filter where there is one (SPEC §4). Scores are sums of
    log-probabilities (paper equation 6). ``backend``: "native" (C++, float32 on the CPU), "torch" (the same
    steps in PyTorch, on any device), "reference" (the model's own forward), or None for the dispatcher's;
    UserError where it does not serve the model. ``graphs``: record a CUDA graph a bucket of prompts (None:
    on a GPU, yes). ``check``: compare each path with the model's own forward on two short prompts and two
    beam steps, and use the next path where they differ; False saves these milliseconds and trusts the first
    path that takes the model. ``path`` says what runs and why. The fast paths read the weights here: after
    further training, make a new Decoder.
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
        proof = self._parity_check() if check else None
        self.plan, self.path = make_plan(model, tokens.span, backend, proof)
        self.graphs: Graphs | None = None
        own_state = isinstance(self.plan, (T5Plan, CausalPlan))
        if own_state and (model.device.type == "cuda" if graphs is None else graphs):
            self.graphs = Graphs(pad_left=self.causal, device=self.trie.device)
            self.path += ", CUDA graphs"

    def save_pretrained(self, folder: Path | str) -> None:
        """Write model, token map, catalog and ``normalize`` to a folder; LoRA is merged into the weights.

        ``AutoModelForSeq2SeqLM`` or ``AutoModelForCausalLM`` and ``Decoder.from_pretrained`` load it; the
        catalog alone is in ``cemg_catalog``, for ``Catalog.load``. Other files of the folder stay. Raises
        UserError for adapters that cannot be merged.
        """
        tokens = self.tokens.to("cpu")
        save_pretrained(folder, self.model, self.catalog, tokens=tokens, normalize=self.normalize)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, device: str = "cpu", normalize: Normalize | None = None,
        backend: str | None = None, graphs: bool | None = None, check: bool = True,
    ) -> Decoder:  # fmt: skip
        """The decoder of a folder that ``save_pretrained`` wrote; ``normalize`` None: as it was saved.

        Raises UserError where a part of the folder is missing or damaged.
        """
        model, catalog, saved = load_pretrained(folder, device=device)
        chosen = cast(Normalize, normalize or saved)
        return cls(model, catalog, normalize=chosen, backend=backend, graphs=graphs, check=check)

    @torch.inference_mode()
    def decode(
        self, input_ids: Array, attention_mask: Array, beams: int, *,
        filter: Filter | SharedFilter | None = None,
    ) -> Recommendations:  # fmt: skip
        """The ``beams`` best items for prompts [B, S], padded anywhere, best first. Prompts are tensors,
        arrays or lists of equal length.

        ``filter`` admits some of the items only, the same for all (ItemFilter) or each prompt's own
        (RequestFilter of B requests), as ``catalog.only`` and ``catalog.excluding`` return them;
        ``certified`` counts what is proven among them. With normalize="valid" the softmax runs over the
        codes that pass the filter, so an item's score is not what it is without;
        "vocab" and "level" scores are. Rows hold fewer items where fewer are legal: the rest is −1. Of a
        catalog with shared semantic IDs, a row holds the first ``beams`` items of the best ``beams`` IDs.
        Raises UserError for fewer beams than one, and for shapes that differ.
        """
        input_ids, attention_mask = torch.as_tensor(input_ids), torch.as_tensor(attention_mask)
        leaves = leaf_filter(filter, self.catalog, self.trie)
        check_prompts(input_ids, attention_mask, beams, leaves)
        if len(input_ids) == 0:
            return Recommendations.of_nobody(beams, self.catalog.levels)
        return with_members(
            self._leaves(input_ids, attention_mask, beams, leaves), self.catalog, filter, beams
        )

    def _leaves(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None
    ) -> Recommendations:
        """The leaves that a search ends on, by the ids that the trie gives them."""
        input_ids, attention_mask = self.trimmed(input_ids, attention_mask)
        self.check_positions(attention_mask)
        if self.graphs is None or recording():
            return self._search(input_ids, attention_mask, beams, filter)
        self.trie.filter_tensors(filter, len(input_ids))  # a replay asks no questions

        def search(
            ids: Tensor, mask: Tensor, allowed: Filter | None, num_tokens: int | None
        ) -> tuple[Tensor, ...]:
            return self._found(ids, mask, beams, allowed, num_tokens=num_tokens).parts()

        with self.graphs.lock:  # until its results are copied
            return Recommendations(*self.graphs.run(search, beams, input_ids, attention_mask, filter)).cpu()

    @torch.inference_mode()
    def decode_exact(
        self, input_ids: Array, attention_mask: Array, top: int, beams: int, *,
        filter: Filter | SharedFilter | None = None, budget: int = 4096,
    ) -> Recommendations:  # fmt: skip
        """The true ``top`` of the catalog, proven: rows that ``beams`` cannot prove are searched again.

        The second search keeps every prefix that could still lead above the ``top``-th score of the first:
        scores only fall, so nothing else can. ``budget`` bounds the prefixes a level keeps; a row that
        needs more stays unproven, and ``certified`` < ``top`` says so. Raises UserError as ``decode``
        does, and for ``top`` above ``beams`` or ``beams`` above ``budget``.
        """
        if not 1 <= top <= beams <= budget:
            raise UserError(f"1 <= top <= beams <= budget must hold, got {top}, {beams} and {budget}")
        check_beams(budget)
        input_ids, attention_mask = torch.as_tensor(input_ids), torch.as_tensor(attention_mask)
        found = self.decode(input_ids, attention_mask, beams, filter=filter).top(top)
        unproven = found.certified < (found.items >= 0).sum(1)
        for row in unproven.nonzero().flatten().tolist():
            own = slice(row, row + 1)
            allowed = filter
            if isinstance(filter, RequestFilter | SharedFilter):
                allowed = filter.select(torch.tensor([row]))
            leaves = leaf_filter(allowed, self.catalog, self.trie)
            floor = found.scores[own, -1].to(self.model.device) - 2 * MARGIN
            prompt = self.trimmed(input_ids[own], attention_mask[own])
            better = with_members(self._search(*prompt, budget, leaves, floor), self.catalog, allowed, budget)
            better = better.top(top)
            for kept, new in zip(found.parts(), better.padded(top).parts(), strict=True):
                kept[row] = new[0]
        return found

    def trimmed(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [B, S] as the plan reads them, without needless padding."""
        return trimmed(input_ids, attention_mask, causal=self.causal)

    def check_positions(self, mask: Tensor) -> None:
        """UserError where a step in PyTorch would feed a token behind the learned positions. The C++ looks at
        each step itself; a ``mask`` [B, S] on a GPU is not waited for."""
        if isinstance(self.plan, CausalPlan) and mask.device.type == "cpu":
            self.plan.check_positions(int(mask.sum(1).max()) + self.catalog.levels - 1)

    def logits_request(self, level: int) -> LogitsRequest:
        """What a state is asked for where codes of ``level`` come next."""
        start, size = self.tokens.start, self.catalog.codebook_size
        if start is None:
            return LogitsRequest(-1, size, self.normalize == "vocab", tokens=self.tokens.table[level])
        return LogitsRequest(start + level * size, size, self.normalize == "vocab")

    def _parity_check(self) -> ParityCheck:
        levels = range(min(3, self.catalog.levels))
        return ParityCheck(
            self.model,
            [self.logits_request(level) for level in levels],
            [self.tokens.table[level] for level in levels],
        )

    def _search(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        floor: Tensor | None = None,
    ) -> Recommendations:  # fmt: skip
        device = self.trie.device
        num_tokens = None if isinstance(self.plan, NativePlan) else token_count(attention_mask)
        prompts = input_ids.to(device), attention_mask.to(device)
        return self._found(*prompts, beams, filter, floor, num_tokens).cpu()

    def _found(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        floor: Tensor | None = None, num_tokens: int | None = None,
    ) -> Recommendations:  # fmt: skip
        """Beam search, its results on the device; without ``floor`` it never waits for
        the device. With ``floor`` [B], only prefixes that score at least as much live on. ``num_tokens``:
        at least those of all prompts, as a state takes it."""
        if isinstance(self.plan, NativePlan) and floor is None and self._in_one_call(self.plan, input_ids):
            ended, timings = self.plan.beam_search(
                input_ids, attention_mask, beams=beams, trie=self.trie.arrays,
                filter=self.trie.filter_tensors(filter, len(input_ids)), normalize=self.normalize,
                requests=[self.logits_request(level) for level in range(self.catalog.levels)],
                table=self.tokens.fed if self.tokens.start is None else None,
            )  # fmt: skip
            add_seconds(timings.by_stage())
            return Recommendations.of_leaves(self.trie, *ended)
        state = self.plan.new_state()
        with timed_stage("prefill", "decode: prompt and first code"):
            logits = state.prefill(input_ids, attention_mask, self.logits_request(0), num_tokens)
        found = Beams.at_the_root(len(input_ids), self.trie.device)
        for level in range(self.catalog.levels):
            if level > 0:
                open_beams = self._open(found.nodes)
                if open_beams is not None and not bool(open_beams.any()):
                    self._to_the_leaves(found)
                    break
                tokens = self.tokens.of_level(level - 1, found.codes[:, :, -1])
                request = self.logits_request(level)._replace(rows=open_beams)
                with timed_stage("decode_steps", f"decode: code {level}"):
                    logits = state.decode_step(tokens, found.parents, request)
            with timed_stage("selection"):
                step = trie_beam_step(
                    logits.values, found.scores, found.nodes, self.trie, beams, self.normalize,
                    logits.logsumexp, filter,
                )  # fmt: skip
            found.grow(step)
            if floor is not None:
                found.drop_below(floor)
        return found.results(self.trie)

    def _in_one_call(self, plan: NativePlan, prompts: Tensor) -> bool:
        """Whether C++ may go through the whole search: its selection is the chosen one, no ranges are to be
        named, and no step, taken or not, would lack a position."""
        selects = choose("trie_beam_step", self.trie.device).backend == "native"
        last = prompts.shape[1] + self.catalog.levels - 1
        return selects and not ranges_enabled() and plan.has_positions(last)

    def _open(self, nodes: Tensor) -> Tensor | None:
        """The beams [B, W] for which the model has to run: those that live and, under "valid", have more than
        one item below them, since what follows a sole one is certain, its log-probability 0. None: all.

        Not asked on a GPU, which would have to be waited for.
        """
        if nodes.device.type != "cpu":
            return None
        found = nodes >= 0
        if self.normalize == "valid":
            ranks = self.trie.interval(nodes.flatten())
            found = (ranks[:, 1] - ranks[:, 0] > 1).view(nodes.shape)
        return None if bool(found.all()) else found

    def _to_the_leaves(self, found: Beams) -> None:
        """Beams that are dead or have one item below them, walked down to it."""
        for _ in range(found.codes.shape[2], self.catalog.levels):
            own, below = self.trie.children(found.nodes.flatten())
            codes = own[:, 0].view(found.nodes.shape)
            found.codes = torch.cat((found.codes, codes[:, :, None].long()), dim=2)
            found.nodes = below[:, 0].view(found.nodes.shape)
