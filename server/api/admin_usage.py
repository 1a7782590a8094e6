"""The admin API's answers to what was used, and what administrators did."""

import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ktransformers.server.api.admin_access import MAX_PAGE, PREFIX, Query, answer, ask
from ktransformers.server.auth import Role, requires
from ktransformers.server.errors import RESPONSES, RequestError
from ktransformers.server.routing import GuardedRoute
from ktransformers.server.tenants.records import AuditEntry, UsageRow

router = APIRouter(route_class=GuardedRoute, tags=["admin"], responses=RESPONSES)
# width -> (seconds, buckets of a page, at most)
_WIDTHS = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86400, 7, 31)}
_GROUPS = {"project_id": "project", "api_key_id": "key", "model": "model"}
_LAST_TIME = 1 << 40


@router.get(f"{PREFIX}/usage/completions", operation_id="usage_completions")
@requires(Role.ADMIN)
async def usage_completions(request: Request) -> Response:
    """Tokens and requests by time, and by project, key and model if wanted. Minutes and hours are there for
    eight days, days for good. `output_reasoning_tokens`, which are among `output_tokens`, OpenAI's API does
    not have."""
    query = Query(
        request, "start_time", "end_time", "bucket_width", "project_ids", "api_key_ids", "models", "group_by",
        "limit", "page",
    )  # fmt: skip
    width = query.text("bucket_width") or "1d"
    if width not in _WIDTHS:
        raise RequestError("invalid_value", f"'bucket_width': must be {', '.join(_WIDTHS)}", "bucket_width")
    seconds, usual, most = _WIDTHS[width]
    limit = query.number("limit", usual, 1, most)
    start = query.number("start_time", None, 0, _LAST_TIME)
    end = query.number("end_time", int(time.time()) + 1, 0, _LAST_TIME)
    start = query.number("page", start, start, _LAST_TIME) // seconds * seconds
    groups = query.several("group_by")
    if unknown := sorted(groups - _GROUPS.keys()):
        raise RequestError("unsupported_parameter", f"'group_by': not {unknown[0][:64]!r}", "group_by")
    stop = min(end, start + limit * seconds)
    rows = await ask(request, lambda store: store.usage.between(start, stop, by_day=seconds == 86400))
    buckets: dict[int, list[UsageRow]] = {}
    for row in rows:
        if _asked_for(row, query):
            buckets.setdefault(row.start // seconds * seconds, []).append(row)
    data = [
        {
            "object": "bucket",
            "start_time": begin,
            "end_time": min(begin + seconds, end),
            "results": _results(buckets.get(begin, []), groups),
        }
        for begin in range(start, stop, seconds)
    ]
    return answer(
        {
            "object": "page",
            "data": data,
            "has_more": stop < end,
            "next_page": str(stop) if stop < end else None,
        }
    )


def _asked_for(row: UsageRow, query: Query) -> bool:
    wanted = (("project_ids", row.project), ("api_key_ids", row.key), ("models", row.model))
    return all(not query.several(name) or value in query.several(name) for name, value in wanted)


def _results(rows: Iterable[UsageRow], groups: frozenset[str]) -> list[dict[str, Any]]:
    sums: dict[tuple[str | None, ...], dict[str, Any]] = {}
    for row in rows:
        names = {g: getattr(row, field) if g in groups else None for g, field in _GROUPS.items()}
        result = sums.setdefault(
            tuple(names.values()),
            {
                "object": "organization.usage.completions.result",
                "input_tokens": 0,
                "input_cached_tokens": 0,
                "output_tokens": 0,
                "output_reasoning_tokens": 0,
                "num_model_requests": 0,
                "user_id": None,
                "batch": None,
                "service_tier": None,
                **names,
            },
        )
        result["input_tokens"] += row.input
        result["input_cached_tokens"] += row.cached
        result["output_tokens"] += row.output
        result["output_reasoning_tokens"] += row.reasoning
        result["num_model_requests"] += row.requests
    return list(sums.values())


# ---- the audit log


def _entry(entry: AuditEntry) -> dict[str, Any]:
    actor: dict[str, Any] = {"type": "api_key", "api_key": {"id": entry.actor}}
    if entry.actor.startswith("cli:"):
        actor = {"type": "session", "session": {"user": {"id": entry.actor}}}
    return {
        "id": f"audit_{entry.id}",
        "effective_at": entry.at,
        "type": entry.action,
        "actor": actor,
        "project": {"id": entry.project} if entry.project else None,
        entry.action: {"id": entry.target, "data": entry.details},
    }


@router.get(f"{PREFIX}/audit_logs", operation_id="list_audit_logs")
@requires(Role.ADMIN)
async def list_audit_logs(request: Request) -> Response:
    """The latest first."""
    query = Query(request, "after", "limit", "event_types")
    limit, after = query.number("limit", 20, 1, MAX_PAGE), query.text("after").removeprefix("audit_")
    if after and not (after.isascii() and after.isdecimal() and len(after) < 16):
        raise RequestError("invalid_value", "'after': no such entry", "after")
    before = int(after) if after else None
    kinds = query.several("event_types")
    found = await ask(request, lambda store: store.audit(before, limit + 1, kinds))
    data = [_entry(entry) for entry in found[:limit]]
    return answer(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }
    )
