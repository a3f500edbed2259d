"""Errors as every client of this API expects them: a status, and a message with type, code and parameter."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lmsleep.serve.log import LOG


class ApiError(HTTPException):
    """Is answered with `status` and `{"error": ...}`; FastAPI lets it through wherever it is raised.

    Attributes:
        status: of HTTP.
        body: the error as a client reads it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, None if retry_after is None else {"Retry-After": str(retry_after)})
        self.status = status
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}

    def answer(self) -> JSONResponse:
        """Return what the client is sent."""
        return JSONResponse({"error": self.body}, self.status, self.headers)


TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def not_found(kind: str, name: str, code: str | None = None, param: str | None = None) -> ApiError:
    """Return the error for a name that nothing of this owner has."""
    return ApiError(404, f"there is no {kind} {name!r}", code=code or f"{kind}_not_found", param=param)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error for a value that cannot be used."""
    return ApiError(400, message, code=code, param=param)


def told(error: Exception) -> ApiError:
    """Return what a client is told of an error; what was not foreseen may hold paths, and goes to the log."""
    if isinstance(error, ApiError):
        return error
    LOG.error("a request failed", exc_info=error)
    return failed()


def failed() -> ApiError:
    """Return the error for what was not foreseen, without the error itself: it may hold paths."""
    return ApiError(500, "the server failed on this request", code="internal_error")


def draining() -> ApiError:
    """Return the error for a server that takes no more work, for it is about to end."""
    return ApiError(503, "the server is shutting down", code="draining", retry_after=5)
