"""Asks a gateway on this host for its health over HTTP, for `gateway health`."""

import http.client
from typing import Final, Literal

from gateway.settings import split_address

TIMEOUT_S: Final = 2.0
"""Longer than a healthy gateway takes, shorter than engines give a health check."""
TEXT_BYTES_MAX: Final = 1024
_EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing listens here


def ask_health(address: str, path: Literal["livez", "readyz"]) -> tuple[bool, str]:
    """Whether the gateway whose metrics are at `address` (`host:port`) is well, and what it says.

    A gateway that listens on every address is asked on loopback. An answer that does not come
    within `TIMEOUT_S` is a bad one.
    """
    host, port = split_address(address)
    connection = http.client.HTTPConnection(_EVERY_ADDRESS.get(host, host), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        text = answer.read(TEXT_BYTES_MAX).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return False, f"no gateway answers at {address}: {str(error) or type(error).__name__}"
    finally:
        connection.close()
    return answer.status == http.client.OK, text
