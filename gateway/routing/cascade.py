"""After which answers another connector may be asked, and how often a card may be tried again."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Final, NamedTuple

from gateway.domain.errors import Reason
from gateway.domain.model import (
    AdviceAction,
    ConnectorAnswer,
    Delivery,
    Outcome,
    ResponseCode,
    Verdict,
)

SOFT_DECLINES: Final = frozenset(
    {
        ResponseCode.DO_NOT_HONOR,
        ResponseCode.INVALID_MERCHANT,
        ResponseCode.REENTER_TRANSACTION,
        ResponseCode.ISSUER_UNAVAILABLE,
        ResponseCode.SYSTEM_MALFUNCTION,
        ResponseCode.REJECTED_BY_CONNECTOR,
    }
)
"""Declines that another acquirer may not get: not the cardholder's money, card or identity."""

VISA_CATEGORY_1: Final = frozenset(
    {"04", "07", "12", "14", "15", "41", "43", "46", "57", "R0", "R1", "R3"}
)
"""Response codes after which Visa forbids to try again: the issuer will never approve."""
MAYBE_VISA: Final = frozenset({"visa", "iso8583_1987", ""})
"""Whose code it may be where it is one of Visa's: an acquirer's host hands DE 39 on as the network
has it, and does not always say which network that was."""


class Next(Enum):
    """What may follow an answer."""

    NOTHING = 0
    """The answer stands: it is final, or what was asked for may have happened."""
    ANOTHER = 1
    """Another connector; the network saw nothing."""
    REATTEMPT = 2
    """Another connector, which is a reattempt by the networks' rules."""


def after(answer: ConnectorAnswer, soft: AbstractSet[ResponseCode] = SOFT_DECLINES) -> Next:
    """What may follow an answer. Only what surely took no effect may be tried elsewhere.

    An issuer's advice of any kind ends it: do not retry (Mastercard MAC 03, Visa category 1), stop
    (MAC 21), or retry later, which is not now.
    """
    if answer.delivery is Delivery.NOT_SENT and answer.verdict is Verdict.UNKNOWN:
        return Next.NOTHING if answer.reason in _OUT_OF_TIME else Next.ANOTHER
    if answer.delivery is not Delivery.ANSWERED or answer.verdict not in _REFUSED:
        return Next.NOTHING
    outcome = answer.outcome
    if outcome is None or outcome.response_code not in soft or _is_final(outcome):
        return Next.NOTHING
    rejected = outcome.response_code is ResponseCode.REJECTED_BY_CONNECTOR
    return Next.ANOTHER if rejected and not outcome.network_code else Next.REATTEMPT


_OUT_OF_TIME: Final = frozenset({Reason.SEND_WINDOW_PASSED, Reason.DEADLINE_TOO_SHORT})
_REFUSED: Final = frozenset({Verdict.DECLINED, Verdict.FAILED})


def _is_final(outcome: Outcome) -> bool:
    return outcome.advice_action is not AdviceAction.UNSPECIFIED or (
        outcome.network_code_scheme in MAYBE_VISA and outcome.network_code in VISA_CATEGORY_1
    )


class ReattemptLimit(NamedTuple):
    """How often a declined card may be tried again."""

    window_s: int
    reattempts_max: int


_DAY_S: Final = 86_400
REATTEMPT_LIMITS: Final[Mapping[str, tuple[ReattemptLimit, ...]]] = {
    "visa": (ReattemptLimit(30 * _DAY_S, 15),),
    "mastercard": (ReattemptLimit(_DAY_S, 10), ReattemptLimit(30 * _DAY_S, 35)),
}
"""Visa: 15 reattempts in 30 days; Mastercard: 10 in 24 hours and 35 in 30 days."""
STRICTEST_LIMITS: Final = (ReattemptLimit(_DAY_S, 10), ReattemptLimit(30 * _DAY_S, 15))
"""For a card of another scheme, or one that nobody told."""


def limits_of(scheme: str) -> tuple[ReattemptLimit, ...]:
    """The limits of a card scheme."""
    return REATTEMPT_LIMITS.get(scheme, STRICTEST_LIMITS)
