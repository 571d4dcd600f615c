"""The page tokens of the lists: opaque, versioned, and bound to the filters they were made for.

A token is no secret and proves nothing: whatever it says, the query is held to the caller's
merchants and mode. It is written in hexadecimal, one token too long to look like a card number.
"""

from collections.abc import Callable
from datetime import datetime
from hashlib import sha256
from typing import Final, TypeAlias

from payments.v1.admin_service_pb2 import ListDiscrepanciesRequest, ListInDoubtRequest
from payments.v1.payment_service_pb2 import ListPaymentsRequest

from gateway.domain.errors import GatewayError, Reason, Violation, refuse
from gateway.domain.ids import is_payment_id
from gateway.rpc.conversion import Caller, from_microseconds, to_microseconds

_VERSION: Final = b"\x01"
_FILTER_BYTES: Final = 8
_TIME_BYTES: Final = 8
_HEAD_BYTES: Final = len(_VERSION) + _FILTER_BYTES + _TIME_BYTES


ListRequest: TypeAlias = ListPaymentsRequest | ListInDoubtRequest | ListDiscrepanciesRequest


def filter_digest(request: ListRequest, caller: Caller) -> bytes:
    """What a token is bound to: the filters, the merchant and the mode; not the page's size."""
    filters = type(request).FromString(request.SerializeToString())
    filters.merchant_id = caller.merchant_id
    filters.ClearField("page_size")
    filters.ClearField("page_token")
    filters.DiscardUnknownFields()
    encoding = b"%d " % caller.mode + filters.SerializeToString(deterministic=True)
    return sha256(encoding).digest()[:_FILTER_BYTES]


def encode_page_token(digest: bytes, after: tuple[datetime, str] | None) -> str:
    """The token of the page that begins after the given sort key (time, id); empty without one."""
    if after is None:
        return ""
    at, row_id = after
    time = to_microseconds(at).to_bytes(_TIME_BYTES, signed=True)
    return (_VERSION + digest + time + row_id.encode()).hex()


def decode_page_token(
    digest: bytes, token: str, is_id: Callable[[str], bool] = is_payment_id
) -> tuple[datetime, str] | None:
    """The sort key of a token; None for the first page's empty one. `is_id` knows the rows' ids.

    Raises GatewayError(PAGE_TOKEN_INVALID) for what is no token, or another filter's.
    """
    if not token:
        return None
    try:
        data = bytes.fromhex(token)
        at = from_microseconds(
            int.from_bytes(data[_HEAD_BYTES - _TIME_BYTES : _HEAD_BYTES], signed=True)
        )
        row_id = data[_HEAD_BYTES:].decode("ascii")
    except (ValueError, OverflowError):
        raise _invalid() from None
    # Nothing but what was given out: no other spelling of it, no time beyond the calendar.
    after = (at, row_id)
    if not is_id(row_id) or encode_page_token(digest, after) != token:
        raise _invalid()
    return after


def _invalid() -> GatewayError:
    return refuse(
        Reason.PAGE_TOKEN_INVALID,
        "The page token is none, or was given for other filters.",
        violation=Violation("page_token", "is none that was given out for these filters"),
    )
