"""What the routes of the admin API have in common: the store behind HTTP errors, query parameters, pages."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response

from ktransformers.server.errors import RequestError
from ktransformers.server.routing import context_of
from ktransformers.server.tenants.records import Conflict, Missing, StoreError
from ktransformers.server.tenants.store import Store

PREFIX = "/v1/organization"
PAGE, MAX_PAGE = 20, 100
_encode = msgspec.json.Encoder().encode
Result = TypeVar("Result")


def answer(value: Any) -> Response:
    """JSON."""
    return Response(_encode(value), media_type="application/json")


async def act(request: Request, job: Callable[[Store, str], Result]) -> Result:
    """Have the store do what changes what holds; `job` is also given who acts. It holds when this returns.

    Raises RequestError: not_found, conflict, invalid_value.
    """
    context = context_of(request)
    try:
        return await context.service.directory.call(lambda store: job(store, context.caller.key))
    except StoreError as error:
        raise _refused(error) from None


async def ask(request: Request, job: Callable[[Store], Result]) -> Result:
    """Ask the store. Raises RequestError: not_found."""
    try:
        return await context_of(request).service.directory.read(job)
    except StoreError as error:
        raise _refused(error) from None


def _refused(error: StoreError) -> RequestError:
    if isinstance(error, Missing):
        return RequestError("not_found", str(error))
    return RequestError("conflict" if isinstance(error, Conflict) else "invalid_value", str(error))


class Query:
    """The query parameters of a request: each is known, or refused by name."""

    def __init__(self, request: Request, *known: str) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            name = name.removesuffix("[]")
            if name not in known:
                raise RequestError("unknown_parameter", f"unknown parameter '{name[:64]}'", name[:64])
            self._values.setdefault(name, []).append(value)

    def number(self, name: str, default: int | None, least: int, most: int) -> int:
        """A whole number within bounds; without a default it must be given. Raises RequestError."""
        value = self.text(name)
        if not value and default is not None:
            return default
        if not (value.isascii() and value.isdecimal() and len(value) < 16 and least <= int(value) <= most):
            raise RequestError("invalid_value", f"'{name}': must be a number {least} to {most}", name)
        return int(value)

    def text(self, name: str) -> str:
        """Its value, "" if it was not given. Raises RequestError when it was given twice."""
        values = self._values.get(name, [])
        if len(values) > 1:
            raise RequestError("invalid_value", f"'{name}': given more than once", name)
        return values[0] if values else ""

    def flag(self, name: str) -> bool:
        """Raises RequestError for what is neither true nor false."""
        value = self.text(name)
        if value not in ("", "true", "false"):
            raise RequestError("invalid_value", f"'{name}': must be true or false", name)
        return value == "true"

    def several(self, name: str) -> frozenset[str]:
        """All its values."""
        return frozenset(self._values.get(name, []))


def page(
    query: Query, items: Sequence[Result], show: Callable[[Result], dict[str, Any]], size: int = PAGE
) -> Response:
    """The part of a list that `after` and `limit` ask for."""
    limit, after = query.number("limit", size, 1, MAX_PAGE), query.text("after")
    shown = [show(item) for item in items]
    begin = 0
    if after:
        begin = next((i + 1 for i, item in enumerate(shown) if item["id"] == after), len(shown))
    data = shown[begin : begin + limit]
    return answer(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": begin + limit < len(shown),
        }
    )
