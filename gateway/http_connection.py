"""The connections of our servers over HTTP."""

from collections.abc import Callable
from typing import Any

from aiohttp import web


class Connection(web.RequestHandler):
    """A connection that tells what is no HTTP, and neither logs it nor sends it back."""

    __slots__ = ("_malformed",)

    def __init__(self, malformed: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._malformed = malformed

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that is malformed, or whose handler failed."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        self._malformed()
        response = web.Response(status=status)
        response.force_close()
        return response
