"""Every route of both listeners with every kind of key; what a key may and may not; how soon a change
holds."""

import asyncio
import time

import httpx
import pytest
from fastapi import FastAPI
from msgspec import structs

from ktransformers.scheduler.client import RequestFailed
from ktransformers.server import refusals
from ktransformers.server.auth import Role, declared_role, declared_scope
from ktransformers.server.config import ConfigError
from ktransformers.server.routing import GuardedRoute
from ktransformers.server.tenants.directory import LOOK_SECONDS
from ktransformers.server.tenants.records import READ, READ_ALL, REQUEST, SCOPES, Limits

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "tiny", "prompt": "hi"}
BODIES = {
    "/v1/completions": PROMPT,
    "/api/generate": PROMPT,
    "/api/show": {"model": "tiny"},
    "/v1/chat/completions": CHAT,
    "/api/chat": CHAT,
}
ASKING = ["/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate"]


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def statuses(client: httpx.AsyncClient, app: FastAPI, key: str | None) -> dict[tuple[str, str], int]:
    """Of every route. Requests of the admin API name things that are not there and bodies that are none."""
    found = {}
    for route in app.routes:
        assert isinstance(route, GuardedRoute)
        path = route.path.replace("{model:path}", "tiny")
        for part in ("project", "account", "key", "rate_limit"):
            path = path.replace(f"{{{part}}}", "none")
        for method in route.methods:
            body = BODIES.get(path, {}) if method == "POST" else None
            answer = await client.request(method, path, json=body, headers=bearer(key))
            found[method, route.path] = answer.status_code
    return found


@pytest.fixture
def kinds(office) -> dict[str, str | None]:
    """One key of each kind."""
    project, user = office.tenant("alice")
    account = office.store.accounts(project.id)[0]
    expired = office.store.create_key(account, "old", "test", expires_at=int(time.time()) + 1)
    revoked = office.store.create_key(account, "gone", "test")
    office.store.revoke_key(revoked[0], "test")
    archived, left = office.tenant("archived")
    office.store.archive_project(archived.id, "test")
    elsewhere, other = office.tenant("elsewhere")
    office.store.change_project(elsewhere.id, "test", models=frozenset({"another"}))
    narrowed = {
        scope: office.store.create_key(account, "narrow", "test", scopes=[scope])[1] for scope in SCOPES
    }
    boss = office.admin()
    office.follow()
    time.sleep(1.0)
    return {
        "none": None,
        "empty": "",
        "wrong": "kt-" + "A" * 43,
        "almost": user[:-1] + "_",
        "expired": expired[1],
        "revoked": revoked[1],
        "archived": left,
        "user": user,
        "other model": other,
        "admin": boss,
        **narrowed,
    }


def expected(kind: str, path: str, endpoint) -> int:
    role, scope = declared_role(endpoint), declared_scope(endpoint)
    if role is Role.PUBLIC:
        return 200
    if kind in ("none", "empty", "wrong", "almost", "expired", "revoked", "archived"):
        return 401
    wrong_scope = kind in SCOPES and scope != kind and not (scope == READ and kind == READ_ALL)
    if (kind == "admin") != (role is Role.ADMIN) or wrong_scope:
        return 403
    names_a_model = path in ASKING or path in ("/api/show", "/v1/models/{model:path}")
    return 404 if kind == "other model" and names_a_model else 200


@pytest.mark.anyio
async def test_every_route_of_the_main_listener(office, kinds, connect) -> None:
    app = office.app(keys=("settings-key-1",))
    endpoints = {(method, route.path): route.endpoint for route in app.routes for method in route.methods}
    async with connect(app) as client:
        for kind, key in kinds.items():
            found = await statuses(client, app, key)
            assert found.keys() == endpoints.keys()
            for (method, path), status in found.items():
                assert status == expected(kind, path, endpoints[method, path]), (kind, method, path)
        print(f"{len(endpoints)} routes x {len(kinds)} kinds of key = {len(endpoints) * len(kinds)} answers")
        for path in ("/v1/models", "/api/tags", "/api/ps"):
            assert "tiny" in (await client.get(path, headers=bearer(kinds["user"]))).text
            assert "tiny" not in (await client.get(path, headers=bearer(kinds["other model"]))).text


@pytest.mark.anyio
async def test_every_route_of_the_admin_listener(office, kinds, connect) -> None:
    app = office.app(keys=("settings-key-1",))
    admin = office.admin_app(app)
    public = {"/livez", "/readyz", "/healthz"}
    kinds = {**kinds, "settings": "settings-key-1"}
    async with connect(admin) as client:
        for kind, key in kinds.items():
            found = await statuses(client, admin, key)
            assert len(found) >= 28
            for route, status in found.items():
                if route[1] in public:
                    assert status == 200
                elif kind == "admin":
                    assert status in (200, 400, 404), (kind, route)
                elif kind in ("user", "other model", *SCOPES):
                    assert status == 403, (kind, route)
                else:
                    assert status == 401, (kind, route)
        print(f"{len(found)} routes x {len(kinds)} kinds of key = {len(found) * len(kinds)} answers")
    async with connect(app) as client:  # nothing of it is on the other listener
        answer = await client.get("/v1/organization/projects", headers=bearer(kinds["admin"]))
        assert answer.status_code == 404


# What each route of the admin API takes. Paths that name an account or a key of a project are there for that
# project alone.
ADMIN_BODIES = {
    "create_project": {"name": "new"},
    "update_rate_limit": {"max_running": 1},
    "update_model_permissions": {"mode": "allow_list", "model_ids": ["m"]},
    "create_service_account": {"name": "other"},
    "update_service_account": {"name": "renamed"},
    "create_admin_api_key": {"name": "second"},
    "create_public_prefix": {"name": "p", "text": "hi"},
}
ADMIN_QUERIES = {"usage_completions": "?start_time=0&limit=1"}


def in_store(office) -> list[object]:
    """All that an admin may change; a key's last use is noted whenever it was used."""
    projects, accounts, keys, _ = office.store.load()
    return [projects, accounts, [structs.replace(key, last_used_at=None) for key in keys]]


@pytest.mark.anyio
@pytest.mark.parametrize("whose", ["its own", "another project's", "an archived project's"])
async def test_every_admin_route_on_what_is_there(office, connect, whose: str) -> None:
    """Each with ids that exist, on a project of its own: done; and with an account or a key of project A in
    the path of project B, or of one that is archived: 404, and nothing has changed."""
    boss = office.admin()
    app = office.admin_app(office.app())
    routes = [r for r in app.routes if declared_role(r.endpoint) is Role.ADMIN and r.path != "/metrics"]
    asked = 0
    async with connect(app) as client:
        for number, route in enumerate(routes):
            project, _ = office.tenant(f"a{number}")
            (account,), (key,) = office.store.accounts(project.id), office.store.keys(project.id)
            under = project
            if whose != "its own":
                if "{account}" not in route.path and "{project}/api_keys/{key}" not in route.path:
                    continue
                under, _ = office.tenant(f"b{number}")
                if whose == "an archived project's":
                    under = office.store.archive_project(under.id, "test")
            if "admin_api_keys" in route.path:
                key, _ = office.store.create_key(None, f"c{number}", "test")
            ids = {"project": under.id, "account": account.id, "key": key.id, "rate_limit": "rl_all"}
            if "{prefix}" in route.path:
                ids["prefix"] = office.store.publish(f"prefix {number}", {"text": "x"}, "test").id
            office.follow()
            (method,) = route.methods - {"HEAD"}
            path = route.path.format(**ids) + ADMIN_QUERIES.get(route.operation_id, "")
            body = ADMIN_BODIES.get(route.operation_id, {}) if method == "POST" else None
            before = in_store(office)
            answer = await client.request(method, path, json=body, headers=bearer(boss))
            asked += 1
            assert answer.status_code == (200 if whose == "its own" else 404), (method, path, answer.text)
            if whose != "its own":
                assert in_store(office) == before, (method, path)
    assert asked == (len(routes) if whose == "its own" else 7)
    print(f"{asked} routes of the admin API, {whose} ids")


@pytest.mark.anyio
async def test_without_a_tenant_all_stays_as_it_was(office, connect) -> None:
    async with connect(office.app()) as client:
        assert (await client.get("/v1/models")).status_code == 200
        boss = office.admin()
        office.follow()
        assert (await client.get("/v1/models", headers=bearer("any"))).status_code == 200
        project, key = office.tenant("first")
        office.follow()
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers=bearer(key))).status_code == 200
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers=bearer(boss))).status_code == 200
        office.store.archive_project(project.id, "test")
        office.follow()  # the last tenant gone does not open the door
        assert (await client.get("/v1/models")).status_code == 401
    async with connect(office.admin_app(office.app())) as client:
        assert (await client.get("/v1/organization/projects")).status_code == 401


def test_other_machines_need_a_tenant_or_a_key(office) -> None:
    with pytest.raises(ConfigError, match="tenants create"):
        office.app(host="0.0.0.0")
    office.tenant("a")
    office.follow()
    office.app(host="0.0.0.0")


@pytest.mark.anyio
@pytest.mark.parametrize("path", ASKING)
async def test_what_the_scheduler_is_told(office, connect, scheduler, path: str) -> None:
    limits = Limits(max_running=3, max_waiting=9)
    project, key = office.tenant("alice", limits)
    office.store.change_project(project.id, "test", weight=2.0, priority="high")
    office.tenant("bob")
    office.follow()
    async with connect(office.app()) as client:
        assert (await client.post(path, json=BODIES[path], headers=bearer(key))).status_code == 200
    (submit,) = scheduler.submits
    tenant = submit.tenant
    assert (tenant.id, tenant.weight, tenant.max_running, tenant.max_waiting) == (project.id, 8.0, 3, 9)
    assert tenant.user == office.store.accounts(project.id)[0].id
    assert submit.cache_scope == office.directory.cache_scope(project.id)
    assert len(submit.cache_scope) == 32 and submit.cache_scope != office.directory.cache_scope("bob")


@pytest.mark.anyio
@pytest.mark.parametrize("path", ASKING)
async def test_two_hundred_at_once_against_sixty(office, connect, scheduler, path: str) -> None:
    _, key = office.tenant("alice", Limits(requests_per_minute=60, tokens_per_minute=10**9))
    office.follow()
    scheduler.pause = 0.001
    async with connect(office.app()) as client:
        answers = await asyncio.gather(
            *(client.post(path, json=BODIES[path], headers=bearer(key)) for _ in range(200))
        )
        codes = [answer.status_code for answer in answers]
        assert (codes.count(200), codes.count(429), len(scheduler.submits)) == (60, 140, 60)
        for answer in answers:
            assert answer.headers["x-ratelimit-limit-requests"] == "60"
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 0
            if answer.status_code == 429:
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["content-type"] == "application/json"
        office.clock.now += 1
        assert (await client.post(path, json=BODIES[path], headers=bearer(key))).status_code == 200
        assert (await client.post(path, json=BODIES[path], headers=bearer(key))).status_code == 429


@pytest.mark.anyio
async def test_tokens_are_settled_whatever_becomes_of_a_request(office, connect, scheduler) -> None:
    project, key = office.tenant("alice", Limits(tokens_per_minute=5000, tokens_per_day=100_000))
    office.follow()
    app = office.app()
    async with connect(app) as client:

        async def left() -> int:
            answer = await client.post(
                "/v1/completions", json=PROMPT | {"max_tokens": 1}, headers=bearer(key)
            )
            assert answer.status_code == 200
            return int(answer.headers["x-ratelimit-remaining-tokens"])

        before = await left()
        answer = await client.post("/v1/completions", json=PROMPT | {"max_tokens": 2000}, headers=bearer(key))
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) == before - 3 - 2002 + 3 - 3 + 3
        used = answer.json()["usage"]["total_tokens"]
        assert await left() == before - used - 3
        subject = app.state.service.generator._limiter._subjects[project.id]
        assert subject.reserved == subject.open == 0


@pytest.mark.anyio
async def test_a_used_up_quota_says_so(office, connect) -> None:
    _, key = office.tenant("alice", Limits(tokens_per_day=23))
    office.follow()
    async with connect(office.app()) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))
        assert answer.json()["usage"]["total_tokens"] == 23
        for path in ASKING:
            for stream in (False, True):
                body = BODIES[path] | {"stream": stream}
                answer = await client.post(path, json=body, headers=bearer(key))
                assert answer.status_code == 429 and answer.headers["x-should-retry"] == "false"
                assert "retry-after" not in answer.headers
                error = answer.json()["error"]
                assert "quota" in (error if path.startswith("/api/") else error["code"])


@pytest.mark.anyio
async def test_parallel_requests_share_a_days_quota(office, connect, scheduler) -> None:
    """Outputs count before they are there; those that were not needed, or never came, are there again."""
    project, key = office.tenant("alice", Limits(tokens_per_day=1000))
    office.follow()
    app = office.app()
    async with connect(app) as client:

        async def ask_many() -> list[int]:
            body = PROMPT | {"max_tokens": 298}  # with its prompt's 2 more than a quarter of the quota
            asked = (client.post("/v1/completions", json=body, headers=bearer(key)) for _ in range(30))
            return [answer.status_code for answer in await asyncio.gather(*asked)]

        scheduler.pause, scheduler.failure = 0.01, RequestFailed("engine_restarted", "gone")
        for _ in range(3):
            statuses = await ask_many()
            assert (statuses.count(500), statuses.count(429)) == (3, 27)
        scheduler.failure = None
        statuses = await ask_many()
        assert (statuses.count(200), statuses.count(429)) == (3, 27)
        subject = office.limiter._subjects[project.id]
        assert (subject.reserved, subject.open, subject.used) == (0, 0, 3 * (2 + len("Hello, world!") + 1))


@pytest.mark.anyio
async def test_a_change_holds_within_a_second(office, connect) -> None:
    assert LOOK_SECONDS <= 0.5  # and that it is looked at at all
    project, key = office.tenant("alice")
    office.follow()
    slowest = 0.0
    async with connect(office.app()) as client:

        async def until(status: int, path: str = "/v1/models", **request) -> float:
            begin = time.monotonic()
            while True:
                method = "POST" if request else "GET"
                answer = await client.request(method, path, headers=bearer(key), **request)
                if answer.status_code == status:
                    return time.monotonic() - begin
                assert time.monotonic() - begin < 60.0
                await asyncio.sleep(0.01)

        await until(200)
        office.store.change_limits(project.id, "test", {"tokens_per_day": 1})
        slowest = max(slowest, await until(429, "/v1/chat/completions", json=CHAT))
        office.store.change_limits(project.id, "test", {"tokens_per_day": None})
        office.store.change_project(project.id, "test", models=frozenset({"x"}))
        slowest = max(slowest, await until(404, "/v1/chat/completions", json=CHAT))
        office.store.revoke_key(office.store.keys(project.id)[0], "test")
        slowest = max(slowest, await until(401))
    print(f"slowest change: {slowest:.2f} s")


def test_keys_and_scopes_are_as_documented() -> None:
    assert {READ, REQUEST, READ_ALL} == set(SCOPES)


@pytest.mark.anyio
async def test_the_scheduler_may_say_that_it_is_the_tenants_own_limit(
    office, connect, scheduler, monkeypatch
) -> None:
    """Too many of its answers wait: 429, where a full server is 503; neither uses up a request."""
    monkeypatch.setattr(refusals, "REFUSAL_SECONDS", 0.0)
    _, key = office.tenant("alice", Limits(max_waiting=1, requests_per_minute=1))
    office.follow()
    async with connect(office.app()) as client:
        for code, status in (("rate_limited", 429), ("overloaded", 503)):
            scheduler.failure = RequestFailed(code, "too many", 7.0)
            for stream in (False, True):
                body = CHAT | {"stream": stream}
                answer = await client.post("/v1/chat/completions", json=body, headers=bearer(key))
                assert (answer.status_code, answer.headers["retry-after"]) == (status, "7")
                own = answer.json()["error"]["code"] == "rate_limit_exceeded"
                assert own == (status == 429)
        scheduler.failure = None
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))).status_code == 200


@pytest.mark.anyio
async def test_what_was_just_refused_is_refused_before_it_is_read(
    office, connect, scheduler, monkeypatch
) -> None:
    """For a moment, to that tenant alone: nobody else pays for one that does not stop asking."""
    _, alice = office.tenant("alice")
    _, bob = office.tenant("bob")
    office.follow()
    path = "/v1/chat/completions"
    monkeypatch.setattr(refusals, "REFUSAL_SECONDS", 60.0)
    async with connect(office.app()) as client:
        scheduler.failure = RequestFailed("overloaded", "full", 7.0)
        assert (await client.post(path, json=CHAT, headers=bearer(alice))).status_code == 503
        scheduler.failure = None
        asked = len(scheduler.submits)
        for body in (CHAT, CHAT | {"messages": 5}):  # not even looked at
            answer = await client.post(path, json=body, headers=bearer(alice))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert len(scheduler.submits) == asked
        assert (await client.post(path, json=CHAT, headers=bearer(bob))).status_code == 200
