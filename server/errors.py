"""What a client is told when a request cannot be done: a code, a short text, and the status that goes with
the code.

No exception text, path or address ever gets into one of these; the log has the request id to find the rest
by.
"""

import math
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException

# code -> (HTTP status, OpenAI error type)
_CODES: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "invalid_value": (400, "invalid_request_error"),
    "unknown_parameter": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "invalid_host": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "host_not_allowed": (403, "permission_error"),
    "origin_not_allowed": (403, "permission_error"),
    "permission_denied": (403, "permission_error"),
    "conflict": (409, "invalid_request_error"),
    "model_not_found": (404, "not_found_error"),
    "not_found": (404, "not_found_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "insufficient_quota": (429, "rate_limit_error"),
    "internal": (500, "server_error"),
    "numerical_error": (500, "server_error"),
    "engine_restarted": (500, "server_error"),
    "overloaded": (503, "overloaded_error"),
    "not_ready": (503, "overloaded_error"),
    "draining": (503, "overloaded_error"),
    "server_shutdown": (503, "overloaded_error"),
    "deadline": (504, "timeout_error"),
}


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be done; the error names the field at fault"},
    "5XX": {"description": "The server cannot do it now"},
}
"""What the OpenAPI description says of every route."""


class RequestError(HTTPException):
    """Ends a request. `param` names the field at fault; `retry_after` is in seconds, 0 is none."""

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        # A code that is not known here is no client's business, nor is its message.
        self.code, self.message = (code, message) if code in _CODES else ("internal", "the request failed")
        status, self.type = _CODES[self.code]
        headers = dict(headers or {})
        if status == 503 or code == "rate_limit_exceeded":
            retry_after = retry_after or 1.0
        if retry_after > 0:
            headers["Retry-After"] = str(min(120, max(1, math.ceil(retry_after))))
        super().__init__(status, self.message, headers)
        self.param = param


def from_status(status: int) -> RequestError:
    """The framework's own refusals (unknown path, wrong method) as ours."""
    if status == HTTPStatus.NOT_FOUND:
        return RequestError("not_found", "there is nothing at this path")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return RequestError("method_not_allowed", "this path does not take this method")
    return RequestError("internal" if status >= 500 else "invalid_request", HTTPStatus(status).phrase.lower())


def body(path: str, error: RequestError) -> dict[str, Any]:
    """The error object of the protocol that is spoken at `path`."""
    if path.startswith("/api/"):
        return {"error": error.message}
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
