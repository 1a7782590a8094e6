"""Each parameter at its edges and as what it is not: honoured, or a 400 that names it; never a crash."""

import json
from typing import Any

import pytest
from fastapi import FastAPI


@pytest.fixture(scope="module")
def app(make_once) -> FastAPI:
    """One for all: building it takes longer than the tests."""
    return make_once()


INF, NAN = "Infinity", "NaN"  # put into the JSON bare
BIG = 1 << 63

# name -> (values that are taken, values that are refused)
NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 2, 0.0, 1], [-0.001, 2.001, -1, 3]),
    "top_p": ([1e-9, 1], [0, -0.1, 1.001]),
    "min_p": ([0, 1], [-0.001, 1.001]),
    "presence_penalty": ([-2, 2], [-2.001, 2.001]),
    "frequency_penalty": ([-2, 2], [-2.001, 2.001]),
    "repetition_penalty": ([1e-3, 2], [0, -1, 2.001]),
}
INTEGERS: dict[str, tuple[list[Any], list[Any]]] = {
    "top_k": ([-1, 0, 1, 300], [-2, 301, 1.5]),
    "n": ([1, 8], [0, 9, -1, 1.5]),
    "max_tokens": ([1, 4096], [0, 4097, -1, 1.5]),
    "min_tokens": ([0, 1], [-1, 4097, 1.5]),
    "seed": ([-BIG, BIG - 1, 0], [BIG, -BIG - 1, 1.5]),
}
CHAT_INTEGERS: dict[str, tuple[list[Any], list[Any]]] = {
    "max_completion_tokens": ([1, 4096], [0, 4097, -1]),
    "top_logprobs": ([0, 20], [-1, 21, 1.5]),
}
COMPLETION_INTEGERS: dict[str, tuple[list[Any], list[Any]]] = {"logprobs": ([0, 20], [-1, 21, 1.5])}
OTHERS: dict[str, tuple[list[Any], list[Any]]] = {
    "stop": (
        ["x", ["x"] * 16, "x" * 128, [], None, "é" * 64],
        ["", "x" * 129, "é" * 65, ["x"] * 17, [""], [1], 1, {}, [["x"]], True],
    ),
    "stop_token_ids": (
        [[0], [299], [1] * 300, []],
        [[-1], [300], [1] * 301, [1.5], ["1"], [True], "1", 1, [BIG]],
    ),
    "logit_bias": (
        [{"0": 0}, {"299": 100}, {"5": -100}, {}],
        [
            {"-1": 0},
            {"300": 0},
            {"1": 100.1},
            {"1": -100.1},
            {"x": 1},
            {"1": "1"},
            {"1": None},
            [],
            1,
            {"1.5": 1},
            {"٣": 1},
            {str(BIG): 1},
            {str(i): 0 for i in range(301)},
        ],
    ),
    "stream": ([True, False, None], [1, 0, "true", []]),
    "ignore_eos": ([True, False, None], [1, "true", []]),
    "user": (["", "u" * 512, None], ["u" * 513, 1, [], "é" * 257]),
    "cache_salt": (["s", "s" * 128, None], ["", "s" * 129, 1, [], "é" * 65]),
}
CHAT_OTHERS: dict[str, tuple[list[Any], list[Any]]] = {
    "metadata": (
        [{}, {str(i): "v" for i in range(16)}, None],
        [{str(i): "v" for i in range(17)}, {"a": 1}, [], {"k" * 65: "v"}, {"k": "v" * 513}],
    ),
    "messages": (
        [
            [{"role": "user", "content": ""}],
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": []}],
        ],
        [
            [],
            None,
            "x",
            {},
            [1],
            [None],
            [{}],
            [{"role": "user"}],
            [{"role": "boss", "content": "x"}],
            [{"role": "user", "content": 1}],
            [{"role": "user", "content": []}],
            [{"role": "user", "content": "x"}] * 2049,
            [{"content": "x"}],
        ],
    ),
    "response_format": (
        [{"type": "text"}, None],
        [{"type": "json_object"}, {}, "text", {"type": "text", "x": 1}],
    ),
    "logprobs": ([True, False, None], [1, "true"]),
    "safety_identifier": (["x" * 512], ["x" * 513, 1]),
    "prompt_cache_key": (["x" * 512], ["x" * 513, 1]),
}
# What no number may be, whatever its bounds.
NOT_NUMBERS: list[Any] = [NAN, INF, "-" + INF, "1", True, False, [], {}, [1]]
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "hi"}


def cases(tables: list[dict[str, tuple[list[Any], list[Any]]]]) -> list[tuple[str, Any, bool]]:
    found = []
    for table in tables:
        for name, (good, bad) in table.items():
            numeric = table not in (OTHERS, CHAT_OTHERS)
            found += [(name, value, True) for value in good + ([None] if numeric else [])]
            found += [(name, value, False) for value in bad + (NOT_NUMBERS if numeric else [])]
            if numeric:
                found += [(name, value, False) for value in ("1e308", "1e309", str(10**400))]
                if name != "seed":
                    found += [(name, BIG, False), (name, -BIG, False)]
    return found


def encode(body: dict[str, Any], name: str, value: Any) -> bytes:
    bare = isinstance(value, str) and value.lstrip("-") in (NAN, INF, "1e308", "1e309", str(10**400))
    text = json.dumps(body | {name: "@" if bare else value})
    return (text.replace('"@"', value) if bare else text).encode()


async def check(
    app: FastAPI, connect: Any, path: str, body: dict[str, Any], name: str, value: Any, good: bool
) -> None:
    if name == "top_logprobs":
        body = body | {"logprobs": True}
    async with connect(app) as client:
        answer = await client.post(
            path, content=encode(body, name, value), headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == (200 if good else 400), answer.text
    if not good:
        error = answer.json()["error"]
        assert error["param"] == name or error["code"] == "invalid_json", error
        assert len(answer.content) < 600


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "value", "good"), cases([NUMBERS, INTEGERS, CHAT_INTEGERS, OTHERS, CHAT_OTHERS])
)
async def test_chat(app: FastAPI, connect, name: str, value: Any, good: bool) -> None:
    await check(app, connect, "/v1/chat/completions", CHAT, name, value, good)


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "value", "good"), cases([NUMBERS, INTEGERS, COMPLETION_INTEGERS, OTHERS]))
async def test_completions(app: FastAPI, connect, name: str, value: Any, good: bool) -> None:
    await check(app, connect, "/v1/completions", COMPLETION, name, value, good)


OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 2], [-0.1, 2.1]),
    "top_k": ([0, 300], [-1, 301, 1.5]),
    "top_p": ([0, 1], [-0.1, 1.1]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "repeat_penalty": ([0.1, 2], [0, 2.1]),
    "repeat_last_n": ([-1, 0, 64], [-2, 1.5]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "num_predict": ([-2, -1, 0, 1, 4097, 1 << 24], [-3, (1 << 24) + 1, 1.5]),
    "num_ctx": ([100, 4097, 1 << 24], [0, -1, (1 << 24) + 1, 1.5]),
    "seed": ([-BIG, BIG - 1], [BIG, -BIG - 1, 1.5]),
}


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(("name", "value", "good"), cases([OPTIONS]))
async def test_ollama_options(app: FastAPI, connect, path: str, name: str, value: Any, good: bool) -> None:
    body = (CHAT if path == "/api/chat" else COMPLETION) | {"stream": False}
    content = json.dumps(body)[:-1].encode() + b', "options": ' + encode({}, name, value) + b"}"
    async with connect(app) as client:
        answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == (200 if good else 400), answer.text
    assert good or name in answer.json()["error"] or "JSON" in answer.json()["error"]


@pytest.mark.anyio
async def test_fields_may_be_null(app: FastAPI, connect) -> None:
    """As clients in languages without optional fields send them."""
    names = [
        *NUMBERS,
        *INTEGERS,
        *CHAT_INTEGERS,
        "stop",
        "logit_bias",
        "tools",
        "tool_choice",
        "functions",
        "audio",
        "response_format",
        "stream_options",
        "user",
        "logprobs",
        "store",
        "service_tier",
        "reasoning_effort",
    ]
    async with connect(app) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT | dict.fromkeys(names))
    assert answer.status_code == 200, answer.text
