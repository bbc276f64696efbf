"""The engine: exact trie-constrained beam search for Hugging Face models.

The prompt runs once a user and its keys and values are shared by all W beams, which are queries. T5, GPT-2,
Llama, Mistral and Qwen run on steppers of our own (``t5.py``, ``causal.py``), other models on their own
forward (``generic.py``).

B users, W beams, M levels, K codes a level, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cemg.decoding.causal import CausalPlan
from cemg.decoding.generic import GenericPlan
from cemg.decoding.graphs import Graphs
from cemg.decoding.layers import Stepper, Unsupported, Wanted
from cemg.decoding.t5 import T5Plan
from cemg.errors import UserError
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, RequestFilter, Trie, fast_kernels_enabled, trie_beam_step
from cemg_kernels.ranges import named_range

Filter = ItemFilter | RequestFilter
Normalize = Literal["vocab", "level", "valid"]
MARGIN = 1e-4  # a result is certified where it beats everything pruned by this much


@dataclass(frozen=True, slots=True)
class Recommendations:
    """Best first. ``items`` [B, top] int64 (−1: none), ``scores`` [B, top] float32 (−inf), ``codes``
    [B, top, M] int64 (−1), ``certified`` [B]: how many leading results are proven to be the true top.
    """

    items: Tensor
    scores: Tensor
    codes: Tensor
    certified: Tensor

    def top(self, count: int) -> Recommendations:
        """The first ``count`` results of each row."""
        first = (self.items[:, :count], self.scores[:, :count], self.codes[:, :count])
        return Recommendations(*first, self.certified.clamp_max(count))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors, in their order."""
        return self.items, self.scores, self.codes, self.certified

    def cpu(self) -> Recommendations:
        """The same on the CPU."""
        return Recommendations(*(part.cpu() for part in self.parts()))

    def padded(self, count: int) -> Recommendations:
        """At least ``count`` places a row, the last ones without an item."""
        more = max(count - self.items.shape[1], 0)
        pad = torch.nn.functional.pad
        items, scores = pad(self.items, (0, more), value=-1), pad(self.scores, (0, more), value=float("-inf"))
        return Recommendations(items, scores, pad(self.codes, (0, 0, 0, more), value=-1), self.certified)


def check_fit(model: PreTrainedModel, catalog: Catalog, code_token_start: int, normalize: str) -> None:
    """UserError where the model has fewer tokens than the catalog needs, and for an unknown ``normalize``."""
    rows = cast(int, model.get_input_embeddings().num_embeddings)
    check_tokens(rows, catalog, code_token_start, normalize)


def check_tokens(tokens: int, catalog: Catalog, code_token_start: int, normalize: str) -> None:
    """As ``check_fit``, for a model of so many tokens."""
    if normalize not in ("vocab", "level", "valid"):
        raise UserError(f"normalize must be vocab, level or valid, got {normalize!r}")
    size, levels = catalog.codebook_size, catalog.levels
    needed = code_token_start + levels * size
    if needed > tokens:
        raise UserError(
            "this catalog does not belong to the generator",
            cause=f"{levels} levels of {size} codes from token {code_token_start} on need {needed} tokens, "
            f"the model has {tokens}",
            fix="use the catalog that the model was trained on",
        )


def ranked(trie: Trie, scores: Tensor, nodes: Tensor, codes: Tensor, pruned: Tensor) -> Recommendations:
    """The results of a search, from its last beams [B, W] and the best score [B] that it pruned; where
    they lie."""
    proven = (scores > pruned[:, None] + MARGIN) & (nodes >= 0)  # sorted, so the proven ones lead
    items = trie.items(nodes.flatten()).reshape(nodes.shape)
    codes = codes.masked_fill((nodes < 0)[:, :, None], -1)
    return Recommendations(items, scores, codes, proven.sum(1))


class Plan(Protocol):
    """A model, arranged for decoding."""

    def begin(self) -> Stepper:
        """A stepper for one batch."""
        ...


def make_plan(model: PreTrainedModel, code_tokens: range, fast: bool) -> tuple[Plan, str]:
    """The plan of a model and the path it takes, in words."""
    if not fast:
        return GenericPlan(model), "the model's own forward: fast kernels are off"
    try:
        if model.config.is_encoder_decoder:
            return T5Plan(model, code_tokens), "fast T5"
        return CausalPlan(model, code_tokens), "fast decoder-only"
    except Unsupported as reason:
        return GenericPlan(model), f"the model's own forward: {reason}"


class Decoder:
    """``Decoder(model, catalog, code_token_start).decode(input_ids, attention_mask, beams)``.

    Any Hugging Face T5 or decoder-only model whose token ``code_token_start + m·K + c`` is code c of level m.
    ``normalize`` says over which tokens the log-softmax runs: the whole vocabulary, the level's K codes, or
    the valid ones, those that pass the filter where there is one (SPEC §4). Scores are sums of
    log-probabilities (paper equation 6). ``fast=False`` runs the model's own forward; by default the fast
    kernels' switch decides. ``graphs``: record a CUDA graph a bucket of prompts (None: on a GPU, yes).
    ``path`` says what runs and why. The fast paths read the weights here: after
    further training, make a new Decoder.
    """

    def __init__(
        self, model: PreTrainedModel, catalog: Catalog, code_token_start: int, normalize: Normalize = "vocab",
        *, fast: bool | None = None, graphs: bool | None = None,
    ) -> None:  # fmt: skip
        check_fit(model, catalog, code_token_start, normalize)
        self.model, self.catalog = model, catalog
        self.code_token_start, self.normalize = code_token_start, normalize
        self.trie = catalog.trie.to(model.device)
        codes = range(code_token_start, code_token_start + catalog.levels * catalog.codebook_size)
        self.plan, self.path = make_plan(model, codes, fast_kernels_enabled() if fast is None else fast)
        self.graphs: Graphs | None = None
        own_stepper = not isinstance(self.plan, GenericPlan)
        if own_stepper and (model.device.type == "cuda" if graphs is None else graphs):
            pad_left = not model.config.is_encoder_decoder
            self.graphs = Graphs(pad_left=pad_left, device=self.trie.device)
            self.path += ", CUDA graphs"

    @torch.inference_mode()
    def decode(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, *, filter: Filter | None = None
    ) -> Recommendations:
        """The ``beams`` best items for prompts [B, S] (a decoder's padded on the left), best first.

        ``filter`` admits some of the items only, the same for all (ItemFilter) or each prompt's own
        (RequestFilter of B requests); ``certified`` counts what is proven among them. With
        normalize="valid" the softmax runs over the codes that pass the filter, so an item's score is not
        what it is without; "vocab" and "level" scores are. Rows hold fewer items where fewer are legal: the
        rest is −1. Raises UserError for fewer beams than one, and for shapes that differ.
        """
        self._check(input_ids, attention_mask, beams, filter)
        if self.graphs is None or isinstance(filter, RequestFilter):
            return self._search(input_ids, attention_mask, beams, filter)

        def search(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            return self._found(ids, mask, beams, filter).parts()

        found = self.graphs.run(search, (beams, id(filter)), input_ids, attention_mask)
        return Recommendations(*found).cpu()

    @torch.inference_mode()
    def decode_exact(
        self, input_ids: Tensor, attention_mask: Tensor, top: int, beams: int, *,
        filter: Filter | None = None, budget: int = 4096,
    ) -> Recommendations:  # fmt: skip
        """The true ``top`` of the catalog, proven: rows that ``beams`` cannot prove are searched again.

        The second search keeps every prefix that could still lead above the ``top``-th score of the first:
        scores only fall, so nothing else can. ``budget`` bounds the prefixes a level keeps; a row that
        needs more stays unproven, and ``certified`` < ``top`` says so. Raises UserError as ``decode``
        does, and for ``top`` above ``beams`` or ``beams`` above ``budget``.
        """
        if not 1 <= top <= beams <= budget:
            raise UserError(f"1 <= top <= beams <= budget must hold, got {top}, {beams} and {budget}")
        found = self.decode(input_ids, attention_mask, beams, filter=filter).top(top)
        unproven = found.certified < (found.items >= 0).sum(1)
        for row in unproven.nonzero().flatten().tolist():
            own = slice(row, row + 1)
            allowed = filter.select(torch.tensor([row])) if isinstance(filter, RequestFilter) else filter
            floor = found.scores[own, -1].to(self.model.device) - 2 * MARGIN
            better = self._search(input_ids[own], attention_mask[own], budget, allowed, floor).top(top)
            for kept, new in zip(found.parts(), better.padded(top).parts(), strict=True):
                kept[row] = new[0]
        return found

    def _check(self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None) -> None:
        if beams < 1:
            raise UserError(f"beams must be at least 1, got {beams}")
        if input_ids.shape != attention_mask.shape or input_ids.ndim != 2:
            shapes = f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
            raise UserError(f"input_ids and attention_mask must be [B, S] alike, got {shapes}")
        if isinstance(filter, RequestFilter) and filter.num_requests != len(input_ids):
            raise UserError(f"a filter of {filter.num_requests} requests for {len(input_ids)} prompts")

    def _search(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        floor: Tensor | None = None,
    ) -> Recommendations:  # fmt: skip
        device = self.trie.device
        return self._found(input_ids.to(device), attention_mask.to(device), beams, filter, floor).cpu()

    def _found(
        self, input_ids: Tensor, attention_mask: Tensor, beams: int, filter: Filter | None,
        floor: Tensor | None = None,
    ) -> Recommendations:  # fmt: skip
        """Beam search, its results on the device; without ``floor`` it never waits for
        the device. With ``floor`` [B], only prefixes that score at least as much live on."""
        device = self.trie.device
        stepper = self.plan.begin()
        with named_range("decode: prompt and first code"):
            logits = stepper.start(input_ids, attention_mask, self._wanted(0))
        batch = len(input_ids)
        scores = torch.zeros(batch, 1, device=device)
        nodes = torch.zeros(batch, 1, dtype=torch.int32, device=device)  # the root
        codes = torch.zeros(batch, 1, 0, dtype=torch.int64, device=device)
        pruned = torch.full((batch,), float("-inf"), device=device)
        parents = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        for level in range(self.catalog.levels):
            if level > 0 and self._decided(nodes):
                codes, nodes = self._to_the_leaves(codes, nodes)
                break
            if level > 0:
                tokens = self._tokens(codes[:, :, -1], level - 1)
                with named_range(f"decode: code {level}"):
                    logits = stepper.step(tokens, parents.clamp_min(0), self._wanted(level))
            scores, parents, chosen, nodes, cut = trie_beam_step(
                logits.columns, scores, nodes, self.trie, beams, self.normalize, logits.total, filter
            )
            grown_from = parents.clamp_min(0)[:, :, None].expand(-1, -1, level)
            codes = torch.cat(
                (codes.gather(1, grown_from), chosen[:, :, None].long()), dim=2
            )  # [B, W, level + 1]
            pruned = torch.maximum(pruned, cut)
            if floor is not None:
                alive = scores >= floor[:, None]  # the leading ones
                below = scores.masked_fill(alive, float("-inf")).amax(1)
                pruned = torch.maximum(pruned, below)
                scores, nodes = scores.masked_fill(~alive, float("-inf")), nodes.masked_fill(~alive, -1)
                count = max(int(alive.sum(1).max()), 1)
                scores, parents, nodes, codes = (t[:, :count] for t in (scores, parents, nodes, codes))
        return ranked(self.trie, scores, nodes, codes, pruned)

    def _decided(self, nodes: Tensor) -> bool:
        """Whether every beam [B, W] has one item below it, so that "valid" codes are certain from here on.

        Not asked on a GPU, which would have to be waited for.
        """
        if self.normalize != "valid" or nodes.device.type != "cpu":
            return False
        ranks = self.trie.interval(nodes.flatten())
        return bool((ranks[:, 1] - ranks[:, 0] <= 1).all())

    def _to_the_leaves(self, codes: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, W, m] and nodes [B, W] with one item each below -> [B, W, M] and the leaves."""
        for _ in range(codes.shape[2], self.catalog.levels):
            own, below = self.trie.children(nodes.flatten())
            codes = torch.cat((codes, own[:, 0].view(nodes.shape)[:, :, None].long()), dim=2)
            nodes = below[:, 0].view(nodes.shape)
        return codes, nodes

    def _tokens(self, codes: Tensor, level: int) -> Tensor:
        """Tokens of codes [B, W] of a level; a dead beam's −1 becomes code 0, which nothing reads."""
        return self.code_token_start + level * self.catalog.codebook_size + codes.clamp_min(0)

    def _wanted(self, level: int) -> Wanted:
        size = self.catalog.codebook_size
        return Wanted(self.code_token_start + level * size, size, self.normalize == "vocab")
