"""What a service has stored as a data set for the next training: the run's data, served events and items."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cemg.artifacts import RunArtifacts
from cemg.data import Dataset
from cemg.data.dataset import Served
from cemg.data.readers.text import clean, item_text
from cemg.serve.rows import Deletion, Item, StoredItem, to_json
from cemg.serve.run_items import RunItem, RunItems
from cemg.serve.served_run import events_in_data, run_of
from cemg.serve.store import Store
from cemg.storage import files

ITEMS_FILE = "served-items.jsonl"  # what a data set has no column for: see `export`
IMAGES = "images"


@dataclass(slots=True)
class _Exported:
    """An item of the data set: what the encoder reads, and the image file."""

    title: str
    text: str | None
    image: Path | None


def export(run: Path, store: str | Path, folder: Path, *, name: str = "") -> Dataset:
    """Write the data of a run and what its service has stored since as one prepared folder.

    The histories are those of the run's data, followed by the stored events that these lack, in the order of
    their times. Deleted users and removed items are left out. Texts, titles and images are those that the
    service has now. The store is read as it was at one moment, while a service may change it.

    ``served-items.jsonl`` has a line per item that the store describes, in the form of an item of
    ``POST /v1/items``, because a data set has no attributes.

    Args:
        run: The folder of the run. If the service was told to serve another one, the data are those of that.
        store: Its store: a path or a URL.
        folder: Folder to write, which exists.
        name: Name of the data set; "" for that of the run's data.

    Raises:
        UserError: The store is missing, or belongs to another run.
    """
    with Store.open(store, create=False) as opened, opened.snapshot() as stored:
        artifacts = RunArtifacts.open(run_of(run, stored))
        data, catalog = artifacts.load_data(), artifacts.load_catalog()
        stored.check_catalog(catalog.digest())
        known = events_in_data(artifacts, data.served, stored)
        served = Served(stored.created, stored.last_number)
        items = _items(artifacts, data, stored, folder)
        rows = {item: row for row, item in enumerate(items)}
        histories, unknown = _histories(data, stored, rows, known=known)
    notes = list(data.notes)
    if unknown:
        notes.append(f"{unknown:,} interactions with removed and unknown items are left out")
    if data.cuts is not None:
        notes.append("the run's data were split in time; the export is split leave-one-out")
    users = [user for user, rows_of_user in histories.items() if rows_of_user]
    exported = Dataset(
        name=name or data.name,
        user_ids=users,
        item_ids=list(items),
        sequences=[np.array(histories[user], dtype=np.int32) for user in users],
        titles=[item.title for item in items.values()],
        texts=[item.text for item in items.values()],
        images=[folder / item.image if item.image else None for item in items.values()],
        tie_rule=data.tie_rule,
        synthetic=data.synthetic,
        notes=notes,
        served=served,
    )
    exported.save(folder)
    return exported


def _items(artifacts: RunArtifacts, data: Dataset, stored: Store, folder: Path) -> dict[str, _Exported]:
    """The items that are not removed, by id, those of the run first."""
    run_items = RunItems(artifacts.run.folder)
    gone = set(map(str, artifacts.removed_items()))
    ids = dict.fromkeys([*data.item_ids, *run_items.titles()])
    found = {item: _of_run(run_items.get(item)) for item in ids if item not in gone}
    with files.durable(folder / ITEMS_FILE) as part, part.open("w", encoding="utf-8") as lines:
        for number, one in enumerate(stored.items()):
            item = one.item
            if one.state == "removed":
                found.pop(item.item_id, None)
                continue
            image = _image(one, stored, folder, number=number)
            known = run_items.get(item.item_id)
            found[item.item_id] = _of_store(item, known, image)
            body = {"item_id": item.item_id, "title": item.title, "text": item.text}
            lines.write(to_json(body | {"attributes": dict(item.attributes)}) + "\n")
    return found


def _of_run(known: RunItem) -> _Exported:
    return _Exported(known.title, known.text or None, known.image)


def _of_store(item: Item, known: RunItem, image: Path | None) -> _Exported:
    """The item as the store has it; a text that is still that of the run is not composed again."""
    title = clean(item.title)
    same = (item.title, item.text) == (known.title, known.text)
    text = (known.text or None) if same else item_text(title, [clean(item.text)])
    return _Exported(title, text, image or known.image)


def _image(one: StoredItem, stored: Store, folder: Path, *, number: int) -> Path | None:
    """Write the image that the store has of an item. Returns its path in the folder."""
    found = stored.get_item(one.item.item_id) if one.has_image else None
    if found is None or found.item.image is None:
        return None
    path = Path(IMAGES) / str(number)  # ids may have characters that are not for file names
    files.write_bytes(folder / path, found.item.image)
    return path


def _histories(
    data: Dataset, stored: Store, rows: dict[str, int], *, known: int
) -> tuple[dict[str, list[int]], int]:
    """Item rows per user, oldest first, and the number of interactions whose item is not in ``rows``.

    The data have the events up to the number ``known``: see `cemg.serve.served_run.ServedRun.events`.
    """
    histories = {
        user: [rows[item] for item in (data.item_ids[row] for row in sequence.tolist()) if item in rows]
        for user, sequence in zip(data.user_ids, data.sequences, strict=True)
    }
    left_out = {
        user: len(sequence) - len(histories[user])
        for user, sequence in zip(data.user_ids, data.sequences, strict=True)
    }
    in_data = {user: {*history} for user, history in histories.items()} if known else {}
    served: dict[str, list[tuple[float, int]]] = {}
    for entry in stored.log():
        if isinstance(entry, Deletion):
            histories.pop(entry.user_id, None)
            left_out.pop(entry.user_id, None)
            in_data.pop(entry.user_id, None)
            served.pop(entry.user_id, None)
        elif entry.number <= known and rows.get(entry.item_id) in in_data.get(entry.user_id, ()):
            continue
        elif entry.item_id in rows:
            served.setdefault(entry.user_id, []).append((entry.time, rows[entry.item_id]))
        else:
            left_out[entry.user_id] = left_out.get(entry.user_id, 0) + 1
    for user, events in served.items():
        events.sort(key=lambda event: event[0])  # stable: equal times stay in the order of arrival
        histories.setdefault(user, []).extend(row for _, row in events)
    return histories, sum(left_out.values())
