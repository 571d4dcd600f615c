"""The gates of a run: limits from a file, values from a summary, and the verdict. Pure."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Self, cast

from loadtest.arrivals import Profile, segments_of

SLO_FILE: Final = Path(__file__).with_name("slo.toml")
PROFILES: Final = ("ramp", "spike", "soak", "overload", "knee")


class BadSlo(ValueError):
    """The file of the gates cannot be used."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one profile is held to. None: not gated."""

    control_p99_ms_max: float
    psp_lateness_p99_ms_max: float
    added_p99_ms_max: float
    added_p999_ms_max: float
    added_p999_from_s: float
    error_ratio_max: float
    dropped_max: int
    gateway_memory_mb_max: float
    gated_segments: tuple[str, ...] | None = None
    """Whose latencies and errors count; None: all that is measured."""
    memory_growth_mb_max: float | None = None
    memory_growth_from_s: float | None = None
    goodput_ratio_min: Mapping[str, float] | None = None
    accepted_p99_ratio_max: float | None = None
    refusal_p99_ms_max: float | None = None
    refusals_without_retry_info_max: int | None = None
    unserved_ratio_min: float | None = None
    """Of an overload's sends; where fewer were left unserved, there was none."""
    knee_rate_min: float | None = None

    @classmethod
    def load(cls, profile: str, path: Path = SLO_FILE) -> Self:
        """The limits of a profile. Raises BadSlo, which says what is wrong."""
        try:
            tables = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadSlo(f"{path}: {error}") from error
        unknown = tables.keys() - {"validity", "slo", *PROFILES}
        if unknown:
            raise BadSlo(f"{path}: no profile is called {', '.join(sorted(unknown))}")
        values = {**tables.get("validity", {}), **tables.get("slo", {}), **tables.get(profile, {})}
        known = {each.name for each in fields(cls)}
        if values.keys() - known:
            names = ", ".join(sorted(values.keys() - known))
            raise BadSlo(f"{path}: no such limit: {names}")
        for name, value in values.items():
            _check(path, name, value)
        if "gated_segments" in values:
            values["gated_segments"] = tuple(values["gated_segments"])
            measured = _segments(profile)
            if not measured.issuperset(values["gated_segments"]):
                raise BadSlo(
                    f"{path}: gated_segments of {profile} can be {', '.join(sorted(measured))},"
                    f" not {', '.join(values['gated_segments'])}"
                )
        try:
            return cls(**values)
        except TypeError as error:
            raise BadSlo(f"{path}: a limit of [validity] or [slo] is missing: {error}") from error


def _segments(profile: str) -> set[str]:
    """What a profile measures; a search is made of steady steps."""
    steady = "steady" if profile == "knee" else profile
    return {each.name for each in segments_of(cast("Profile", steady), 1.0, 1.0)}


def _check(path: Path, name: str, value: object) -> None:
    if name == "gated_segments":
        good = isinstance(value, list) and all(isinstance(each, str) for each in value)
    elif name == "goodput_ratio_min":
        good = isinstance(value, dict) and all(
            _is_number(each) and _is_number_text(factor) for factor, each in value.items()
        )
    else:
        good = _is_number(value)
    if not good:
        raise BadSlo(f"{path}: {name} has a value that is no limit: {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_number_text(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


@dataclass(frozen=True, slots=True)
class Gate:
    """One comparison."""

    name: str
    value: float | None
    """None: it was not measured, which meets no gate."""
    limit: float
    at_least: bool = False
    """Whether the limit is a lower one."""
    validity: bool = False
    """Missed, it makes the run invalid, not failed."""
    absolute: bool = False
    """Missed, the run has failed on whatever machine."""

    @property
    def met(self) -> bool:
        """Whether the value is within its limit."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def figures(self) -> dict[str, Any]:
        """For a summary."""
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "at_least": self.at_least,
            "validity": self.validity,
            "met": self.met,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all gates say together."""

    gates: tuple[Gate, ...]

    @property
    def valid(self) -> bool:
        """Whether the run says anything."""
        return all(gate.met for gate in self.gates if gate.validity)

    @property
    def met(self) -> bool:
        """Whether the SLO is met; never by an invalid run."""
        return all(gate.met for gate in self.gates)

    @property
    def exit_status(self) -> int:
        """0 met, 1 missed, 3 invalid."""
        if any(gate.absolute and not gate.met for gate in self.gates):
            return 1
        if not self.valid:
            return 3
        return 0 if self.met else 1

    def without_validity(self) -> "Verdict":
        """The gates of the gateway alone."""
        return replace(self, gates=tuple(gate for gate in self.gates if not gate.validity))


def evaluate(limits: Limits, summary: Mapping[str, Any]) -> Verdict:
    """Compare a summary's figures with the limits."""
    gates = [
        *_validity(limits, summary),
        *_latency(limits, summary),
        *_memory(limits, summary),
        *overload_gates(limits, summary.get("overload")),
        *_knee(limits, summary),
        *_alive(summary),
        *_audit(summary),
    ]
    return Verdict(tuple(gates))


def _validity(limits: Limits, summary: Mapping[str, Any]) -> list[Gate]:
    # A send without a sample is one of which nobody knows how long it took.
    # And where nothing was sent, there is nothing to say.
    gates = [
        Gate("sends without a sample", summary["unaccounted"], 0, validity=True),
        Gate("sends", summary["whole"]["offered"], 1, at_least=True, validity=True),
    ]
    if "gateway" not in summary["left_out"]:
        gates.append(Gate("servers that ended", len(summary["ended"]), 0, validity=True))
    if summary["stopped"]:
        gates.append(Gate("runs that were stopped", 1, 0, validity=True))
    # What was left out on purpose, or is no part of the system, gates nothing.
    if "control" not in summary["left_out"]:
        gates.append(
            Gate(
                "control p99, ms",
                summary["control_p99_ms"],
                limits.control_p99_ms_max,
                validity=True,
            )
        )
    if "simulator" not in summary["left_out"]:
        gates.append(
            Gate(
                "simulator's lateness p99, ms",
                summary["psp_lateness_p99_ms"],
                limits.psp_lateness_p99_ms_max,
                validity=True,
            )
        )
    if limits.unserved_ratio_min is not None and "overload" in summary:
        gates.append(
            Gate(
                "overload's sends left unserved",
                summary["overload"]["unserved_ratio"],
                limits.unserved_ratio_min,
                at_least=True,
                validity=True,
            )
        )
    # Of a knee that is high enough nobody asks why the next rate did not hold.
    if any(not gate.met for gate in _knee(limits, summary)):
        is_valid = _next_to_knee_is_valid(summary["knee"])
        gates.append(Gate("knee: next rate valid", int(is_valid), 1, at_least=True, validity=True))
    return gates


def _next_to_knee_is_valid(knee: Mapping[str, Any]) -> bool:
    """Whether the next rate, which did not hold, was one that could be measured."""
    beyond = [each for each in knee["steps"] if each["rate"] > knee["rate"] and not each["held"]]
    return not beyond or bool(min(beyond, key=lambda each: float(each["rate"]))["valid"])


def _latency(limits: Limits, summary: Mapping[str, Any]) -> list[Gate]:
    if limits.gated_segments is None:
        parts = {"": summary["whole"]}
    else:
        parts = {f"{name}: ": summary["segments"][name] for name in limits.gated_segments}
    gates = []
    for prefix, figures in parts.items():
        offered = figures["offered"]
        gates += [
            Gate(
                f"{prefix}added p99, ms",
                figures["added_p99_ms"] if figures["ok"] else None,
                limits.added_p99_ms_max,
            ),
            Gate(
                f"{prefix}error ratio",
                figures["errors"] / offered if offered else None,
                limits.error_ratio_max,
            ),
            Gate(f"{prefix}dropped sends", figures["dropped"], limits.dropped_max),
        ]
        if summary["duration_s"] >= limits.added_p999_from_s:
            gates.append(
                Gate(
                    f"{prefix}added p99.9, ms",
                    figures["added_p999_ms"] if figures["ok"] else None,
                    limits.added_p999_ms_max,
                )
            )
    return gates


def _memory(limits: Limits, summary: Mapping[str, Any]) -> list[Gate]:
    if "gateway" in summary["left_out"]:
        return []
    memory = summary["gateway_memory"]
    gates = [Gate("gateway's memory, MB", memory["max_mb"], limits.gateway_memory_mb_max)]
    from_s = limits.memory_growth_from_s
    if (
        limits.memory_growth_mb_max is not None
        and from_s is not None
        and summary["duration_s"] >= from_s
    ):
        gates.append(
            Gate("gateway's memory growth, MB", memory["growth_mb"], limits.memory_growth_mb_max)
        )
    return gates


def overload_gates(limits: Limits, overload: Mapping[str, Any] | None) -> list[Gate]:
    """What an overload is held to; None: there was none.

    It has `factor`, `goodput_ratio`, `accepted_p99_ratio`, `refusal_p99_ms` and
    `refusals_without_retry_info`.
    """
    if overload is None or limits.goodput_ratio_min is None:
        return []
    gates = []
    floor = floor_for(limits.goodput_ratio_min, overload["factor"])
    if floor is not None:
        gates.append(Gate("goodput ÷ base", overload["goodput_ratio"], floor, at_least=True))
    for name, value, limit in (
        ("accepted p99 ÷ base", overload["accepted_p99_ratio"], limits.accepted_p99_ratio_max),
        ("refusal p99, ms", overload["refusal_p99_ms"], limits.refusal_p99_ms_max),
        (
            "refusals without RetryInfo",
            overload["refusals_without_retry_info"],
            limits.refusals_without_retry_info_max,
        ),
    ):
        if limit is not None:
            gates.append(Gate(name, value, limit))
    return gates


def _knee(limits: Limits, summary: Mapping[str, Any]) -> list[Gate]:
    if limits.knee_rate_min is None or "knee" not in summary:
        return []
    return [Gate("knee, sends/s", summary["knee"]["rate"], limits.knee_rate_min, at_least=True)]


def floor_for(floors: Mapping[str, float], factor: float) -> float | None:
    """The limit of the smallest factor that is not below this one; None beyond the largest."""
    at_or_above = [text for text in floors if float(text) >= factor]
    return floors[min(at_or_above, key=float)] if at_or_above else None


def conclusion(summary: Mapping[str, Any]) -> tuple[str, str]:
    """`good`, `bad` or `doubt`, and what a finished summary says in a sentence."""
    audit, stopped = summary["audit"], summary["stopped"]
    ended = f"{' and '.join(summary['ended'])} ended" if summary["ended"] else ""
    also = f", and {ended} during the run" if ended else ""
    cases = (
        (audit["clean"] is False, "bad", "FAILED: the audit found what must never be"),
        (summary["gateway_ended"], "bad", "FAILED: the gateway ended during the run"),
        (summary["workers_ended"], "bad", "FAILED: workers of the gateway ended during the run"),
        ("failure" in audit, "bad", f"FAILED: the audit could not be done{also}"),
        (ended, "doubt", f"INVALID: {ended} during the run"),
        (stopped, "doubt", f"INVALID: {stopped} before all was sent"),
        (not summary["valid"], "doubt", "INVALID: this run says nothing of the gateway"),
        (summary["slo_met"], "good", "the SLO is met"),
        (True, "bad", "FAILED: the SLO is not met"),
    )
    return next((kind, said) for is_so, kind, said in cases if is_so)


def _alive(summary: Mapping[str, Any]) -> list[Gate]:
    ended = summary["gateway_ended"]
    if ended is None:
        return []
    return [
        Gate("gateway that ended", int(ended), 0, absolute=True),
        Gate("gateway's workers that ended", summary["workers_ended"], 0, absolute=True),
    ]


def _audit(summary: Mapping[str, Any]) -> list[Gate]:
    audit = summary["audit"]
    if not audit:  # a step of a search: the audit follows the last one
        return []
    if "failure" in audit:
        return [Gate("audit: done", None, 1, at_least=True, absolute=True)]
    faults = {
        "missing": "audit: acknowledged and missing",
        "repeated_rows": "audit: keys stored twice",
        "contradicted": "audit: answers contradicted",
        "unkept": "audit: answers not kept",
        "duplicate_charges": "audit: duplicate charges",
        "repeated_effects": "audit: captures and the like repeated",
        "charged_declines": "audit: declines charged",
        "charged_refusals": "audit: refusals charged",
        "unrecorded_charges": "audit: charges unrecorded",
    }
    return [
        Gate(title, audit[name], 0, absolute=True)
        for name, title in faults.items()
        if audit[name] is not None
    ]
