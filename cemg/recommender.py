"""``Recommender``: recommendations from a trained run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cemg.artifacts import RunArtifacts
from cemg.data import Dataset
from cemg.decoding import Decoder, Normalize, Recommendations, TransformersDecoder, make_decoder
from cemg.decoding.beams import check_beams
from cemg.decoding.pretrained import save_pretrained
from cemg.decoding.priors import PRIOR_WEIGHT, prior_of_rows, prior_tensors
from cemg.errors import UserError
from cemg.features import FeatureCache
from cemg.generator.item_tokens import keep_items
from cemg.item_encoder import ItemEncoder
from cemg.memory import Memory
from cemg.mixture import Experts, Gate, Mixed, Source
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter, ItemPrior, RequestFilter, Trie


class Recommender:
    """A trained run that recommends items.

    Example:
        >>> recommender = Recommender.from_run("runs/demo")
        >>> recommender.recommend(["item-0012", "item-0007"], top=3).ids
    """

    def __init__(
        self, artifacts: RunArtifacts, *, normalize: Normalize | None = None, engine: str = "cemg"
    ) -> None:
        self.artifacts, self.engine = artifacts, engine
        self.catalog: Catalog = artifacts.load_catalog()
        known = set(self.catalog.item_ids)  # a retraining may have dropped some of the removed
        self.removed = [item for item in artifacts.removed_items() if item in known]
        self._normalize, self._trained = artifacts.normalize(normalize), artifacts.load_trained(self.catalog)
        self._prepare()

    def _prepare(self) -> None:
        """Prepare searches in the catalog."""
        model, vocabulary = self.artifacts.served(*self._trained, self.catalog)
        model.to(torch.device(self.artifacts.device))  # type: ignore[arg-type]  # transformers wraps Module.to
        self.prompter = self.artifacts.prompter(model, vocabulary, self.catalog)
        first = vocabulary.code_token_start
        self.decoder = make_decoder(self.engine, model, self.catalog, first, self._normalize)

    @classmethod
    def from_run(
        cls, folder: Path | str, device: str = "cpu", normalize: Normalize | None = None,
        engine: str = "cemg", *, verify: bool = True,
    ) -> Recommender:  # fmt: skip
        """Open a run that ``cemg-train`` wrote.

        Args:
            folder: The folder of the run.
            device: "cpu" or a CUDA device.
            normalize: "vocab", "valid" or "level"; None for the run's setting.
            engine: "cemg", "transformers" (``generate()`` with a Python trie, for comparison) or "vllm".
            verify: Whether each file is compared with its hash when it is read.

        Raises:
            UserError: A part of the run is missing or damaged, vLLM is not installed, or it cannot serve the
                model.
        """
        return cls(
            RunArtifacts.open(Path(folder), device=device, verify=verify), normalize=normalize, engine=engine
        )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write model, token map and catalog to a folder that works without the run.

        ``AutoModelForSeq2SeqLM`` or ``AutoModelForCausalLM`` and `Decoder.from_pretrained` load it. LoRA is
        merged into the weights. ``cemg_catalog/cemg_decoder.json`` describes the prompts: special tokens and
        number of history items. Removed items are not in the catalog, so prompts cannot contain them.

        Raises:
            UserError: The engine is "vllm".
        """
        if not isinstance(self.decoder, Decoder | TransformersDecoder):
            raise UserError(f"engine={self.engine} has no model to save", fix="use engine=cemg")
        gone = set(self.catalog.rows_of([self._id(item) for item in self.removed]))
        kept = [row for row in range(len(self.catalog)) if row not in gone]
        model, vocabulary = self.decoder.model, self.prompter.vocabulary
        if gone and vocabulary.items:
            model = keep_items(model, vocabulary.item_token_start, kept)
            vocabulary = dataclasses.replace(vocabulary, items=len(kept))
        prompts = {**vocabulary.to_dict(), "history_items": self.prompter.history_items}
        save_pretrained(
            folder, model, self.catalog.take(kept) if gone else self.catalog,
            tokens=self.decoder.tokens.to("cpu"), normalize=self.decoder.normalize, prompts=prompts,
        )  # fmt: skip

    def recommend(
        self,
        histories: Iterable[str | int] | Iterable[Iterable[str | int]],
        top: int = 10,
        beams: int = 50,
        filter: ItemFilter | Sequence[ItemFilter | None] | None = None,
        exclude_history: bool = False,
        exact: bool = False,
        prior: ItemPrior | None = None,
        prior_weight: float | Sequence[float] | None = None,
        memory: str | None = None,
        shares: bool = False,
    ) -> Recommendations:
        """Recommend the next items for one history or for B histories.

        Items that ``cemg-catalog remove`` removed are never recommended.

        Args:
            histories: Item ids, oldest first: ``["12", "7"]`` for one, ``[["12", "7"], ["3"]]`` for two.
            top: Number of items per history.
            beams: Beam width, at least ``top``.
            filter: Admits only some of the items: one filter for all histories, or a list of B filters, with
                None for no filter. See `only`.
            exclude_history: Whether the search excludes the items of the history. The list is still full;
                engine "transformers" drops them from its results instead.
            exact: Whether the search continues until the results are proven to be the true top of the
                admitted items. If its budget runs out, ``certified`` says how many are proven.
            prior: A distribution over items per history, with ids of the catalog, such as the scores of your
                own retriever. Items rank by the mixture (1 - weight) * P(generator) + weight * P(prior), and
                the search is exact in it. It is renormalised over the admitted items.
            prior_weight: The share of the prior, 0 to 1: one number, or one per history. None: 0.5.
            memory: How the run's item memory is mixed into the search: "off", "constant" (the same weights
                for every history) or "gate" (weights per history). An empty history is then ranked by
                popularity, and ``ranked_by`` says so. None: see `default_memory`; "off" beside a prior.
            shares: Whether ``shares`` is computed: how much of the probability of each item is from the
                generator and from each source of the prior.

        Returns:
            ``ids``, ``titles``, ``scores`` and ``codes`` per history; ``items`` are catalog rows. With
            normalize="valid", ``filter`` and ``exclude_history`` change the scores, because the softmax runs
            over the admitted codes.

        Raises:
            UserError: ``histories`` is a string or has an unknown item id, ``top`` exceeds ``beams``, the
                number of filters or of the prior's requests differs from the number of histories, the prior
                has an unknown or repeated item, the engine has no filters, priors or exact search, or the run
                has no memory or no gate.
        """
        if not 1 <= top <= beams:
            fix = f"beams={top}" if top > beams else None
            raise UserError(f"top must be within 1 … beams, got top={top} and beams={beams}", fix=fix)
        check_beams(beams)
        many = as_histories(histories)
        if not many:
            return Recommendations.empty(top, self.catalog.levels)
        if memory is None:
            memory = self.default_memory if prior is None else "off"
        mixes = _check_memory(memory, prior)
        if prior is None and prior_weight is not None:
            raise UserError(
                "prior_weight has no effect without a prior", fix="pass prior=ItemPrior(items, mass)"
            )
        options = {
            "filter": filter is not None, "exact=True": exact, "a prior": prior is not None,
            f"memory={memory}": mixes,
        }  # fmt: skip
        if any(options.values()) and not isinstance(self.decoder, Decoder):
            option = next(name for name, given in options.items() if given)
            raise UserError(f"engine={self.engine} does not support {option}", fix="use engine=cemg")
        rows = [self._rows_of(history) for history in many]
        own = prior_of_rows(prior, self.catalog)
        weight = PRIOR_WEIGHT if prior_weight is None else prior_weight
        mixed = None
        if mixes:
            gate, sources = self._experts
            experts = Experts(gate, sources, self.memory.counts)
            mixed = experts.prior(rows, constant=memory == "constant", exclude_history=exclude_history)
            own = _named(ItemPrior(mixed.items, mixed.mass), self.catalog)
            weight = mixed.weight.tolist()
        known = rows if self.catalog.named else many  # as the trie's leaves name them
        allowed = None
        if isinstance(self.decoder, Decoder):
            offered = self._offered(filter)
            allowed = allowed_items(self.decoder.trie, offered, known, exclude=exclude_history)
        found = self._search(
            rows, known, top=top, beams=beams, allowed=allowed, exclude=exclude_history, exact=exact,
            prior=own, prior_weight=weight,
        )  # fmt: skip
        ids = self.catalog.ids_of(found.items)
        titles = [[None if item is None else self._titles.get(item) for item in row] for row in ids]
        ranked_by = self._ranked_by(own, weight, allowed, len(many))
        if mixes:  # an empty history has the popularity of the memory as its prior
            ranked_by = [
                "popularity" if way == "mixture" and not history else way
                for way, history in zip(ranked_by, rows, strict=True)
            ]
        parts = self._shares(found, own, weight, allowed, mixed) if shares else None
        return dataclasses.replace(found, ids=ids, titles=titles, ranked_by=ranked_by, shares=parts)

    @cached_property
    def default_memory(self) -> str:
        """The value of ``memory`` that a call without one takes: "gate", or "off" where there is none.

        It is "off" for a run without a gate, for another engine than "cemg", and for another ``normalize``
        than that of the run, which the weights were fitted with.
        """
        fitted = isinstance(self.decoder, Decoder) and self.decoder.normalize == self.artifacts.normalize(
            None
        )
        return "gate" if fitted and self.artifacts.has_gate() else "off"

    @cached_property
    def memory(self) -> Memory:
        """The item memory of the mixture, which learns by `Memory.observe`."""
        return self.artifacts.load_memory(self.catalog)

    @cached_property
    def _experts(self) -> tuple[Gate, list[Source]]:
        gate, softmax = self.artifacts.load_gate(), None
        if self.artifacts.config.generator.item_loss and isinstance(self.decoder, Decoder):
            softmax = self.artifacts.item_softmax(self.decoder.model, self.prompter)
        return gate, self.artifacts.sources(gate, self.memory, softmax=softmax)

    def with_items(
        self, codes: Tensor, item_ids: Sequence[str], *, titles: Mapping[int | str, str] | None = None
    ) -> Recommender:
        """Return a recommender whose catalog has further items. This one does not change.

        Both share the item memory, which must have the items before the first search that mixes it:
        ``recommender.memory.add_items(texts)``.

        Args:
            codes: Semantic IDs of the items, [n, levels]: see `encode_items`.
            item_ids: Ids of the items.
            titles: Titles of all items, which are not copied.
        """
        other = copy.copy(self)
        for name in ("_experts", "_not_removed", "removed_leaves", "_titles"):  # cached
            other.__dict__.pop(name, None)
        other.catalog = self.catalog.extended(codes, item_ids)
        if titles is not None:
            other.__dict__["_titles"] = titles
        if self.artifacts.has_memory():
            other.__dict__["memory"] = self.memory
        vocabulary = self.prompter.vocabulary
        if isinstance(self.decoder, Decoder) and not vocabulary.items:  # the model stays as it is
            other.prompter = self.artifacts.prompter(self.decoder.model, vocabulary, other.catalog)
            other.decoder = self.decoder.with_catalog(other.catalog)
        else:
            other._prepare()
        return other

    def without_items(self, removed: Sequence[str | int]) -> Recommender:
        """Return a recommender that never recommends these items. This one does not change."""
        other = copy.copy(self)
        for name in ("_not_removed", "removed_leaves"):
            other.__dict__.pop(name, None)
        other.removed = list(removed)
        return other

    def _search(
        self,
        rows: list[list[int]],
        known: list[list[Any]],
        *,
        top: int,
        beams: int,
        allowed: ItemFilter | RequestFilter | None,
        exclude: bool,
        exact: bool,
        prior: ItemPrior | None,
        prior_weight: float | Sequence[float],
    ) -> Recommendations:
        ids, mask = self.prompter.batch([np.asarray(r, dtype=np.int64) for r in rows])
        width = min(beams, len(self.catalog))
        if not isinstance(self.decoder, Decoder):
            found = self.decoder.decode(ids, mask, width)
            gone = [[*(items if exclude else ()), *self.removed_leaves] for items in known]
            return (found.without(gone) if any(gone) else found).top(top).padded(top)
        if exact:
            found = self.decoder.decode_exact(
                ids, mask, min(top, width), width, filter=allowed, prior=prior, prior_weight=prior_weight
            )
        else:
            found = self.decoder.decode(
                ids, mask, width, filter=allowed, prior=prior, prior_weight=prior_weight
            )
        return found.top(top).padded(top)

    def _ranked_by(
        self, prior: ItemPrior | None, weight: float | Sequence[float],
        allowed: ItemFilter | RequestFilter | None, requests: int,
    ) -> list[str]:  # fmt: skip
        """What ranks each request: the generator, or its mixture with a prior."""
        if prior is None:
            return ["generator"] * requests
        mixed = (np.broadcast_to(weight, requests) > 0) & (prior.counts > 0)
        if allowed is not None and isinstance(self.decoder, Decoder):  # it may leave nothing of a prior
            left = prior_tensors(prior, weight, self.catalog, self.decoder.trie, allowed, requests)
            mixed = np.zeros(requests, bool) if left is None else left.weight.cpu().numpy() > 0
        return ["mixture" if own else "generator" for own in mixed]

    def _shares(
        self, found: Recommendations, prior: ItemPrior | None, weight: float | Sequence[float],
        allowed: ItemFilter | RequestFilter | None, mixed: Mixed | None,
    ) -> dict[str, Tensor] | None:  # fmt: skip
        """w_s P_s(i) / P(i) of each result i and source s; None for items that share semantic IDs.

        The whole prior has weight * mass / P(i), and each of its sources the same fraction of that as of the
        mass.
        """
        requests, top = found.items.shape
        if not isinstance(self.decoder, Decoder) or self.catalog.shared is not None:
            return None
        trie, listed = self.decoder.trie, found.items >= 0
        left = prior_tensors(prior, weight, self.catalog, trie, allowed, requests)
        whole = torch.zeros(requests, top, dtype=torch.float64)
        if left is not None:
            nodes = trie.lookup(found.codes.flatten(0, 1).clamp_min(0).to(trie.device))
            masses = left.masses_of(trie.interval(nodes).view(requests, top, 2)).cpu()
            whole = left.weight.cpu()[:, None] * masses / found.scores.double().exp()
            whole = whole.masked_fill(~listed, 0.0).clamp(0.0, 1.0)
        shares = {"generator": listed.double() - whole}
        if mixed is None:
            return shares if prior is None else shares | {"prior": whole}
        for request in range(requests):
            items = found.items[request][listed[request]].tolist()
            rows = np.array(items if self.catalog.named else self.catalog.rows_of(items), dtype=np.int64)
            for name, part in mixed.fractions(request, rows).items():
                own = shares.setdefault(name, torch.zeros_like(whole))
                own[request, listed[request]] = whole[request, listed[request]] * torch.from_numpy(part)
        return shares

    def _offered(
        self, filter: ItemFilter | Sequence[ItemFilter | None] | None
    ) -> ItemFilter | Sequence[ItemFilter | None] | None:
        """``filter`` without the removed items."""
        offered = self._not_removed
        if offered is None:
            return filter
        if filter is None or isinstance(filter, ItemFilter):
            return offered if filter is None else filter & offered
        return [offered if one is None else one & offered for one in filter]

    def only(self, item_ids: Sequence[str | int]) -> ItemFilter:
        """A filter that admits only these items. Combine filters with ``~``, ``&`` and ``|``.

        Raises:
            UserError: An item id is unknown.

        Example: ``recommender.recommend(histories, filter=~recommender.only(sold_out))``
        """
        rows = self.catalog.rows_of([self._id(item) for item in item_ids])
        allowed = torch.zeros(len(self.catalog), dtype=torch.bool)
        allowed[rows] = True
        return ItemFilter.from_mask(self.catalog.trie, allowed)

    @cached_property
    def removed_leaves(self) -> list[int]:
        """The removed items as values of the trie's leaves."""
        rows = self.catalog.rows_of([self._id(item) for item in self.removed])
        return rows if self.catalog.named else [int(self.catalog.item_ids[row]) for row in rows]

    @cached_property
    def _not_removed(self) -> ItemFilter | None:
        return ~self.only(self.removed) if self.removed else None

    @cached_property
    def _titles(self) -> dict[int | str, str]:
        return self.artifacts.titles()

    def take_titles_from(self, data: Dataset) -> None:
        """Take the titles from the data of the run, so that these are not read again."""
        self.__dict__["_titles"] = self.artifacts.titles(data)

    def titles(self) -> Mapping[int | str, str]:
        """Titles by item id, those of added items included."""
        return self._titles

    def item_ids(self, found: Recommendations) -> list[list[int | str | None]]:
        """Item IDs of recommendations, B lists of ``top``; None where there were fewer items."""
        return self.catalog.ids_of(found.items)

    def encode_items(
        self, texts: Sequence[str | None], images: Sequence[Path | str | None], *,
        cache: FeatureCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute semantic IDs for new items with the feature encoders and the tokenizer of the run.

        They are unique among each other and in the catalog. Existing semantic IDs do not change.

        Args:
            texts: Text of each new item, or None.
            images: Picture file of each new item, or None.
            cache: Texts and images in it are not encoded again.

        Returns:
            Codes [n, levels] int64.

        Raises:
            UserError: An item has neither a text nor an image that the tokenizer uses.
        """
        return self._encoder.codes(texts, images, self.catalog.trie, cache=cache)

    @property
    def content(self) -> set[str]:
        """What `encode_items` reads: "text", "image" or both."""
        return self._encoder.content

    @cached_property
    def _encoder(self) -> ItemEncoder:
        return ItemEncoder(self.artifacts)

    def _id(self, item: str | int) -> str | int:
        return str(item) if self.catalog.named else item

    def _rows_of(self, history: Sequence[str | int]) -> list[int]:
        ids = [self._id(item) for item in history]
        try:
            return self.catalog.rows_of(ids)
        except UserError:
            known = set(self.catalog.item_ids)
            for item in ids:
                parts = str(item).replace(",", " ").split()
                if item not in known and len(parts) > 1 and all(part in known for part in parts):
                    raise UserError(
                        f"{item!r} is not an item; it looks like a history in one string",
                        fix=f"pass each history as a list of ids: [{parts}]",
                    ) from None
            raise


def _check_memory(memory: str, prior: ItemPrior | None) -> bool:
    """Return whether the memory is mixed in. Raises UserError for another value, or beside a prior."""
    if memory not in ("off", "constant", "gate"):
        raise UserError(f"memory must be off, constant or gate, got {memory!r}")
    if memory != "off" and prior is not None:
        raise UserError(f"memory={memory} and a prior exclude each other", fix="leave one of them out")
    return memory != "off"


def _named(prior: ItemPrior, catalog: Catalog) -> ItemPrior:
    """A prior over catalog rows with the items named as in ``Recommendations.items``."""
    if catalog.named:
        return prior
    return prior.renamed(np.array(catalog.item_ids, dtype=np.int64)[prior.items])


def as_histories(given: Any) -> list[list[Any]]:
    """One history or many, as a list of lists. Arrays and tensors become lists.

    Raises UserError for a string, for a set, and for a list that holds both ids and lists.
    """
    if isinstance(given, str | bytes | set | frozenset | dict) or not isinstance(given, Iterable):
        raise UserError(
            f"a history must be a list of item ids, got {type(given).__name__} {str(given)[:40]!r}",
            fix='recommend(["12", "7", "105"]), or [["12", "7"], ["3"]] for two histories',
        )
    items = given.tolist() if isinstance(given, np.ndarray | Tensor) else list(given)
    nested = [isinstance(item, Iterable) and not isinstance(item, str | bytes) for item in items]
    if not any(nested):
        return [items] if items else []
    if not all(nested):
        raise UserError(
            f"entry {nested.index(False)} of the histories is an item id, others are lists",
            fix='one history is ["12", "7"], two are [["12", "7"], ["3"]]',
        )
    return [one.tolist() if isinstance(one, np.ndarray | Tensor) else list(one) for one in items]


def allowed_items(
    trie: Trie,
    filter: ItemFilter | Sequence[ItemFilter | None] | None,
    histories: Sequence[Sequence[Any]],
    *,
    exclude: bool,
) -> ItemFilter | RequestFilter | None:
    """The filter of each of B requests; ``exclude`` also excludes the items of its history."""
    allowed: ItemFilter | RequestFilter | None = filter if isinstance(filter, ItemFilter) else None
    if isinstance(filter, Sequence):
        if len(filter) != len(histories):
            raise UserError(
                f"{len(filter)} filters for {len(histories)} histories", fix="pass one filter per history"
            )
        allowed = ItemFilter.stack(filter) if any(one is not None for one in filter) else None
    if allowed is not None and allowed.device != trie.device:
        allowed = allowed.to(trie.device)
    if not exclude:
        return allowed
    own = RequestFilter.excluding(trie, histories)
    return own if allowed is None else own & allowed
