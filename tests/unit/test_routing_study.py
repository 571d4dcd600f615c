"""The study of routing: the oracle is the best, the gateway's routing is near it, drawn images."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from gateway.routing.learning import LearningLimits
from loadtest.routing_study import Drift, World, plots, policies, regrets, run, study

CALM = Drift(
    psps=3,
    hours=1.5,
    rate_per_s=1.0,
    walk=0.0,
    shifts_per_day=0.0,
    shift=0.0,
    outages_per_day=0.0,
    outage_minutes=0.0,
    slowdowns_per_day=0.0,
    slowdown_minutes=0.0,
    spread=0.8,
    margin_percent=20.0,
)


def test_what_is_learnt_loses_less_than_fixed_weights() -> None:
    results, _ = study(CALM, 1, 1, LearningLimits())
    assert regrets(results, "oracle") == [0.0]
    (learnt,), (static,) = regrets(results, "learnt"), regrets(results, "static weights")
    assert 0 < learnt < static / 2


def test_a_breaker_keeps_payments_from_a_psp_that_is_down() -> None:
    world = World(replace(CALM, hours=0.5), 1)
    best = 0
    world._late[best] = [1.0] * world.steps
    payments = world.payments(1)
    fixed, guarded = (
        run(world, policies(world, LearningLimits(), payments)[name], payments)[1].count(best)
        for name in ("static weights", "learnt")
    )
    assert guarded < fixed / 5


def test_the_same_seed_gives_the_same_figures() -> None:
    drift = replace(CALM, hours=0.5, outages_per_day=50.0, outage_minutes=5.0)
    limits = LearningLimits()
    first, troubles = study(drift, 1, 3, limits)
    again, _ = study(drift, 1, 3, limits)
    assert [each[0].earned for each in first.values()] == [
        each[0].earned for each in again.values()
    ]
    assert troubles


def test_plots_are_images_of_their_own() -> None:
    drift = replace(CALM, hours=0.5, outages_per_day=50.0, outage_minutes=5.0)
    for text in plots(*study(drift, 1, 3, LearningLimits())).values():
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4


@pytest.mark.parametrize("psp", range(3))
def test_costs_of_the_study_are_those_of_a_file(psp: int) -> None:
    world = World(CALM, 1)
    payment = world.payments(1)[0]
    rate = world.rate(psp, payment)
    worth = payment.amount_minor * CALM.margin_percent / 100
    percentage, fixed = ((1.40, 10), (1.10, 15), (0.90, 20))[psp]
    expected = rate * (worth - payment.amount_minor * percentage / 100 - fixed) - 1
    assert world.utility(psp, payment) == pytest.approx(expected)
