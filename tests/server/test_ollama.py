"""The shapes and errors of Ollama's protocol."""

import json
from datetime import datetime
from typing import Any

import pytest
from fastapi import FastAPI

from ktransformers.scheduler.client import RequestFailed
from ktransformers.server import refusals

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
GENERATE: dict[str, Any] = {"model": "tiny", "prompt": "hi"}
ROUTES = pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])


def request_of(path: str) -> dict[str, Any]:
    return CHAT if path == "/api/chat" else GENERATE


def text_of(answer: dict[str, Any]) -> str:
    return answer["message"]["content"] if "message" in answer else answer["response"]


def check_end(answer: dict[str, Any]) -> None:
    assert answer["done"] is True
    for name in (
        "total_duration",
        "load_duration",
        "prompt_eval_count",
        "prompt_eval_duration",
        "eval_count",
        "eval_duration",
    ):
        assert type(answer[name]) is int and answer[name] >= 0
    assert answer["total_duration"] >= answer["eval_duration"]
    datetime.fromisoformat(answer["created_at"])


@pytest.mark.anyio
@ROUTES
async def test_streams_by_default(app: FastAPI, connect, path: str) -> None:
    async with connect(app) as client:
        answer = await client.post(path, json=request_of(path))
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    *lines, last = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(map(text_of, lines)) == "Hello, world!" and all(line["done"] is False for line in lines)
    assert all(line["model"] == "tiny" for line in [*lines, last])
    check_end(last)
    assert text_of(last) == "" and last["done_reason"] == "stop" and last["eval_count"] == 14


@pytest.mark.anyio
@ROUTES
async def test_whole(app: FastAPI, connect, path: str) -> None:
    body = request_of(path) | {"stream": False, "options": {"num_predict": 5}, "keep_alive": "5m"}
    async with connect(app) as client:
        answer = (await client.post(path, json=body)).json()
    check_end(answer)
    assert (text_of(answer), answer["done_reason"], answer["eval_count"]) == ("Hello", "length", 5)


@pytest.mark.anyio
async def test_the_name_may_carry_the_default_tag(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        assert (await client.post("/api/chat", json=CHAT | {"model": "tiny:latest"})).status_code == 200
        answer = await client.post("/api/chat", json=CHAT | {"model": "other"})
        assert answer.status_code == 404 and answer.json()["error"]


@pytest.mark.anyio
async def test_options_arrive(app: FastAPI, connect, scheduler) -> None:
    options = {
        "seed": 5,
        "num_predict": 3,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.25,
        "temperature": 0,
        "num_ctx": 100,
        "repeat_penalty": 1.5,
        "repeat_last_n": 32,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "stop": ["x"],
        "num_keep": 4,
        "typical_p": 1.0,
    }
    async with connect(app) as client:
        assert (await client.post("/api/chat", json=CHAT | {"options": options})).status_code == 200
        assert (await client.post("/api/chat", json=CHAT)).status_code == 200
        assert (
            await client.post(
                "/api/chat", json=CHAT | {"options": {"repeat_last_n": -1, "num_predict": -1, "seed": -1}}
            )
        ).status_code == 200
    first, default, whole = [submit.sampling for submit in scheduler.submits]
    assert (first.seed, first.max_tokens, first.top_k, first.top_p, first.min_p) == (5, 3, 7, 0.5, 0.25)
    assert (first.temperature, first.repetition_penalty, first.repetition_window) == (0.0, 1.5, 32)
    assert (first.presence_penalty, first.frequency_penalty) == (1, -1)
    assert (
        default.temperature,
        default.top_k,
        default.top_p,
        default.repetition_penalty,
        default.repetition_window,
    ) == (0.8, 40, 0.9, 1.1, 64)
    assert whole.repetition_window == 0 and whole.max_tokens > 4000


@pytest.mark.anyio
async def test_generate_uses_the_template_unless_raw(app: FastAPI, connect, scheduler) -> None:
    async with connect(app) as client:
        for extra in ({}, {"raw": True}, {"system": "be brief"}):
            assert (await client.post("/api/generate", json=GENERATE | extra)).status_code == 200
        assert (
            await client.post("/api/generate", json=GENERATE | {"raw": True, "system": "x"})
        ).status_code == 400
    prompts = [bytes(submit.tokens) for submit in scheduler.submits]
    assert prompts == [b"user: hi\n", b"hi", b"system: be brief\nuser: hi\n"]


@pytest.mark.anyio
async def test_logprobs(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        answer = await client.post(
            "/api/chat", json=CHAT | {"logprobs": True, "top_logprobs": 1, "stream": False}
        )
        lines = (await client.post("/api/generate", json=GENERATE | {"logprobs": True})).text.splitlines()
    assert answer.json()["logprobs"][0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}],
    }
    assert json.loads(lines[0])["logprobs"][0]["token"] == "H"


@pytest.mark.anyio
@pytest.mark.parametrize("body", [{"messages": []}, {"messages": None}, {}])
async def test_nothing_to_do_asks_for_loading(app: FastAPI, connect, body: dict[str, Any]) -> None:
    async with connect(app) as client:
        answer = (await client.post("/api/chat", json={"model": "tiny"} | body)).json()
        assert answer["done"] is True and answer["done_reason"] == "load"
        assert (await client.post("/api/generate", json={"model": "tiny"})).json()["done_reason"] == "load"
        answer = await client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
        assert answer.status_code == 400 and "keep_alive" in answer.json()["error"]


@pytest.mark.anyio
@ROUTES
@pytest.mark.parametrize(
    "changes",
    [
        {"format": "json"},
        {"think": "max"},
        {"think": 1},
        {"think": "low"},
        {"truncate": True},
        {"nope": 1},
        {"options": {"num_gpu": 1}},
        {"options": {"nope": 1}},
        {"options": {"typical_p": 0.5}},
        {"options": 1},
        {"options": {"top_k": 400}},
        {"images": ["aGk="]},
    ],
)
async def test_what_is_refused_is_named(
    app: FastAPI, connect, scheduler, path: str, changes: dict[str, Any]
) -> None:
    async with connect(app) as client:
        answer = await client.post(path, json=request_of(path) | changes)
    name, value = next(iter(changes.items()))
    assert answer.status_code == 400
    assert (next(iter(value)) if isinstance(value, dict) else name) in answer.json()["error"]
    assert not scheduler.submits


@pytest.mark.anyio
async def test_context_of_the_request(app: FastAPI, connect, scheduler) -> None:
    async with connect(app) as client:
        assert (await client.post("/api/chat", json=CHAT | {"options": {"num_ctx": 20}})).status_code == 200
        assert (await client.post("/api/chat", json=CHAT | {"options": {"num_ctx": 9}})).status_code == 400
        for options in ({}, {"num_ctx": 32768}, {"num_predict": 100_000}):  # as much as there is
            assert (await client.post("/api/chat", json=CHAT | {"options": options})).status_code == 200
    assert [submit.sampling.max_tokens for submit in scheduler.submits] == [11, 4087, 4087, 4087]


@pytest.mark.anyio
@ROUTES
async def test_failures(app: FastAPI, connect, scheduler, path: str, monkeypatch) -> None:
    monkeypatch.setattr(refusals, "REFUSAL_SECONDS", 0.0)
    scheduler.failure = RequestFailed("overloaded", "full", 1)
    async with connect(app) as client:
        answer = await client.post(path, json=request_of(path))
        assert answer.status_code == 503 and answer.json() == {"error": "full"}
        scheduler.fail_after = 2
        answer = await client.post(path, json=request_of(path))
        assert answer.status_code == 200 and json.loads(answer.text.splitlines()[-1]) == {"error": "full"}


@pytest.mark.anyio
async def test_about_the_model(app: FastAPI, connect, scheduler) -> None:
    async with connect(app) as client:
        (tag,) = (await client.get("/api/tags")).json()["models"]
        assert (
            tag["name"] == tag["model"] == "tiny:latest" and tag["size"] == 1234 and len(tag["digest"]) == 64
        )
        assert tag["details"]["family"] == "llama" and tag["details"]["quantization_level"] == "F16"
        datetime.fromisoformat(tag["modified_at"])
        (loaded,) = (await client.get("/api/ps")).json()["models"]
        assert loaded["context_length"] == 4096
        scheduler.status = None
        assert (await client.get("/api/ps")).json() == {"models": []}
        for body in ({"model": "tiny"}, {"name": "tiny:latest"}):
            shown = (await client.post("/api/show", json=body)).json()
            assert shown["template"] == "{{ x }}" and shown["capabilities"] == ["completion"]
        assert (await client.post("/api/show", json={"model": "x"})).status_code == 404
        assert (await client.get("/api/version")).json()["version"]
        for path in ("/", "/api/tags", "/api/version"):
            assert (await client.head(path)).status_code == 200


@pytest.mark.anyio
async def test_somebody_is_running(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        assert (await client.get("/")).text == "Ollama is running"


@pytest.mark.anyio
@ROUTES
@pytest.mark.parametrize("think", [True, False])
async def test_thinking_is_switched_by_the_template(
    app: FastAPI, connect, scheduler, path: str, think: bool
) -> None:
    async with connect(app) as client:
        answer = await client.post(path, json=request_of(path) | {"think": think})
        assert answer.status_code == 200
        assert f"enable_thinking: {think}\n".encode() in bytes(scheduler.submits[-1].tokens)
        raw = {"model": "tiny", "prompt": "x", "raw": True, "think": think}
        answer = await client.post("/api/generate", json=raw)
        assert answer.status_code == 400 and "'think' needs a template" in answer.json()["error"]


@pytest.mark.anyio
@ROUTES
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_model_thinks_comes_apart(
    app: FastAPI, connect, scheduler, path: str, stream: bool
) -> None:
    scheduler.thought = "They greet."
    async with connect(app) as client:
        answer = await client.post(path, json=request_of(path) | {"stream": stream})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    thought = "".join(line.get("message", line).get("thinking", "") for line in lines)
    assert ("".join(map(text_of, lines)), thought) == ("Hello, world!", "They greet.")
    check_end(lines[-1])
    assert lines[-1]["eval_count"] == 14 + 13
