"""Clients that send random requests, know what each must answer, and compare."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from .process import PATIENCE

OWN_ITEMS, OWN_USERS, OF_RUN = 15, 6, 5  # of each client


@dataclass
class Client:
    """What one client knows: it alone changes its users and items, so it knows their state exactly."""

    name: str
    random: random.Random
    items_of_run: list[str]
    names: list[str] = field(default_factory=list)  # of its items
    users: dict[str, list[str]] = field(default_factory=dict)
    items: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # None: removed
    codes: dict[str, list[int]] = field(default_factory=dict)
    version: int = 0
    sent: int = 0
    acknowledged: int = 0
    error: Exception | None = None
    one_model: bool = True  # else the semantic ID of an item may change
    in_doubt: tuple[str, Any] | None = None  # of the users or items: what the last request would have made

    @classmethod
    def several(cls, http: httpx.Client, count: int) -> list[Client]:
        """Clients of a fresh server; each has some items of the run for itself."""
        found = {one["item_id"]: one["title"] for one in http.get("/v1/items?limit=1000").json()["items"]}
        clients = [cls(f"c{n}", random.Random(n), list(found)) for n in range(count)]
        for n, client in enumerate(clients):
            own = list(found)[n::count][:OF_RUN]
            client.items = {item: {"title": found[item], "attributes": {}} for item in own}
            client.names = [*own, *(f"{client.name}-{k}" for k in range(OWN_ITEMS))]
        return clients

    def work(self, url: str) -> None:
        """Send requests until the server is gone."""
        with httpx.Client(base_url=url, timeout=PATIENCE) as http:
            while True:
                try:
                    self.step(http)
                except httpx.TransportError:
                    return
                except Exception as error:
                    self.error = error
                    return
                self.in_doubt = None

    def step(self, http: httpx.Client) -> None:
        kinds = {"events": 6, "put": 3, "patch": 2, "remove": 1, "user": 1, "get": 2, "search": 4}
        kind = self.random.choices([*kinds], [*kinds.values()])[0]
        item = self.random.choice(self.names)
        user = f"{self.name}-u{self.random.randrange(OWN_USERS)}"
        present = self.items.get(item) is not None
        self.sent += 1
        if kind == "events":
            new = self.random.choices(self.items_of_run, k=self.random.randint(1, 3))
            after = [*self.users.get(user, []), *new]
            body = [{"event_id": f"{self.name}-{self.sent}-{n}", "user_id": user, "item_id": one,
                     "timestamp": float(self.sent)} for n, one in enumerate(new)]  # fmt: skip
            self.in_doubt = user, after
            self.ask(http, "POST", "/v1/events", {"events": body})
            self.users[user] = after
        elif kind == "put":
            after = {"title": f"sturdy rudder {self.sent}", "attributes": self.attributes()}
            self.in_doubt = item, after
            self.ask(http, "PUT", f"/v1/items/{item}", after)
            self.items[item] = after
        elif kind == "patch" and present:
            changed = {"number": self.sent, "gone": None}
            before = self.items[item]["attributes"]
            after = self.items[item] | {"attributes": before | {"number": self.sent}}
            self.in_doubt = item, after
            self.ask(http, "PATCH", f"/v1/items/{item}", {"attributes": changed})
            self.items[item] = after
        elif kind == "remove" and present:
            self.in_doubt = item, None
            self.ask(http, "DELETE", f"/v1/items/{item}")
            self.items[item] = None
        elif kind == "user" and user in self.users:
            self.in_doubt = user, None
            self.ask(http, "DELETE", f"/v1/users/{user}")
            del self.users[user]
        elif kind == "get" and item in self.items:
            found = self.ask(http, "GET", f"/v1/items/{item}")
            self.note_codes(item, found["codes"])
            assert (found["state"] == "removed") == (self.items[item] is None)
            if self.items[item] is not None:
                assert {"title": found["title"], "attributes": found["attributes"]} == self.items[item]
            history = http.get(f"/v1/users/{user}")
            assert history.json()["history"] == self.users[user] if user in self.users else history.is_error
        elif kind == "search":
            self.search(http, user)

    def search(self, http: httpx.Client, user: str) -> None:
        """Recommendations must follow the client's own changes, whatever the others do."""
        mine = {item for item, value in self.items.items() if value is not None}
        placed = {item for item in mine if item in self.codes}
        history = self.random.choices(self.items_of_run, k=3)
        listed = self.recommended(http, history=history, exclude_history=False)
        assert not listed & (set(self.items) - mine) and placed <= listed
        assert not self.recommended(http, history=history, exclude_history=True) & set(history)
        seen = set(self.users.get(user, []))
        assert not self.recommended(http, user_id=user, exclude_history=True) & seen
        limit = self.random.randint(0, self.sent)
        must = [{"key": "owner", "match": {"value": self.name}}, {"key": "number", "range": {"lt": limit}}]
        if not any("owner" in self.items[item]["attributes"] for item in placed):
            return  # perhaps no item has these attributes, and then they are unknown
        fields = {item: self.items[item]["attributes"] for item in mine}
        wanted = {item for item in mine if "owner" in fields[item] and fields[item]["number"] < limit}
        listed = self.recommended(http, history=history, exclude_history=False, filter={"must": must})
        if not (listed <= wanted and wanted & placed <= listed):
            odd = (listed - wanted) | (wanted & placed - listed)
            again = self.recommended(http, history=history, exclude_history=False, filter={"must": must})
            items = [http.get(f"/v1/items/{item}").json() for item in odd]
            raise AssertionError(
                (odd, limit, listed, again, history, items, [self.items[one] for one in odd])
            )

    def recommended(self, http: httpx.Client, **body: Any) -> set[str]:
        found = self.ask(http, "POST", "/v1/recommend", body | {"limit": 1000})
        return {one["item_id"] for one in found["items"]}

    def attributes(self) -> dict[str, Any]:
        return {"number": self.sent, "owner": self.name}

    def ask(self, http: httpx.Client, method: str, path: str, body: Any = None) -> Any:
        answer = http.request(method, path, json=body)
        assert answer.status_code == 200, (method, path, answer.text)
        found = answer.json()
        assert found.get("catalog_version", self.version) >= self.version  # versions only grow
        self.version = max(self.version, found.get("catalog_version", 0))
        self.acknowledged += 1
        return found

    def note_codes(self, item: str, codes: list[int] | None) -> None:
        if item in self.codes and self.one_model:
            assert codes == self.codes[item], f"the semantic ID of {item} changed"
        elif codes is not None:
            self.codes[item] = codes

    def check(self, http: httpx.Client) -> None:
        """Compare the server with what is known, and adopt what was in doubt."""
        name, after = self.in_doubt or ("", None)
        of_item = name in self.names
        for user in {*self.users, *([name] if name and not of_item else [])}:
            answer = http.get(f"/v1/users/{user}")
            history = answer.json()["history"] if answer.status_code == 200 else None
            if user == name and history == after:
                self.users.pop(user, None)
                if after is not None:
                    self.users[user] = after
            assert history == self.users.get(user), (user, history, self.users.get(user), self.in_doubt)
        for item in {*self.items, *([name] if of_item else [])}:
            answer = http.get(f"/v1/items/{item}")
            if item not in self.items and answer.status_code == 404:
                continue
            found = answer.json()
            self.note_codes(item, found["codes"])
            stored = None
            if found["state"] != "removed":
                stored = {"title": found["title"], "attributes": found["attributes"]}
            if item == name and stored == after:
                self.items[item] = after
            assert item in self.items and stored == self.items[item], (item, found, self.items.get(item))
        self.in_doubt = None
