"""The official client, unmodified, drives the admin API; what it must not do is refused by name."""

import asyncio
import logging
import socket
import time
from types import SimpleNamespace

import httpx
import msgspec
import openai
import pytest

import ktransformers.server.__main__ as api_process
from ktransformers.scheduler.protocol import TenantStatus

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def both(office, served):
    """The two listeners on real sockets: (official admin client, base URL of the main one, admin key)."""
    boss = office.admin()
    office.follow()
    app = office.app()
    with served(app) as port, served(office.admin_app(app)) as admin_port:
        client = openai.OpenAI(
            admin_api_key=boss, base_url=f"http://127.0.0.1:{admin_port}/v1", max_retries=0
        )
        yield client.admin.organization, f"http://127.0.0.1:{port}/v1", boss


def user(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=url, max_retries=0)


def test_a_tenant_from_beginning_to_end(both, office, scheduler) -> None:
    organization, url, _ = both
    scheduler.thought = "Hm."
    project = organization.projects.create(name="Team ü")
    assert (project.object, project.status, project.name) == ("organization.project", "active", "Team ü")
    assert organization.projects.retrieve(project.id) == project
    assert organization.projects.update(project.id, name="Team").name == "Team"

    account = organization.projects.service_accounts.create(project.id, name="bot", expires_in_seconds=3600)
    assert account.api_key is not None and account.api_key.value.startswith("kt-")
    bot = user(url, account.api_key.value)
    answer = bot.chat.completions.create(model="tiny", messages=CHAT)
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3

    (key,) = organization.projects.api_keys.list(project.id).data
    assert key.id == account.api_key.id and key.owner.service_account.id == account.id
    assert key.redacted_value == f"kt-…{account.api_key.value[-4:]}"
    assert abs(key.expires_at - time.time() - 3600) < 60
    assert organization.projects.api_keys.retrieve(key.id, project_id=project.id).id == key.id

    # Replace it without a gap.
    second = organization.projects.service_accounts.api_keys.create(
        account.id, project_id=project.id, name="bot 2", scopes=["api.model.request"]
    )
    user(url, second.value).chat.completions.create(model="tiny", messages=CHAT)
    with pytest.raises(openai.PermissionDeniedError):
        user(url, second.value).models.list()
    assert organization.projects.api_keys.delete(key.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError):  # at once, not within a second
        bot.models.list()
    organization.projects.api_keys.update(second.id, project_id=project.id, scopes=[])
    assert user(url, second.value).models.list().data[0].id == "tiny"

    # A key may have limits of its own.
    third = organization.projects.service_accounts.api_keys.create(
        account.id, project_id=project.id, extra_body={"max_requests_per_1_day": 1, "max_running": 3}
    )
    user(url, third.value).chat.completions.create(model="tiny", messages=CHAT)
    with pytest.raises(openai.RateLimitError) as refused:
        user(url, third.value).chat.completions.create(model="tiny", messages=CHAT)
    assert refused.value.code == "insufficient_quota"
    changed = organization.projects.api_keys.update(
        third.id, project_id=project.id, extra_body={"max_requests_per_1_day": None}
    )
    assert (changed.max_requests_per_1_day, changed.max_running) == (None, 3)
    user(url, third.value).chat.completions.create(model="tiny", messages=CHAT)

    (limit,) = organization.projects.rate_limits.list_rate_limits(project.id).data
    assert limit.object == "project.rate_limit" and limit.max_requests_per_1_minute == (1 << 53) - 1
    limit = organization.projects.rate_limits.update_rate_limit(
        limit.id,
        project_id=project.id,
        max_requests_per_1_minute=2,
        extra_body={"max_tokens_per_1_day": 5000},
    )
    assert limit.max_requests_per_1_minute == 2 and limit.max_tokens_per_1_day == 5000
    raw = user(url, second.value).chat.completions.with_raw_response.create(model="tiny", messages=CHAT)
    assert raw.headers["x-ratelimit-remaining-requests"] == "1"
    user(url, second.value).chat.completions.create(model="tiny", messages=CHAT, stream=True).close()
    with pytest.raises(openai.RateLimitError) as refused:
        user(url, second.value).chat.completions.create(model="tiny", messages=CHAT)
    assert refused.value.code == "rate_limit_exceeded"
    limit = organization.projects.rate_limits.update_rate_limit(
        limit.id, project_id=project.id, max_requests_per_1_minute=(1 << 53) - 1, max_requests_per_1_day=1
    )
    assert limit.max_requests_per_1_day == 1  # there were more today
    with pytest.raises(openai.RateLimitError) as refused:
        user(url, second.value).chat.completions.create(model="tiny", messages=CHAT)
    assert refused.value.code == "insufficient_quota"
    assert refused.value.response.headers["x-should-retry"] == "false"
    organization.projects.rate_limits.update_rate_limit(
        limit.id, project_id=project.id, max_requests_per_1_day=(1 << 53) - 1
    )

    assert organization.projects.model_permissions.retrieve(project.id).mode == "deny_list"
    organization.projects.model_permissions.update(project.id, mode="allow_list", model_ids=["other"])
    with pytest.raises(openai.NotFoundError):
        user(url, second.value).chat.completions.create(model="tiny", messages=CHAT)
    assert organization.projects.model_permissions.delete(project.id).deleted

    time.sleep(1.2)  # the ledger promises a second
    usage = organization.usage.completions(
        start_time=int(time.time()) - 60, bucket_width="1d", group_by=["project_id", "model"]
    )
    (result,) = [result for bucket in usage.data for result in bucket.results]
    assert (result.project_id, result.model, result.api_key_id) == (project.id, "tiny", None)
    assert result.num_model_requests >= 3 and result.input_tokens == 9 * result.num_model_requests
    assert result.output_tokens >= 3 * (14 + 5)
    assert 3 * 5 <= result.output_reasoning_tokens <= 3 * 6  # of one that was left, as far as it came

    assert organization.projects.service_accounts.delete(account.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError):
        user(url, second.value).models.list()
    assert organization.projects.archive(project.id).status == "archived"
    assert [p.id for p in organization.projects.list()] == []
    assert [p.id for p in organization.projects.list(include_archived=True)] == [project.id]
    kinds = [entry.type for entry in organization.audit_logs.list(limit=100)]
    assert kinds[0] == "project.archived" and len(kinds) == 17
    last = organization.audit_logs.list(event_types=["rate_limit.updated"]).data
    assert [entry.actor.api_key.id for entry in last] == 3 * [office.store.keys("")[0].id]


def test_administrators(both) -> None:
    organization, _, _ = both
    made = organization.admin_api_keys.create(name="second", expires_in_seconds=60)
    assert made.value.startswith("kt-admin-")
    assert {key.name for key in organization.admin_api_keys.list()} == {"boss", "second"}
    assert organization.admin_api_keys.retrieve(made.id).redacted_value.endswith(made.value[-4:])
    base = str(organization._client.base_url)
    again = openai.OpenAI(admin_api_key=made.value, base_url=base, max_retries=0).admin.organization
    assert again.projects.list().data == []
    assert organization.admin_api_keys.delete(made.id).deleted
    with pytest.raises(openai.AuthenticationError):
        again.projects.list()


def test_lists_come_in_pages(both) -> None:
    organization, _, _ = both
    made = [organization.projects.create(name=f"p{i}").id for i in range(25)]
    assert [p.id for p in organization.projects.list(limit=10)] == made
    assert len(organization.projects.list(limit=10).data) == 10
    assert organization.projects.list(after=made[-1]).data == []
    entries = [entry.id for entry in organization.audit_logs.list(limit=10)]
    assert len(entries) == len(set(entries)) == 26


def test_usage_comes_in_pages(both) -> None:
    organization, _, _ = both
    start = int(time.time()) // 86400 * 86400 - 3 * 86400
    first = organization.usage.completions(start_time=start, limit=2)
    assert (len(first.data), first.has_more, first.object) == (2, True, "page")
    second = organization.usage.completions(start_time=start, limit=2, page=first.next_page)
    assert second.data[0].start_time == first.data[1].end_time and not second.has_more


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/projects", {"name": ""}, 400, "characters"),
        ("POST", "/projects", {"name": "a\u0000b"}, 400, "printable"),
        ("POST", "/projects", {"name": "x", "geography": "EU"}, 400, "geography"),
        ("POST", "/projects", {"name": "x", "weight": 0}, 400, "weight"),
        ("POST", "/projects", {"name": "x", "priority": "root"}, 400, "priority"),
        ("POST", "/projects", {}, 400, "name"),
        ("POST", "/projects", {"name": "taken"}, 409, "already"),
        ("GET", "/projects/x' OR '1'='1", None, 404, "no tenant"),
        ("GET", "/projects/taken", None, 404, "no project"),
        ("POST", "/projects/{id}/archive/x", {}, 404, "nothing"),
        ("GET", "/projects?limit=0", None, 400, "limit"),
        ("GET", "/projects?limit=1;DROP", None, 400, "limit"),
        ("GET", "/projects?colour=red", None, 400, "colour"),
        ("GET", "/projects?include_archived=maybe", None, 400, "include_archived"),
        ("POST", "/projects/{id}/rate_limits/rl_all", {"max_images_per_1_minute": 1}, 400, "_images_"),
        ("POST", "/projects/{id}/rate_limits/rl_all", {"max_running": 0}, 400, "max_running"),
        ("POST", "/projects/{id}/rate_limits/other", {}, 404, "rl_all"),
        ("POST", "/projects/{id}/model_permissions", {"mode": "deny_list", "model_ids": ["x"]}, 400, "mode"),
        ("POST", "/projects/{id}/service_accounts", {"name": "a", "expires_in_seconds": -1}, 400, "expires"),
        ("POST", "/projects/{id}/service_accounts/none/api_keys", {}, 404, "account"),
        ("POST", "/projects/{id}/service_accounts/none/api_keys", {"max_running": 0}, 400, "max_running"),
        ("POST", "/projects/{id}/api_keys/key_1", {"kv_disk_bytes": 1}, 400, "kv_disk_bytes"),
        ("DELETE", "/projects/{id}/api_keys/key_1", None, 404, "key"),
        ("GET", "/usage/completions", None, 400, "start_time"),
        ("GET", "/usage/completions?start_time=0&bucket_width=1y", None, 400, "bucket_width"),
        ("GET", "/usage/completions?start_time=0&group_by[]=user_id", None, 400, "user_id"),
        ("GET", "/usage/completions?start_time=0&limit=99", None, 400, "limit"),
        ("GET", "/audit_logs?after=x", None, 400, "after"),
        ("GET", "/audit_logs?actor_ids[]=x", None, 400, "actor_ids"),
        ("GET", "/users", None, 404, "nothing"),
    ],
)  # fmt: skip
@pytest.mark.anyio
async def test_what_is_wrong_is_named(office, connect, method, path, body, status, says) -> None:
    boss = office.admin()
    project = office.store.create_project("taken", "test")
    office.follow()
    async with connect(office.admin_app(office.app())) as client:
        answer = await client.request(
            method,
            "/v1/organization" + path.replace("{id}", project.id),
            json=body,
            headers={"Authorization": f"Bearer {boss}"},
        )
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"] and set(answer.json()["error"]) == {
        "message", "type", "param", "code",
    }  # fmt: skip
    assert [p.name for p in office.store.projects()] == ["taken"]


@pytest.mark.anyio
async def test_no_page_and_no_other_host(office, connect) -> None:
    boss = {"Authorization": f"Bearer {office.admin()}"}
    office.follow()
    async with connect(office.admin_app(office.app(allowed_origins=("https://good.test",)))) as client:
        url = "/v1/organization/projects"
        assert (await client.get(url, headers=boss)).status_code == 200
        assert (await client.get(url, headers=boss | {"Host": "evil.test"})).status_code == 403
        foreign = boss | {"Origin": "https://good.test"}
        assert (await client.post(url, json={"name": "x"}, headers=foreign)).status_code == 403
        plain = boss | {"Content-Type": "text/plain"}
        assert (await client.post(url, content='{"name": "x"}', headers=plain)).status_code == 415


def test_tenants_in_metrics_are_bounded(both, office, scheduler) -> None:
    _, url, boss = both
    keys = [office.tenant(f"tenant {i}")[1] for i in range(60)]
    office.follow()
    with httpx.Client() as client:
        for key in keys:
            answer = client.post(
                f"{url}/chat/completions",
                json={"model": "tiny", "messages": CHAT},
                headers={"Authorization": f"Bearer {key}"},
            )
            assert answer.status_code == 200
        ids = [project.id for project in office.store.projects()]
        tenants = [TenantStatus(one, 1.0, 1, 0, 6.0, 4.0, 5.0) for one in ids]
        scheduler.status = msgspec.structs.replace(scheduler.status, tenants=tenants)
        text = client.get(
            url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {boss}"}
        ).text
    counts = {
        line.partition("{")[2].partition("}")[0]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("ktransformers_tenant_requests_total{")
    }
    assert len(counts) == 51 and counts['tenant="other"'] == 10 and sum(counts.values()) == 60
    assert 'ktransformers_tenant_due_units_total{tenant="tenant 3"} 5.0' in text
    assert 'ktransformers_tenant_backlogged_service_units_total{tenant="tenant 3"} 4.0' in text
    assert 'ktransformers_tenant_service_units_total{tenant="other"} 60.0' in text


@pytest.mark.anyio
async def test_a_port_that_is_taken_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api_process, "ADMIN_POLL_SECONDS", 0.01)
    caplog.set_level(logging.ERROR)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = SimpleNamespace(
            config=SimpleNamespace(admin_port=taken.getsockname()[1]),
            directory=SimpleNamespace(view=SimpleNamespace(has_admin=True)),
        )
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await api_process._serve_admin(service, None)  # type: ignore[arg-type]
    assert [record.message for record in caplog.records if "admin" in record.message] == [
        f"no admin API until it can: setting 'admin_port': cannot listen on 127.0.0.1 "
        f"port {service.config.admin_port}: Address already in use; "
        "stop what listens there, or take another --admin-port"
    ]
