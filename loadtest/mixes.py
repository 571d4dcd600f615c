"""What the calls of a load test are: kinds by weight, merchants by Zipf's law. Pure."""

import random
import tomllib
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

MIXES_FILE: Final = Path(__file__).with_name("mixes.toml")
MERCHANTS_MAX: Final = 10_000
ZIPF_EXPONENT_MAX: Final = 10.0

T = TypeVar("T")


class Kind(IntEnum):
    """What a call does. The numbers stand in the samples' files."""

    AUTHORIZE = 0
    DECLINE = 1
    VERIFY = 2
    CAPTURE = 3
    VOID = 4
    REFUND = 5
    INCREMENT = 6
    REPLAY = 7
    GET_PAYMENT = 8
    GET_OPERATION = 9
    LIST_PAYMENTS = 10
    BATCH = 11
    STREAM = 12


class BadMix(ValueError):
    """The mix cannot be used."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What is called, and for how many merchants."""

    name: str
    weights: Mapping[Kind, float]
    merchants: int
    zipf_exponent: float


class Draw(Generic[T]):
    """Draws values by their weights."""

    def __init__(
        self, values: Sequence[T], weights: Sequence[float], source: random.Random
    ) -> None:
        self._values = values
        self._bounds = list(accumulate(weights))
        self._source = source

    def __call__(self) -> T:
        """One value."""
        at = bisect(self._bounds, self._source.random() * self._bounds[-1])
        return self._values[min(at, len(self._values) - 1)]


def zipf_weights(count: int, exponent: float) -> list[float]:
    """The weights of the first `count` ranks by Zipf's law."""
    return [rank**-exponent for rank in range(1, count + 1)]


def load_mix(name: str, path: Path = MIXES_FILE) -> Mix:
    """A mix of the file by its name. Raises BadMix, which says what is wrong."""
    try:
        mixes = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadMix(f"{path}: {error}") from error
    if name not in mixes:
        raise BadMix(f"no mix {name!r} in {path}; there are {', '.join(mixes)}")
    return _mix(name, mixes[name], path)


def _mix(name: str, table: Any, path: Path) -> Mix:
    where = f"{path}, [{name}]"
    if not isinstance(table, dict) or table.keys() != {"merchants", "zipf_exponent", "weights"}:
        raise BadMix(f"{where}: needs merchants, zipf_exponent and weights, and nothing else")
    merchants, exponent, weights = table["merchants"], table["zipf_exponent"], table["weights"]
    if not _number(merchants, int) or not 1 <= merchants <= MERCHANTS_MAX:
        raise BadMix(f"{where}: merchants must be an integer from 1 to {MERCHANTS_MAX}")
    if not _number(exponent, int, float) or not 0 <= exponent <= ZIPF_EXPONENT_MAX:
        raise BadMix(f"{where}: zipf_exponent must be from 0 to {ZIPF_EXPONENT_MAX:g}")
    kinds = {kind.name.lower(): kind for kind in Kind}
    if not isinstance(weights, dict) or not weights:
        raise BadMix(f"{where}: weights must be a table")
    for kind, weight in weights.items():
        if kind not in kinds:
            raise BadMix(f"{where}: no call {kind!r}; there are {', '.join(kinds)}")
        if not _number(weight, int, float) or not 0 < weight < 1e9:
            raise BadMix(f"{where}: the weight of {kind} must be above 0")
    return Mix(
        name=name,
        weights={kinds[kind]: float(weight) for kind, weight in weights.items()},
        merchants=merchants,
        zipf_exponent=float(exponent),
    )


def _number(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
