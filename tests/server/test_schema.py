"""Requests that schemathesis makes of the OpenAPI description: nothing crashes, what is answered is
documented.
"""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def whole(value: Any) -> Any:
    """1.0 as 1: to a JSON schema it is an integer, and the generator makes many; our parser refuses it."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def statuses_of(operation: Any, mode: GenerationMode, url: str) -> set[int]:
    """Play what the strategy of one operation makes, checking each answer."""
    seen = set()

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def play(case: Any) -> None:
        case.body = whole(case.body)
        # Any other name is a 404 whatever the rest.
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        answer = case.call(base_url=url)
        case.validate_response(answer, checks=CHECKS)
        seen.add(answer.status_code)

    play()
    return seen


def test_nothing_crashes(make, served) -> None:
    app = make()
    schema = schemathesis.openapi.from_dict(app.openapi())
    statuses: dict[str, set[int]] = {}
    with served(app) as port:
        for found in schema.get_all_operations():
            operation, url = found.ok(), f"http://127.0.0.1:{port}"
            statuses[operation.label] = statuses_of(operation, GenerationMode.POSITIVE, url)
            if operation.body:
                statuses[operation.label] |= statuses_of(operation, GenerationMode.NEGATIVE, url)
    assert len(statuses) >= 14
    for label in (
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /api/chat",
        "POST /api/generate",
    ):
        assert {200, 400} <= statuses[label], label
