"""Amounts as a PSP writes them, where its minor units are not those of ISO 4217. Exact, or none."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gateway.application.ports import AmountRule
from gateway.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS


@dataclass(frozen=True, slots=True)
class PspUnits:
    """The currencies that a PSP takes, and how it writes their amounts."""

    exponents: Mapping[str, int]
    """To the number of decimals in the PSP's API."""
    rules: Mapping[str, AmountRule]
    """Which amounts of each the PSP can express, in the minor units of ISO 4217."""

    @classmethod
    def of(
        cls,
        currencies: Mapping[int, str],
        *,
        amount_max: int | None = None,
        steps: Mapping[int, int] | None = None,
    ) -> "PspUnits":
        """From numbers of decimals to codes, separated by spaces.

        `amount_max` is the largest amount and `steps` tells by the number of decimals of what an
        amount must be a multiple, both in the PSP's unit.
        """
        exponents = {
            code: decimals for decimals, codes in currencies.items() for code in codes.split()
        }
        rules = {}
        for code, decimals in exponents.items():
            times, over = _factors(decimals, code)
            step = (steps or {}).get(decimals, 1) * over
            largest = AMOUNT_MINOR_MAX if amount_max is None else amount_max // times * over
            rules[code] = AmountRule(step, min(largest, AMOUNT_MINOR_MAX))
        return cls(MappingProxyType(exponents), MappingProxyType(rules))

    def to_psp(self, amount_minor: int, currency: str) -> int | None:
        """The amount in the PSP's unit; None where it cannot be expressed, or the currency is none
        of the PSP's.
        """
        rule = self.rules.get(currency)
        if rule is None or amount_minor % rule.step_minor or amount_minor > rule.amount_minor_max:
            return None
        times, over = _factors(self.exponents[currency], currency)
        return amount_minor * times // over

    def from_psp(self, amount: int, currency: str) -> int | None:
        """The PSP's amount in minor units of ISO 4217; None where these cannot express it."""
        if currency not in self.exponents:
            return None
        times, over = _factors(self.exponents[currency], currency)
        return None if amount % times else amount // times * over


def _factors(decimals: int, code: str) -> tuple[int, int]:
    """What an amount in minor units is multiplied by, and then divided by."""
    shift = decimals - CURRENCY_EXPONENTS[code]
    return int(10 ** max(shift, 0)), int(10 ** max(-shift, 0))
