"""Who may call an endpoint: API keys with roles, and the hosts and origins that requests may name."""

from __future__ import annotations

import hmac
import math
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cemg.errors import UserError
from cemg.serve.problems import problem

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = ("read", "write", "admin")  # each may do what those before it may
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
MIN_KEY = 16  # characters
CLIENTS = 10_000  # whose requests are counted; beyond, those that were quiet for longest start anew

_bearer = HTTPBearer(auto_error=False)
_header = APIKeyHeader(name="X-API-Key", auto_error=False)


@dataclass(frozen=True, slots=True)
class Keys:
    """API keys with their roles. Without any, every request may do everything."""

    roles: dict[str, Role]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a YAML or JSON file that maps a role to a list of keys.

        Raises:
            UserError: The file cannot be read, or has another form.
        """
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _UniqueNames)
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} cannot be read", cause=f"{type(error).__name__}: {error}"[:300]
            ) from error
        example = "read: [a key of 16 characters or more]"
        lists = [*content.values()] if isinstance(content, dict) and {*content} <= {*ROLES} else [None]
        if not all(one is None or isinstance(one, list) for one in lists) or not any(lists):
            raise UserError(f"{path} must map the roles {', '.join(ROLES)} to lists of keys", fix=example)
        roles: dict[str, Role] = {}
        for role in ROLES:
            for key in content.get(role) or []:
                if not isinstance(key, str) or len(key) < MIN_KEY or not re.fullmatch("[!-~]+", key):
                    raise UserError(
                        f"{path}: a key of the role {role} is not ASCII text of {MIN_KEY} characters or more "
                        "without spaces",
                        fix=example,
                    )
                roles[key] = role
        return cls(roles)

    def role(self, key: str) -> Role | None:
        """The role of a key, compared in constant time; None for an unknown key."""
        found: Role | None = None
        for known, role in self.roles.items():
            if hmac.compare_digest(known.encode(), key.encode()):
                found = role
        return found


class _UniqueNames(yaml.SafeLoader):
    """Refuses a name that is given twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        if len({*map(str, names)}) < len(names):
            raise yaml.YAMLError("a role is given twice")
        return super().construct_mapping(node, deep)


def requires(role: Role) -> Any:
    """A dependency of endpoints that need a role."""

    async def check(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
        header: Annotated[str | None, Depends(_header)],
    ) -> None:
        keys: Keys = request.app.state.keys
        if not keys.roles:
            return
        given = bearer.credentials if bearer is not None else header
        if given is None:
            raise HTTPException(401, "an API key is needed", {"WWW-Authenticate": "Bearer"})
        own = keys.role(given)
        if own is None:
            raise HTTPException(401, "the API key is not known", {"WWW-Authenticate": "Bearer"})
        if ROLES.index(own) < ROLES.index(role):
            raise HTTPException(403, f"this needs a key with the role {role}; yours has {own}")

    return Depends(check)


class Rate:
    """How many requests per second a client may send: a bucket of one second's requests, which refills.

    Args:
        per_second: Requests per second; 0 for no limit.
    """

    def __init__(self, per_second: float) -> None:
        self.per_second, self.size = per_second, max(1.0, per_second)
        self._left = OrderedDict[str, tuple[float, float]]()  # requests, and when they were so many

    def wait(self, client: str, now: float) -> float:
        """Count a request at a time in seconds; return 0, or the seconds until the client may send one."""
        if not self.per_second:
            return 0.0
        left, before = self._left.pop(client, (self.size, now))
        left = min(self.size, left + (now - before) * self.per_second)
        admitted = left >= 1
        self._left[client] = (left - admitted, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if admitted else (1 - left) / self.per_second


class Guard:
    """Refuses requests for other hosts, of other origins, with large bodies, and too many of a client.

    A client is an API key, or without one the address that a request is from.

    Args:
        app: The application.
        hosts: Names that the Host header may have, without ports; "*" admits any.
        max_bytes: Largest size of a body.
        keys: The API keys.
        rate: Requests per second of a client, see `Rate`.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], max_bytes: int, keys: Keys, rate: float
    ) -> None:
        self.app, self.hosts, self.max_bytes = app, {host.lower() for host in hosts}, max_bytes
        self.keys, self.rate = keys, Rate(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self._refusal(headers) or self._too_many(headers, scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _refusal(self, headers: dict[str, str]) -> Any:
        host = headers.get("host", "")
        if "*" not in self.hosts and _name(f"//{host}") not in self.hosts:
            fix = "start cemg-serve with --allow-host and this name"
            return problem(421, f"this service does not serve the host {host[:200]!r}", fix=fix)
        origin = headers.get("origin")
        own = host and origin and origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
        if origin is not None and not own:
            return problem(403, "requests from pages of other origins are refused")
        length = headers.get("content-length", "")
        digits = length.lstrip("0") if length.isdecimal() else ""
        if len(digits) > len(str(self.max_bytes)) or int(digits or 0) > self.max_bytes:
            return problem(413, f"the body has {digits[:20]} bytes; at most {self.max_bytes} are read")
        return None

    def _too_many(self, headers: dict[str, str], scope: Scope) -> Any:
        if not scope["path"].startswith("/v1/"):
            return None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")  # as `requires`
        known = self.keys.role(given) is not None  # others could send a new key with each request
        client = given if known else str((scope.get("client") or [""])[0])
        seconds = self.rate.wait(client, time.monotonic())
        if not seconds:
            return None
        limit = f"at most {self.rate.per_second:g} requests per second are answered per client"
        return problem(429, limit, headers={"Retry-After": str(math.ceil(seconds))})

    def _limited(self, receive: Receive) -> Receive:
        """Stop reading a body without a length once it is too large."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise HTTPException(413, f"the body is too large; at most {self.max_bytes} bytes are read")
            return message

        return limited


def _name(netloc: str) -> str:
    try:
        return (urlsplit(netloc).hostname or "").lower()
    except ValueError:
        return ""
