"""The store of the service: events, items, the log of changes; random operations against a model."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cemg.errors import UserError
from cemg.serve import log
from cemg.serve.rows import DroppedError, Event, Item, UnknownItemError
from cemg.serve.store import Store


def event(name: str, user: str = "ann", item: str = "item", timestamp: float | None = None) -> Event:
    return Event(name, user, item, timestamp)


def ids(events) -> list[str]:
    return [each.event_id for each in events]


# Events


def test_an_event_with_a_known_id_is_not_stored_again(store):
    first, second = event("e1", timestamp=1.0), event("e2", timestamp=2.0)
    assert store.append_events([first, second]) == [True, True]
    assert store.append_events([replace(first, item_id="other"), event("e3")]) == [False, True]
    assert [each.item_id for each in store.history("ann")] == ["item"] * 3
    assert store.count_events() == 3


def test_an_event_that_is_twice_in_one_call_is_stored_once(store):
    assert store.append_events([event("e1"), event("e2"), event("e1")]) == [True, True, False]
    assert ids(store.events_after(0)) == ["e1", "e2"]
    assert store.append_events([]) == []


def test_a_history_is_in_the_order_of_time_then_of_arrival(store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 50.0)
    store.append_events([event("none-1"), event("late", timestamp=99), event("tie-1", timestamp=7)])
    store.append_events(
        [event("tie-2", timestamp=7.0), event("none-2"), event("before-1970", timestamp=-1.0)]
    )
    store.append_events([event("other", "bob")])
    history = store.history("ann")
    assert ids(history) == ["before-1970", "tie-1", "tie-2", "none-1", "none-2", "late"]
    assert [each.time for each in history] == [-1.0, 7.0, 7.0, 50.0, 50.0, 99.0]
    assert history[1].timestamp == 7.0 and history[3].timestamp is None and history[1].received == 50.0
    assert ids(store.history("ann", limit=2)) == ["none-2", "late"]
    assert store.history("ann", limit=0) == [] and store.history("nobody") == []


def test_a_replay_sees_events_in_the_order_of_arrival(store):
    store.append_events([event(f"e{n}", timestamp=float(-n)) for n in range(10)])
    first = store.events_after(0, limit=4)
    rest = store.events_after(first[-1].number)
    assert ids([*first, *rest]) == [f"e{n}" for n in range(10)]
    assert store.events_after(rest[-1].number) == [] and store.last_number == rest[-1].number


def test_a_deletion_of_a_user_is_in_the_order_of_the_events(store):
    store.append_events([event("a1"), event("b1", "bob"), event("a2")])
    assert store.delete_user("ann") == 2
    assert store.history("ann") == [] and store.users() == 1 and store.count_events() == 1
    store.append_events([event("a3")])
    deletion = store.deletions_after(0)[0]
    assert (deletion.user_id, deletion.events) == ("ann", 2)
    assert store.history("bob")[0].number < deletion.number < store.history("ann")[0].number
    assert store.delete_user("nobody") == 0
    assert [each.user_id for each in store.deletions_after(deletion.number)] == ["nobody"]


def test_numbers_are_not_used_again_after_a_deletion_and_a_restart(location):
    with Store.open(location) as store:
        store.append_events([event("e1"), event("e2")])
        store.delete_user("ann")
    with Store.open(location) as store:
        store.append_events([event("e3")])
        assert store.events_after(0)[0].number == 4


def test_deleted_events_are_not_in_the_files_any_more(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store.open(path) as store:
        store.append_events([event(f"secret-{n}", "ann") for n in range(200)])
        store.delete_user("ann")
    assert b"secret-" not in path.read_bytes()


def test_users_are_listed_in_pages(store):
    names = ["Zoë", "ann", "bob", "Émile", "😀", "ann "]
    store.append_events([event(f"e{n}", name) for n, name in enumerate([*names, "bob"])])
    found, after = [], ""
    while page := store.list_users(after=after, limit=2):
        found, after = found + page, page[-1]
    assert found == sorted(names) and store.users() == len(names)


def test_more_events_than_one_query_has_names_for(store):
    events = [event(f"e{n}", f"user-{n % 1500}") for n in range(2000)]
    assert all(store.append_events(events)) and store.users() == 1500
    assert not any(store.append_events(events))


# Items


def test_an_added_item_is_pending_until_it_is_placed(store):
    item = Item(
        "new", "Title", "Text", b"\x89PNG\x00", {"price": 9.5, "stock": 3, "sale": True, "tags": ["a", "ä"]}
    )
    assert store.put_item(item) == 1
    found = store.get_item("new")
    assert (found.item, found.state, found.codes, found.version) == (item, "pending", None, 1)
    assert store.put_items([Item("b"), Item("a")]) == 3
    assert store.place_items({"new": [1, 2, 3], "a": [4, 5, 6], "unknown": [7]}) == 4
    assert [(i.item.item_id, i.state, i.codes) for i in store.list_items()] == [
        ("a", "active", (4, 5, 6)), ("b", "pending", None), ("new", "active", (1, 2, 3)),
    ]  # fmt: skip
    assert [i.item.item_id for i in store.items(states=["pending"])] == ["b"]
    assert store.get_item("unknown") is None


def test_codes_of_a_placed_item_never_change(store):
    store.put_item(Item("new", text="old text"))
    store.place_items({"new": [1, 2]})
    assert store.place_items({"new": [3, 4]}) == 2 and store.version == 2
    store.put_item(Item("new", text="new text"))
    assert (store.get_item("new").state, store.get_item("new").codes) == ("active", (1, 2))
    store.remove_item("new")
    assert store.place_items({"new": [5, 6]}) == store.version
    store.put_item(Item("new"))
    assert (store.get_item("new").state, store.get_item("new").codes) == ("active", (1, 2))


def test_an_item_that_was_removed_before_it_was_placed_is_pending_when_it_is_added_again(store):
    store.put_item(Item("new"))
    store.remove_item("new")
    assert store.place_items({"new": [1]}) == store.version == 2
    store.put_item(Item("new"))
    assert store.get_item("new").state == "pending"


def test_an_item_of_the_run_has_a_row_once_it_is_changed(location, open_store):
    store = open_store(location, run_items={"old-1", "old-2", "old-3"})
    assert store.get_item("old-1") is None
    store.remove_item("old-1")
    assert (store.get_item("old-1").state, store.get_item("old-1").codes) == ("removed", None)
    store.put_item(Item("old-1", "again"))
    store.put_item(Item("old-2", "replaced"))
    store.patch_item(
        "old-3", {"attributes": {"stock": 0}}, base=Item("old-3", "Title", attributes={"price": 1})
    )
    assert {i.state for i in store.items()} == {"active"}
    assert store.get_item("old-3").item == Item("old-3", "Title", attributes={"price": 1, "stock": 0})
    with pytest.raises(UnknownItemError, match="no item 'missing'"):
        store.remove_item("missing")


def test_without_the_items_of_the_run_each_removal_is_recorded(store):
    assert store.remove_item("maybe") == 1
    assert store.remove_item("maybe") == 1, "the second removal changes nothing"
    assert store.get_item("maybe").state == "removed"


def test_a_patch_keeps_what_it_does_not_name(store):
    store.put_item(Item("a", "Title", "Text", b"image", {"price": 1, "stock": 2, "tags": ["x"]}))
    store.patch_item("a", {"title": "New", "attributes": {"price": 3.5, "stock": None}})
    assert store.get_item("a").item == Item("a", "New", "Text", b"image", {"price": 3.5, "tags": ["x"]})
    store.patch_item("a", {"image": None})
    assert not store.get_item("a").has_image
    for values, problem in [
        ({"codes": [1]}, "'codes' cannot be changed"),
        ({"title": 3}, "not text"),
        ({"attributes": {"x": {}}}, "attribute 'x'"),
        ({"attributes": 1}, "not an object"),
    ]:
        with pytest.raises(UserError, match=problem):
            store.patch_item("a", values)
    store.remove_item("a")
    for missing in ("a", "b"):
        with pytest.raises(UnknownItemError):
            store.patch_item(missing, {"title": "x"})
    assert store.version == 4


def test_the_log_of_changes_tells_a_replica_everything(store):
    store.put_item(Item("a", "T", "Text", b"image", {"p": 1}))
    store.put_item(Item("b"))
    store.place_items({"a": [1], "b": [2]})
    store.patch_item("a", {"attributes": {"p": None}})
    store.remove_item("b")
    assert [(c.version, c.kind, c.item_id, c.payload) for c in store.changes_after(0)] == [
        (1, "put", "a", {"title": "T", "text": "Text", "image": True, "attributes": {"p": 1}}),
        (2, "put", "b", {"title": "", "text": "", "image": False, "attributes": {}}),
        (3, "place", "", {"codes": {"a": [1], "b": [2]}}),
        (4, "patch", "a", {"attributes": {"p": None}}),
        (5, "remove", "b", {}),
    ]
    assert [c.version for c in store.changes_after(2, limit=2)] == [3, 4]
    assert store.changes_after(5) == []


def test_versions_grow_over_restarts_and_removals(location):
    seen = []
    for name in "abc":
        with Store.open(location) as store:
            assert store.version == (seen[-1] if seen else 0)
            seen += [store.put_item(Item(name)), store.remove_item(name), store.put_item(Item(name))]
    assert seen == list(range(1, 10))


def test_old_changes_are_dropped_and_asking_for_them_is_refused(store, monkeypatch):
    monkeypatch.setattr(log, "KEPT", 5)
    monkeypatch.setattr(log, "DROPPED_AT_ONCE", 3)
    for number in range(10):
        store.put_item(Item(f"item-{number}"))
    store.put_items([Item("late-1"), Item("late-2")])
    assert [change.version for change in store.changes_after(7)] == [8, 9, 10, 11, 12]
    with pytest.raises(DroppedError, match="the changes 7 to 7 of the catalog are not kept"):
        store.changes_after(6)
    assert store.version == 12 and len([*store.items()]) == 12 and store.changes_after(12) == []


def test_one_call_that_puts_an_item_twice_keeps_the_last(store):
    assert store.put_items([Item("a", "1"), Item("b"), Item("a", "2")]) == 3
    assert (store.get_item("a").item.title, store.get_item("a").version) == ("2", 3)
    assert store.put_items([]) == 3 and store.place_items({}) == 3


def test_pages_of_items_are_complete_while_items_are_added(store):
    before = {f"item-{n:03}" for n in range(0, 300, 2)}
    store.put_items([Item(name, image=b"x") for name in before])
    found, after, number = [], "", 1
    while page := store.list_items(after=after, limit=7):
        found, after = found + [i.item.item_id for i in page], page[-1].item.item_id
        store.put_items([Item(f"item-{(number * 37) % 300 | 1:03}"), Item(f"added-{number}")])
        number += 1
    assert found == sorted(found) and len(set(found)) == len(found) and before <= set(found)
    page = store.list_items(limit=1000)
    assert {i.item.image for i in page} == {None} and sum(i.has_image for i in page) == 150
    assert sum(i.item.image is not None for i in store.items(images=True)) == 150
    assert store.list_items(states=[]) == []


def test_a_snapshot_has_one_state_of_a_store_that_changes_meanwhile(store):
    store.append_events([Event("e1", "ann", "item")])
    with store.snapshot() as frozen:
        store.append_events([Event("e2", "ann", "item")])
        store.delete_user("bob")
        store.put_item(Item("late"))
        assert [entry.number for entry in frozen.log()] == [1] and list(frozen.items()) == []
        assert frozen.version == 0 and store.version == 1
    assert [entry.number for entry in store.log()] == [1, 2, 3]


def test_another_run_makes_added_items_pending_again(location):
    with Store.open(location, catalog="old") as store:
        store.put_items([Item("added"), Item("trained"), Item("gone")])
        store.place_items({"added": [1], "trained": [2], "gone": [3]})
        store.remove_item("gone")
        version = store.change_catalog("new", {"trained"})
        assert {i.item.item_id: (i.state, i.codes) for i in store.items()} == {
            "added": ("pending", None), "trained": ("active", None), "gone": ("removed", None),
        }  # fmt: skip
        assert (store.changes_after(version - 1)[0].kind, store.catalog) == ("catalog", "new")
    Store.open(location, catalog="new").close()


# Random operations against a plain model

NAMES = st.sampled_from(["a", "b", "Ä", "z z"])
EVENTS = st.lists(
    st.builds(
        Event, st.sampled_from([f"e{n}" for n in range(12)]), NAMES, NAMES, st.sampled_from([None, 1.0, 2.0])
    ),
    max_size=4,
)
STEPS = st.one_of(
    st.tuples(st.just("events"), EVENTS),
    st.tuples(st.sampled_from(["delete", "put", "patch", "remove", "place"]), NAMES),
    st.tuples(st.just("reopen"), st.none()),
)


class Model:
    """What a store does, in plain Python. `a` is an item of the run."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Event]] = []
        self.items: dict[str, tuple[str, bool, int]] = {}  # state, whether it has codes, number of patches
        self.number = self.version = 0

    def step(self, kind: str, value) -> object:
        if kind == "events":
            stored = []
            for each in value:
                stored.append(all(each.event_id != old.event_id for _, old in self.events))
                if stored[-1]:
                    self.number += 1
                    self.events.append((self.number, each))
            return stored
        if kind == "delete":
            self.number += 1
            before = len(self.events)
            self.events = [(number, each) for number, each in self.events if each.user_id != value]
            return before - len(self.events)
        state, placed, patches = self.items.get(value, (None, False, 0))
        if kind == "put":
            self.items[value] = ("active" if placed or value == "a" else "pending", placed, 0)
        elif kind == "patch" and state in ("active", "pending"):
            self.items[value] = (state, placed, patches + 1)
        elif kind == "place" and state == "pending":
            self.items[value] = ("active", True, patches)
        elif kind == "remove" and (state or value == "a"):
            if state == "removed":
                return self.version
            self.items[value] = ("removed", placed, patches)
        else:
            return self.version if kind == "place" else UnknownItemError
        self.version += 1
        return self.version

    def history(self, user: str) -> list[str]:
        mine = [(each.timestamp or 1e9, number, each) for number, each in self.events if each.user_id == user]
        return [each.event_id for _, _, each in sorted(mine, key=lambda entry: entry[:2])]


def _step(store: Store, kind: str, value, patches: int) -> object:
    calls = {
        "events": lambda: store.append_events(value),
        "delete": lambda: store.delete_user(value),
        "put": lambda: store.put_item(Item(value)),
        "patch": lambda: store.patch_item(value, {"attributes": {"n": patches + 1}}),
        "remove": lambda: store.remove_item(value),
        "place": lambda: store.place_items({value: [1, 2]}),
    }
    try:
        return calls[kind]()
    except UnknownItemError:
        return UnknownItemError


@pytest.mark.medium
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, max_size=25))
def test_a_store_equals_a_plain_model(new_location, steps):
    location, model = new_location(), Model()
    store = Store.open(location, run_items={"a"}, synchronous="NORMAL")
    try:
        for kind, value in steps:
            if kind == "reopen":
                store.close()
                store = Store.open(location, run_items={"a"}, synchronous="NORMAL")
            else:
                patches = model.items.get(value, ("", False, 0))[2] if kind == "patch" else 0
                assert _step(store, kind, value, patches) == model.step(kind, value)
            assert (store.version, store.last_number) == (model.version, model.number)
        users = {each.user_id for _, each in model.events}
        assert store.list_users() == sorted(users) and store.users() == len(users)
        assert {user: ids(store.history(user)) for user in users} == {u: model.history(u) for u in users}
        assert [(e.number, e.event_id) for e in store.events_after(0)] == [
            (n, e.event_id) for n, e in model.events
        ]
        assert {i.item.item_id: (i.state, i.codes is not None, i.item.attributes.get("n", 0))
                for i in store.items()} == model.items  # fmt: skip
        assert [c.version for c in store.changes_after(0)] == list(range(1, model.version + 1))
    finally:
        store.close()
