"""The file that routing rules are written in: TOML, described in docs/routing.md.

Reading a file finds everything that is wrong with it, not only the first fault. What it names
outside of itself (accounts, and what they can do) is compared in `gateway.application.routing`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeVar

from gateway.domain.model import ResponseCode
from gateway.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS
from gateway.routing.cascade import SOFT_DECLINES
from gateway.routing.model import CARD_TYPES
from gateway.routing.rules import (
    ATTEMPTS_DEFAULT,
    ATTEMPTS_MAX,
    BIN_DIGITS_MAX,
    Arm,
    Conditions,
    Experiment,
    Order,
    Ranges,
    Rule,
    Rules,
    SplitBy,
    Target,
    compile_rules,
)
from gateway.routing.toml import read_toml

FORMAT: Final = 1
"""The version of the file's format."""
TEXT_BYTES_MAX: Final = 64 * 1024
RULES_MAX: Final = 200
TARGETS_MAX: Final = 16
"""Of a rule with all that follow it by `then`, and of an arm."""
ARMS_MAX: Final = 8
VALUES_MAX: Final = 500
"""Of one condition."""
WEIGHT_MAX: Final = 1_000_000
PRIORITY_MAX: Final = 1_000_000
KEY_CHARACTERS_SHOWN: Final = 64
"""Of a key that is none of ours; all of ours are shorter."""
WARNINGS_MAX: Final = 50
"""A file of many rules that overlap is told of the first ones."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_ACCOUNT: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_SCHEME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_METHOD: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_COUNTRY: Final = re.compile(r"[A-Z]{2}")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_METADATA_KEY: Final = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_BIN_RANGE: Final = re.compile(r"([0-9]{6,8})(?:\.\.([0-9]{6,8}))?")
_CARD_TYPE: Final = re.compile("|".join(CARD_TYPES))
_CHANNELS: Final = ("ECOMMERCE", "MAIL_ORDER", "TELEPHONE_ORDER")

_E = TypeVar("_E", bound=StrEnum)


def _shown(key: str) -> str:
    """A key as it is told: clients refuse an error that is long."""
    return key if len(key) <= KEY_CHARACTERS_SHOWN else f"{key[:KEY_CHARACTERS_SHOWN]}…"


class Problem(NamedTuple):
    """One thing that is wrong with a file, or worth a warning."""

    path: str
    """Where, as `rule[2].when.currency`."""
    text: str


class RulesInvalid(ValueError):
    """A file cannot be used; `problems` says everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{each.path}: {each.text}" for each in problems))
        self.problems = problems


class RuleFile(NamedTuple):
    """A file that was read."""

    rules: Rules
    in_order: tuple[Rule, ...]

    @property
    def warnings(self) -> list[Problem]:
        """What is perhaps not meant: every rule is compared with every other."""
        return _warnings(self.in_order)


def read_rules(text: str) -> RuleFile:
    """The rules of a file. Raises RulesInvalid."""
    if len(text.encode("utf-8", "replace")) > TEXT_BYTES_MAX:
        raise RulesInvalid([Problem("file", f"has more than {TEXT_BYTES_MAX} bytes")])
    try:
        document = read_toml(text)
    except ValueError as error:
        raise RulesInvalid([Problem("file", f"is not TOML: {error}")]) from None
    return _Reader().read(document)


_FILE_KEYS: Final = ("format", "rule")
_RULE_KEYS: Final = (
    "name",
    "when",
    "targets",
    "experiment",
    "split_by",
    "order",
    "attempts_max",
    "cascade_on",
    "then",
)
_WHEN_KEYS: Final = (
    "currency",
    "amount_minor",
    "method",
    "scheme",
    "bin",
    "issuer_country",
    "card_type",
    "channel",
    "metadata",
)


class _Reader:
    """Reads one file and keeps what is wrong with it."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def read(self, document: Mapping[str, Any]) -> RuleFile:
        """See `read_rules`."""
        self._known(document, _FILE_KEYS, "")
        if document.get("format") is not FORMAT:  # neither true nor 1.0
            self._wrong("format", f"must be {FORMAT}")
        tables = document.get("rule", [])
        if not isinstance(tables, list) or not tables:
            self._wrong("rule", "there must be at least one [[rule]]")
            tables = []
        elif len(tables) > RULES_MAX:
            self._wrong("rule", f"there may be {RULES_MAX} at most")
            tables = []
        rules = [self._rule(table, f"rule[{index}]") for index, table in enumerate(tables)]
        self._names(rules)
        self._chains(rules)
        if self._problems:
            raise RulesInvalid(self._problems)
        return RuleFile(compile_rules(rules), tuple(rules))

    # --- what may be wrong ---

    def _wrong(self, path: str, text: str) -> None:
        self._problems.append(Problem(path, text))

    def _known(self, table: Mapping[str, Any], keys: Sequence[str], path: str) -> None:
        for key in table:
            if key not in keys:
                where = f"{path}.{_shown(key)}" if path else _shown(key)
                self._wrong(where, f"there is no such field; there are {', '.join(keys)}")

    def _text(self, value: object, path: str, pattern: re.Pattern[str]) -> str:
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        self._wrong(path, f"must be a text that matches {pattern.pattern}")
        return ""

    def _number(self, value: object, path: str, low: int, high: int) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        self._wrong(path, f"must be a whole number from {low} to {high}")
        return low

    def _one_of(self, value: object, path: str, default: _E) -> _E:
        kind = type(default)
        names = [member.value for member in kind]
        if value is None:
            return default
        if value in names:
            return kind(value)
        self._wrong(path, f"must be one of {', '.join(names)}")
        return default

    def _texts(self, value: object, path: str, pattern: re.Pattern[str]) -> frozenset[str]:
        return frozenset(self._text(each, path, pattern) for each in self._values(value, path))

    def _values(self, value: object, path: str) -> list[object]:
        values = value if isinstance(value, list) else [value]
        if not 0 < len(values) <= VALUES_MAX:
            self._wrong(path, f"must have 1 to {VALUES_MAX} values")
            return []
        return values

    # --- a rule ---

    def _rule(self, table: object, path: str) -> Rule:
        if not isinstance(table, dict):
            self._wrong(path, "must be a table")
            return Rule("", Conditions(), ())
        self._known(table, _RULE_KEYS, path)
        name = self._text(table.get("name"), f"{path}.name", _NAME)
        experiment: Experiment | None = None
        targets: tuple[Target, ...] = ()
        if ("targets" in table) == ("experiment" in table):
            self._wrong(path, "must have either targets or an experiment")
        elif "targets" in table:
            targets = self._targets(table["targets"], f"{path}.targets")
        else:
            experiment = self._experiment(table["experiment"], f"{path}.experiment")
        attempts = table.get("attempts_max", ATTEMPTS_DEFAULT)
        return Rule(
            name=name,
            when=self._when(table.get("when", {}), f"{path}.when"),
            targets=targets,
            experiment=experiment,
            split_by=self._one_of(table.get("split_by"), f"{path}.split_by", SplitBy.PAYMENT),
            order=self._one_of(table.get("order"), f"{path}.order", Order.WEIGHTS),
            attempts_max=self._number(attempts, f"{path}.attempts_max", 1, ATTEMPTS_MAX),
            cascade_on=self._cascade_on(table.get("cascade_on"), f"{path}.cascade_on"),
            then=self._text(table["then"], f"{path}.then", _NAME) if "then" in table else "",
        )

    def _targets(self, value: object, path: str) -> tuple[Target, ...]:
        if not isinstance(value, list) or not 0 < len(value) <= TARGETS_MAX:
            self._wrong(path, f"must be a list of 1 to {TARGETS_MAX} targets")
            return ()
        targets = [self._target(each, f"{path}[{index}]") for index, each in enumerate(value)]
        names = [target.name for target in targets]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self._wrong(path, f"names {name} more than once")
        return tuple(targets)

    def _target(self, value: object, path: str) -> Target:
        if not isinstance(value, dict):
            self._wrong(path, "must be a table")
            return Target("", "", 1, 1)
        self._known(value, ("account", "connector", "priority", "weight"), path)
        if ("account" in value) == ("connector" in value):
            self._wrong(path, "must name either an account or a connector")
        account = connector = ""
        if "account" in value:
            account = self._text(value["account"], f"{path}.account", _ACCOUNT)
        if "connector" in value:
            connector = self._text(value["connector"], f"{path}.connector", _NAME)
        return Target(
            account,
            connector,
            self._number(value.get("priority", 1), f"{path}.priority", 1, PRIORITY_MAX),
            self._number(value.get("weight", 1), f"{path}.weight", 1, WEIGHT_MAX),
        )

    def _experiment(self, value: object, path: str) -> Experiment | None:
        if not isinstance(value, dict):
            self._wrong(path, "must be a table")
            return None
        self._known(value, ("name", "split_by", "arms"), path)
        name = self._text(value.get("name"), f"{path}.name", _NAME)
        split_by = self._one_of(value.get("split_by"), f"{path}.split_by", SplitBy.PAYMENT)
        tables = value.get("arms")
        if not isinstance(tables, list) or not 2 <= len(tables) <= ARMS_MAX:
            self._wrong(f"{path}.arms", f"must be a list of 2 to {ARMS_MAX} arms")
            return None
        arms: list[Arm] = []
        for index, table in enumerate(tables):
            where = f"{path}.arms[{index}]"
            if not isinstance(table, dict):
                self._wrong(where, "must be a table")
                continue
            self._known(table, ("name", "share", "targets"), where)
            arms.append(
                Arm(
                    self._text(table.get("name"), f"{where}.name", _NAME),
                    self._number(table.get("share"), f"{where}.share", 1, WEIGHT_MAX),
                    self._targets(table.get("targets"), f"{where}.targets"),
                )
            )
        if len({arm.name for arm in arms}) < len(arms):
            self._wrong(f"{path}.arms", "two arms have the same name")
        return Experiment(name, split_by, tuple(arms))

    def _cascade_on(self, value: object, path: str) -> frozenset[ResponseCode]:
        if value is None:
            return SOFT_DECLINES
        names = {code.name: code for code in SOFT_DECLINES}
        if not isinstance(value, list) or any(
            not isinstance(name, str) or name not in names for name in value
        ):
            self._wrong(path, f"must be a list of {', '.join(sorted(names))}")
            return SOFT_DECLINES
        return frozenset(names[name] for name in value)

    # --- conditions ---

    def _when(self, value: object, path: str) -> Conditions:
        if not isinstance(value, dict):
            self._wrong(path, "must be a table")
            return Conditions()
        self._known(value, _WHEN_KEYS, path)

        def texts(key: str, pattern: re.Pattern[str]) -> frozenset[str] | None:
            if key not in value:
                return None
            return self._texts(value[key], f"{path}.{key}", pattern)

        currency = texts("currency", _CURRENCY)
        conditions = Conditions(
            currency=currency,
            amount_minor=self._amount(value, f"{path}.amount_minor", currency),
            method=texts("method", _METHOD),
            scheme=texts("scheme", _SCHEME),
            bin=self._bins(value["bin"], f"{path}.bin") if "bin" in value else None,
            issuer_country=texts("issuer_country", _COUNTRY),
            card_type=texts("card_type", _CARD_TYPE),
            channel=texts("channel", re.compile("|".join(_CHANNELS))),
            metadata=self._metadata(value["metadata"], f"{path}.metadata")
            if "metadata" in value
            else None,
        )
        for code in sorted(currency or ()):
            if code and code not in CURRENCY_EXPONENTS:
                self._wrong(f"{path}.currency", f"{code} is no currency of ISO 4217")
        return conditions

    def _amount(
        self, when: Mapping[str, Any], path: str, currency: frozenset[str] | None
    ) -> tuple[int, int] | None:
        if "amount_minor" not in when:
            return None
        value = when["amount_minor"]
        if not isinstance(value, dict) or not value:
            self._wrong(path, "must be a table with min, max or both")
            return None
        self._known(value, ("min", "max"), path)
        if len({CURRENCY_EXPONENTS.get(code) for code in currency or ()}) != 1:
            self._wrong(path, "needs a condition on currencies that have the same minor unit")
        low = self._number(value.get("min", 0), f"{path}.min", 0, AMOUNT_MINOR_MAX)
        high = self._number(value.get("max", AMOUNT_MINOR_MAX), f"{path}.max", 0, AMOUNT_MINOR_MAX)
        if low > high:
            self._wrong(path, "no amount is at least min and at most max")
        return low, high

    def _bins(self, value: object, path: str) -> Ranges:
        ranges: list[tuple[int, int]] = []
        for each in self._values(value, path):
            match = _BIN_RANGE.fullmatch(each) if isinstance(each, str) else None
            if match is None:
                self._wrong(path, 'must be BINs of 6 to 8 digits, as "411111" or "411111..411119"')
                continue
            first, last = match[1], match[2] or match[1]
            low = int(first.ljust(BIN_DIGITS_MAX, "0"))
            high = int(last.ljust(BIN_DIGITS_MAX, "9"))
            if low > high:
                self._wrong(path, f"{each} ends before it begins")
            ranges.append((low, high))
        return _merged(ranges)

    def _metadata(self, value: object, path: str) -> Mapping[str, frozenset[str]]:
        if not isinstance(value, dict) or not 0 < len(value) <= VALUES_MAX:
            self._wrong(path, "must be a table of keys and their values")
            return {}
        found: dict[str, frozenset[str]] = {}
        for key, values in value.items():
            if not _METADATA_KEY.fullmatch(key):
                self._wrong(path, f"a key must match {_METADATA_KEY.pattern}")
            where = f"{path}.{_shown(key)}"
            found[key] = self._texts(values, where, re.compile(r".{0,500}", re.DOTALL))
        return found

    # --- the rules together ---

    def _names(self, rules: Sequence[Rule]) -> None:
        for what, names in (
            ("rules", [rule.name for rule in rules if rule.name]),
            ("experiments", [rule.experiment.name for rule in rules if rule.experiment]),
        ):
            for name in sorted({name for name in names if names.count(name) > 1}):
                self._wrong("rule", f"two {what} have the name {name}")

    def _chains(self, rules: Sequence[Rule]) -> None:
        by_name = {rule.name: rule for rule in rules}
        for index, rule in enumerate(rules):
            path = f"rule[{index}].then"
            seen = [rule.name]
            named = {target.name for target in rule.all_targets}
            arms = () if rule.experiment is None else rule.experiment.arms
            count = max(len(targets) for targets in (rule.targets, *(a.targets for a in arms)))
            following = rule.then
            # No further: a long way round is told as one to too many targets.
            while following and max(count, len(seen)) <= TARGETS_MAX:
                after = by_name.get(following)
                if after is None:
                    self._wrong(path, f"there is no rule {following}")
                    break
                if following in seen:
                    self._wrong(path, f"goes round: {' → '.join([*seen, following])}")
                    break
                if after.experiment is not None:
                    self._wrong(path, f"{following} has an experiment, which nothing may lead to")
                    break
                repeated = named & {target.name for target in after.targets}
                for name in sorted(repeated):
                    self._wrong(path, f"{name} stands in {following} again")
                named |= {target.name for target in after.targets}
                count += len(after.targets)
                seen.append(following)
                following = after.then
            if count > TARGETS_MAX:
                self._wrong(path, f"leads to more than {TARGETS_MAX} targets")


def _warnings(rules: Sequence[Rule]) -> list[Problem]:
    warnings: list[Problem] = []
    reached = {rule.then for rule in rules}
    for index, rule in enumerate(rules):
        if len(warnings) >= WARNINGS_MAX:
            break
        path = f"rule[{index}]"
        for earlier in rules[:index]:
            if earlier.when.cover(rule.when):
                if rule.name not in reached:
                    warnings.append(
                        Problem(path, f"{rule.name} is never reached: {earlier.name} holds before")
                    )
                break
            if (
                earlier.when.meet(rule.when)
                and not rule.when.cover(earlier.when)
                and earlier.all_targets != rule.all_targets
            ):
                warnings.append(
                    Problem(
                        path,
                        f"{rule.name} overlaps with {earlier.name}, which decides where both hold",
                    )
                )
    if rules and not any(rule.when == Conditions() for rule in rules):
        warnings.append(
            Problem(
                "rule",
                "no rule is without conditions: what none matches goes to the account of the"
                " lowest priority number",
            )
        )
    return warnings[:WARNINGS_MAX]


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)
