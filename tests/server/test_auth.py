"""Every route, with every kind of key."""

from pathlib import Path
from urllib.parse import unquote

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Mount, Route

from ktransformers.server.api import admin, admin_keys, admin_prefixes, admin_usage, health, ollama, openai
from ktransformers.server.app import make_admin_app
from ktransformers.server.auth import Keys, Role, declared_role
from ktransformers.server.config import ConfigError
from ktransformers.server.routing import GuardedRoute, UndeclaredRoute, check_routes

USER_KEY, ADMIN_KEY = "user-key-0123456789", "admin-key-0123456789"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
BODIES = {
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
    "/api/generate": {"model": "tiny", "prompt": "hi"},
    "/api/show": {"model": "tiny"},
    "/v1/chat/completions": CHAT,
    "/api/chat": CHAT,
}


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys"
    file.write_text(f"# who may\nalice:{USER_KEY}\n\nadmin:{ADMIN_KEY}\n")
    file.chmod(0o600)
    return str(file)


def expected(role: Role | None, key: str | None) -> int:
    if role is Role.PUBLIC or key == ADMIN_KEY:
        return 200
    if key != USER_KEY:
        return 401
    return 403 if role is Role.ADMIN else 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "key", [None, "", "wrong-key-0123456789", USER_KEY[:-1], USER_KEY + "0", "\xff", USER_KEY, ADMIN_KEY]
)
async def test_every_route_with_every_key(make, connect, key_file: str, key: str | None) -> None:
    app = make(api_key_file=key_file, host="0.0.0.0")
    seen = 0
    async with connect(app) as client:
        for route in app.routes:
            assert isinstance(route, GuardedRoute)
            path = route.path.replace("{model:path}", "tiny")
            for method in route.methods:
                headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
                answer = await client.request(method, path, json=BODIES.get(path), headers=headers)
                assert answer.status_code == expected(declared_role(route.endpoint), key), (
                    method,
                    path,
                    answer.text,
                )
                seen += 1
                if answer.status_code in (401, 403) and method != "HEAD":
                    error = answer.json()["error"]
                    assert isinstance(error, str) if path.startswith("/api/") else error["code"]
    assert seen >= 17


@pytest.mark.anyio
async def test_the_key_may_come_as_x_api_key(make, connect, key_file: str) -> None:
    async with connect(make(api_key_file=key_file)) as client:
        assert (await client.get("/v1/models", headers={"x-api-key": USER_KEY})).status_code == 200
        assert (
            await client.get("/v1/models", headers={"Authorization": f"bearer {USER_KEY}"})
        ).status_code == 200
        answer = await client.get("/v1/models", headers={"Authorization": f"Basic {USER_KEY}"})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.anyio
async def test_without_keys_loopback_takes_any_key(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        for headers in ({}, {"Authorization": "Bearer whatever"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
            assert (await client.get("/metrics", headers=headers)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1//models",
        "/v1/../v1/models",
        "/v1/%2e%2e/v1/models",
        "/v1/models;",
        "/V1/models",
        "/v1/models%00",
        "/livez/../v1/models",
        "/livez%2f..%2fv1%2fmodels",
        "/v1/models/",
        "/.//v1/models",
    ],
)
async def test_no_spelling_of_a_path_gets_around(make, key_file: str, path: str) -> None:
    """Sent raw: httpx would tidy it up."""
    statuses = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"localhost/livez?")],
        "server": ("localhost", 80),
        "client": ("1.2.3.4", 5),
    }
    await make(api_key_file=key_file, allowed_hosts=("*",))(scope, receive, send)
    assert statuses in ([401], [404])


@pytest.mark.anyio
async def test_a_tenant_is_the_name_of_its_key(make, connect, key_file: str, scheduler) -> None:
    async with connect(make(api_key_file=key_file)) as client:
        for key in (USER_KEY, ADMIN_KEY):
            await client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {key}"})
    first, second = scheduler.submits
    assert (first.tenant.id, second.tenant.id) == ("alice", "admin")
    assert first.cache_scope != second.cache_scope and len(first.cache_scope) == 32


def test_a_route_without_a_role_does_not_start() -> None:
    router = APIRouter(route_class=GuardedRoute)
    with pytest.raises(UndeclaredRoute, match="/oops"):

        @router.get("/oops")
        async def oops() -> None: ...


@pytest.mark.parametrize("route", [Route("/raw", lambda request: None), Mount("/files", routes=[])])
def test_a_route_that_is_not_guarded_does_not_start(app: FastAPI, route: Route) -> None:
    check_routes(list(app.routes))
    with pytest.raises(UndeclaredRoute):
        check_routes([*app.routes, route])


@pytest.mark.parametrize("part", [health, openai, ollama])
@pytest.mark.parametrize("route", [Route("/raw", lambda request: None), Mount("/files", routes=[])])
def test_the_application_does_not_start_with_one(make, monkeypatch, part, route: Route) -> None:
    monkeypatch.setattr(part.router, "routes", [*part.router.routes, route])
    with pytest.raises(UndeclaredRoute):
        make()


@pytest.mark.parametrize("part", [admin, admin_keys, admin_prefixes, admin_usage])
def test_nor_does_the_admin_api(app: FastAPI, monkeypatch, part) -> None:
    async def oops() -> None: ...

    make_admin_app(app.state.service)
    monkeypatch.setattr(part.router, "routes", [*part.router.routes, APIRoute("/v1/organization/oops", oops)])
    with pytest.raises(UndeclaredRoute, match="oops"):
        make_admin_app(app.state.service)


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        ("alice:" + USER_KEY, 0o644, "chmod 600"),
        ("alice:" + USER_KEY, 0o640, "chmod 600"),
        ("", 0o600, "no key"),
        ("# nothing\n", 0o600, "no key"),
        ("alice:short", 0o600, "8 to 512"),
        ("a b:" + USER_KEY, 0o600, "bad name"),
        (f"a:{USER_KEY}\nb:{USER_KEY}", 0o600, "twice"),
        ("alice:with space in it", 0o600, "8 to 512"),
        ("x" * 600, 0o600, "8 to 512"),
        ("ä:" + USER_KEY, 0o600, "ASCII"),
        ("x" * 65 + ":" + USER_KEY, 0o600, "bad name"),
    ],
)
def test_a_bad_key_file_is_refused(make, tmp_path: Path, content: str, mode: int, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content, encoding="utf-8")
    file.chmod(mode)
    with pytest.raises(ConfigError, match=says) as raised:
        make(api_key_file=str(file))
    assert USER_KEY not in str(raised.value)


def test_a_key_file_that_is_not_there(make, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError):
            make(api_key_file=str(path))


def test_no_key_no_other_address(make) -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        make(host="0.0.0.0")


def test_bare_keys_are_named_by_their_hash() -> None:
    headers = Headers({"authorization": f"Bearer {USER_KEY}"})
    caller = Keys([("", USER_KEY)]).authorize(Role.USER, headers)
    assert caller.tenant == f"key-{caller.key_hash}" and not caller.is_admin
