"""Routing rules: what a file may say, what is wrong with one, and where it sends payments."""

from __future__ import annotations

import itertools
from collections import Counter
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.model import ResponseCode
from gateway.routing import rule_file
from gateway.routing.rule_file import (
    RULES_MAX,
    TARGETS_MAX,
    WARNINGS_MAX,
    RulesInvalid,
    read_rules,
)
from gateway.routing.rules import Choice, Conditions, Facts, Order, Rules
from gateway.routing.toml import KEY_PARTS_MAX

pytestmark = pytest.mark.unit


def rules_of(text: str) -> Rules:
    return read_rules("format = 1\n" + dedent(text)).rules


def problems_of(text: str, *, whole: bool = False) -> dict[str, str]:
    with pytest.raises(RulesInvalid) as raised:
        read_rules(text if whole else "format = 1\n" + dedent(text))
    return {problem.path: problem.text for problem in raised.value.problems}


def warnings_of(text: str) -> list[str]:
    return [warning.text for warning in read_rules("format = 1\n" + dedent(text)).warnings]


def chosen(
    rules: Rules,
    facts: Facts | None = None,
    amount_minor: int = 1000,
    currency: str = "EUR",
    payment_id: str = "pay_1",
) -> Choice:
    choice = rules.choose(facts or Facts(), amount_minor, currency, payment_id)
    assert choice is not None
    return choice


def order_of(choice: Choice) -> list[str]:
    return [target.name for group in choice.groups for target in group]


CATCH_ALL = '[[rule]]\nname = "rest"\ntargets = [{ account = "acc_rest" }]\n'


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "facts", "amount_minor", "currency", "holds"),
    [
        ('currency = "EUR"', Facts(), 1, "EUR", True),
        ('currency = ["EUR", "USD"]', Facts(), 1, "USD", True),
        ('currency = "EUR"', Facts(), 1, "USD", False),
        ('currency = "EUR", amount_minor = { min = 10, max = 20 }', Facts(), 10, "EUR", True),
        ('currency = "EUR", amount_minor = { min = 10, max = 20 }', Facts(), 20, "EUR", True),
        ('currency = "EUR", amount_minor = { min = 10, max = 20 }', Facts(), 21, "EUR", False),
        ('currency = "EUR", amount_minor = { min = 10 }', Facts(), 9, "EUR", False),
        ('scheme = "visa"', Facts(scheme="visa"), 1, "EUR", True),
        ('scheme = "visa"', Facts(), 1, "EUR", False),
        ('method = "ideal"', Facts(method="ideal"), 1, "EUR", True),
        ('method = "ideal"', Facts(), 1, "EUR", False),
        ('issuer_country = ["DE", "AT"]', Facts(issuer_country="AT"), 1, "EUR", True),
        ('issuer_country = ["DE", "AT"]', Facts(), 1, "EUR", False),
        ('channel = "MAIL_ORDER"', Facts(channel="MAIL_ORDER"), 1, "EUR", True),
        ('channel = "MAIL_ORDER"', Facts(), 1, "EUR", False),
        ('bin = "411111"', Facts(bin="41111199"), 1, "EUR", True),
        ('bin = "411111"', Facts(bin="411111"), 1, "EUR", True),
        ('bin = "411111"', Facts(bin="411112"), 1, "EUR", False),
        ('bin = "411111"', Facts(), 1, "EUR", False),
        # Six digits are not enough to know that the card is in a range of eight.
        ('bin = "41111100..41111149"', Facts(bin="411111"), 1, "EUR", False),
        ('bin = "41111100..41111149"', Facts(bin="41111149"), 1, "EUR", True),
        ('bin = ["400000..409999", "410000..419999"]', Facts(bin="411111"), 1, "EUR", True),
        ('metadata = { tier = ["gold"] }', Facts(metadata={"tier": "gold"}), 1, "EUR", True),
        ('metadata = { tier = ["gold"] }', Facts(metadata={"tier": "tin"}), 1, "EUR", False),
        ('metadata = { tier = ["gold"] }', Facts(), 1, "EUR", False),
    ],
)
def test_a_rule_decides_where_all_its_conditions_hold(
    when: str, facts: Facts, amount_minor: int, currency: str, holds: bool
) -> None:
    rules = rules_of(
        f'[[rule]]\nname = "one"\nwhen = {{ {when} }}\ntargets = [{{ account = "acc_1" }}]\n'
        + CATCH_ALL
    )
    choice = chosen(rules, facts, amount_minor, currency)
    assert choice.rule.name == ("one" if holds else "rest")


def test_the_first_rule_that_holds_decides_also_among_rules_of_other_currencies() -> None:
    rules = rules_of(
        """
        [[rule]]
        name = "visa"
        when = { scheme = "visa" }
        targets = [{ account = "acc_1" }]
        [[rule]]
        name = "eur"
        when = { currency = "EUR" }
        targets = [{ account = "acc_2" }]
        [[rule]]
        name = "rest"
        targets = [{ account = "acc_3" }]
        """
    )
    assert chosen(rules, Facts(scheme="visa")).rule.name == "visa"
    assert chosen(rules).rule.name == "eur"
    assert chosen(rules, currency="USD").rule.name == "rest"


def test_where_no_rule_holds_the_rules_say_nothing() -> None:
    rules = rules_of(
        '[[rule]]\nname = "a"\nwhen = { currency = "EUR" }\ntargets = [{ account = "acc_1" }]'
    )
    assert rules.choose(Facts(), 1, "USD", "pay_1") is None


# --- splits ---------------------------------------------------------------------------------------

SPLIT = """
[[rule]]
name = "split"
targets = [
    { account = "acc_a", weight = 70 },
    { account = "acc_b", weight = 30 },
    { account = "acc_c", priority = 2 },
]
"""


def test_targets_are_first_in_the_shares_of_their_weights_and_priorities_come_before() -> None:
    rules = rules_of(SPLIT)
    orders = [order_of(chosen(rules, payment_id=f"pay_{n}")) for n in range(4000)]
    first = Counter(order[0] for order in orders)
    assert 2700 < first["acc_a"] < 2900  # 2,800 ± 29 at one standard deviation, and no chance
    assert first["acc_c"] == 0
    assert {order[2] for order in orders} == {"acc_c"}


def test_a_target_that_goes_leaves_the_payments_of_the_others_where_they_were() -> None:
    three = '{ account = "a" }, { account = "b" }, { account = "c" }'
    two = '{ account = "a" }, { account = "b" }'
    before, after = (
        rules_of(f'[[rule]]\nname = "split"\ntargets = [{targets}]') for targets in (three, two)
    )
    for number in range(300):
        old = order_of(chosen(before, payment_id=f"pay_{number}"))
        new = order_of(chosen(after, payment_id=f"pay_{number}"))
        assert new == [name for name in old if name != "c"]


def test_a_split_by_customer_sends_a_customer_the_same_way_and_others_by_their_payment() -> None:
    rules = rules_of(
        '[[rule]]\nname = "s"\nsplit_by = "customer"\n'
        'targets = [{ account = "a" }, { account = "b" }]'
    )
    facts = Facts(customer_id="cus_1")
    assert len({order_of(chosen(rules, facts, payment_id=f"pay_{n}"))[0] for n in range(50)}) == 1
    assert len({order_of(chosen(rules, payment_id=f"pay_{n}"))[0] for n in range(50)}) == 2


EXPERIMENT = """
[[rule]]
name = "tested"
then = "fallback"
experiment = { name = "new-psp", split_by = "customer", arms = [
    { name = "control", share = 90, targets = [{ account = "acc_old" }] },
    { name = "new", share = 10, targets = [{ account = "acc_new" }] },
] }
[[rule]]
name = "fallback"
targets = [{ account = "acc_last" }]
"""


def test_an_experiment_divides_customers_into_arms_by_their_shares_and_they_stay() -> None:
    rules = rules_of(EXPERIMENT)
    arms = Counter[str]()
    for number in range(2000):
        facts = Facts(customer_id=f"cus_{number}")
        one, two = (chosen(rules, facts, payment_id=f"pay_{number}_{n}") for n in range(2))
        assert (one.experiment, one.arm) == ("new-psp", two.arm)
        assert order_of(one) == [{"control": "acc_old", "new": "acc_new"}[one.arm], "acc_last"]
        arms[one.arm] += 1
    assert 150 < arms["new"] < 250


def test_the_targets_of_the_rule_that_follows_come_after() -> None:
    rules = rules_of(
        """
        [[rule]]
        name = "first"
        when = { currency = "EUR" }
        targets = [{ account = "a" }]
        order = "learned"
        attempts_max = 3
        cascade_on = ["DO_NOT_HONOR"]
        then = "second"
        [[rule]]
        name = "second"
        targets = [{ account = "b", priority = 2 }, { connector = "stripe" }]
        """
    )
    choice = chosen(rules)
    assert order_of(choice) == ["a", "stripe", "b"]
    assert (choice.rule.order, choice.rule.attempts_max) == (Order.LEARNED, 3)
    assert choice.rule.cascade_on == {ResponseCode.DO_NOT_HONOR}


# --- what is wrong --------------------------------------------------------------------------------

ONE = '[[rule]]\nname = "a"\n'
TARGETS = 'targets = [{ account = "acc_1" }]\n'


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (ONE + TARGETS + "wieght = 3", "rule[0].wieght"),
        (ONE + TARGETS + 'when = { curency = "EUR" }', "rule[0].when.curency"),
        (ONE + TARGETS + 'when = { currency = "XXQ" }', "rule[0].when.currency"),
        (ONE + TARGETS + "when = { currency = [] }", "rule[0].when.currency"),
        (ONE + TARGETS + "when = { currency = 3 }", "rule[0].when.currency"),
        (ONE + TARGETS + "when = { amount_minor = { min = 1 } }", "rule[0].when.amount_minor"),
        (
            ONE + TARGETS + 'when = { currency = ["EUR", "JPY"], amount_minor = { min = 1 } }',
            "rule[0].when.amount_minor",
        ),
        (
            ONE + TARGETS + 'when = { currency = "EUR", amount_minor = { min = 2, max = 1 } }',
            "rule[0].when.amount_minor",
        ),
        (
            ONE + TARGETS + 'when = { currency = "EUR", amount_minor = { min = -1 } }',
            "rule[0].when.amount_minor.min",
        ),
        (ONE + TARGETS + 'when = { bin = "41111" }', "rule[0].when.bin"),
        (ONE + TARGETS + 'when = { bin = "4111111111111111" }', "rule[0].when.bin"),
        (ONE + TARGETS + 'when = { bin = "411119..411111" }', "rule[0].when.bin"),
        (ONE + TARGETS + 'when = { channel = "SHOP" }', "rule[0].when.channel"),
        (ONE + TARGETS + 'when = { issuer_country = "Germany" }', "rule[0].when.issuer_country"),
        (ONE + TARGETS + 'when = { metadata = { "a b" = "c" } }', "rule[0].when.metadata"),
        (ONE, "rule[0]"),
        (ONE + TARGETS + "experiment = {}", "rule[0]"),
        (ONE + "targets = []", "rule[0].targets"),
        (ONE + 'targets = [{ account = "a", connector = "b" }]', "rule[0].targets[0]"),
        (ONE + 'targets = [{ account = "a", weight = 0 }]', "rule[0].targets[0].weight"),
        (ONE + 'targets = [{ account = "a", weight = true }]', "rule[0].targets[0].weight"),
        (ONE + 'targets = [{ account = "a" }, { account = "a" }]', "rule[0].targets"),
        (ONE + TARGETS + "attempts_max = 6", "rule[0].attempts_max"),
        (ONE + TARGETS + 'cascade_on = ["INSUFFICIENT_FUNDS"]', "rule[0].cascade_on"),
        (ONE + TARGETS + "cascade_on = [{}, []]", "rule[0].cascade_on"),
        (ONE + TARGETS + 'when = { card_type = "gold" }', "rule[0].when.card_type"),
        (ONE + TARGETS + 'split_by = "card"', "rule[0].split_by"),
        (ONE + TARGETS + "split_by = []", "rule[0].split_by"),
        (ONE + TARGETS + 'then = "none"', "rule[0].then"),
        (ONE + TARGETS + 'then = "a"', "rule[0].then"),
        (ONE + TARGETS + ONE + TARGETS, "rule"),
        (TARGETS.replace("targets", "target"), "target"),
        ("[[rule]]\n" + TARGETS, "rule[0].name"),
        (ONE + 'experiment = { name = "e", arms = [] }', "rule[0].experiment.arms"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, path: str) -> None:
    assert path in problems_of(text)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    found = problems_of(ONE + 'targets = [{ account = "a b" }]\nattempts_max = 0\nx = 1')
    assert found.keys() == {"rule[0].targets[0].account", "rule[0].attempts_max", "rule[0].x"}


@pytest.mark.parametrize(
    "text",
    [
        "format = 2\n" + ONE + TARGETS,
        "format = true\n" + ONE + TARGETS,
        "format = 1.0\n" + ONE + TARGETS,
        ONE + TARGETS,
        "format = 1",
        "format = ",
        "[[[[",
        "format = " + "1" * 5000,
        "format = " + "[" * 5000,
    ],
)
def test_a_file_of_another_format_is_refused(text: str) -> None:
    problems_of(text, whole=True)


def test_a_file_that_is_too_large_is_refused() -> None:
    too_large = "# " + "x" * rule_file.TEXT_BYTES_MAX
    assert "bytes" in problems_of(too_large, whole=True)["file"]


LONG_KEY = ".".join(["a"] * 100)


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG_KEY} = 1",
        f"[{LONG_KEY}]",
        LONG_KEY.replace(".", " .\t") + " = 1",
        ".".join(['"="'] * 100) + " = 1",
        ".".join(["'#'"] * 100) + " = 1",
        f"x = {{ {LONG_KEY} = 1 }}",
        # What looks like an open string or comment, and is none.
        f'# """ don\'t\n{LONG_KEY} = 1',
        f'x = {{ a = """b"c\\"""d""""", {LONG_KEY} = 1 }}',
        f"x = {{ a = '''b'c\\''''', {LONG_KEY} = 1 }}",
        f'x = "\\"#"\n{LONG_KEY} = 1',
    ],
)
def test_a_key_of_more_parts_than_any_field_has_is_refused_before_it_is_read(text: str) -> None:
    assert problems_of(text, whole=True) == {
        "file": f"is not TOML: a key has more than {KEY_PARTS_MAX} parts"
    }


def test_dots_that_divide_no_key_are_not_counted() -> None:
    read_rules(
        f"# {LONG_KEY}\n"
        "format = 1\n"
        f"rule = [{{ name = 'b', when.metadata.\"{LONG_KEY[:39]}\" = '{LONG_KEY}', "
        f'targets = [{{ account = "a" }}] }}, {{ name = """{LONG_KEY[:63]}""", '
        'targets = [{ account = "b" }] }]'
    )


def test_a_cascade_that_goes_round_is_refused_with_its_way() -> None:
    text = "".join(
        f'[[rule]]\nname = "{name}"\nthen = "{then}"\ntargets = [{{ account = "{name}" }}]\n'
        for name, then in (("a", "b"), ("b", "c"), ("c", "a"))
    )
    assert problems_of(text)["rule[0].then"] == "goes round: a → b → c → a"


def test_a_cascade_that_comes_to_an_account_again_is_refused() -> None:
    text = (
        ONE + 'then = "b"\n' + TARGETS + '[[rule]]\nname = "b"\ntargets = [{ account = "acc_1" }]\n'
    )
    assert problems_of(text)["rule[0].then"] == "acc_1 stands in b again"


def test_a_cascade_is_followed_no_further_than_to_too_many_targets() -> None:
    """Many rules that lead to each other had megabytes of problems, and held a gateway up."""
    targets = ", ".join(f'{{ account = "acc_{number}" }}' for number in range(10))
    text = "format = 1\n" + "".join(
        f'[[rule]]\nname = "r{number}"\nthen = "r{(number + 1) % RULES_MAX}"\n'
        f"targets = [{targets}]\n"
        for number in range(RULES_MAX)
    )
    with pytest.raises(RulesInvalid) as raised:
        read_rules(text)
    found = Counter(problem.path for problem in raised.value.problems)
    assert len(found) == RULES_MAX
    assert max(found.values()) <= TARGETS_MAX + 1


# --- what is worth a warning ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("earlier", "later", "word"),
    [
        ('currency = ["EUR", "USD"]', 'currency = "EUR"', "never reached"),
        ('bin = "400000..499999"', 'bin = "411111"', "never reached"),
        (
            'currency = "EUR", amount_minor = { min = 1 }',
            'currency = "EUR", amount_minor = { min = 5, max = 9 }',
            "never reached",
        ),
        ('metadata = { a = ["1", "2"] }', 'metadata = { a = "1", b = "2" }', "never reached"),
        ('currency = "EUR"', 'scheme = "visa"', "overlaps"),
        ('bin = "411111..411119"', 'bin = "411115..411125"', "overlaps"),
        ('currency = "EUR"', 'currency = "USD"', ""),
        ('bin = "411111"', 'bin = "411112"', ""),
        # The special case before the general one is how rules are meant to be written.
        ('currency = "EUR", scheme = "visa"', 'currency = "EUR"', ""),
    ],
)
def test_rules_that_are_never_reached_or_overlap_are_warned_of(
    earlier: str, later: str, word: str
) -> None:
    text = (
        f'[[rule]]\nname = "x"\nwhen = {{ {earlier} }}\ntargets = [{{ account = "a" }}]\n'
        f'[[rule]]\nname = "y"\nwhen = {{ {later} }}\ntargets = [{{ account = "b" }}]\n'
    )
    told = [text for text in warnings_of(text + CATCH_ALL) if text.startswith("y ")]
    assert bool(told) == bool(word)
    assert all(word in text for text in told)


def test_a_rule_that_only_others_lead_to_is_reached() -> None:
    text = ONE + 'then = "b"\n' + TARGETS + '[[rule]]\nname = "b"\ntargets = [{ account = "b" }]\n'
    assert warnings_of(text) == []


def test_rules_that_leave_payments_undecided_are_warned_of() -> None:
    [warning] = warnings_of(ONE + TARGETS + 'when = { currency = "EUR" }')
    assert "none matches" in warning


def test_rules_are_compared_no_longer_than_until_enough_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = 0
    meet = Conditions.meet

    def counted(mine: Conditions, its: Conditions) -> bool:
        nonlocal compared
        compared += 1
        return meet(mine, its)

    monkeypatch.setattr(Conditions, "meet", counted)
    text = "format = 1\n" + "".join(
        f'[[rule]]\nname = "r{number}"\nwhen = {{ metadata = {{ k{number} = "1" }} }}\n'
        f'targets = [{{ account = "acc_{number}" }}]\n'
        for number in range(RULES_MAX)
    )
    assert len(read_rules(text).warnings) == WARNINGS_MAX
    assert compared < WARNINGS_MAX + RULES_MAX


# --- the checks and the decision agree ------------------------------------------------------------

_CONDITIONS = st.fixed_dictionaries(
    {},
    optional={
        "currency": st.sets(st.sampled_from(["EUR", "USD"]), min_size=1),
        "scheme": st.sets(st.sampled_from(["visa", "mastercard"]), min_size=1),
        "bin": st.sets(st.sampled_from(["411111", "411111..411112", "41111150"]), min_size=1),
        "issuer_country": st.sets(st.sampled_from(["DE", "FR"]), min_size=1),
    },
)


def _when(conditions: dict[str, set[str]]) -> str:
    return ", ".join(f"{key} = {sorted(values)}" for key, values in conditions.items())


@given(
    st.lists(_CONDITIONS, min_size=2, max_size=4),
    st.sampled_from(["EUR", "USD", "GBP"]),
    st.sampled_from(["", "visa", "mastercard"]),
    st.sampled_from(["", "411111", "41111150", "41111299"]),
    st.sampled_from(["", "DE", "FR"]),
)
def test_no_payment_ever_comes_to_a_rule_that_is_said_to_be_never_reached(
    conditions: list[dict[str, set[str]]], currency: str, scheme: str, bin_: str, country: str
) -> None:
    text = "format = 1\n" + "".join(
        f'[[rule]]\nname = "r{n}"\nwhen = {{ {_when(each)} }}\ntargets = [{{ account = "a{n}" }}]\n'
        for n, each in enumerate(conditions)
    )
    read = read_rules(text)
    choice = read.rules.choose(
        Facts(scheme=scheme, bin=bin_, issuer_country=country), 100, currency, "pay_1"
    )
    if choice is not None:
        assert not any(
            warning.text.startswith(f"{choice.rule.name} is never reached")
            for warning in read.warnings
        )


def ranges() -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """BIN ranges as rules hold them: ascending, and apart from each other."""
    ends = st.lists(st.integers(0, 40), min_size=2, max_size=12, unique=True)
    return ends.map(lambda each: tuple(zip(sorted(each)[::2], sorted(each)[1::2], strict=False)))


@given(ranges(), ranges())
def test_ranges_of_bins_are_compared_as_the_bins_in_them_are(
    mine: tuple[tuple[int, int], ...], its: tuple[tuple[int, int], ...]
) -> None:
    def bins(ranges_: tuple[tuple[int, int], ...]) -> set[int]:
        return {each for low, high in ranges_ for each in range(low, high + 1)}

    one, other = Conditions(bin=mine), Conditions(bin=its)
    assert one.meet(other) is bool(bins(mine) & bins(its))
    # One range that two together hold, with nothing between them, is no case: they would be one.
    apart = all(low > high + 1 for (_, high), (low, _) in itertools.pairwise(mine))
    if apart:
        assert one.cover(other) is (bins(its) <= bins(mine))
