"""A client of cemg-serve that needs only Python. It repeats calls that fail; event ids make that safe."""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

BUSY = (429, 503)  # the same call may work later


class Client:
    def __init__(self, url: str = "http://localhost:8000", key: str = "", tries: int = 5) -> None:
        self.url, self.tries = url.rstrip("/"), tries
        self.headers = {"content-type": "application/json"} | ({"x-api-key": key} if key else {})

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        for left in reversed(range(self.tries)):
            wait = 0.1 * 2 ** (self.tries - left)
            try:
                with urlopen(
                    Request(self.url + path, data, self.headers, method=method), timeout=30
                ) as answer:
                    return json.load(answer)
            except HTTPError as error:
                if error.code not in BUSY or not left:
                    raise RuntimeError(f"{method} {path}: {error.code} {error.read().decode()}") from error
                wait = float(error.headers.get("retry-after", wait))
            except (
                URLError,
                ConnectionError,
                TimeoutError,
            ):  # it may have been done: only its answer is lost
                if not left:
                    raise
            time.sleep(wait)

    def recommend(self, user: str, limit: int = 10, **options: Any) -> list[dict[str, Any]]:
        return self.call("POST", "/v1/recommend", {"user_id": user, "limit": limit, **options})["items"]

    def send_events(self, events: list[dict[str, Any]]) -> int:
        named = [{"event_id": uuid.uuid4().hex, **event} for event in events]  # before the first try
        return self.call("POST", "/v1/events", {"events": named})["stored"]

    def put_item(self, item: str, **fields: Any) -> int:
        return self.call("PUT", f"/v1/items/{quote(item, safe='')}", fields)["catalog_version"]


if __name__ == "__main__":  # python client.py http://localhost:8000 user-0001 item-0012
    client, user, item = Client(sys.argv[1]), *sys.argv[2:4]
    print("stored", client.send_events([{"user_id": user, "item_id": item}]))
    print(*(f"{one['item_id']} {one['title']}" for one in client.recommend(user, limit=3)), sep="\n")
