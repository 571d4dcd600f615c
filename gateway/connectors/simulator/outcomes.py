"""The published test tokens and amounts of the simulator, as data; docs/simulator.md shows them."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

SLOW_MS: Final = 2_000.0
"""How long `slow` takes, in milliseconds, beside the drawn latency."""
LOOKS_UNTIL_SETTLED: Final = 2
"""At which look (a query, or a repeat with the same reference) a pending outcome is settled."""


class Result(Enum):
    """What the PSP says of an operation; the values go over the wire."""

    APPROVED = "approved"
    DECLINED = "declined"
    PENDING = "pending"
    REQUIRES_ACTION = "requires_action"
    REJECTED = "rejected"
    """Refused by a rule of the PSP itself: the request cannot stand as it is."""
    FAILED = "failed"
    """It had been accepted or approved, and failed later."""
    CANCELED = "canceled"
    EXPIRED = "expired"
    """The customer's time passed."""
    REFUSED = "refused"
    """The reference was cancelled before this request came."""


class Fault(Enum):
    """What goes wrong with the answer.

    It strikes the first request with a reference, except where the behaviour says `every_time`; a
    later one is handled as the profile says.
    """

    NONE = "none"
    HANG_BEFORE = "hang_before"
    """No effect, never an answer."""
    HANG_AFTER = "hang_after"
    """The effect, never an answer."""
    LATE = "late"
    """No answer, and the effect only when the client has gone."""
    RESET_BEFORE = "reset_before"
    """No effect, the connection is reset."""
    RESET_AFTER = "reset_after"
    """The effect, the connection is reset."""
    ERROR_BEFORE = "error_before"
    """No effect, status 500."""
    ERROR_AFTER = "error_after"
    """The effect, status 500."""
    GARBAGE = "garbage"
    """The effect, and a body that is no JSON."""
    OVERSIZED = "oversized"
    """The effect, and a body of a megabyte."""
    WRONG_REFERENCE = "wrong_reference"
    """The effect, and an answer that names another reference."""
    WRONG_CURRENCY = "wrong_currency"
    """The effect, and an answer in another currency."""


BEFORE_EFFECT: Final = frozenset({Fault.HANG_BEFORE, Fault.RESET_BEFORE, Fault.ERROR_BEFORE})


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the PSP does with an operation."""

    name: str
    meaning: str
    result: Result = Result.APPROVED
    settles_as: Result | None = None
    """What a query finds in the end, where that is not `result`."""
    code: str = "approved"
    """The PSP's own code."""
    network_code: str = "00"
    """ISO 8583 DE39, 1987 edition; empty where no network was asked."""
    advice_scheme: str = ""
    advice_code: str = ""
    avs_code: str = ""
    cvv_code: str = "M"
    fault: Fault = Fault.NONE
    every_time: bool = False
    extra_ms: float = 0.0
    reports_wrong_amount: bool = False
    partial: bool = False


APPROVE: Final = Behaviour("approved", "approves")
UNKNOWN_TOKEN: Final = Behaviour(
    "invalid_payment_method",
    "declines, as every token that is not published",
    Result.DECLINED,
    code="invalid_payment_method",
    network_code="",
    cvv_code="",
)

REDIRECT: Final = Behaviour(
    "redirect",
    "the customer has to visit a page of the simulator's first",
    Result.REQUIRES_ACTION,
    code="requires_action",
    network_code="",
    cvv_code="",
)
"""What an authorization with a redirect method does."""
VISITS: Final[Mapping[str, Result]] = MappingProxyType(
    {"approve": Result.APPROVED, "decline": Result.DECLINED, "later": Result.PENDING}
)
"""What the customer chooses on that page, to what the PSP says then."""
ACTION_LIFE_S: Final = 900.0
"""For how long the page can be used, in seconds."""

DECLINES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        # The PSP's code: DE39 and what it says.
        "refer_to_issuer": ("01", "refer to the issuer"),
        "invalid_merchant": ("03", "invalid merchant"),
        "pick_up_card": ("04", "pick up the card"),
        "pick_up_card_special": ("07", "pick up the card, special condition"),
        "do_not_honor": ("05", "do not honor"),
        "invalid_transaction": ("12", "invalid transaction"),
        "invalid_amount": ("13", "invalid amount"),
        "invalid_card_number": ("14", "invalid card number"),
        "reenter_transaction": ("19", "enter the transaction again"),
        "lost_card": ("41", "the card was lost"),
        "stolen_card": ("43", "the card was stolen"),
        "insufficient_funds": ("51", "insufficient funds"),
        "expired_card": ("54", "the card expired"),
        "wrong_pin": ("55", "wrong PIN"),
        "not_permitted_cardholder": ("57", "not permitted to the cardholder"),
        "not_permitted_terminal": ("58", "not permitted to the terminal"),
        "suspected_fraud": ("59", "suspected fraud"),
        "exceeds_amount_limit": ("61", "exceeds the amount limit"),
        "restricted_card": ("62", "the card is restricted"),
        "security_violation": ("63", "security violation"),
        "exceeds_frequency_limit": ("65", "exceeds the frequency limit"),
        "issuer_unavailable": ("91", "the issuer is unavailable"),
        "system_malfunction": ("96", "system malfunction"),
        "authentication_required": ("1A", "the customer must be authenticated first"),
        "other": ("93", "a code without a unified one: violation of law"),
    }
)


def _declines() -> Iterator[Behaviour]:
    for code, (network_code, meaning) in DECLINES.items():
        yield Behaviour(
            f"declined_{code}",
            f"declines with {network_code}: {meaning}",
            Result.DECLINED,
            code=code,
            network_code=network_code,
            cvv_code="",
        )


def _advised() -> Iterator[Behaviour]:
    for name, meaning, scheme, advice_code, code in (
        ("update_account", "update the account data", "mastercard", "01", "expired_card"),
        ("retry_later", "try again later", "mastercard", "02", "insufficient_funds"),
        ("do_not_retry", "do not try again", "mastercard", "03", "do_not_honor"),
        ("stop_recurring", "stop the recurring payments", "mastercard", "21", "do_not_honor"),
        ("retry_after_1h", "again after 1 hour", "mastercard", "24", "insufficient_funds"),
        ("retry_after_24h", "again after 24 hours", "mastercard", "25", "insufficient_funds"),
        ("retry_after_2d", "again after 2 days", "mastercard", "26", "insufficient_funds"),
        ("retry_after_4d", "again after 4 days", "mastercard", "27", "insufficient_funds"),
        ("retry_after_6d", "again after 6 days", "mastercard", "28", "insufficient_funds"),
        ("retry_after_8d", "again after 8 days", "mastercard", "29", "insufficient_funds"),
        ("retry_after_10d", "again after 10 days", "mastercard", "30", "insufficient_funds"),
        ("visa_never_approves", "category 1: never approves", "visa", "1", "stolen_card"),
    ):
        network_code, _ = DECLINES[code]
        yield Behaviour(
            f"advice_{name}",
            f"declines with {network_code} and the {scheme} advice {advice_code}: {meaning}",
            Result.DECLINED,
            code=code,
            network_code=network_code,
            advice_scheme=scheme,
            advice_code=advice_code,
            cvv_code="",
        )


AVS_CODES: Final = "YXAZWNURSGBCDIMPF"
CVV_CODES: Final = "MNPSU"

_FAULTS: Final = (
    Behaviour("timeout_before_charge", "no effect, never answers", fault=Fault.HANG_BEFORE),
    Behaviour("timeout_after_charge", "takes effect, never answers", fault=Fault.HANG_AFTER),
    Behaviour(
        "success_late",
        "never answers, and takes effect when the client has closed the connection",
        fault=Fault.LATE,
    ),
    Behaviour("reset_before_charge", "no effect, resets the connection", fault=Fault.RESET_BEFORE),
    Behaviour("reset_after_charge", "takes effect, resets the connection", fault=Fault.RESET_AFTER),
    Behaviour(
        "reset_always",
        "takes effect, resets the connection of every request with the reference",
        fault=Fault.RESET_AFTER,
        every_time=True,
    ),
    Behaviour(
        "error_500_then_success",
        "status 500 without effect, then succeeds with the same reference",
        fault=Fault.ERROR_BEFORE,
    ),
    Behaviour("error_500_after_charge", "takes effect, status 500", fault=Fault.ERROR_AFTER),
    Behaviour(
        "error_500_always",
        "status 500 without effect, for every request with the reference",
        fault=Fault.ERROR_BEFORE,
        every_time=True,
    ),
    Behaviour("garbage", "takes effect, answers with no JSON", fault=Fault.GARBAGE),
    Behaviour("oversized", "takes effect, answers with a megabyte", fault=Fault.OVERSIZED),
    Behaviour(
        "wrong_reference",
        "takes effect, answers with another reference",
        fault=Fault.WRONG_REFERENCE,
    ),
    Behaviour(
        "wrong_currency", "takes effect, answers in another currency", fault=Fault.WRONG_CURRENCY
    ),
    Behaviour("slow", f"approves after {SLOW_MS:g} ms", extra_ms=SLOW_MS),
)
_LATER: Final = (
    Behaviour(
        "pending",
        f"pending; approved at look {LOOKS_UNTIL_SETTLED}",
        Result.PENDING,
        settles_as=Result.APPROVED,
        code="pending",
        network_code="",
    ),
    Behaviour(
        "pending_declined",
        f"pending; declined with 05 at look {LOOKS_UNTIL_SETTLED}",
        Result.PENDING,
        settles_as=Result.DECLINED,
        code="pending",
        network_code="",
    ),
)
_WRONG_AMOUNT: Final = Behaviour(
    "wrong_amount", "approves, and reports one minor unit more", reports_wrong_amount=True
)
_DECLINED: Final = Behaviour(
    "declined",
    "declines with 05: do not honor",
    Result.DECLINED,
    code="do_not_honor",
    network_code="05",
)
_BOUNCES: Final = Behaviour(
    "bounces",
    f"approves; returned by the bank at look {LOOKS_UNTIL_SETTLED}",
    settles_as=Result.FAILED,
)

_PREFIX: Final = "tok_"

TOKENS: Final[Mapping[str, Behaviour]] = MappingProxyType(
    {
        _PREFIX + behaviour.name: behaviour
        for behaviour in (
            APPROVE,
            replace(APPROVE, name="visa"),
            replace(APPROVE, name="mastercard"),
            Behaviour(
                "partial_approval",
                "approves half of the amount, rounded down, with 10",
                code="partially_approved",
                network_code="10",
                partial=True,
            ),
            *_LATER,
            Behaviour(
                "requires_action",
                f"the customer has to act first; approved at look {LOOKS_UNTIL_SETTLED}",
                Result.REQUIRES_ACTION,
                settles_as=Result.APPROVED,
                code="requires_action",
                network_code="",
            ),
            _WRONG_AMOUNT,
            *_FAULTS,
            *_declines(),
            *_advised(),
            *(
                replace(
                    APPROVE,
                    name=f"avs_{code.lower()}",
                    meaning=f"approves with the AVS code {code}",
                    avs_code=code,
                )
                for code in AVS_CODES
            ),
            *(
                replace(
                    APPROVE,
                    name=f"cvv_{code.lower()}",
                    meaning=f"approves with the CVV code {code}",
                    cvv_code=code,
                )
                for code in CVV_CODES
            ),
        )
    }
)
"""What an AUTHORIZE or VERIFY with a token does."""

OPEN_PREFIX: Final = "tok_test_"
"""Any token that begins so approves: for load, and for tests that need tokens of their own."""

FOLLOW_UPS: Final[Mapping[str, Behaviour]] = MappingProxyType(
    {
        behaviour.name: behaviour
        for behaviour in (_DECLINED, *_LATER, _WRONG_AMOUNT, *_FAULTS, _BOUNCES)
    }
)
"""What a follow-up operation can be made to do."""
FOLLOW_UP_KINDS: Final = ("capture", "void", "refund", "increment", "reversal")
BOUNCING_KINDS: Final = ("capture", "refund")

SCRIPTED_TOKEN: Final = "tok_scripted"  # noqa: S105
"""On a payment with this token, published amounts choose what every operation does."""
SCRIPTED_AMOUNT_FROM: Final = 9001
AMOUNTS: Final[Mapping[int, Behaviour]] = MappingProxyType(
    dict(enumerate(FOLLOW_UPS.values(), SCRIPTED_AMOUNT_FROM))
)
"""Amount in minor units to what an operation of this amount does; other amounts approve."""

_FOLLOW_UP_TOKEN = re.compile(f"tok_({'|'.join(FOLLOW_UP_KINDS)})_({'|'.join(FOLLOW_UPS)})")


def _follow_up_of(token: str) -> tuple[str, Behaviour] | None:
    match = _FOLLOW_UP_TOKEN.fullmatch(token)
    if match is None:
        return None
    kind, behaviour = match[1], FOLLOW_UPS[match[2]]
    return None if behaviour is _BOUNCES and kind not in BOUNCING_KINDS else (kind, behaviour)


def choose(kind: str, token: str, amount_minor: int) -> Behaviour:
    """What the PSP does with an operation of `kind` and an amount on a payment with this token."""
    if token == SCRIPTED_TOKEN:
        behaviour = AMOUNTS.get(amount_minor, APPROVE)
        return APPROVE if behaviour is _BOUNCES and kind not in BOUNCING_KINDS else behaviour
    follow_up = _follow_up_of(token)
    if kind not in ("authorize", "verify"):
        return follow_up[1] if follow_up is not None and follow_up[0] == kind else APPROVE
    if follow_up is not None or token.startswith(OPEN_PREFIX):
        return APPROVE
    return TOKENS.get(token, UNKNOWN_TOKEN)


def follow_up_tokens() -> Iterator[str]:
    """Every token that makes follow-up operations misbehave."""
    for kind in FOLLOW_UP_KINDS:
        for name in FOLLOW_UPS:
            token = f"tok_{kind}_{name}"
            if _follow_up_of(token) is not None:
                yield token


def tables() -> str:
    """The tables of docs/simulator.md, in Markdown."""
    lines = [
        "### Tokens",
        "",
        "| Token | What an authorization or verification does |",
        "|---|---|",
    ]
    lines += [f"| `{token}` | {behaviour.meaning} |" for token, behaviour in TOKENS.items()]
    lines += [
        f"| `{OPEN_PREFIX}…` | approves |",
        f"| `{SCRIPTED_TOKEN}` | chosen by the amount, see below |",
        "| `tok_<kind>_<name>` | approves; the follow-ups are as below |",
        f"| any other | {UNKNOWN_TOKEN.meaning} |",
        "",
        "### Follow-ups: captures, voids, refunds, increments, reversals",
        "",
        "A payment authorized with `tok_<kind>_<name>` is approved, and every operation of that",
        "kind on it does what the table says; kinds: "
        + ", ".join(f"`{kind}`" for kind in FOLLOW_UP_KINDS)
        + ".",
        f"On a payment with `{SCRIPTED_TOKEN}` the amount of each operation chooses.",
        "",
        "| Name | Amount, minor units | What the operation does |",
        "|---|---|---|",
    ]
    for amount_minor, behaviour in AMOUNTS.items():
        only = f" ({' and '.join(BOUNCING_KINDS)} only)" if behaviour is _BOUNCES else ""
        lines.append(f"| `{behaviour.name}` | {amount_minor} | {behaviour.meaning}{only} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(tables())
