"""gateway.telemetry.logs: what is logged, and above all what is not."""
# ruff: noqa: RUF001 - digits of other scripts are what is tested

import asyncio
import errno
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry.logs import (
    DEPTH_MAX,
    ITEMS_MAX,
    REDACTED,
    TEXT_CHARACTERS_MAX,
    JsonFormatter,
    QueueWriter,
    configure_logging,
    loop_exception_handler,
    redact,
)

ROOT = Path(__file__).parents[2]
PAN = "5425233430109903"
SPACED = "5425 2334 3010 9903"
MASKED = "************9903"
KEY = "gwk_live_S3cr3tS3cr3tS3cr3t"


class Captured:
    """The lines that a configured logging wrote."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.logs = configure_logging("DEBUG", self.data.extend)

    def lines(self) -> list[dict[str, Any]]:
        self.logs.close()
        return [json.loads(line) for line in self.data.decode().splitlines()]

    def text(self) -> str:
        self.logs.close()
        return self.data.decode()


@pytest.fixture
def captured() -> Iterator[Captured]:
    capture = Captured()
    yield capture
    capture.logs.close()


def formatted(message: object, *args: object, **extra: object) -> str:
    record = logging.getLogger("t").makeRecord(
        "t", logging.INFO, __file__, 1, message, args, None, extra=extra
    )
    return JsonFormatter().format(record)


def leaks(text: str) -> bool:
    """Whether the number's first half can be read, in any script and however divided."""
    digits = (unicodedata.digit(character, None) for character in text)
    return PAN[:8] in "".join(str(digit) for digit in digits if digit is not None)


def test_a_record_is_one_line_of_json_with_its_facts(captured: Captured) -> None:
    logging.getLogger("gateway.rpc").info(
        "answered\nin %d ms",
        5,
        extra={"request_id": "req_1", "merchant_id": "mer_1", "payment_id": "pay_1"},
    )
    (line,) = captured.lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "gateway.rpc",
        "message": "answered\nin 5 ms",
        "request_id": "req_1",
        "merchant_id": "mer_1",
        "payment_id": "pay_1",
    }


def test_fields_keep_their_types_and_do_not_replace_the_records_own() -> None:
    line = json.loads(
        formatted("m", amount_minor=1000, ok=True, none=None, share=0.5, big=2**70, level="x")
    )
    assert (line["amount_minor"], line["ok"], line["none"], line["share"]) == (
        1000,
        True,
        None,
        0.5,
    )
    assert line["big"] == str(2**70)
    assert (line["level"], line["extra_level"]) == ("INFO", "x")


class Hostile:
    def __repr__(self) -> str:
        return f"Hostile(card={SPACED})"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError(PAN)

    __str__ = __repr__


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return PAN


PLACES: dict[str, Callable[[str], str]] = {
    "message": lambda s: formatted(f"card {s} used"),
    "%-argument": lambda s: formatted("card %s used", s),
    "%r-argument": lambda s: formatted("card %r used", ["x\n" + s]),
    "mapping arguments": lambda s: formatted("card %(c)s", {"c": s}),
    "arguments that do not fit": lambda s: formatted("card %d %d", s),
    "message that is no text": lambda s: formatted({"card": s}),
    "field": lambda s: formatted("m", note=s),
    "field's name": lambda s: formatted("m", **{s: 1}),
    "nested": lambda s: formatted("m", a={"b": [{"c": (s, {s})}]}),
    "key of a mapping": lambda s: formatted("m", a={"b": {s: 1}}),
    "bytes": lambda s: formatted("m", a=s.encode(), b=bytearray(s.encode()), c=[s.encode()]),
    "memoryview": lambda s: formatted("m", a=memoryview(s.encode())),
    "key of bytes": lambda s: formatted("m", a={s.encode(): s.encode()}),
    "exception as field": lambda s: formatted("m", a=ValueError(s), b=[KeyError(s)]),
    "too deep": lambda s: formatted("m", a=[[[[[[[[[[s]]]]]]]]]]),
    "json in text": lambda s: formatted(json.dumps({"a": json.dumps({"b": "\n" + s})})),
    "url": lambda s: formatted("GET /?card=" + s.replace(" ", "%20") + "&x=1"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("written", [PAN, SPACED, SPACED.replace(" ", "-"), "５４２５" + PAN[4:]])
def test_a_card_number_is_masked_wherever_it_stands(place: str, written: str) -> None:
    line = PLACES[place](written)
    decoded = json.dumps(json.loads(line), ensure_ascii=False)
    for text in (line, decoded):
        assert not leaks(text), text
        assert written not in text


@pytest.mark.parametrize(
    "line",
    [
        formatted("a %s %s %s %s b", *SPACED.split()),
        formatted("m", a=SPACED.split()),
        formatted("m", a=[5425, 2334, 3010, 9903]),
        formatted("m", a=int(PAN)),
        formatted("m", a=float(PAN)),
        formatted("m", a={int(PAN): 1}),
        formatted("m", a=Hostile()),
        formatted("m", a=Text("x")),
        formatted("%s", Broken()),
        formatted("m", a=Broken()),
        formatted("5425 2334\n3010 9903"),
        formatted(SPACED.replace(" ", "\r\n")),
        formatted(SPACED.replace(" ", ".")),
        formatted("[" + SPACED.replace(" ", ", ") + "]"),
        formatted("٥٤٢٥٢٣٣٤٣٠١٠٩٩٠٣"),
        formatted("x" * (TEXT_CHARACTERS_MAX - 8) + " " + PAN),
        formatted("x" * (TEXT_CHARACTERS_MAX - 19) + " " + SPACED.replace(" ", ",")),
        formatted("m", a=["x"] * ITEMS_MAX + [PAN]),
    ],
    # The lines hold the time: each process of a parallel run must give a test the same name.
    ids=itertools.count(),
)
def test_a_card_number_in_disguise_is_masked(line: str) -> None:
    assert not leaks(json.dumps(json.loads(line), ensure_ascii=False)), line


def test_a_card_number_in_the_loggers_name_is_masked() -> None:
    record = logging.LogRecord(PAN, logging.INFO, "", 0, "m", (), None)
    assert not leaks(JsonFormatter().format(record))


def test_a_card_number_in_an_exception_its_causes_and_groups_is_masked(captured: Captured) -> None:
    log = logging.getLogger("t")
    try:
        try:
            raise KeyError(PAN)
        except KeyError as first:
            first.add_note("note " + SPACED)
            raise RuntimeError("then " + SPACED) from first
    except RuntimeError:
        log.exception("failed", stack_info=True)
    try:
        raise ExceptionGroup("g " + PAN, [ValueError(PAN), ExceptionGroup("h", [OSError(SPACED)])])
    except ExceptionGroup:
        log.exception("failed")
    text = captured.text()
    assert "RuntimeError" in text
    assert "OSError" in text
    assert not leaks(text.replace(__file__, ""))


@pytest.mark.parametrize(
    "value",
    [
        KEY,
        f"x-api-key: {KEY}",
        "authorization: Bearer S3cr3tS3cr3t",
        "Authorization=Basic S3cr3tS3cr3t==",
        "authorization: basic S3cr3tS3cr3t",
        '{"authorization": "S3cr3tS3cr3t"}',
        "('authorization', 'S3cr3tS3cr3t')",
        "(b'authorization', b'S3cr3tS3cr3t')",
        '{\\"authorization\\": \\"Bearer S3cr3tS3cr3t\\"}',
        "bearer S3cr3tS3cr3t",
        "token eyJhbGciOiJS3cr3tS3cr3t.eyJpc3MiOiJS3cr3tS3cr3t.S3cr3tS3cr3t was refused",
        "api_key=S3cr3tS3cr3t&x=1",
        "postgresql://gateway:S3cr3tS3cr3t@host:5432/db",
        "postgresql://gateway:a@S3cr3tS3cr3t/b@host:5432/db",
        # As a cloud's database takes a signed token for a password.
        f"postgresql://gateway:{'a%2F' * 600}S3cr3tS3cr3t@host:5432/db",
        "'dsn=postgresql://gateway:S3cr3tS3cr3t@host/db'",
        "redis://:S3cr3tS3cr3t@host:6379/0",
        "rediss://default:S3cr3tS3cr3t@host:6379/0",
        "host=h user=u password=S3cr3tS3cr3t dbname=d",
        "passwd: S3cr3tS3cr3t",
        "client_secret='S3cr3tS3cr3t'",
        # What accounts at PSPs have, and what a network token brings.
        '{"secret_key": "S3cr3tS3cr3t"}',
        "{'webhook_secrets': 'S3cr3tS3cr3t'}",
        "private_key=S3cr3tS3cr3t",
        '{"cryptogram": "S3cr3tS3cr3t="}',
        "the key sk_live_S3cr3tS3cr3t is none",
        "rk_test_S3cr3tS3cr3t",
        "signed by whsec_S3cr3tS3cr3t",
    ],
)
def test_a_secret_in_text_is_redacted(value: str) -> None:
    for line in (formatted(value), formatted("%s", value), formatted("m", a=[{"b": value}])):
        assert "S3cr3t" not in line
        assert "[REDACTED]" in line


def test_a_credential_of_small_letters_is_redacted_after_its_header() -> None:
    assert redact("authorization: basic abcdefgh") == f"authorization: basic {REDACTED}"
    assert redact("authorization: Bearer abcdefgh") == f"authorization: Bearer {REDACTED}"


@pytest.mark.parametrize(
    "value",
    [
        "cvv=737",
        "cvv 737",
        "CVV2: 737",
        'cvc": "737"',
        '{\\"cvc\\": \\"737\\"}',
        "('csc', '737')",
        "card_cvv=737",
        "cardCvc=737",
        "security code is 737",
        "security_code: 7373",
        "cvv_code=737",
        "cvc=７３７",
        "card verification value: 737",
        "CVV:\n737",
    ],
)
def test_a_card_security_code_in_text_is_redacted(value: str) -> None:
    assert "737" not in "".join(str(int(c)) if c.isdigit() else c for c in redact(value))


@pytest.mark.parametrize(
    "key",
    [
        "cvv", "CVC", "cvc2", "csc", "card_cvv", "cardCvc", "security_code", "Security-Code",
        "authorization", "Authorization", "x-api-key", "api_key", "password", "client_secret",
        "track2", "cookie", "pin", "cavv", "secret_key", "webhook_secrets", "private_key",
        "cryptogram",
    ],
)  # fmt: skip
def test_the_value_under_a_secret_key_is_redacted_whatever_it_is(key: str) -> None:
    for line in (
        formatted("m", **{key: "737"}),
        formatted("m", a={key: 737}),
        formatted("m", a=[{key: {"value": "737"}}]),
        formatted("m", metadata=[(key, "737"), (key.encode(), b"737")]),
    ):
        assert "737" not in json.dumps({**json.loads(line), "time": ""})
        assert REDACTED in line


@pytest.mark.parametrize(
    "text",
    [
        "cvv_result=M avs_result=Y",
        "authorized 1000 EUR",
        "authorization 5 captured",
        "pay_01a1fc513c0775d59480b250e158f699 took 12.5 ms",
        "GET https://psp.example/v1/charges/op_1-1 200",
        "order 1763700000000",
        "the basic idea",
    ],
)
def test_what_is_harmless_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=20,
    )
)
def test_any_value_can_be_logged(value: object) -> None:
    json.loads(formatted("%s", value, a=value))
    json.loads(formatted(value))


def test_values_that_json_cannot_hold_are_logged() -> None:
    loop: list[object] = []
    loop.append(loop)
    line = formatted(
        "\ud800 %s", 1, a="\udfff", b=float("nan"), c=10**5000, d=loop, e=object(), f=Broken()
    )
    assert set("abcdef") <= set(json.loads(line))


def test_a_number_of_a_kind_of_its_own_is_logged() -> None:
    class Seconds(float):
        pass

    assert json.loads(formatted("m", a=Seconds(1.5), b=[Seconds(2)]))["b"] == [2]


def test_size_and_depth_of_a_record_are_bounded() -> None:
    deep: object = "x"
    for _ in range(DEPTH_MAX * 3):
        deep = {"d": deep}
    line = formatted("m" * 10**6, a=["i"] * 10**4, b=dict.fromkeys(range(10**4)), c=deep)
    assert len(line) < 3 * TEXT_CHARACTERS_MAX


def test_a_full_queue_drops_lines_and_says_how_many() -> None:
    written, blocked, release = bytearray(), threading.Event(), threading.Event()

    def write(data: bytes) -> None:
        blocked.set()
        release.wait()
        written.extend(data)

    writer = QueueWriter(write, lines_queued_max=3)
    record = logging.LogRecord("t", logging.INFO, "", 0, "m", (), None)
    writer.handle(record)
    blocked.wait()
    for _ in range(10):
        writer.handle(record)
    assert writer.lines_dropped == 7
    release.set()
    writer.close()
    lines = [json.loads(line) for line in written.decode().splitlines()]
    assert [line["message"] for line in lines] == ["m"] * 4 + ["log lines were dropped"]
    assert lines[-1]["lines_dropped"] == 7


def test_a_broken_stream_costs_lines_and_nothing_else() -> None:
    def write(_data: bytes) -> None:
        raise BrokenPipeError

    writer = QueueWriter(write)
    writer.handle(logging.LogRecord("t", logging.INFO, "", 0, "m", (), None))
    writer.close()


def test_closing_puts_handlers_and_hooks_back() -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, sys.excepthook, threading.excepthook)
    logs = configure_logging("ERROR", lambda _data: None)
    assert sys.excepthook is not before[2]
    logs.close()
    logs.close()
    assert (root.handlers[:], root.level, sys.excepthook, threading.excepthook) == before


def test_warnings_are_logged_and_redacted(captured: Captured) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = sys.modules["gateway.telemetry.logs"]._warned
        warnings.warn("deprecated for " + PAN, DeprecationWarning, stacklevel=1)
    (line,) = captured.lines()
    assert line["logger"] == "py.warnings"
    assert line["message"] == "deprecated for " + MASKED


async def test_what_asyncio_cannot_deliver_is_logged_and_redacted(captured: Captured) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(loop_exception_handler)
    loop.call_exception_handler(
        {"message": "lost " + SPACED, "exception": ValueError(PAN), "task": f"<Task {PAN}>"}
    )
    (line,) = captured.lines()
    assert line["logger"] == "asyncio"
    assert "ValueError" in line["exception"]
    assert not leaks(json.dumps(line))


PROGRAM = f"""
import threading, warnings
from gateway.telemetry.logs import configure_logging
configure_logging("INFO")
thread = threading.Thread(target=lambda: int("{SPACED} x"))
thread.start()
thread.join()
warnings.warn("warned {PAN}")
class Finalized:
    def __del__(self):
        raise ValueError("{PAN}")
Finalized()
raise RuntimeError("uncaught {PAN}") from KeyError("{KEY}")
"""


def test_a_process_that_dies_of_an_exception_logs_it_redacted_to_stderr(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "always", str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert run.returncode == 1
    assert run.stdout == ""
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("CRITICAL", "gateway.telemetry.logs"),
        ("WARNING", "py.warnings"),
        ("ERROR", "gateway.telemetry.logs"),
        ("CRITICAL", "gateway.telemetry.logs"),
    ]
    assert "uncaught" in lines[-1]["exception"]
    shown = run.stderr.replace(str(tmp_path), "")
    assert PAN not in shown
    assert SPACED not in shown
    assert "S3cr3t" not in shown


def test_long_hostile_text_is_redacted_in_linear_time() -> None:
    # Beginnings of secrets that are none: to read on from each of them would take half an hour.
    for text in ("eyJ", "eyJ-", "a://b:", "://", "\\", "bearer ", "authorization", "cvv-"):
        redact(text * (1_000_000 // len(text)))


def test_a_token_is_redacted_with_what_it_is_joined_to() -> None:
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"
    assert redact(f"of x-{token}, then") == "of [REDACTED], then"
    assert redact(f"({token})") == "([REDACTED])"
    assert redact("eyJhbGciOiJIUzI1NiJ9 without a second part") == (
        "eyJhbGciOiJIUzI1NiJ9 without a second part"
    )


def test_lines_that_a_full_disk_did_not_take_are_told_once_it_takes_some() -> None:
    written, tried = bytearray(), threading.Semaphore(0)
    full = True

    def write(data: bytes) -> None:
        try:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.extend(data)
        finally:
            tried.release()

    writer = QueueWriter(write)
    record = logging.LogRecord("t", logging.INFO, "", 0, "m", (), None)
    for _ in range(2):
        writer.handle(record)
        tried.acquire()
    full = False
    writer.handle(record)
    writer.close()
    lines = [json.loads(line) for line in written.decode().splitlines()]
    assert [line["message"] for line in lines] == ["m", "log lines were dropped"]
    assert lines[-1]["lines_dropped"] == 2
