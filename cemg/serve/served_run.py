"""A run as it is served: its engine, and the attributes, filters and descriptions of its items."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

from cemg.artifacts import RunArtifacts
from cemg.data.dataset import Served
from cemg.data.readers.text import clean, item_text
from cemg.errors import UserError
from cemg.memory.similarity import Similarity
from cemg.recommender import Recommender
from cemg.serve.attributes import AttributeTable
from cemg.serve.engine import Engine, Query
from cemg.serve.filters import Filters
from cemg.serve.named_filters import NamedFilters
from cemg.serve.rows import Attribute, Deletion, DroppedError, Item, ServedModel, StoredItem
from cemg.serve.run_items import ItemSearch, RunItems
from cemg.serve.similarity_file import SavedSimilarity, SimilarityFile, digest_of
from cemg.serve.store import Store
from cemg.storage.run import Run

CHANGES = 1_000  # of the catalog, read at once
WARM_UP = 8  # histories of the first search

log = logging.getLogger("cemg.serve")


@dataclass(slots=True)
class ServedRun:
    """A run that follows the store of a service.

    Attributes:
        run: The folder.
        recommender: The run as it was trained.
        engine: The run with the changes of the store.
        table: Attributes of the items that have a semantic ID.
        filters: Filters over them.
        run_items: What the run says about its items.
        search: Finds items by id or title.
        events: Number of the last stored event that the data of the run have, as they say; 0 for none.
        keeps_codes: Whether the semantic IDs of added items are those in the store. Else they are computed.
        beams: Beams of a search by default.
        excludes_history: Whether items of the history are left out by default: unless users return to items.
        codes: Semantic IDs of the added items.
        saved: The text similarities of the added items, in a file.
        texts: Digests of the texts by which the memory compares the added items, in the order of their rows.
        unsaved: Whether ``saved`` lacks some of them.
        number: Number of the last event or deletion that the engine has.
        version: Version of the catalog that the engine has; None before the first `follow`.
    """

    run: Path
    recommender: Recommender
    engine: Engine
    table: AttributeTable
    filters: Filters
    run_items: RunItems
    search: ItemSearch
    events: int
    keeps_codes: bool
    beams: int
    excludes_history: bool
    saved: SimilarityFile
    codes: dict[str, Sequence[int]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    unsaved: bool = False
    number: int = 0
    version: int | None = None

    @classmethod
    def load(
        cls, run: Path, store: Store, *, device: str = "cpu", named: NamedFilters | None = None
    ) -> ServedRun:
        """Open a run. `follow` brings it to where the store is.

        Args:
            run: The folder of the run.
            store: The store of the service.
            device: "cpu", "cuda", …
            named: The named filters.

        Raises:
            UserError: The run cannot be opened, or its parts do not belong together.
        """
        Run(run).check_unlocked()
        recommender = Recommender.from_run(run, device)
        engine = Engine(recommender, model_version=model_version(recommender.artifacts))
        table = AttributeTable([str(item) for item in recommender.catalog.item_ids])
        engine.filters = Filters(table, named)
        items = RunItems(run)
        artifacts = recommender.artifacts
        return cls(
            run, recommender, engine, table, engine.filters, items, ItemSearch(store, items),
            events=events_in_data(artifacts, engine.data_events, store),
            keeps_codes=store.catalog in ("", recommender.catalog.digest()),
            beams=artifacts.config.decoding.beams,
            excludes_history=not (artifacts.has_gate() and artifacts.load_gate().repeats),
            saved=SimilarityFile(run, model_version=engine.model_version, store=store.created),
        )  # fmt: skip

    @property
    def catalog(self) -> str:
        """The digest of the catalog that the run was trained on."""
        return self.recommender.catalog.digest()

    @property
    def served_model(self) -> ServedModel:
        """The run as the store records it."""
        return ServedModel(str(self.run.resolve()), self.engine.model_version, self.events)

    @property
    def ids(self) -> frozenset[str]:
        """The items of that catalog."""
        return frozenset(str(item) for item in self.recommender.catalog.item_ids)

    # ---- following the store

    def follow(self, store: Store) -> int:
        """Apply what the store has since the last call. Returns how many changes and events that were.

        Only one thread may call it, and no search may run at the same time. After an error of the store, the
        next call continues.

        Raises:
            UserError: The items of the run are numbers, so it cannot have the added items.
        """
        version, last = store.position()  # changes after it are applied again by the next call
        changed, moved = _changed(store, self.version, self.catalog)
        if moved or store.catalog not in ("", self.catalog):  # read last: the codes may be of another catalog
            self.keeps_codes = False
        self._apply(changed, store)
        self.version = self.engine.version = version
        count = len(changed)
        # deletions and events are read one after the other: later ones may be in one of the answers only
        for entry in takewhile(lambda entry: entry.number <= last, store.log(after=self.number)):
            count += 1
            if isinstance(entry, Deletion):
                self.engine.forget(entry.user_id)
            elif not self._has_event(entry.number, entry.user_id, entry.item_id):
                self.engine.learn(entry.user_id, entry.item_id, entry.time, entry.number)
            self.number = entry.number  # here, so that an error of the store repeats nothing
        return count

    def _has_event(self, number: int, user: str, item: str) -> bool:
        """Whether the data of the run have a stored event: see `events`.

        Data sets may leave out users and items with few interactions, so the data must have the pair.
        """
        return number <= self.events and self.engine.in_data(user, item)

    def _apply(self, changed: Sequence[StoredItem], store: Store) -> None:
        new = [one for one in changed if not self.engine.has(one.item.item_id)]
        old = [one.item for one in changed if self.engine.has(one.item.item_id)]
        codes: dict[str, Sequence[int]]
        if self.keeps_codes:
            codes = {one.item.item_id: one.codes for one in new if one.codes is not None}
        else:
            # removed ones are in histories, and may come back
            placed = [one for one in new if one.state == "active" or one.codes is not None]
            codes = self._encoded(placed, store)
        if codes:
            self._add({one.item.item_id: one.item for one in new}, codes)
            self.codes |= codes
        here = [one for one in changed if self.engine.has(one.item.item_id)]
        active = [one.item for one in here if one.state != "removed"]
        removed = [one.item.item_id for one in here if one.state == "removed"]
        self.table.update({item: {} for item in removed})  # first: their types bind no other item
        self._set_attributes({item.item_id: item.attributes for item in active})
        self.describe(old)
        version = self.engine.version
        if active:
            self.engine.restore([item.item_id for item in active], version)
        if removed:
            self.engine.remove(removed, version)

    def _set_attributes(self, attributes: Mapping[str, Mapping[str, Attribute]]) -> None:
        """Replace the attributes of items; log and skip a value of another type than in earlier items.

        The type of an attribute is not checked against pending items when it is written, but such an item may
        be one of this run's own.
        """
        try:
            self.table.update(attributes)
        except UserError:
            for item, values in attributes.items():
                fitting: dict[str, Attribute] = {}
                for name, value in values.items():
                    try:
                        self.table.check({item: fitting | {name: value}})
                        fitting[name] = value
                    except UserError as error:
                        log.warning("%s; filters do not see it until it is changed", error.message)
                self.table.update({item: fitting})

    def _add(self, items: Mapping[str, Item], codes: Mapping[str, Sequence[int]]) -> None:
        saved = None if self.texts else self.saved.read()
        if saved is not None and not saved.texts.keys() <= codes.keys():  # of a later state of the store
            saved = None
        first = {} if saved is None else saved.texts
        order = [*first, *(name for name in codes if name not in first)]
        extended = self.engine.extended({name: codes[name] for name in order})
        self.table.extend(order)
        self.add([items[name] for name in order], extended, self.engine.version, saved=saved)

    def add(
        self, items: Sequence[Item], extended: Recommender, version: int, *,
        saved: SavedSimilarity | None = None,
    ) -> None:  # fmt: skip
        """Search further items from now on. The table must have them. See `follow` for threads.

        Args:
            items: The items, in the order of their rows.
            extended: What `Engine.extended` returned for them.
            version: The version of the catalog.
            saved: The text similarities of the first ones.
        """
        known, rows = ({}, None) if saved is None else (saved.texts, saved.rows)
        first, later = items[: len(known)], items[len(known) :]
        texts = [text_of(item) for item in later]
        self.engine.add(extended, texts, version, rows=rows)
        self.texts |= known
        self.texts |= {item.item_id: digest_of(text) for item, text in zip(later, texts, strict=True)}
        self.unsaved |= len(later) > 0
        self.engine.titles |= {item.item_id: item.title for item in later}
        self.describe(first)

    def describe(self, items: Sequence[Item]) -> None:
        """Take the titles and texts of items that have semantic IDs. See `follow` for threads.

        The memory compares items that were added to the service by their present texts. Semantic IDs, and
        the similarities of the run's own items, stay as they are.
        """
        self.engine.titles |= {item.item_id: item.title for item in items}
        for item in items:
            text, known = text_of(item), self.texts.get(item.item_id)
            if known is not None and known != digest_of(text):
                self.engine.change_text(item.item_id, text)
                self.texts[item.item_id] = digest_of(text)
                self.unsaved = True

    def frozen_similarity(self) -> tuple[dict[str, bytes], Similarity] | None:
        """The arguments of `save_similarity`; None if the file is up to date. See `follow` for threads."""
        similar = self.engine.recommender.memory.similar if self.engine.learns else None
        if similar is None or not self.unsaved:
            return None
        self.unsaved = False
        return dict(self.texts), similar.frozen()

    def save_similarity(self, texts: dict[str, bytes], frozen: Similarity) -> Callable[[], None]:
        """Write the text similarities of the added items to the file, in any thread.

        Args:
            texts: From `frozen_similarity`.
            frozen: From `frozen_similarity`.

        Returns:
            Called like `follow`, it moves the rows into the arrays that were written.

        Raises:
            StorageError: They cannot be written.
        """
        rows = frozen.added_rows()
        assert rows is not None, "items were added"
        self.saved.write(SavedSimilarity(texts, rows))
        similar = self.engine.recommender.memory.similar
        assert similar is not None
        return partial(similar.replace_rows, rows, frozen)

    def _encoded(self, items: Sequence[StoredItem], store: Store) -> dict[str, Sequence[int]]:
        """The semantic IDs of items; those that say nothing to the encoder are left out, and stay pending."""
        if items and not self.recommender.catalog.named:
            raise UserError(
                f"{self.run} cannot have the items that were added",
                cause=f"its items are numbers, and {items[0].item.item_id!r} was added by its name",
            )
        read = self.recommender.content if items else set[str]()
        described = [
            one for one in items
            if ("text" in read and text_of(one.item) is not None) or ("image" in read and one.has_image)
        ]  # fmt: skip
        if not described:
            return {}
        texts = [text_of(one.item) for one in described]
        found = self.engine.encode(texts, images_of(described, store)).tolist()
        return dict(zip((one.item.item_id for one in described), found, strict=True))

    def warm_up(self) -> None:
        """Search once, so that the first request finds everything loaded."""
        query = partial(Query, limit=1, beams=self.beams, exclude_history=self.excludes_history)
        users = self.engine.users("", "", WARM_UP)
        self.engine.recommend([query(user=user) for user in users] or [query()])


def _changed(store: Store, version: int | None, catalog: str) -> tuple[list[StoredItem], bool]:
    """The items that changed after a version, as they are now, and whether the store left ``catalog`` since.

    None for all items.
    """
    if version is None:
        return [*store.items()], False
    items: dict[str, None] = {}
    moved = False
    try:
        while changes := store.changes_after(version, CHANGES):
            version = changes[-1].version
            for change in changes:
                moved |= change.kind == "catalog" and change.payload["catalog"] != catalog
                items |= dict.fromkeys(
                    [change.item_id] if change.item_id else change.payload.get("codes", {})
                )
    except DroppedError:  # what they were is not known
        return [*store.items()], True
    found = (store.get_item(item) for item in items)
    return [one for one in found if one is not None], moved


def run_of(run: Path, store: Store) -> Path:
    """The run that the service was told to serve by POST /v1/models, else ``run``.

    Raises:
        UserError: That one is missing.
    """
    models = store.models
    if models is None or Path(models.current.run) == run.resolve():
        return run
    chosen = Path(models.current.run)
    if not chosen.is_dir():
        raise UserError(
            f"{chosen}, the run that was served last, is missing",
            fix=f"put it back, or serve {run} again: cemg-serve --move-store",
        )
    return chosen


def events_in_data(artifacts: RunArtifacts, served: Served | None, store: Store) -> int:
    """Number of the last stored event that the data of a run have; 0 for none.

    The service was told so when it loaded the run, or ``cemg-data export`` noted ``served`` in the data.
    """
    models = store.models
    if models is not None and models.current.version == model_version(artifacts):
        return models.current.events
    return served.events if served is not None and served.store == store.created else 0


def text_of(item: Item) -> str | None:
    """The text that the encoder reads, composed as for ``cemg-catalog add``; None without title and text."""
    return item_text(clean(item.title), [clean(item.text)])


def images_of(items: Sequence[StoredItem], store: Store) -> Iterator[bytes | None]:
    """The image of each item, read from the store when it is needed."""
    for one in items:
        stored = store.get_item(one.item.item_id) if one.has_image else None
        yield None if stored is None else stored.item.image


def model_version(artifacts: RunArtifacts) -> str:
    """Identifies all that answers depend on: a digest of the contents of the stages of a run."""
    return hashlib.sha256(json.dumps(sorted(artifacts.opened.items())).encode()).hexdigest()[:12]
