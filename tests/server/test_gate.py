"""What every request passes: hosts, origins, media types, sizes, JSON, and the headers of every answer."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI

from ktransformers.server import body as body_module
from ktransformers.server.body import strict_json
from ktransformers.server.errors import RequestError

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"Content-Type": "application/json"}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.test", 403),
        ("evil.test:8000", 403),
        ("localhost.evil.test", 403),
        ("127.0.0.1.evil.test", 403),
        ("", 403),
        ("localhost@evil.test", 403),
        ("[::1]evil", 200),
        ("my.name", 200),
    ],
)
async def test_only_our_hosts(make, connect, host: str, status: int) -> None:
    async with connect(make(allowed_hosts=("my.name",))) as client:
        for path in ("/livez", "/v1/models", "/nothing"):
            answer = await client.get(path, headers={"Host": host})
            assert answer.status_code == (404 if status == 200 and path == "/nothing" else status)


@pytest.mark.anyio
async def test_two_hosts_or_none(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        answer = await client.get("/livez", headers=[("Host", "localhost"), ("Host", "evil.test")])
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_host"


@pytest.mark.anyio
async def test_with_keys_and_another_address_any_host_unless_listed(make, connect) -> None:
    keys = ("abcdefgh",)
    async with connect(make(host="0.0.0.0", keys=keys)) as client:
        assert (await client.get("/livez", headers={"Host": "anything.test"})).status_code == 200
    async with connect(make(host="0.0.0.0", keys=keys, allowed_hosts=("a.test",))) as client:
        assert (await client.get("/livez", headers={"Host": "anything.test"})).status_code == 403
        assert (await client.get("/livez", headers={"Host": "a.test"})).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost:8000", 200),
        ("https://good.test", 200),
        ("http://evil.test", 403),
        ("null", 403),
        ("http://localhost:3000", 403),
        ("http://localhost:8000.evil.test", 403),
        ("", 403),
        ("http://good.test", 403),
    ],
)
async def test_only_our_pages_may_post(make, connect, origin: str | None, status: int) -> None:
    async with connect(make(allowed_origins=("https://good.test",))) as client:
        headers = {} if origin is None else {"Origin": origin}
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code == status
        assert ("access-control-allow-origin" in answer.headers) == (origin == "https://good.test")
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.anyio
async def test_preflight_for_listed_origins_only(make, connect) -> None:
    async with connect(make(allowed_origins=("https://good.test",))) as client:
        ask = {"Access-Control-Request-Method": "POST"}
        good = await client.options("/v1/chat/completions", headers=ask | {"Origin": "https://good.test"})
        assert good.status_code == 204 and good.headers["access-control-allow-origin"] == "https://good.test"
        assert "access-control-allow-credentials" not in good.headers
        assert good.headers["access-control-allow-headers"] == "Authorization, *"  # SDKs send x-stainless-*
        bad = await client.options("/v1/chat/completions", headers=ask | {"Origin": "https://evil.test"})
        assert bad.status_code == 405 and "access-control-allow-origin" not in bad.headers


@pytest.mark.anyio
@pytest.mark.parametrize(
    "media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"]
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate", "/api/show"]
)
async def test_only_json_is_taken(app: FastAPI, connect, media: str, path: str) -> None:
    async with connect(app) as client:
        answer = await client.post(path, content=json.dumps(CHAT), headers={"Content-Type": media})
        assert answer.status_code == 415


@pytest.mark.anyio
async def test_json_with_a_charset(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        answer = await client.post(
            "/v1/chat/completions",
            content=json.dumps(CHAT),
            headers={"Content-Type": "Application/JSON; charset=utf-8"},
        )
        assert answer.status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_is_counted_while_it_arrives(app: FastAPI, connect, chunked: bool) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(40):
            sent += 1 << 20
            yield b" " * (1 << 20)

    async with connect(app) as client:
        body = chunks() if chunked else b" " * ((16 << 20) + 1)
        answer = await client.post("/v1/chat/completions", content=body, headers=JSON)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
    assert body_module.BoundedRequest.held == 0


@pytest.mark.anyio
async def test_16_mib_are_taken(app: FastAPI, connect) -> None:
    body = json.dumps(CHAT).encode()
    async with connect(app) as client:
        answer = await client.post(
            "/v1/chat/completions", content=body + b" " * ((16 << 20) - len(body)), headers=JSON
        )
        assert answer.status_code == 200


@pytest.mark.anyio
async def test_a_body_is_not_kept_while_the_answer_is_made(app: FastAPI, connect, scheduler) -> None:
    padding = 8 << 20
    held = 0

    def measure(submit: object) -> None:
        nonlocal held
        held = tracemalloc.get_traced_memory()[0] - before

    scheduler.on_submit = measure
    body = json.dumps(CHAT).encode() + b" " * padding
    async with connect(app) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        tracemalloc.start()
        try:
            request = client.build_request("POST", "/v1/chat/completions", content=body, headers=JSON)
            before = tracemalloc.get_traced_memory()[0]
            assert (await client.send(request)).status_code == 200
        finally:
            tracemalloc.stop()
    assert 0 < held < padding // 8


@pytest.mark.anyio
async def test_a_body_that_does_not_come(app: FastAPI, connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_SECONDS", 0.05)

    async def forever() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    async with connect(app) as client:
        answer = await client.post("/api/chat", content=forever(), headers=JSON)
        assert answer.status_code == 408 and isinstance(answer.json()["error"], str)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"1",
        b'"x"',
        b"null",
        b"{} x",
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"model": "\\ud800"}',
        b"\xff\xfe",
        b'{"model": "\xed\xa0\x80"}',
        b"{'a': 1}",
        b'{"a": 01}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 33 + b"]" * 33,
        b'{"a":' * 33 + b"1" + b"}" * 33,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b'{"a": "\x00"}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_what_is_not_a_request_is_400(app: FastAPI, connect, path: str, body: bytes) -> None:
    async with connect(app) as client:
        answer = await client.post(path, content=body, headers=JSON)
        assert answer.status_code == 400, answer.text
        assert len(answer.content) < 600


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "the body has to be a JSON object"),
        (b"[1]", "the body has to be a JSON object"),
        (b'{"model": NaN}', "the body is not valid JSON, from byte 10 on"),
        (b'{"model": "\xff"}', "the body is not valid JSON: a text in it is not UTF-8"),
    ],
)
async def test_what_is_wrong_with_a_body_is_said(app: FastAPI, connect, body: bytes, what: str) -> None:
    async with connect(app) as client:
        answer = await client.post("/api/chat", content=body, headers=JSON)
        assert answer.json() == {"error": what}


@pytest.mark.anyio
async def test_a_compressed_body_is_refused_by_name(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        for encoding, status in (("gzip", 415), ("identity", 200)):
            headers = JSON | {"Content-Encoding": encoding}
            answer = await client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
            assert answer.status_code == status
            assert status == 200 or "'Content-Encoding'" in answer.json()["error"]["message"]


MIB16 = 16 << 20
HEAD = '{"model":"tiny","messages":[{"role":"user","content":"hi"}]'
HOSTILE = {
    "strings": '{"model":"tiny","prompt":[' + '"",' * (MIB16 // 3 - 20) + '""]}',
    "lists": '{"model":"tiny","prompt":[' + "[1]," * (MIB16 // 4 - 20) + "[1]]}",
    "wrong numbers": '{"model":"tiny","prompt":[' + "-1," * (MIB16 // 3 - 20) + "-1]}",
    "objects": '{"model":"tiny","prompt":[1' + ",{}" * (MIB16 // 3 - 20) + "]}",
    "fields": HEAD + "".join(f',"x{i}":0' for i in range(1_200_000)) + "}",
    "biases": HEAD + ',"logit_bias":{"0":0' + "".join(f',"x{i}":0' for i in range(90_000)) + "}}",
    "messages": '{"model":"tiny","messages":[1' + ",1" * (MIB16 // 2 - 40) + "]}",
    "commas": '{"model":"tiny","stop":[' + '"a",' * (MIB16 // 4 - 20) + '"a"]}',
    "as many as may be": '{"model":"tiny","stop":[' + '"a",' * 1_090_000 + '"a"]}',
    "quotes": '{"model":"tiny","messages":[{"role":"user","content":"' + '[\\"' * (MIB16 // 3 - 40) + '"}]}',
}


@pytest.mark.anyio
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/chat"])
async def test_a_hostile_body_costs_little(app: FastAPI, connect, path: str, body: str) -> None:
    content = body.encode()
    assert len(content) <= MIB16
    async with connect(app) as client:
        begin = time.process_time()
        answer = await client.post(path, content=content, headers=JSON)
        assert answer.status_code == 400 and len(answer.content) < 600
        assert time.process_time() - begin < 2  # a third of one here; listing every error took forty


def test_depth_is_counted_outside_strings() -> None:
    assert strict_json(b"[" * 32 + b"]" * 32)
    assert strict_json(b'["' + b"[{" * 1000 + b'\\"]"]') == ["[{" * 1000 + '"]']
    assert len(strict_json(b"[" + b",".join([b"[]", b'{"a":[]}'] * 1000) + b"]")) == 2000
    with pytest.raises(RequestError):
        strict_json(b"[" * 16 + b'{"a":' * 17 + b"0" + b"}" * 17 + b"]" * 16)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/livez", "/metrics"])
async def test_every_answer_carries_the_headers(app: FastAPI, connect, path: str) -> None:
    async with connect(app) as client:
        headers = (await client.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert (
        "default-src" in headers["content-security-policy"]
        and "unsafe" not in headers["content-security-policy"]
    )
    assert headers["x-request-id"].startswith("req-") and "server" not in headers


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/", "/livez", "/readyz", "/healthz", "/api/version", "/api/tags"])
async def test_head_for_those_who_only_look(app: FastAPI, connect, path: str) -> None:
    async with connect(app) as client:
        assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200


@pytest.mark.anyio
async def test_a_bug_is_a_500_that_says_nothing(
    app: FastAPI, connect, scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(submit: object) -> None:
        raise ZeroDivisionError("secret canary")

    scheduler.submit = broken
    async with connect(app) as client:
        for path in ("/v1/chat/completions", "/api/chat"):
            answer = await client.post(path, json=CHAT)
            assert answer.status_code == 500 and answer.headers["x-request-id"] in answer.text
            assert "canary" not in answer.text and "ZeroDivision" not in answer.text
    assert "canary" not in caplog.text and "ZeroDivisionError" in caplog.text
