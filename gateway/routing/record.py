"""A route decision as an operation keeps it: a short JSON text."""

from functools import lru_cache
from math import floor
from typing import Any, Final

import orjson

from gateway.routing.model import Candidate, Excluded, RouteDecision, Scored

TEXTS_KEPT: Final = 512
"""Many payments have the same decision, but with costs, where each amount has scores of its own."""


@lru_cache(TEXTS_KEPT)
def encode(decision: RouteDecision) -> str:
    """The decision in short: version, rule, experiment and arm, candidates with their scores, and
    those that were excluded with the reason.
    """
    document: dict[str, Any] = {
        "v": decision.rules_version,
        "r": decision.rule,
        "c": [each[:2] for each in decision.candidates],
    }
    if decision.experiment:
        document["e"] = (decision.experiment, decision.arm)
    if decision.excluded:
        document["x"] = [(*each[:2], reason) for each, reason in decision.excluded]
    if decision.scores:
        # Six decimals, as by `round`, which costs seven times as much.
        document["s"] = [
            (each[0], each[1], floor(score * 1e6 + 0.5) / 1e6) for each, score, _ in decision.scores
        ]
    return orjson.dumps(document).decode("utf-8")


def decode(text: str) -> RouteDecision | None:
    """What `encode` wrote, without priorities, weights and what scores are made of.

    None for any other text: an answer must not fail for its explanation.
    """
    try:
        return _decision(orjson.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _decision(document: dict[str, Any]) -> RouteDecision:
    experiment, arm = document.get("e", ("", ""))
    return RouteDecision(
        tuple(Candidate(*each) for each in document["c"]),
        tuple(
            Excluded(Candidate(connector, account_id), str(reason))
            for connector, account_id, reason in document.get("x", ())
        ),
        document["v"],
        document["r"],
        experiment,
        arm,
        tuple(
            Scored(Candidate(connector, account_id), score)
            for connector, account_id, score in document.get("s", ())
        ),
    )
