"""Which numbers a request has at the host, from nothing but the attempt's reference.

Recovery has to name a request whose sender died before anything of it was stored, so that its STAN,
RRN and transmission time follow from the reference alone (docs/decisions/0013).
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Final, Literal

from gateway.domain.ids import created_s

RrnStyle = Literal["alphanumeric", "date"]

STAN_MAX: Final = 999_999
"""DE 11 is six digits; 000000 is left out, since hosts take it for none."""
_BASE36: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TRANSACTION_ID: Final = re.compile(
    r"(?:y([0-9]{2}))?m([0-9]{4})s([0-9]{6})t([0-9]{10})r([0-9A-Z]{0,12})n([0-9]{1,12})a([0-9A-Za-z]{0,6})"
)
_NOT_RRN: Final = re.compile(r"[^0-9A-Z]")
_NOT_AUTH_CODE: Final = re.compile(r"[^0-9A-Za-z]")


@dataclass(frozen=True, slots=True)
class Identity:
    """A request's numbers."""

    stan: str
    """DE 11."""
    rrn: str
    """DE 37."""
    time: str
    """DE 7, MMDDhhmmss in UTC: when the operation was made."""
    year: str
    """YY."""

    @property
    def local_time(self) -> str:
        """DE 12, hhmmss."""
        return self.time[4:]

    @property
    def local_date(self) -> str:
        """DE 13, MMDD."""
        return self.time[:4]


def identity_of(reference: str, rrn_style: RrnStyle) -> Identity:
    """The numbers of the request with a reference.

    STAN and RRN are parts of a digest of the reference; the RRN is twelve letters and digits, or,
    in the style `date`, YDDDhh and six digits, as hosts have it that compose it themselves. Raises
    ValueError for a reference that does not begin with an id, which tells the time.
    """
    made_s = created_s(reference)
    if made_s is None:
        raise ValueError("the reference begins with no id")
    made_at = datetime.fromtimestamp(made_s, UTC)
    digest = int.from_bytes(blake2b(reference.encode(), digest_size=24).digest(), "big")
    digest, stan = divmod(digest, STAN_MAX)
    if rrn_style == "date":
        rrn = f"{made_at.year % 10}{made_at:%j%H}{digest % 10**6:06}"
    else:
        letters = []
        for _ in range(12):
            digest, letter = divmod(digest, 36)
            letters.append(_BASE36[letter])
        rrn = "".join(letters)
    return Identity(f"{stan + 1:06}", rrn, f"{made_at:%m%d%H%M%S}", f"{made_at:%y}")


@dataclass(frozen=True, slots=True)
class Original:
    """What later messages say of an earlier one, DE 90, in the edition of 1993 DE 56, and others.

    Its text is the transaction id that the connector gives to the gateway. It holds letters, so
    that nothing takes its digits for a card number.
    """

    mti: str
    stan: str
    time: str
    rrn: str
    amount_minor: int
    auth_code: str = ""
    year: str = ""
    """YY; empty in transaction ids of before it was kept."""

    def __str__(self) -> str:
        rrn = _NOT_RRN.sub("", self.rrn)[:12]
        auth_code = _NOT_AUTH_CODE.sub("", self.auth_code)[:6]
        year = f"y{self.year}" if self.year else ""
        return f"{year}m{self.mti}s{self.stan}t{self.time}r{rrn}n{self.amount_minor}a{auth_code}"


def parse_original(transaction_id: str) -> Original | None:
    """The reverse of `str`; None for any other text."""
    match = _TRANSACTION_ID.fullmatch(transaction_id)
    if match is None:
        return None
    year, mti, stan, time, rrn, amount, auth_code = match.groups()
    return Original(mti, stan, time, rrn, int(amount), auth_code, year or "")
