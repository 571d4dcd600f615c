"""What the doubles of PSPs over HTTP have in common: their journals, keys, and place behind a
disturbed way; and what every connector has to do that is tested with one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from aiohttp import web

from gateway.application.ports import Connector
from gateway.connectors.http import HttpClient, Limits
from gateway.domain.model import OperationKind as K
from gateway.domain.model import Verdict
from tests.connector_conformance import (
    SHORT_S,
    WAIT_S,
    Conformance,
    Fault,
    Way,
    is_doubt,
    request_of,
    send,
    way_to,
)
from tests.http_server import http_server

RequestT = TypeVar("RequestT")
"""What a double notes of a request."""
Answer = tuple[int, dict[str, Any]]
"""Status and body."""


@dataclass
class Double(ABC, Generic[RequestT]):
    """The state behind a PSP's API."""

    requests: list[RequestT] = field(default_factory=list)
    """What came, in order."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of each request, by their names in small letters."""
    effects: list[str] = field(default_factory=list)
    """The reference of each request that moved money or verified, each time that it did."""
    gate: asyncio.Event | None = None
    """Where it is set, requests that have begun to change something wait for it."""
    revoked_after: int | None = None
    """After how many requests the credentials are no longer accepted."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @abstractmethod
    async def handle(self, request: web.Request) -> web.Response:
        """Any request."""

    def note(self, request: web.Request, noted: RequestT) -> None:
        """Enter a request, before anything is made of it."""
        self.requests.append(noted)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})

    @property
    def revoked(self) -> bool:
        """Whether the credentials of the latest request are no longer accepted."""
        return self.revoked_after is not None and len(self.requests) > self.revoked_after

    async def pass_gate(self) -> None:
        """Wait where there is a gate."""
        if self.gate is not None:
            await self.gate.wait()


@dataclass
class KeyedDouble(Double[RequestT]):
    """One whose answers are saved under idempotency keys."""

    keys: dict[str, tuple[str, Answer | None]] = field(default_factory=dict)
    """By key: what came with it at first, and its answer; None while it is under way."""

    async def execute(
        self, key: str, fingerprint: str, make: Callable[[], Awaitable[Answer]]
    ) -> Answer:
        """Make and save the answer to a key's first request. Where it raises, the key is free."""
        self.keys[key] = (fingerprint, None)
        try:
            await self.pass_gate()
            status, body = await make()
        except BaseException:
            del self.keys[key]
            raise
        # A copy: the saved answer does not change with the object.
        self.keys[key] = (fingerprint, (status, json.loads(json.dumps(body))))
        return status, body


DoubleT = TypeVar("DoubleT", bound=Double[Any])
PspT = TypeVar("PspT")


class DoublePsp(ABC, Generic[DoubleT]):
    """A double, the way to it, and a connector (`tests.connector_conformance.Psp`)."""

    def __init__(self, double: DoubleT, way: Way, stack: AsyncExitStack) -> None:
        self.way = way
        self.double = double
        self._stack = stack
        self.connector: Connector = self.connect(WAIT_S)

    @abstractmethod
    def connect(self, answer_timeout_s: float, **more: Any) -> Connector:
        """Another connector over the same way; `more` are arguments of its own."""

    def client(self) -> HttpClient:
        """One that is closed with the double."""
        http = HttpClient(self.way.url, Limits(body_bytes_max=2 * 1024 * 1024))
        self._stack.push_async_callback(http.close)
        return http

    async def impatient(self) -> Connector:
        """A connector that waits only SHORT_S for an answer."""
        return self.connect(SHORT_S)

    async def effects(self, reference: str) -> int:
        """How often a reference took effect."""
        return self.double.effects.count(reference)


@asynccontextmanager
async def running(
    psp: Callable[[DoubleT, Way, AsyncExitStack], PspT],
    double: DoubleT,
    is_change: Callable[[bytes], bool] = lambda _: True,
) -> AsyncIterator[PspT]:
    """A double that serves, for as long as the context lasts; `is_change` as for `way_to`."""
    async with (
        http_server(double.handle) as url,
        way_to(url, is_change) as way,
        AsyncExitStack() as stack,
    ):
        yield psp(double, way, stack)


class DoubleConformance(Conformance):
    """The suite, and what only a double shows."""

    async def test_refusal_of_a_repeat_says_nothing_of_the_first_sending(self, psp: Any) -> None:
        request = request_of()
        psp.double.revoked_after = 1
        psp.way.disturb(Fault.RESET, times=1)
        assert is_doubt(await send(psp.connector, request))
        assert len(psp.double.requests) == 2
        assert await psp.effects(request.reference) == 1

    async def test_request_under_way_is_not_taken_for_absent(self, psp: Any) -> None:
        request = request_of()
        psp.double.gate = asyncio.Event()
        sending = asyncio.create_task(send(psp.connector, request))
        while not psp.double.requests:  # noqa: ASYNC110 - it has to arrive
            await asyncio.sleep(0.01)
        if self.asking_uses_up:
            assert is_doubt(await psp.connector.query(K.AUTHORIZE, request.reference, request))
        assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))
        psp.double.gate.set()
        assert (await sending).verdict is Verdict.APPROVED
        assert await psp.effects(request.reference) == 1
