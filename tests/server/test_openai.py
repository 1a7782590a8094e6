"""The shapes and errors of OpenAI's protocol."""

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from ktransformers.scheduler.client import RequestFailed

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "hi"}


def events(text: str) -> list[Any]:
    """The data of an event stream; "[DONE]" as text."""
    lines = text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@pytest.mark.anyio
async def test_chat(app: FastAPI, connect, scheduler) -> None:
    scheduler.cached = 4
    async with connect(app) as client:
        answer = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert (
        answer["object"] == "chat.completion"
        and answer["id"].startswith("chatcmpl-")
        and answer["model"] == "tiny"
    )
    assert answer["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
        }
    ]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (9, 14, 23)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.anyio
@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_chat_stream(app: FastAPI, connect, scheduler, include_usage: bool, n: int) -> None:
    scheduler.cached = 4
    body = CHAT | {"stream": True, "n": n, "stream_options": {"include_usage": include_usage}}
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "[DONE]" and len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 14 * n
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}  # of one prompt
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    for i in range(n):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert mine[0]["delta"]["role"] == "assistant" and all("role" not in c["delta"] for c in mine[1:])
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hello, world!"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(app: FastAPI, connect, scheduler, stream: bool) -> None:
    scheduler.reply = "é!"
    body = CHAT | {"logprobs": True, "top_logprobs": 2, "stream": stream}
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(answer.text)[:-1]]
        content = [
            entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]
        ]
    else:
        content = answer.json()["choices"][0]["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "é!"
    assert content[0]["token"] == "\ufffd" and content[2]["token"] == "!"
    assert content[2]["top_logprobs"] == [
        {"token": "!", "logprob": -0.5, "bytes": [33]},
        {"token": "<end>", "logprob": -9999.0, "bytes": list(b"<end>")},
    ]
    assert scheduler.submits[0].sampling.logprobs == 2


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "said"),
    [(["lo, w"], "Hel"), (["o"], "Hell"), (["lots", "world?"], "Hello, world!"), (["H"], "")],
)
async def test_what_a_stop_string_takes_has_no_logprobs(
    app: FastAPI, connect, stop: list[str], said: str, stream: bool
) -> None:
    body = CHAT | {"logprobs": True, "stop": stop, "stream": stream}
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    choices = [c["choices"][0] for c in events(answer.text)[:-1]] if stream else answer.json()["choices"]
    found = [entry["token"] for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert "".join(found) == said
    texts = [c["delta"].get("content") or "" if stream else c["message"]["content"] for c in choices]
    assert "".join(texts) == said


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("hi", 1),
        (["a", "b"], 2),
        ([1, 2, 3], 1),
        ([[1], [2, 3]], 2),
        (["x"] * 16, 16),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_completion_prompts(
    app: FastAPI, connect, scheduler, prompt: Any, count: int, stream: bool
) -> None:
    body = COMPLETION | {"prompt": prompt, "n": 2, "max_tokens": 3, "seed": 7, "stream": stream}
    async with connect(app) as client:
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    texts = [""] * count * 2
    if stream:
        for chunk in events(answer.text)[:-1]:
            assert chunk["object"] == "text_completion"
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        texts = [choice["text"] for choice in answer.json()["choices"]]
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(count * 2))
    assert texts == ["Hel"] * count * 2
    seeds = [submit.sampling.seed for submit in sorted(scheduler.submits, key=lambda s: s.sampling.seed)]
    assert seeds == [7] * count + [8] * count


@pytest.mark.anyio
async def test_completion_logprobs(app: FastAPI, connect) -> None:
    body = COMPLETION | {"logprobs": 1, "max_tokens": 2}
    async with connect(app) as client:
        found = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
        chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)[:-1]
    assert found == {
        "tokens": ["H", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5}, {"e": -0.5}],
        "text_offset": [0, 1],
    }
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1]]


@pytest.mark.anyio
async def test_every_parameter_arrives(app: FastAPI, connect, scheduler) -> None:
    body = CHAT | {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 20,
        "min_p": 0.125,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "6": 1.5},
        "stop_token_ids": [3],
        "min_tokens": 2,
        "seed": -1,
        "max_tokens": 9,
        "max_completion_tokens": 8,
        "user": "u",
        "metadata": {"a": "b"},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "store": False,
        "n": None,
    }
    async with connect(app) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert (
            await client.post("/v1/chat/completions", json=CHAT | {"ignore_eos": True})
        ).status_code == 200
    sampling = scheduler.submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 20, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        -1,
        2,
        1.5,
    )
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5)) and sampling.stop_tokens == (3, 256)
    assert (sampling.min_tokens, sampling.max_tokens, sampling.seed) == (2, 8, (1 << 63) - 1)
    assert (
        scheduler.submits[1].sampling.stop_tokens == ()
        and scheduler.submits[1].sampling.max_tokens == 4096 - 9
    )
    assert scheduler.submits[0].tenant.id == "default"


@pytest.mark.anyio
async def test_seeds_are_random_when_not_given(app: FastAPI, connect, scheduler) -> None:
    async with connect(app) as client:
        for _ in range(3):
            await client.post("/v1/chat/completions", json=CHAT)
    assert len({submit.sampling.seed for submit in scheduler.submits}) == 3


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("world", "Hello, ", 12),
        (["xyz", ", w"], "Hello", 8),
        ("!x", "Hello, world!", 14),
        ("H", "", 1),
        (None, "Hello, world!", 14),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(
    app: FastAPI, connect, scheduler, stop: Any, text: str, tokens: int, stream: bool
) -> None:
    body = CHAT | {
        "stop": stop,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    }
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    if stream:
        *chunks, last, _ = events(answer.text)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        usage = last["usage"]
    else:
        choice, usage = answer.json()["choices"][0], answer.json()["usage"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert usage["completion_tokens"] == tokens
    # What was stopped by its text is cancelled at the scheduler.
    assert len(scheduler.left) == (tokens < 14)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("context_length_exceeded", 400),
        ("invalid_request", 400),
        ("overloaded", 503),
        ("draining", 503),
        ("not_ready", 503),
        ("deadline", 504),
        ("engine_restarted", 500),
        ("numerical_error", 500),
        ("internal", 500),
        ("never heard of", 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token_are_statuses(
    app: FastAPI, connect, scheduler, code: str, status: int, stream: bool
) -> None:
    scheduler.failure = RequestFailed(code, "why", 2.5)
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream, "n": 2})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == (code if code != "never heard of" else "internal")
    assert answer.headers.get("retry-after") == "3"


@pytest.mark.anyio
async def test_failures_after_it_are_events(app: FastAPI, connect, scheduler) -> None:
    scheduler.failure, scheduler.fail_after = RequestFailed("engine_restarted", "why"), 3
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert answer.status_code == 200
        found = events(answer.text)
        assert found[-1]["error"]["code"] == "engine_restarted" and "[DONE]" not in answer.text
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 500


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": ""}, "'stop': A stop"),
        ({"stop": ["a", 1]}, "'stop.1': Input"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "'messages.0.content.0.type': ",
        ),
        ({"messages": [{"role": "user", "content": 1}]}, "'messages.0.content': Input"),
        ({"messages": [{"role": "user", "content": "", "audio": 1}]}, "'messages.0.audio' is not supported"),
        ({"logit_bias": {"-5": 1}}, "'logit_bias.-5': String"),
        ({"logit_bias": {"1": 1, "01": 2}}, "'logit_bias.01': String"),  # one token, two values
        ({"tools": [1]}, "'tools' is not supported"),
        ({"model": "other"}, "model 'other' not found"),
    ],
)
async def test_the_message_says_where(app: FastAPI, connect, changes: Any, message: str) -> None:
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT | changes)
    assert answer.json()["error"]["message"].startswith(message), answer.text
    assert answer.json()["error"]["param"] == next(iter(changes))


@pytest.mark.anyio
async def test_what_vllms_clients_send_by_default(app: FastAPI, connect) -> None:
    defaults = {
        "best_of": 1,
        "use_beam_search": False,
        "skip_special_tokens": True,
        "echo": False,
        "length_penalty": 1.0,
    }
    async with connect(app) as client:
        answer = await client.post(
            "/v1/chat/completions",
            json=CHAT | defaults | {"add_generation_prompt": True, "chat_template": None},
        )
        assert answer.status_code == 200, answer.text
        answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"} | defaults)
        assert answer.status_code == 200, answer.text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"model": "other"}, "model_not_found", "model"),
        ({"messages": [{"role": "user", "content": "x" * 4096}]}, "context_length_exceeded", "messages"),
        ({"max_tokens": 4097}, "invalid_value", "max_tokens"),
        ({"stop_token_ids": [300]}, "invalid_value", "stop_token_ids"),
        ({"logit_bias": {"300": 1}}, "invalid_value", "logit_bias"),
        ({"top_k": 301}, "invalid_value", "top_k"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
        ({"nonsense": 1}, "unknown_parameter", "nonsense"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "invalid_value", "response_format"),
        ({"stream_options": {"include_usage": True}}, "unsupported_parameter", "stream_options"),
        ({"top_logprobs": 2}, "unsupported_parameter", "top_logprobs"),
        ({"store": True}, "unsupported_parameter", "store"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            None,
            "messages",
        ),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "unknown_parameter", "messages"),
    ],
)
async def test_what_is_refused_is_named(
    app: FastAPI, connect, scheduler, changes: Any, code: str | None, param: str
) -> None:
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT | changes)
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == param and (code is None or error["code"] == code)
    assert not scheduler.submits


@pytest.mark.anyio
@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [300]},
        {"prompt": [[1], [-1]]},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"prompt": None},
        {"prompt": ["a"] * 17},
        {"prompt": [[1]] * 17},
        {"prompt": 1},
        {"prompt": [1 << 40]},
        {"echo": True},
        {"suffix": "x"},
        {"best_of": 2},
        {"prompt": ["a", ""]},
    ],
)
async def test_bad_prompts(app: FastAPI, connect, scheduler, changes: Any) -> None:
    async with connect(app) as client:
        answer = await client.post("/v1/completions", json=COMPLETION | changes)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(changes)), answer.text
    assert not scheduler.submits


@pytest.mark.anyio
async def test_max_tokens_is_no_promise(app: FastAPI, connect, scheduler) -> None:
    """More than there is room for is cut to the room, as long as it is within the context at all."""
    async with connect(app) as client:
        assert (
            await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4096})
        ).status_code == 200
    assert scheduler.submits[0].sampling.max_tokens == 4096 - 9


@pytest.mark.anyio
async def test_not_ready(app: FastAPI, connect, scheduler, make_status) -> None:
    async with connect(app) as client:
        for status in (None, make_status(ready=False, detail="loading 40 %")):
            scheduler.status = status
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
            assert answer.json()["error"]["code"] == "not_ready"
    assert "loading 40 %" in answer.json()["error"]["message"]


@pytest.mark.anyio
async def test_models(app: FastAPI, connect) -> None:
    async with connect(app) as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny"]
        assert {"id", "object", "created", "owned_by"} <= listed["data"][0].keys()
        assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
        missing = await client.get("/v1/models/org/other")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


# ---- reasoning


@pytest.mark.anyio
async def test_thinking_is_switched_by_the_template(app: FastAPI, connect, scheduler) -> None:
    async with connect(app) as client:

        async def ask(**changes: Any) -> httpx.Response:
            return await client.post("/v1/chat/completions", json=CHAT | changes)

        for changes, prompt in (
            ({"chat_template_kwargs": {"enable_thinking": False}}, b"enable_thinking: False\n"),
            ({"chat_template_kwargs": {"reasoning_effort": "low"}}, b"reasoning_effort: low\n"),
            ({"reasoning_effort": "none"}, b"enable_thinking: False\n"),
        ):
            assert (await ask(**changes)).status_code == 200
            assert prompt in bytes(scheduler.submits[-1].tokens)
        for name, value in (
            ("reasoning_effort", "high"),
            ("reasoning_effort", "none at all"),
            ("chat_template_kwargs", {"add_generation_prompt": False}),
            ("chat_template_kwargs", {"enable_thinking": 1}),
            ("chat_template_kwargs", {str(i): True for i in range(17)}),
        ):
            answer = await ask(**{name: value})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == name


@pytest.mark.anyio
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_model_thinks_comes_apart(
    app: FastAPI, connect, scheduler, stream: bool, n: int
) -> None:
    scheduler.thought, scheduler.reply = "\nThey greet: world? ", "\n\nHello, world!"
    body = CHAT | {"stream": stream, "n": n, "logprobs": True, "stop": "world"}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    said: list[dict[str, str]] = [{"content": "", "reasoning_content": "", "tokens": ""} for _ in range(n)]
    parts = [choice for event in events(answer.text)[:-1] for choice in event["choices"]] if stream else []
    for choice in parts or answer.json()["choices"]:
        one, message = said[choice["index"]], choice.get("delta") or choice.get("message") or {}
        for field in ("content", "reasoning_content"):
            one[field] += message.get(field, "")
        for token in (choice["logprobs"] or {"content": []})["content"]:
            one["tokens"] += token["token"]
    # The stop string is looked for in the answer alone, and so are the log-probabilities.
    whole = {"content": "Hello, ", "reasoning_content": "They greet: world? ", "tokens": "\n\nHello, "}
    assert said == [whole] * n
    usage = (events(answer.text)[-2] if stream else answer.json())["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 20 * n
    assert usage["completion_tokens"] == (22 + 14) * n


@pytest.mark.anyio
async def test_an_answer_that_is_all_reasoning(app: FastAPI, connect, scheduler) -> None:
    scheduler.thought = "for ever"
    async with connect(app) as client:
        answer = (await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 5})).json()
        plain = (await client.post("/v1/completions", json=COMPLETION | {"max_tokens": 13})).json()
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("", "for ")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    # A plain completion is the text as it is; what of it was reasoning is counted all the same.
    assert plain["choices"][0]["text"] == "for everHel"
    assert plain["usage"]["completion_tokens_details"] == {"reasoning_tokens": 8}
