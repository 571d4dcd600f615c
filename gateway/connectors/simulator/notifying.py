"""What the simulated PSP tells of its own accord: signed events, late, twice, in any order.

The interface to the gateway's way in is docs/notifications.md; the form of events is in
docs/simulator.md.
"""

import asyncio
import hmac
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from gateway.connectors.http import HttpClient, Limits, MaybeSent, NotSent
from gateway.connectors.simulator.journal import Record
from gateway.connectors.simulator.latency import Latency

SIGNATURE: Final = "simulator-signature"
PATH: Final = "/v1/notifications/simulator/"
WAITING_MAX: Final = 100_000
"""Events that wait to be told; more are dropped, and counted."""
CONNECTIONS_MAX: Final = 32
ANSWER_TIMEOUT_S: Final = 10.0
PAUSE_S_MIN: Final = 0.2
"""Before an event that was not taken is told again; doubled up to the next."""
PAUSE_S_MAX: Final = 60.0
TRIES_MAX: Final = 20

_ACCOUNT: Final = re.compile(r"acc_[0-9a-f]{32}")
_TOLD: Final = frozenset({"approved", "declined", "failed", "expired"})
"""Results that are told: how something ended."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Notifying:
    """Where events go, and what happens to them on the way."""

    url: str
    """The address of the gateway's way in, `http://host:port`."""
    secret: str = field(repr=False)
    """One of the account's `webhook_secrets`."""
    delay: Latency = field(default_factory=Latency)
    """Each event's own, so that a wide one changes their order."""
    duplicate_percent: int = 0
    """How many of a hundred are told a second time, after a delay of their own."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError("events go to http://HOST:PORT")
        if not self.secret or not self.secret.isascii():
            raise ValueError("events need an ASCII secret to be signed with")
        if not 0 <= self.duplicate_percent <= 100:
            raise ValueError("duplicate_percent must be 0 to 100")


def signature(secret: str, at_s: int, body: bytes) -> str:
    """`t=<seconds since 1970>,v1=<hex>`: HMAC-SHA256 of the time, a point and the body."""
    told = hmac.digest(secret.encode(), b"%d." % at_s + body, "sha256")
    return f"t={at_s},v1={told.hex()}"


class Notifier:
    """Tells events at least once, for as long as it runs: what waits is not kept on the disk."""

    def __init__(
        self,
        durable: Callable[[], Awaitable[None]],
        settle: Callable[[str], Awaitable[None]],
        source: random.Random,
    ) -> None:
        """`durable` returns when what the journal holds is on the disk; `settle` lets what is
        pending at the PSP end, by its transaction's id.
        """
        self._durable = durable
        self._settle = settle
        self._source = source
        self._how: Notifying | None = None
        self._http: HttpClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.told = 0
        """Events that were taken, each time."""
        self.dropped = 0
        """Events that were not told, since too many waited or nobody took them."""

    @property
    def waiting(self) -> int:
        """Events that are yet to be taken, and settlements that are yet to come."""
        return len(self._tasks)

    async def set(self, how: Notifying | None) -> None:
        """Where to tell from now on, what waits too; None: nowhere, and what waits is dropped."""
        old, self._how = self._http, how
        self._http = None if how is None else HttpClient(how.url, Limits(CONNECTIONS_MAX))
        if old is not None:
            await old.close()

    async def close(self) -> None:
        """Tell nothing any more."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.set(None)

    @property
    def tells(self) -> bool:
        """Whether anything is told."""
        return self._how is not None

    def entered(self, record: Record, payment_reference: str, *, settles: bool) -> None:
        """A decision of the journal; `settles`: what it is about is to end by itself."""
        if _ACCOUNT.fullmatch(record.get("account", "")) is None:
            return
        if settles:
            self._start(self._settle_later(record["transaction_id"]))
        if record["answer"]["result"] in _TOLD:
            self.tell(record["account"], event_of(record, payment_reference))

    def tell(self, account: str, event: Event) -> None:
        """Tell an event of an account."""
        how = self._how
        if how is None:
            return
        body = orjson.dumps(event)
        self._start(self._tell(how.delay, account, body))
        if self._source.random() * 100 < how.duplicate_percent:
            self._start(self._tell(how.delay, account, body))

    def _start(self, work: Any) -> None:
        if len(self._tasks) >= WAITING_MAX:
            self.dropped += 1
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle_later(self, transaction_id: str) -> None:
        assert self._how is not None
        await asyncio.sleep(self._how.delay.draw(self._source) / 1000)
        await self._settle(transaction_id)

    async def _tell(self, delay: Latency, account: str, body: bytes) -> None:
        await self._durable()
        await asyncio.sleep(delay.draw(self._source) / 1000)
        for number in range(TRIES_MAX):
            if self._how is None:
                break
            if await self._posted(self._how, account, body):
                self.told += 1
                return
            await asyncio.sleep(min(PAUSE_S_MIN * 2**number, PAUSE_S_MAX))
        self.dropped += 1

    async def _posted(self, how: Notifying, account: str, body: bytes) -> bool:
        http, now = self._http, time.monotonic()
        if http is None:
            return False
        try:
            response = await http.request(
                "POST",
                PATH + account,
                body,
                send_before=now + ANSWER_TIMEOUT_S,
                answer_timeout_s=ANSWER_TIMEOUT_S,
                headers={SIGNATURE: signature(how.secret, int(time.time()), body)},
            )
        except (NotSent, MaybeSent):
            return False
        return response.status == 200


def event_of(record: Record, payment_reference: str) -> Event:
    """The event of a decision, or of what became of one; the reference is its authorization's."""
    answer = record["answer"]
    return {
        # The same however often it is told.
        "id": f"evt_{record['transaction_id']}_{answer['result']}",
        "type": f"{record['kind']}.{answer['result']}",
        "created_at": record["t"],
        "payment_transaction_id": record["authorization_id"],
        "payment_reference": payment_reference,
        "operation": answer,
    }
