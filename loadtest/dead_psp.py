"""What a dead PSP costs once its breaker is open: `python -m loadtest.dead_psp`, a minute.

A gateway on PostgreSQL and Redis, and a PSP that answers. Payments in one currency go straight to
it; in another first to a PSP where nobody listens, then to the same; in a third to the dead one
alone. They take turns: what is compared is the CPU time of the gateway in rounds that follow each
other, and what callers wait who pay the one way and the other in turn. The breaker's probes are
part of it.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Final

import click
import grpc
import uvloop
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from payments.v1 import payment_service_pb2_grpc as service
from payments.v1.money_pb2 import Money
from payments.v1.payment_method_pb2 import CAPTURE_METHOD_MANUAL, PaymentMethod
from payments.v1.payment_service_pb2 import AuthorizePaymentRequest

from gateway.connectors.sealing import new_wrapping_key
from gateway.domain.ids import new_request_id
from loadtest.bench.costs import Gate, take_turns, tell
from loadtest.bench.ratios import PAIRS_MIN, Measured, measured, paired
from loadtest.children import cpu_s
from loadtest.servers import Stack, StackOptions

FOLDER: Final = Path(".local/dead_psp")
SUMMARY: Final = Path(".local/bench/dead_psp.json")
RATIO_MAX: Final = 1.1
"""The most CPU that a payment may take with a dead PSP before its own, of one without."""
CALLS_PER_ROUND: Final = 200
CALLERS: Final = 4
CALL_TIMEOUT_S: Final = 30.0
OPENED_CALLS_MAX: Final = 2_000
"""After so many calls without an open breaker something is wrong."""
ALIVE: Final = "USD"
DEAD_FIRST: Final = "EUR"
DEAD_ALONE: Final = "GBP"


class Payer:
    """Authorizes, and keeps count of what was sent to the dead PSP."""

    def __init__(self, stack: Stack, channel: grpc.aio.Channel) -> None:
        self._stack = stack
        self._stub = service.PaymentServiceStub(channel)
        self._headers = (("authorization", f"Bearer {stack.api_key}"),)
        self.probes = 0

    async def pay(self, currency: str) -> str:
        """One authorization; why it was refused, or empty."""
        request = AuthorizePaymentRequest(
            merchant_id=self._stack.merchant_ids[0],
            idempotency_key=new_request_id(),
            amount=Money(amount_minor=1000, currency_code=currency),
            payment_method=PaymentMethod(token="tok_visa"),  # noqa: S106 - a test token
            capture_method=CAPTURE_METHOD_MANUAL,
        )
        try:
            answer = await self._stub.AuthorizePayment(
                request, metadata=self._headers, timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            return _exclusion(error)
        self.probes += len(answer.operation.attempts) - (currency != DEAD_ALONE)
        return ""

    async def open_breaker(self) -> None:
        """Pay until the dead PSP is left alone."""
        for _ in range(OPENED_CALLS_MAX):
            if await self.pay(DEAD_ALONE) == "BREAKER_OPEN":
                return
        raise click.ClickException("the dead PSP's breaker does not open")

    async def round(self, *currencies: str) -> dict[str, float]:
        """So many payments, in these currencies by turns; the median of what callers waited for
        those of each, in seconds.
        """
        waited_s: dict[str, list[float]] = {currency: [] for currency in currencies}

        async def caller() -> None:
            for number in range(CALLS_PER_ROUND // CALLERS):
                currency = currencies[number % len(currencies)]
                began = time.perf_counter()
                await self.pay(currency)
                waited_s[currency].append(time.perf_counter() - began)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return {currency: median(each) for currency, each in waited_s.items()}

    async def cpu_us(self, currency: str) -> float:
        """The gateway's CPU time of a payment, in microseconds."""
        before_s = cpu_s(self._stack.gateway.pid)
        await self.round(currency)
        return 1e6 * (cpu_s(self._stack.gateway.pid) - before_s) / CALLS_PER_ROUND

    async def latency_ratio(self) -> float:
        """What callers wait with a dead PSP before their own, of what they do without."""
        waited_s = await self.round(ALIVE, DEAD_FIRST)
        return waited_s[DEAD_FIRST] / waited_s[ALIVE]


def _exclusion(error: grpc.aio.AioRpcError) -> str:
    """Why no account was asked. Raises the error where it is about something else."""
    trailers = dict(error.trailing_metadata() or ())
    details = trailers.get("grpc-status-details-bin", b"")
    assert isinstance(details, bytes)
    for each in Status.FromString(details).details:
        info = ErrorInfo()
        if each.Unpack(info) and info.reason == "CONNECTOR_UNAVAILABLE":
            return info.metadata["exclusion"]
    raise error


def _gateway(stack: Stack, settings: Mapping[str, str], *arguments: str, told: str = "") -> str:
    """What a command of the gateway prints."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("GATEWAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        input=told,
        env={**inherited, "GATEWAY_POSTGRES_DSN": stack.dsn, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"gateway {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


def _prepare(stack: Stack, settings: Mapping[str, str], dead_url: str) -> None:
    """Two accounts, one of them at a PSP that is not there, and rules for three currencies."""
    who = ("--merchant", stack.merchant_ids[0], "--mode", "test")
    alive, dead = (
        _gateway(
            stack,
            settings,
            *("connectors", "add", *who, "--connector", "simulator"),
            told=json.dumps({"url": url}),
        )
        for url in (stack.simulator.url, dead_url)
    )
    rules = "format = 1\n" + "".join(
        f'[[rule]]\nname = "{currency.lower()}"\nwhen = {{ currency = "{currency}" }}\n'
        "targets = ["
        + ", ".join(
            f'{{ account = "{each}", priority = {n} }}' for n, each in enumerate(targets, 1)
        )
        + "]\n"
        for currency, targets in (
            (ALIVE, (alive,)),
            (DEAD_FIRST, (dead, alive)),
            (DEAD_ALONE, (dead,)),
        )
    )
    file = FOLDER / "rules.toml"
    file.write_text(rules, "utf-8")
    reason = ("--reason", "A measurement of what a dead PSP costs.")
    _gateway(stack, settings, "routing", "put", str(file), *who, *reason, "--activate")


async def measure(stack: Stack, rounds: int) -> tuple[dict[str, Measured], int]:
    """The paired ratios with each side, and how many probes there were."""
    async with grpc.aio.insecure_channel(stack.address) as channel:
        payer = Payer(stack, channel)
        await payer.open_breaker()
        payer.probes = 0
        sides = {
            "alive_us": lambda: payer.cpu_us(ALIVE),
            "dead_us": lambda: payer.cpu_us(DEAD_FIRST),
            "refused_us": lambda: payer.cpu_us(DEAD_ALONE),
            "latency_ratio": payer.latency_ratio,
        }
        spent = await take_turns(sides, rounds)
        return {
            "cpu_ratio": paired(spent["dead_us"], spent["alive_us"]),
            "refusal_ratio": paired(spent["refused_us"], spent["alive_us"]),
            **{name: measured(values) for name, values in spent.items()},
        }, payer.probes


@click.command()
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(PAIRS_MIN))
def main(rounds: int) -> None:
    """Measure, print, write the summary; exit with 1 where the gate fails."""
    settings = {"GATEWAY_CONNECTOR_KEYS": new_wrapping_key("k1")}
    with socket.socket() as silent:  # bound, so that nobody gets its port, and never listening
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        options = StackOptions(
            FOLDER,
            merchants=1,
            psp_latency="5,10",
            settings={**settings, "GATEWAY_CONNECTOR_ACCOUNTS_INTERVAL_S": "1"},
        )
        with Stack(options) as stack:
            _prepare(stack, settings, f"http://127.0.0.1:{port}")
            figures, probes = uvloop.run(measure(stack, rounds))
    click.echo(f"{probes} calls to the dead PSP")
    tell(
        rounds,
        figures,
        Gate("cpu_ratio", most=RATIO_MAX),
        {
            "alive_us": "the gateway's CPU for a payment, microseconds",
            "dead_us": "with a dead PSP before its own",
            "refused_us": "for a refusal, where there is only the dead one",
            "cpu_ratio": "CPU with a dead PSP, of that without",
            "latency_ratio": "what the caller waits with a dead PSP, of that without",
            "refusal_ratio": "CPU of a refusal, of a payment's",
        },
        SUMMARY,
    )


if __name__ == "__main__":
    main()
