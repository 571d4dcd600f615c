"""What a payment costs at an account: fees and interchange from a readable file, exact.

The file is TOML. Percentages are texts with at most four decimals, amounts whole minor units, and
nothing is rounded before the sum: fees are kept in millionths of a minor unit.

    [objective]
    margin_percentage = "30"      # what an approved payment is worth, of its amount

    [[fee]]
    account = "acc_…"
    currency = "EUR"              # of the payment
    valid_from = 2026-01-01       # UTC; may be left out, as valid_until, the first day without
    percentage = "0.25"           # of an approved payment
    fixed_minor = 5               # for an approved payment
    minimum_minor = 8             # the least of both together
    attempt_minor = 2             # for each attempt, a declined one too

    [[fee.interchange]]           # the first one that fits
    scheme = "visa"
    issuer_countries = ["DE", "FR"]
    card_type = "debit"
    percentage = "0.2"
    fixed_minor = 0
    minimum_minor = 1             # the least that it comes to
    cap_minor = 50                # and the most

Where a payment does not say what an interchange row asks for, the dearest row that may fit counts.
"""

import datetime as dt
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Final, NamedTuple

from gateway.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS
from gateway.routing.model import CARD_TYPES, Segment
from gateway.routing.toml import read_toml

MICRO: Final = 1_000_000
"""Fees are counted in millionths of a minor unit."""
TEXT_CHARACTERS_MAX: Final = 256 * 1024
FEES_MAX: Final = 2_000
INTERCHANGES_MAX: Final = 500
"""Of one fee."""
TARIFFS_MAX: Final = 10_000
"""Kinds of payments whose row is remembered."""

_PERCENTAGE: Final = re.compile(r"\d{1,3}(\.\d{1,4})?")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_COUNTRY: Final = re.compile(r"[A-Z]{2}")
_SCHEME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_DAY_S: Final = 86_400
_NEVER: Final = dt.date.max.toordinal()
_EPOCH: Final = dt.date(1970, 1, 1).toordinal()


class CostsRefused(Exception):
    """The file cannot be used; the text says where and why."""


class Interchange(NamedTuple):
    """A class of interchange."""

    scheme: str
    """Empty: every one; so the next two."""
    issuer_countries: frozenset[str]
    card_type: str
    ppm: int
    """Of the amount, in millionths."""
    fixed_micro: int
    minimum_micro: int
    cap_micro: int | None

    def micro(self, amount_minor: int) -> int:
        """The interchange of an amount."""
        fee = max(amount_minor * self.ppm + self.fixed_micro, self.minimum_micro)
        return fee if self.cap_micro is None else min(fee, self.cap_micro)

    def contradicts(self, scheme: str, country: str, card_type: str) -> bool:
        """Whether the payment surely does not belong to it."""
        return bool(
            (self.scheme and scheme and scheme != self.scheme)
            or (self.issuer_countries and country and country not in self.issuer_countries)
            or (self.card_type and card_type and card_type != self.card_type)
        )

    def is_certain(self, scheme: str, country: str, card_type: str) -> bool:
        """Whether the payment says all that it asks for."""
        return (
            (not self.scheme or bool(scheme))
            and (not self.issuer_countries or bool(country))
            and (not self.card_type or bool(card_type))
        )


class Fee(NamedTuple):
    """What an account charges for payments of a currency, for a time."""

    valid_from: int
    """The proleptic Gregorian ordinal of a day."""
    valid_until: int
    """The first day without."""
    ppm: int
    fixed_micro: int
    minimum_micro: int
    attempt_micro: int
    interchange: tuple[Interchange, ...]


class Cost(NamedTuple):
    """What a payment costs, in millionths of a minor unit."""

    attempt_micro: int
    """Whatever becomes of it."""
    approval_micro: int
    """Where it is approved, besides."""


class Tariff(NamedTuple):
    """What payments of a kind cost at an account on a day, by their amounts."""

    fee: Fee
    rows: list[Interchange]
    """Those that may fit: one where the payments say all."""

    def cost(self, amount_minor: int) -> Cost:
        """What a payment of this amount costs, the dearest of the rows taken."""
        fee, rows = self
        approval = max(amount_minor * fee.ppm + fee.fixed_micro, fee.minimum_micro)
        if len(rows) == 1:
            approval += rows[0].micro(amount_minor)
        elif rows:
            approval += max(row.micro(amount_minor) for row in rows)
        return Cost(fee.attempt_micro, approval)


@dataclass(frozen=True, slots=True)
class Costs:
    """A merchant's costs."""

    margin_ppm: int
    """What an approved payment is worth, of its amount in millionths."""
    fees: Mapping[tuple[str, str], tuple[Fee, ...]]
    """By account and currency, in the order of their validity."""
    _tariffs: dict[tuple[object, ...], Tariff | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    def of(self, account_id: str, segment: Segment, amount_minor: int, day: int) -> Cost | None:
        """What a payment costs at an account on a day; None where the file does not say."""
        tariff = self.tariff(account_id, segment, day)
        return None if tariff is None else tariff.cost(amount_minor)

    def tariff(self, account_id: str, segment: Segment, day: int) -> Tariff | None:
        """The same for payments of every amount."""
        known = segment.scheme, segment.issuer_country, segment.card_type
        key = account_id, segment.currency, *known, day
        try:
            return self._tariffs[key]
        except KeyError:
            if len(self._tariffs) >= TARIFFS_MAX:
                self._tariffs.clear()
            tariff = self._tariffs[key] = self._match(account_id, segment.currency, known, day)
            return tariff

    def _match(
        self, account_id: str, currency: str, known: tuple[str, str, str], day: int
    ) -> Tariff | None:
        for fee in self.fees.get((account_id, currency), ()):
            if fee.valid_from <= day < fee.valid_until:
                rows = []
                for each in fee.interchange:
                    if not each.contradicts(*known):
                        rows.append(each)
                        if each.is_certain(*known):
                            break  # what stands below it never fits
                return Tariff(fee, rows)
        return None


class CostBook:
    """The costs of all merchants that have some, in memory."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._costs: dict[str, Costs] = {}

    def put(self, merchant_id: str, costs: Costs) -> None:
        """Take over a merchant's costs."""
        self._costs[merchant_id] = costs

    def forget(self, merchant_id: str) -> None:
        """The merchant has none any more."""
        self._costs.pop(merchant_id, None)

    def costs(self, merchant_id: str) -> Costs | None:
        """A merchant's."""
        return self._costs.get(merchant_id)

    def today(self) -> int:
        """The day in UTC, as the ordinal that validity is told by."""
        return _EPOCH + int(self._clock() // _DAY_S)


# --- the file -------------------------------------------------------------------------------------


def parse_costs(text: str) -> Costs:
    """Read a file. Raises CostsRefused."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise CostsRefused(f"more than {TEXT_CHARACTERS_MAX} characters")
    try:
        document = read_toml(text)
    except ValueError as error:
        raise CostsRefused(f"no TOML: {error}") from error
    _only(document, "the file", {"objective", "fee"})
    objective = _table(document.get("objective", {}), "[objective]")
    _only(objective, "[objective]", {"margin_percentage"})
    margin = objective.get("margin_percentage", "100")
    listed = _tables(document.get("fee", []), "[[fee]]", FEES_MAX)
    fees: dict[tuple[str, str], list[Fee]] = {}
    for number, table in enumerate(listed, 1):
        place = f"fee {number}"
        account_id, currency, fee = _fee(table, place)
        fees.setdefault((account_id, currency), []).append(fee)
    for (account_id, currency), of_account in fees.items():
        of_account.sort(key=lambda fee: fee.valid_from)
        for earlier, later in pairwise(of_account):
            if later.valid_from < earlier.valid_until:
                day = dt.date.fromordinal(later.valid_from)
                raise CostsRefused(f"{account_id} has two fees for {currency} on {day}")
    return Costs(
        _ppm(margin, "margin_percentage of [objective]"),
        {key: tuple(of_account) for key, of_account in fees.items()},
    )


def _fee(table: Mapping[str, object], place: str) -> tuple[str, str, Fee]:
    _only(
        table,
        place,
        {
            *("account", "currency", "valid_from", "valid_until", "percentage", "fixed_minor"),
            *("minimum_minor", "attempt_minor", "interchange"),
        },
    )
    account_id = table.get("account")
    if not isinstance(account_id, str) or not 1 <= len(account_id) <= 64:
        raise CostsRefused(f"{place}: `account` is the id of an account")
    currency = _text(table, "currency", place, _CURRENCY, "three capital letters (ISO 4217)")
    if not currency:
        raise CostsRefused(f"{place}: `currency` is missing")
    if currency not in CURRENCY_EXPONENTS:
        raise CostsRefused(f"{place}: `currency`: {currency} is none of ISO 4217")
    valid_from = _day(table, "valid_from", place, 1)
    valid_until = _day(table, "valid_until", place, _NEVER)
    if valid_from >= valid_until:
        raise CostsRefused(f"{place}: it is never valid")
    rows = _tables(table.get("interchange", []), f"{place}: interchange", INTERCHANGES_MAX)
    interchange = tuple(
        _interchange(row, f"{place}, interchange {number}") for number, row in enumerate(rows, 1)
    )
    for number, row in enumerate(interchange):
        if any(_covers(earlier, row) for earlier in interchange[:number]):
            raise CostsRefused(f"{place}, interchange {number + 1}: one above it always fits first")
    fee = Fee(
        valid_from,
        valid_until,
        _ppm(table.get("percentage", "0"), f"percentage of {place}"),
        _micro(table, "fixed_minor", place),
        _micro(table, "minimum_minor", place),
        _micro(table, "attempt_minor", place),
        interchange,
    )
    return account_id, currency, fee


def _interchange(table: Mapping[str, object], place: str) -> Interchange:
    _only(
        table,
        place,
        {
            *("scheme", "issuer_countries", "card_type"),
            *("percentage", "fixed_minor", "minimum_minor", "cap_minor"),
        },
    )
    countries = table.get("issuer_countries", [])
    if not isinstance(countries, list) or not all(
        isinstance(each, str) and _COUNTRY.fullmatch(each) for each in countries
    ):
        raise CostsRefused(f"{place}: `issuer_countries` are two capital letters each (ISO 3166)")
    card_type = table.get("card_type", "")
    if not isinstance(card_type, str) or (card_type and card_type not in CARD_TYPES):
        raise CostsRefused(f"{place}: `card_type` is one of {', '.join(CARD_TYPES)}")
    minimum_micro = _micro(table, "minimum_minor", place)
    cap_micro = _micro(table, "cap_minor", place) if "cap_minor" in table else None
    if cap_micro is not None and cap_micro < minimum_micro:
        raise CostsRefused(f"{place}: `cap_minor` is below `minimum_minor`")
    return Interchange(
        _text(table, "scheme", place, _SCHEME, "in lower case, as `visa`"),
        frozenset(countries),
        card_type,
        _ppm(table.get("percentage", "0"), f"percentage of {place}"),
        _micro(table, "fixed_minor", place),
        minimum_micro,
        cap_micro,
    )


def _covers(earlier: Interchange, later: Interchange) -> bool:
    """Whether all that fits the later one fits the earlier one."""
    return (
        earlier.scheme in ("", later.scheme)
        and (
            not earlier.issuer_countries
            or (bool(later.issuer_countries) and later.issuer_countries <= earlier.issuer_countries)
        )
        and earlier.card_type in ("", later.card_type)
    )


def _only(table: Mapping[str, object], place: str, known: set[str]) -> None:
    if unknown := table.keys() - known:
        raise CostsRefused(f"{place}: there is no `{min(unknown)}`")


def _table(value: object, place: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise CostsRefused(f"{place} is a table")
    return value


def _tables(value: object, place: str, limit: int) -> list[Mapping[str, object]]:
    if not isinstance(value, list) or len(value) > limit:
        raise CostsRefused(f"{place}: at most {limit} tables")
    return [_table(each, place) for each in value]


def _text(
    table: Mapping[str, object], name: str, place: str, pattern: re.Pattern[str], form: str
) -> str:
    value = table.get(name, "")
    if not isinstance(value, str) or (value and not pattern.fullmatch(value)):
        raise CostsRefused(f"{place}: `{name}` is {form}")
    return value


def _ppm(value: object, place: str) -> int:
    if not isinstance(value, str) or not _PERCENTAGE.fullmatch(value) or Decimal(value) > 100:
        raise CostsRefused(f'{place}: a text from "0" to "100" with at most four decimals')
    return int(Decimal(value) * 10_000)


def _micro(table: Mapping[str, object], name: str, place: str) -> int:
    value = table.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= AMOUNT_MINOR_MAX:
        raise CostsRefused(f"{place}: `{name}` is whole minor units, at least 0")
    return value * MICRO


def _day(table: Mapping[str, object], name: str, place: str, default: int) -> int:
    value = table.get(name)
    if value is None:
        return default
    if not isinstance(value, dt.date) or isinstance(value, dt.datetime):
        raise CostsRefused(f"{place}: `{name}` is a date, as 2026-01-31 without quotes")
    return value.toordinal()
