"""What one run of the generator does: its options, checked once, the same for every worker."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self, cast, get_args

from loadtest.arrivals import (
    Arrival,
    Process,
    Profile,
    Schedule,
    Segment,
    segments_of,
    warm_up,
)
from loadtest.calls import Book
from loadtest.engine import Engine, Target
from loadtest.mixes import load_mix

API_KEY_VARIABLE: Final = "PAYMENTS_API_KEY"
CONNECTIONS_MAX: Final = 256
IN_FLIGHT_MAX: Final = 100_000
DURATION_S_MIN: Final = 0.1
DEADLINE_S_MAX: Final = 300.0
BATCH_ITEMS_MAX: Final = 100
"""What one message of a stream takes at most."""
SHARES_MAX: Final = 256


class BadPlan(ValueError):
    """The options make no sense; the text says which one and why."""


def _option(default: Any, meaning: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": meaning, **more})


@dataclass(frozen=True, slots=True)
class Plan:
    """What the generator sends. Every field is an option of the Locust file, `--load-…`."""

    rate: float = _option(1000.0, "intended sends a second")
    duration: float = _option(60.0, "seconds that are measured")
    profile: str = _option("steady", "how the rate goes", choices=get_args(Profile))
    arrivals: str = _option("poisson", "how sends are spread", choices=get_args(Process))
    mix: str = _option("authorize", "which calls, a section of loadtest/mixes.toml")
    warm_up: float = _option(5.0, "seconds that are sent before, rising, and not measured")
    overload_factor: float = _option(3.0, "how many times the rate an overload is")
    seed: int = _option(1, "of times, calls, merchants and amounts")
    connections: int = _option(4, "connections of each generator")
    in_flight_max: int = _option(20_000, "calls in flight of each generator; beyond it: dropped")
    deadline: float = _option(15.0, "seconds that a call may take")
    batch_items: int = _option(20, "items of a batch or stream call")
    shares: int = _option(1, "generators (Locust workers) that share the schedule")
    merchants: str = _option(
        "", "merchant ids with commas between, or @FILE with one a line; empty: the key's only one"
    )
    tls: bool = _option(False, "call over TLS")
    ca_file: str = _option("", "the CA to trust in PEM, the system's without it; implies TLS")
    retries: bool = _option(False, "repeat refusals as the published service config says")
    run_id: str = _option("", "part of every idempotency key, never used before")
    out: str = _option("", "folder for samples and acknowledgements")
    control: bool = _option(False, "a control run: answers are echoes and acknowledge nothing")

    def __post_init__(self) -> None:
        _between("rate", self.rate, 0.01, 100_000)
        _between("duration", self.duration, DURATION_S_MIN, 86_400)
        _between("warm_up", self.warm_up, 0, 3600)
        _between("overload_factor", self.overload_factor, 1, 100)
        _between("connections", self.connections, 1, CONNECTIONS_MAX)
        _between("in_flight_max", self.in_flight_max, 1, IN_FLIGHT_MAX)
        _between("deadline", self.deadline, 0.01, DEADLINE_S_MAX)
        _between("batch_items", self.batch_items, 1, BATCH_ITEMS_MAX)
        _between("shares", self.shares, 1, SHARES_MAX)
        for name, choices in (("profile", get_args(Profile)), ("arrivals", get_args(Process))):
            if getattr(self, name) not in choices:
                raise BadPlan(f"{name} must be {' or '.join(choices)}")
        if self.ca_file and not Path(self.ca_file).is_file():
            raise BadPlan(f"ca_file: there is no file {self.ca_file}")
        try:
            load_mix(self.mix)
            # A spike or an overload goes beyond the rate.
            _ = self.schedule
        except ValueError as error:
            raise BadPlan(str(error)) from error

    @property
    def schedule(self) -> Schedule:
        """All that is sent, the warm-up first."""
        segments: tuple[Segment, ...] = warm_up(self.rate, self.warm_up)
        segments += segments_of(
            cast("Profile", self.profile),
            self.rate,
            self.duration,
            overload_factor=self.overload_factor,
        )
        return Schedule(segments, cast("Process", self.arrivals), self.seed)

    def engine(self, address: str, share: int) -> Engine:
        """The engine of one share. Raises BadPlan where the API key or the CA is missing."""
        api_key = os.environ.get(API_KEY_VARIABLE, "")
        if not api_key and not self.control:
            raise BadPlan(f"no API key: set {API_KEY_VARIABLE} in the generator's environment")
        target = Target(
            address,
            api_key,
            tls=self.tls or bool(self.ca_file),
            ca_certificate=Path(self.ca_file).read_bytes() if self.ca_file else None,
            connections=self.connections,
            retries=self.retries,
        )
        book = Book(
            load_mix(self.mix),
            self.merchants.split(","),
            run_id=self.run_id,
            share=share,
            seed=self.seed,
            batch_items=self.batch_items,
            echoed=self.control,
        )
        arrivals: Iterator[Arrival] = self.schedule.share(share, self.shares)
        return Engine(
            target,
            book,
            arrivals,
            in_flight_max=self.in_flight_max,
            deadline_s=self.deadline,
        )

    def arguments(self) -> list[str]:
        """The options that make this plan, for the Locust file's command line."""
        arguments = []
        for each in fields(self):
            value = getattr(self, each.name)
            if value is True:
                arguments.append(_name(each.name))
            elif value is not False and value != each.default:
                arguments += [_name(each.name), str(value)]
        return arguments

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """From parsed options. Raises BadPlan."""
        return cls(**{each.name: getattr(options, _PREFIX + each.name) for each in fields(cls)})


def merchants_of(text: str) -> str:
    """Merchants' ids with commas between, of such a text or of @FILE; empty: the key's only one.

    Raises OSError, and ValueError where there are none in what was given.
    """
    if not text:
        return ""
    given = Path(text[1:]).read_text("utf-8") if text.startswith("@") else text
    ids = given.replace(",", " ").split()
    if not ids:
        raise ValueError(f"there is no merchant in {text}")
    return ",".join(ids)


_PREFIX: Final = "load_"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of a plan to the Locust file's own."""
    for each in fields(Plan):
        assert each.default is not MISSING
        meaning = each.metadata["help"]
        if isinstance(each.default, bool):
            parser.add_argument(_name(each.name), action="store_true", help=meaning)
        else:
            parser.add_argument(
                _name(each.name),
                type=type(each.default),
                default=each.default,
                choices=each.metadata.get("choices"),
                help=meaning,
            )


def _name(field_name: str) -> str:
    return "--" + (_PREFIX + field_name).replace("_", "-")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadPlan(f"{name} must be from {low:g} to {high:g}, not {value:g}")
