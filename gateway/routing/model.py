"""What a routing decision is made from and of: segments, candidates, and the ports of its parts.

Everything here is synchronous and local to the process: a decision waits for nobody. What processes
share (breakers' states, learned counts, rules) is exchanged in the background.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from gateway.domain.model import ConnectorAnswer, Mode, OperationKind

CARD_TYPES: Final = ("commercial", "credit", "debit", "prepaid")
"""The contract's card types, in lower case."""


class Segment(NamedTuple):
    """The kind of payment that success and cost are counted for. Empty strings: not known."""

    merchant_id: str
    mode: Mode
    method: str
    """The payment method as capabilities name it: `card`, `network_token`, or the contract's
    method_type, as `ideal`. Empty for what is done to an existing payment."""
    scheme: str = ""
    """The card scheme, lower case, as `visa`."""
    currency: str = ""
    """ISO 4217."""
    issuer_country: str = ""
    """ISO 3166-1 alpha-2."""
    channel: str = ""
    """As the contract names it, as `ECOMMERCE`."""
    card_type: str = ""
    """One of CARD_TYPES: interchange depends on it; success is not counted by it."""


class Candidate(NamedTuple):
    """An account that a payment may go to."""

    connector: str
    connector_account_id: str
    priority: int = 0
    """The lowest number is tried first."""
    weight: int = 1
    """The share among candidates of the same priority, by a stable hash; at least 1."""


class Exclusion(StrEnum):
    """Why a candidate is not asked."""

    DISABLED = "DISABLED"
    """The account is disabled."""
    UNUSABLE = "UNUSABLE"
    """The account cannot be used, as where its credentials cannot be opened."""
    FIELD_NOT_SUPPORTED = "FIELD_NOT_SUPPORTED"
    FIELD_REQUIRED = "FIELD_REQUIRED"
    METHOD_NOT_SUPPORTED = "METHOD_NOT_SUPPORTED"
    COUNTRY_NOT_SUPPORTED = "COUNTRY_NOT_SUPPORTED"
    OPERATION_NOT_SUPPORTED = "OPERATION_NOT_SUPPORTED"
    CURRENCY_NOT_SUPPORTED = "CURRENCY_NOT_SUPPORTED"
    AMOUNT_NOT_SUPPORTED = "AMOUNT_NOT_SUPPORTED"
    BREAKER_OPEN = "BREAKER_OPEN"
    """Its calls failed too often or were too slow lately."""
    PROBES_TAKEN = "PROBES_TAKEN"
    """Its breaker is half-open, and as many calls as may try it are under way."""
    KILLED = "KILLED"
    """A person switched it off."""
    MAINTENANCE = "MAINTENANCE"
    """A maintenance window."""


class Excluded(NamedTuple):
    """A candidate that is not asked, and why."""

    candidate: Candidate
    reason: str
    """An Exclusion; in a record that another version of the gateway wrote, perhaps one that this
    one does not know."""


class Learned(NamedTuple):
    """What a score is made of."""

    success: float
    """The expected share of approvals."""
    calls: float
    """From so many calls that is known."""
    cost_minor: float
    """The expected cost in minor units; 0 where costs are not known."""
    first_share: float
    """How often the candidate comes first."""


class Scored(NamedTuple):
    """A candidate with what a ranking thinks of it; the highest score first."""

    candidate: Candidate
    score: float
    learned: Learned | None = None
    """For the explanation; None in a record, which keeps the score alone."""


class RouteDecision(NamedTuple):
    """Where a payment may go, in the order to try, and why."""

    candidates: tuple[Candidate, ...]
    """Those that remain; several where a cascade may follow."""
    excluded: tuple[Excluded, ...] = ()
    rules_version: int = 0
    """Of the merchant's rules; 0 where it has none."""
    rule: str = ""
    """The name of the rule that matched."""
    experiment: str = ""
    arm: str = ""
    """With an experiment: the arm that the payment is in."""
    scores: tuple[Scored, ...] = ()
    """Where a ranking ordered the candidates."""


class Availability(Protocol):
    """Which accounts may be asked now: breakers, kill switches, maintenance windows."""

    def refusal(self, candidate: Candidate, method: str) -> Exclusion | None:
        """Why the candidate must not be asked now; None where it may be. Only looks."""

    def admit(self, candidate: Candidate, method: str) -> Exclusion | None:
        """As `refusal`, for the candidate that is chosen, just before its intent: None takes a
        place among the probes of a half-open breaker, which the call's `Observer.observed` gives
        back, or `give_back`; otherwise it comes free by itself after a while.
        """

    def give_back(self, candidate: Candidate, method: str, seconds: float) -> None:
        """The call that was admitted less than so long ago is not sent after all."""

    def pause_s(self, candidate: Candidate, method: str) -> float | None:
        """For how long the candidate surely stays out of use, in seconds; None where nobody knows
        or it is in use.
        """


class Ranking(Protocol):
    """Orders candidates of the same priority by what is expected of them."""

    def rank(
        self, segment: Segment, candidates: Sequence[Candidate], amount_minor: int, draw: int
    ) -> Sequence[Scored]:
        """Every candidate, the best first; equal ones by their weights. `draw`, 64 random bits, is
        all of its chance.
        """


class Observer(Protocol):
    """Learns from what came of the calls."""

    def observed(
        self,
        segment: Segment,
        candidate: Candidate,
        kind: OperationKind,
        answer: ConnectorAnswer,
        seconds: float,
    ) -> None:
        """A connector's `send` ended after so long, or came too late; whatever came of it."""
