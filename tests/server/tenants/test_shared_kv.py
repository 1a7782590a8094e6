"""Who shares KV with whom: scopes, quotas, and what an administrator makes public."""

import asyncio
import dataclasses
import json

import msgspec
import pytest

from ktransformers.scheduler.client import RequestFailed
from ktransformers.scheduler.protocol import PUBLIC_SCOPE, Status, Submit
from ktransformers.server import public_prefixes
from ktransformers.server.public_prefixes import PublicPrefixes
from ktransformers.server.tenants.directory import Directory, narrowed
from ktransformers.server.tenants.records import Limits

CHAT = "/v1/chat/completions"
BODIES = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_scope_survives_a_restart_and_is_no_other_tenants(tmp_path) -> None:
    directory = Directory.open(tmp_path / "tenants")
    scopes = {name: directory.cache_scope(name) for name in ("a", "b", "ab", "")}
    directory.close()
    again = Directory.open(tmp_path / "tenants")
    assert {name: again.cache_scope(name) for name in scopes} == scopes
    again.close()
    (tmp_path / "tenants" / "secret").unlink()
    other = Directory.open(tmp_path / "tenants")
    everything = [*scopes.values(), *(other.cache_scope(name) for name in scopes)]
    # A salt only narrows: no salt of one tenant names the scope of another.
    everything += [narrowed(scope, salt) for scope in scopes.values() for salt in ("a", "b", "ab")]
    assert len(set(everything)) == len(everything)
    assert all(len(scope) == 32 != len(PUBLIC_SCOPE) for scope in everything)
    assert (tmp_path / "tenants" / "secret").stat().st_mode & 0o777 == 0o600
    other.close()


@pytest.mark.anyio
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_salt_narrows_the_scope(office, connect, scheduler, path: str) -> None:
    project, key = office.tenant("alice", Limits(kv_device_bytes=5, kv_disk_bytes=7))
    office.follow()
    async with connect(office.app()) as client:
        for salt in ({}, {"cache_salt": "x"}, {"cache_salt": "x"}, {"cache_salt": "y"}):
            await client.post(path, json=BODIES[path] | salt, headers=bearer(key))
    plain, x, x_again, y = [submit.cache_scope for submit in scheduler.submits]
    assert plain == office.directory.cache_scope(project.id)
    assert x == x_again == narrowed(plain, "x") and len({plain, x, y}) == 3
    assert scheduler.submits[0].tenant.kv_bytes == (5, 0, 7)


@pytest.mark.anyio
async def test_what_is_registered_is_computed_in_public_and_withdrawn(office, connect, scheduler) -> None:
    withdrawn: list[list[int]] = []
    scheduler.withdraw = lambda tokens: withdrawn.append(tokens) or True
    admin = bearer(office.admin())
    app = office.app()
    office.follow()
    keeper = PublicPrefixes(app.state.service.generator, office.directory)
    url = "/v1/organization/public_prefixes"
    async with connect(office.admin_app(app)) as client:
        both = {"name": "p", "text": "t", "messages": [{"role": "user", "content": "x"}]}
        for wrong in ({"name": "p"}, both):
            assert (await client.post(url, json=wrong, headers=admin)).status_code == 400
        made = (await client.post(url, json={"name": "p", "text": "hi there"}, headers=admin)).json()
        assert made["tokens"] > 0
        assert (await client.post(url, json={"name": "p", "text": "x"}, headers=admin)).status_code == 409
        messages = [{"role": "system", "content": "be good"}]
        await client.post(url, json={"name": "q", "messages": messages}, headers=admin)
        assert [p["name"] for p in (await client.get(url, headers=admin)).json()["data"]] == ["p", "q"]
        await keeper.follow()
        await keeper.follow()
        assert [submit.cache_scope for submit in scheduler.submits] == [PUBLIC_SCOPE] * 2
        assert {submit.sampling.max_tokens for submit in scheduler.submits} == {1}
        # Another engine knows nothing of them.
        status: Status = scheduler.status
        scheduler.status = msgspec.structs.replace(status, engine_restarts=status.engine_restarts + 1)
        await keeper.follow()
        assert len(scheduler.submits) == 4
        gone = await client.delete(f"{url}/{made['id']}", headers=admin)
        assert gone.json()["deleted"]
        assert (await client.delete(f"{url}/{made['id']}", headers=admin)).status_code == 404
        await keeper.follow()
    assert withdrawn == [scheduler.submits[0].tokens]
    assert len(scheduler.submits) == 5, "what is left is computed again: they may begin alike"
    acts = [entry.action for entry in office.store.audit()]
    assert acts.count("public_prefix.created") == 2 and acts.count("public_prefix.deleted") == 1


@pytest.mark.anyio
@pytest.mark.parametrize("body", [{"text": ""}, {"messages": {}}, {}])
async def test_what_cannot_be_a_prompt_keeps_nothing_else_from_being_public(
    office, scheduler, body: dict[str, object]
) -> None:
    office.store.publish("bad", body, "test")
    office.store.publish("good", {"text": "hi there"}, "test")
    office.tenant("last")  # when the server has seen it, it has seen the others
    app = office.app()
    office.follow()
    await PublicPrefixes(app.state.service.generator, office.directory).follow()
    assert len(scheduler.submits) == 1 and scheduler.submits[0].tokens


@pytest.mark.anyio
async def test_one_that_fails_keeps_nothing_else_from_being_public(office, scheduler) -> None:
    office.store.publish("fails", {"text": "no"}, "test")
    office.store.publish("good", {"text": "hi there"}, "test")
    office.tenant("last")
    app = office.app()
    office.follow()

    def fail_once(submit: Submit) -> None:
        if len(scheduler.submits) == 1:
            raise RequestFailed("overloaded", "full", 1.0)

    scheduler.on_submit = fail_once
    keeper = PublicPrefixes(app.state.service.generator, office.directory)
    with pytest.raises(RequestFailed):
        await keeper.follow()
    assert len(scheduler.submits) == 2
    await keeper.follow()
    assert [submit.tokens for submit in scheduler.submits[::2]] == [scheduler.submits[0].tokens] * 2


@pytest.mark.anyio
async def test_the_keeper_outlives_what_nobody_expects(office, scheduler, monkeypatch, caplog) -> None:
    monkeypatch.setattr(public_prefixes, "AGAIN_SECONDS", 0.0)
    office.store.publish("good", {"text": "hi there"}, "test")
    office.tenant("last")
    app = office.app()
    office.follow()
    computed = asyncio.Event()

    def surprise_once(submit: Submit) -> None:
        if len(scheduler.submits) == 1:
            raise TypeError("a surprise")
        computed.set()

    scheduler.on_submit = surprise_once
    running = asyncio.create_task(PublicPrefixes(app.state.service.generator, office.directory).run())
    await asyncio.wait_for(computed.wait(), 30)
    running.cancel()
    assert "TypeError" in caplog.text


@pytest.mark.anyio
async def test_no_tenant_may_publish(office, connect) -> None:
    _, key = office.tenant("alice")
    office.admin()
    app = office.app()
    office.follow()
    async with connect(office.admin_app(app)) as client:
        body = json.dumps({"name": "p", "text": "x"})
        url = "/v1/organization/public_prefixes"
        assert (await client.post(url, content=body, headers=bearer(key))).status_code in (401, 403)
    assert dataclasses.is_dataclass(office.directory.view) and not office.directory.view.prefixes
