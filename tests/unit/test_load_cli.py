"""The load test's command line and report: clear words for bad input, a page that stands alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from loadtest.charts import Band, Limit, Line, bar_chart, line_chart, percentile_place, thinned
from loadtest.cli import DSN_VARIABLE, main
from loadtest.plan import API_KEY_VARIABLE, BadPlan, Plan, add_options, merchants_of


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "0"), "rate must be from 0.01"),
        (("--rate", "many"), "invalid float value: 'many'"),
        (("--rate", "nan"), "rate must be from"),
        (("--duration", "-1"), "duration must be from 0.1"),
        (("--profile", "waves"), "invalid choice: 'waves'"),
        (("--mix", "nothing"), "no mix 'nothing'"),
        (("--warm-up", "-1"), "warm_up must be"),
        (("--generators", "0"), "shares must be from 1"),
        (("--connections", "0"), "connections must be"),
        (("--deadline", "0"), "deadline must be"),
        (("--batch-items", "101"), "batch_items must be"),
        (("--profile", "spike", "--rate", "50000"), "a rate must be above 0 and at most 100000"),
        (("--profile", "overload", "--rate", "50000"), "a rate must be above 0 and at most 100000"),
        (("--control", "-1"), "--control must be"),
        (("--control", "0.05"), "--control must be 0 or at least 0.1"),
        (("--profile", "knee", "--rate", "9"), "--profile knee searches from a --rate of 10"),
        (("--web-port", "70000"), "--web-port must be"),
        (("--web-port", "8089", "--profile", "knee"), "--web-port shows one run"),
        (("--remote-generators",), "needs --generators 2"),
        (("--remote-generators", "--profile", "knee"), "--profile knee makes many"),
        (("--slo", "nowhere.toml"), "there is no file nowhere.toml"),
        (("--target", "gateway"), "--target must be HOST:PORT"),
        (("--target", "http://gateway:443"), "--target must be HOST:PORT"),
        (("--target", "127.0.0.1:99999"), "--target must be HOST:PORT"),
        (("--target", "127.0.0.1:0"), "--target must be HOST:PORT"),
        (("--tls",), "--tls is for a --target"),
        (("--ca-file", "nowhere.pem"), "there is no file nowhere.pem"),
        (("--merchants", "@nowhere"), "--merchants"),
        (("--rat", "5"), "unrecognized arguments"),
    ],
)
def test_bad_option_is_refused_with_its_reason(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert said in usage_error(capsys, *arguments)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b" \n", "there is no merchant in @"), (b"\xff\xfe", "--merchants: 'utf-8' codec")],
)
def test_file_without_merchants_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: bytes, said: str
) -> None:
    # Empty, it would mean the only merchant of the key.
    file = tmp_path / "merchants"
    file.write_bytes(data)
    assert said in usage_error(capsys, "--target", "127.0.0.1:1", "--merchants", f"@{file}")
    assert "there is no merchant in ," in usage_error(capsys, "--merchants", ",")


def test_merchants_stand_with_commas_or_spaces_between_or_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "merchants"
    file.write_text("mer_a\nmer_b,mer_c\n")
    for text in (f"@{file}", "mer_a, mer_b,mer_c,"):
        assert merchants_of(text) == "mer_a,mer_b,mer_c"
    assert merchants_of("") == ""


def test_target_needs_a_key_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert API_KEY_VARIABLE in usage_error(capsys, "--target", "localhost:1")


def test_target_that_is_not_there_is_no_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    left_over = [tmp_path / name for name in ("summary.json", "report.html")]
    for path in left_over:
        path.write_text('{"slo_met": true}', "utf-8")
    # Port 1 is nobody's on a loopback interface.
    assert main(["--target", "127.0.0.1:1", "--folder", str(tmp_path)]) == 3
    assert "127.0.0.1:1 refuses a payment: UNAVAILABLE" in capsys.readouterr().err
    assert not any(path.exists() for path in left_over)


@pytest.mark.parametrize(
    "dsn", ["postgresql://reader:hush@127.0.0.1:1/payments", "nonsense://reader:hush@127.0.0.1:1"]
)
def test_audit_s_database_that_cannot_be_read_is_found_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dsn: str,
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    monkeypatch.setenv(DSN_VARIABLE, dsn)
    assert main(["--target", "127.0.0.1:1", "--folder", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert "the audit's database cannot be read" in said
    assert "hush" not in said


def test_help_names_exit_statuses_and_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("exit status", "steady", "ramp", "spike", "soak", "knee", "overload"):
        assert word in text


def test_plan_survives_the_locust_file_s_command_line(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("certificate", "utf-8")
    plan = Plan(
        rate=12.5,
        profile="overload",
        mix="realistic",
        arrivals="constant",
        seed=-3,
        shares=4,
        tls=True,
        ca_file=str(ca_file),
        merchants="mer_a,mer_b",
    )
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert Plan.of(parser.parse_args(plan.arguments())) == plan
    assert Plan().arguments() == []


def test_generator_refuses_to_call_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    with pytest.raises(BadPlan, match=API_KEY_VARIABLE):
        Plan().engine("127.0.0.1:1", 0)


def test_charts_are_well_formed_whatever_they_are_called() -> None:
    lines = [
        Line("p50 & <b>", [(0, 1.0), (1, 20.0), (2, 3000.0)], 1, marks=True),
        Line("nothing", [], 2),
        Line("flat", [(0, 0.0), (2, 0.0)], 3, dashed=True),
    ]
    for log_y in (False, True):
        page = line_chart(
            "a < b",
            lines,
            unit="ms",
            x_title="s",
            log_y=log_y,
            limit=Limit("gate", 15),
            bands=[Band("warm-up", 0, 1), Band("rest", 1, 9)],
        )
        root = ET.fromstring(page)
        assert len(root.findall(".//polyline")) == 2
    ET.fromstring(bar_chart("codes", [("OK", 10), ("a<b", 0)]))
    ET.fromstring(line_chart("one", [Line("x", [(5, 5)], 1)], unit="ms", x_title="s"))
    assert "nothing was measured" in line_chart("none", [], unit="ms", x_title="s")


def test_thinning_keeps_the_worst_and_percentiles_stand_in_order() -> None:
    points = [(float(x), float(x == 777)) for x in range(5000)]
    kept = thinned(points)
    assert len(kept) <= 360
    assert (777.0, 1.0) in kept
    kept = thinned([(x, 5 - y + (x == 1234)) for x, y in points], lowest_too=True)
    assert len(kept) <= 360
    assert {(777.0, 4.0), (1234.0, 6.0)} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:360], lowest_too=True) == points[:360]
    places = [percentile_place(percent) for percent in (0, 50, 90, 99, 99.9, 100)]
    assert places == sorted(places)
