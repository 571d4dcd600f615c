"""Structured logs: one JSON object a line, free of card data and secrets, written off the loop.

Facts go in by `extra={"request_id": …, "merchant_id": …, "payment_id": …}` and come out as fields.
Everything passes the redaction: message, arguments, fields and their keys, exceptions, warnings.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final

import orjson

from gateway.domain.pan import contains_pan, mask_pans

LINES_QUEUED_MAX: Final = 10_000
"""Lines that may wait for a slow stderr; more are dropped, and their number is logged."""
TEXT_CHARACTERS_MAX: Final = 16_384
"""The longest text of a field; of a longer one the beginning is kept, of an exception the end."""
ITEMS_MAX: Final = 100
"""Items of one list or mapping that are logged."""
DEPTH_MAX: Final = 6
"""Levels of nesting that are logged."""
WRITE_LINGER_S: Final = 0.02
"""How long a line waits for others. The writer takes the interpreter's lock from the event loop
each time that it wakes, which for every line of a busy server is often."""
FLUSH_S_MAX: Final = 5.0
"""How long the end of the process waits for the queued lines to be written."""
_LINES_PER_WRITE_MAX = 200

REDACTED: Final = "[REDACTED]"

_RECORD_ATTRIBUTES = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
}
_OWN_FIELDS = frozenset({"time", "level", "logger", "message", "exception", "stack"})

_log = logging.getLogger(__name__)

# --- redaction ---

# Keys, reduced to their letters and digits, whose values are never logged.
_SECRET_KEYS = frozenset(
    {"authorization", "proxyauthorization", "cookie", "setcookie", "pin", "pinblock", "cavv"}
)
_SECRET_KEY_ENDS = (
    *("cvv", "cvv2", "cvc", "cvc2", "csc", "cav2", "securitycode", "verificationvalue"),
    *("track1", "track2", "trackdata"),
    *("password", "passwd", "secret", "secrets", "apikey", "accesstoken"),
    *("privatekey", "secretkey", "cryptogram"),
)
_NOT_IN_KEYS = re.compile(r"[^a-z0-9]")

# If none of these words stands in a text, none of the rules below can apply to it.
_HINT = re.compile(
    r"gwk_|eyJ|://|bearer|basic|authori[sz]ation|api[-_ ]?key|passw|secret|cvv|cvc|csc|cav"
    r"|security|verification|private|cryptogram|sk_|rk_|whsec_",
    re.IGNORECASE,
)
_USER_OF_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]{0,30}://[^\s:/@]{0,200}:")


def _without_password(run: re.Match[str]) -> str:
    """scheme://user:password@host; to the last @, since passwords hold unescaped ones."""
    text = run[0]
    end = text.rfind("@")
    user = _USER_OF_URL.search(text, 0, end) if end > 0 else None
    if user is None or user.end() >= end:
        return text
    return f"{text[: user.end()]}{REDACTED}{text[end:]}"


_SECRET_RULES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(?i)gwk_[\w.~+/=-]+"), "gwk_" + REDACTED),
    # A JWT: its first part is base64 of {". With all that it is joined to, so that a run of such
    # beginnings is read once, not from each of them.
    (
        re.compile(r"(?<![\w-])(?=[\w-]*?eyJ[\w-]{8})[\w-]++\.[\w-]*(?:\.[\w-]*)?"),
        REDACTED,
    ),
    # Stripe's keys, and the secrets of its webhooks.
    (re.compile(r"((?:sk|rk)_(?:live|test)_|whsec_)\w+"), rf"\1{REDACTED}"),
    # scheme://user:password@host; to the last @, since passwords hold unescaped ones.
    # A run at a time: a search for the @ from each beginning of a URL would read it anew each time.
    (re.compile(r"[^\s\"'<>]+"), _without_password),
    (re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]{4,}"), rf"\1 {REDACTED}"),
    # "the basic idea" is no credential: base64 has more than small letters.
    (re.compile(r"\b((?i:basic))\s+(?=[\w+/]*[A-Z0-9=])[\w+/=-]{4,}"), rf"\1 {REDACTED}"),
    (
        # authorization: x · "authorization": "x" · ('authorization', 'x') · password=x
        re.compile(
            r"(?i)((?:authori[sz]ation|(?:api|secret|private)[-_ ]?key|passw(?:or)?d|secrets?"
            r"|cryptogram)"
            r"(?:\\*[\"'])?\s*(?:[:=]|(?<=[\"']),)\s*(?:b?\\*[\"'])?"
            r"(?:(?:bearer|basic)\s+)?+)(?!\[REDACTED)[^\s\"',;&\\)\]}]+"
        ),
        rf"\1{REDACTED}",
    ),
    (
        # cvv=123 · "cvc": "123" · security code is 123 · ('csc', '1234')
        re.compile(
            r"(?i)((?:cvv2?|cvc2?|csc|cav2|security[-_ ]?code|verification[-_ ]?(?:value|code))"
            r"(?:[-_ ]?(?:code|value|number))?[^A-Za-z0-9]{0,8}(?:is[^A-Za-z0-9]{1,4})?)"
            r"\d{3,4}(?!\d)"
        ),
        rf"\1{REDACTED}",
    ),
)
_INTEGER_BITS_MAX = 256
_CUT_EDGE = r"[\w\s+%\\.,:/@=-]{0,100}"
_CUT_END = re.compile(_CUT_EDGE + r"\Z")
_CUT_START = re.compile(r"\A" + _CUT_EDGE)


def redact(text: str) -> str:
    """`text` without card numbers, card security codes, API keys, tokens and passwords."""
    if _HINT.search(text) is not None:
        for pattern, replacement in _SECRET_RULES:
            text = pattern.sub(replacement, text)
    return mask_pans(text)


def _bounded(text: str) -> str:
    """The redacted beginning of `text`."""
    if len(text) <= TEXT_CHARACTERS_MAX:
        return redact(text)
    # What the cut may have divided goes too: half a card number would pass the redaction.
    return redact(_CUT_END.sub("", text[:TEXT_CHARACTERS_MAX])) + " …"


def _bounded_end(text: str) -> str:
    """The redacted end of `text`."""
    if len(text) <= TEXT_CHARACTERS_MAX:
        return redact(text)
    return "… " + redact(_CUT_START.sub("", text[-TEXT_CHARACTERS_MAX:]))


def _is_secret_key(key: str) -> bool:
    reduced = _NOT_IN_KEYS.sub("", key.lower())
    return reduced in _SECRET_KEYS or reduced.endswith(_SECRET_KEY_ENDS)


def clean(value: object, depth: int = DEPTH_MAX) -> object:  # noqa: PLR0911 - one for each type
    """`value` as JSON can hold it, redacted, to `depth` levels of nesting."""
    if isinstance(value, str):
        return _bounded(str(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return _clean_number(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _bounded(bytes(value[: 4 * TEXT_CHARACTERS_MAX]).decode("utf-8", "backslashreplace"))
    if depth == 0:
        return _bounded(_safe_repr(value))
    if isinstance(value, Mapping):
        return _clean_mapping(value, depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _clean_items(value, depth)
    if isinstance(value, BaseException):
        return _bounded(f"{type(value).__name__}: {_safe_repr(value)}")
    return _bounded(_safe_repr(value))


def _clean_safely(value: object) -> object:
    try:
        return clean(value)
    except Exception:  # noqa: BLE001 - a field that cannot be read must not cost the log line
        return f"<{type(value).__name__}>"


def _clean_number(value: int | float) -> object:  # noqa: PYI041 - mypy tells them apart so
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS_MAX:
        return f"<integer of {value.bit_length()} bits>"
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if contains_pan(text):
        return mask_pans(text)
    # JSON has no infinity, and readers of JSON no integers beyond 64 bits. Of floats, orjson takes
    # Python's own alone.
    if not abs(value) < 2**63:
        return text
    return float(value) if isinstance(value, float) else value


def _clean_mapping(value: Mapping[Any, Any], depth: int) -> dict[str, object]:
    cleaned: dict[str, object] = {}
    for number, (key, item) in enumerate(value.items()):
        if number == ITEMS_MAX:
            cleaned["…"] = f"{len(value) - ITEMS_MAX} more"
            break
        name = str(clean(key, 0))
        cleaned[name] = REDACTED if _is_secret_key(name) else clean(item, depth - 1)
    return cleaned


def _clean_items(value: Iterable[Any], depth: int) -> list[object]:
    items: list[object] = list(value)
    # A pair such as ("authorization", "…") is how metadata is written.
    if len(items) == 2:
        key = clean(items[0], 0)
        if isinstance(key, str) and _is_secret_key(key):
            return [key, REDACTED]
    cleaned = [clean(item, depth - 1) for item in items[:ITEMS_MAX]]
    if len(items) > ITEMS_MAX:
        cleaned.append(f"… {len(items) - ITEMS_MAX} more")
    # A number may be spread over the items, as ["4111", "1111", "1111", "1111"].
    if contains_pan(" ".join(str(item) for item in cleaned if isinstance(item, (str, int)))):
        return [REDACTED]
    return cleaned


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - a broken repr must not cost the log line
        return f"<{type(value).__name__}>"


# --- formatting ---


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, redacted; it never raises for what a record holds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line break."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": _bounded(record.name),
            "message": _bounded(_message_of(record)),
        }
        for key, value in extra_of(record).items():
            name = _bounded(key)
            if name in _OWN_FIELDS:
                name = "extra_" + name
            fields[name] = REDACTED if _is_secret_key(name) else _clean_safely(value)
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = _bounded_end(_exception_text(*record.exc_info))
        elif record.exc_text:
            fields["exception"] = _bounded_end(record.exc_text)
        if record.stack_info:
            fields["stack"] = _bounded_end(record.stack_info)
        return _json(fields)


def extra_of(record: logging.LogRecord) -> dict[str, Any]:
    """The facts that a record was given by `extra`, as they are."""
    return {key: value for key, value in record.__dict__.items() if key not in _RECORD_ATTRIBUTES}


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that do not fit; logging itself would print them
        return f"{_safe_repr(record.msg)} % {_safe_repr(record.args)}"


def _exception_text(
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> str:
    try:
        return "".join(traceback.format_exception(kind, error, trace)).rstrip()
    except Exception:  # noqa: BLE001 - as above
        return _safe_repr(kind)


def _json(fields: dict[str, object]) -> str:
    try:
        return orjson.dumps(fields).decode()
    except TypeError:  # lone surrogates
        return orjson.dumps(_without_surrogates(fields)).decode()


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {str(_without_surrogates(k)): _without_surrogates(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    return value


# --- writing ---


class QueueWriter(logging.Handler):
    """Formats where it is called and writes in a thread of its own, so that a slow reader of
    stderr never stops the event loop. Drops, and counts, what its queue cannot hold.
    """

    def __init__(
        self, write: Callable[[bytes], object], *, lines_queued_max: int = LINES_QUEUED_MAX
    ) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines_dropped = 0
        """Lines that were not written for lack of room, here or on a disk, since the start."""
        self._write = write
        self._lines_queued_max = lines_queued_max
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._drops_told = 0
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line, or drop it."""
        if self._lines.qsize() >= self._lines_queued_max:
            self.lines_dropped += 1
            return
        try:
            self._lines.put(self.format(record))
        except Exception:  # noqa: BLE001 - a log line must never fail its caller
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        """Count the line as dropped; logging's own would print the record as it is."""
        self.lines_dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most FLUSH_S_MAX, and end the thread."""
        if self._thread.is_alive():
            self._lines.put(None)
            self._thread.join(FLUSH_S_MAX)
        super().close()

    def _run(self) -> None:
        ending = False
        while not ending:
            lines = [self._lines.get()]
            time.sleep(WRITE_LINGER_S)
            with contextlib.suppress(Empty):
                while len(lines) < _LINES_PER_WRITE_MAX:
                    lines.append(self._lines.get_nowait())
            ending = None in lines
            texts = [line for line in lines if line is not None]
            dropped = self.lines_dropped
            if dropped > self._drops_told:
                texts.append(self._drop_line(dropped - self._drops_told))
            if not texts:
                continue
            try:
                self._write("".join(f"{text}\n" for text in texts).encode("utf-8"))
            except (OSError, ValueError):  # a full disk, or a closed stderr, ends no process
                self.lines_dropped += len(lines) - lines.count(None)
            else:
                self._drops_told = dropped

    def _drop_line(self, dropped: int) -> str:
        record = _log.makeRecord(
            __name__,
            logging.WARNING,
            __file__,
            0,
            "log lines were dropped",
            (),
            None,
            extra={"lines_dropped": dropped},
        )
        return self.format(record)


def _write_stderr(data: bytes) -> None:
    """Write whole lines, as many at once as a pipe keeps together (pipe(7), PIPE_BUF).

    Workers write to the same pipe: what is longer, another's line may divide when the pipe is full.
    """
    start = 0
    while start < len(data):
        end = min(start + select.PIPE_BUF, len(data))
        if end < len(data):
            end = data.rfind(b"\n", start, end) + 1 or end
        try:
            start += os.write(2, data[start:end])
        except BlockingIOError:
            time.sleep(0.01)  # someone made stderr non-blocking; this is the writer's own thread


class Logs:
    """The installed logging; `close` flushes it and puts back what was there."""

    def __init__(self, level: str, write: Callable[[bytes], object]) -> None:
        root = logging.getLogger()
        self._level, self._handlers = root.level, root.handlers[:]
        self._hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
        self._show_warning = warnings.showwarning
        self.writer = QueueWriter(write)
        root.handlers[:] = [self.writer]
        root.setLevel(level)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread
        sys.unraisablehook = _unraisable
        warnings.showwarning = _warned
        atexit.register(self.close)
        self._open = True

    def close(self) -> None:
        """Write what is queued and restore the handlers and hooks; harmless when repeated."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        root = logging.getLogger()
        self.writer.close()
        root.handlers[:] = self._handlers
        root.setLevel(self._level)
        sys.excepthook, threading.excepthook, sys.unraisablehook = self._hooks
        warnings.showwarning = self._show_warning


def configure_logging(
    level: str = "INFO", write: Callable[[bytes], object] = _write_stderr
) -> Logs:
    """Send all logging, warnings and uncaught exceptions as JSON to `write` (stderr).

    For each event loop, also `loop.set_exception_handler(loop_exception_handler)`.
    """
    return Logs(level, write)


def loop_exception_handler(
    loop: asyncio.AbstractEventLoop,  # noqa: ARG001 - asyncio's signature
    context: dict[str, Any],
) -> None:
    """What an event loop calls for an exception that nobody awaited."""
    error = context.get("exception")
    about = {
        key: _safe_repr(value)
        for key, value in context.items()
        if key not in ("message", "exception", "source_traceback", "handle_traceback")
    }
    logging.getLogger("asyncio").error(
        "%s",
        context.get("message", "unhandled exception in the event loop"),
        exc_info=error if isinstance(error, BaseException) else None,
        extra={"context": about},
    )


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _log.info("interrupted")
        return
    _log.critical("uncaught exception", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or issubclass(args.exc_type, SystemExit):
        return
    _log.critical(
        "uncaught exception in a thread",
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        extra={"thread_name": args.thread.name if args.thread is not None else None},
    )


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    error = args.exc_value
    _log.error(
        "exception ignored: %s",
        args.err_msg or "in a finalizer",
        exc_info=None if error is None else (args.exc_type, error, args.exc_traceback),
        extra={"object": _safe_repr(args.object)},
    )


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    logging.getLogger("py.warnings").warning(
        "%s", message, extra={"category": category.__name__, "source": f"{filename}:{lineno}"}
    )
