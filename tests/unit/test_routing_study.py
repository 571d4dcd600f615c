"""The study of routing: the oracle is the best, the gateway's routing is near it, drawn images."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from gateway.routing.learning import LearningLimits
from loadtest import routing_study
from loadtest.routing_study import (
    SCENARIOS,
    Drift,
    World,
    main,
    plots,
    policies,
    regrets,
    run,
    study,
)

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


def test_a_newcomer_has_no_payments_before_it_comes_and_most_of_them_where_it_is_better() -> None:
    drift = replace(CALM, hours=0.5, newcomer_hour=0.2, newcomer_odds=4.0, spread=0.0)
    world = World(drift, 1)
    payments = world.payments(1)
    before = sum(payment.at_s < 3600 * drift.newcomer_hour for payment in payments)
    for name, policy in policies(world, LearningLimits(), payments).items():
        _, places = run(world, policy, payments)
        assert 2 not in places[:before], name
        if name in ("oracle", "learnt"):
            assert places[before:].count(2) > len(places[before:]) / 2, name


def test_the_psp_that_is_best_at_first_decays_and_segments_change_places() -> None:
    payment = World(CALM, 1).payments(1)[-1]
    still = World(CALM, 1)
    best = max(range(3), key=still._first_odds.__getitem__)
    decayed = World(replace(CALM, decay=1.0), 1)
    assert decayed.rate(best, payment) < still.rate(best, payment)
    swapped = World(replace(CALM, swaps_per_day=24.0), 1)
    first, last = swapped._rates[0], swapped._rates[-1]
    moved = [
        place
        for place in range(len(swapped.segments))
        if [psp[place] for psp in first] != pytest.approx([psp[place] for psp in last], rel=0.05)
    ]
    assert len(moved) > 0
    for place in moved:
        assert sorted(psp[place] for psp in last) == pytest.approx(
            sorted(psp[place] for psp in first), rel=0.05
        )


def test_a_psp_that_approves_more_is_dearer_where_rates_cost_fees() -> None:
    world = World(replace(CALM, fees_for_rates=2.0), 1)
    payment = world.payments(1)[0]
    cheap, dear = World(CALM, 1), world
    best = max(range(3), key=world._first_odds.__getitem__)
    assert dear.rate(best, payment) == cheap.rate(best, payment)
    assert dear.utility(best, payment) < cheap.utility(best, payment)


def test_more_countries_are_more_segments_whose_shares_are_all_payments() -> None:
    segments = World(replace(CALM, hours=0.5, countries=600), 1).segments
    assert len({segment.issuer_country for segment, _ in segments}) == 600
    assert sum(share for _, share in segments) == pytest.approx(1)


@pytest.mark.parametrize("arguments", SCENARIOS.values())
def test_every_scenario_is_arguments_of_the_command(arguments: str) -> None:
    main.make_context("routing_study", shlex.split(arguments))


@pytest.mark.parametrize(("learnt", "status"), [(0.01, 0), (0.03, 1)])
def test_the_scenarios_fail_where_learning_loses_to_fixed_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, learnt: float, status: int
) -> None:
    found = {"a drift": {"static weights": 0.02, "learnt": learnt}}
    monkeypatch.setattr(routing_study, "scenarios", lambda *_: found)
    monkeypatch.setattr(routing_study, "SUMMARY", tmp_path / "summary.json")
    assert CliRunner().invoke(main, ["--scenarios"]).exit_code == status


@pytest.mark.parametrize("psp", range(3))
def test_costs_of_the_study_are_those_of_a_file(psp: int) -> None:
    world = World(CALM, 1)
    payment = world.payments(1)[0]
    rate = world.rate(psp, payment)
    worth = payment.amount_minor * CALM.margin_percent / 100
    percentage, fixed = ((1.40, 10), (1.10, 15), (0.90, 20))[psp]
    expected = rate * (worth - payment.amount_minor * percentage / 100 - fixed) - 1
    assert world.utility(psp, payment) == pytest.approx(expected)
