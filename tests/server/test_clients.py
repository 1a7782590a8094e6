"""The official client libraries, unmodified, against a real socket."""

from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest

from ktransformers.scheduler.client import RequestFailed

MESSAGES: Any = [{"role": "user", "content": "hi"}]
KEY = "user-key-0123456789"


@pytest.fixture
def url(make, served) -> Iterator[str]:
    with served(make()) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def test_openai_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model and model.id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert reply.choices[0].message.content == "Hello, world!" and reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].token == "H"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 14 and reply._request_id.startswith("req-")


def test_openai_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts, usage = ["", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    assert texts == ["Hello, world!"] * 2 and usage.completion_tokens == 28


def test_openai_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "Hello, world!"


def test_openai_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=5, logprobs=1)
    assert [choice.text for choice in reply.choices] == ["Hello", "Hello"]
    assert reply.choices[0].logprobs.tokens == list("Hello")
    chunks = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"


def test_openai_extra_fields(client: openai.OpenAI, scheduler) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 1}
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, extra_body=extra)
    taken = scheduler.submits[0].sampling
    assert (taken.top_k, taken.min_p, taken.repetition_penalty, taken.min_tokens) == (5, 0.1, 1.1, 1)


@pytest.mark.parametrize(("code", "error"), [
    ("overloaded", openai.InternalServerError), ("context_length_exceeded", openai.BadRequestError),
    ("engine_restarted", openai.InternalServerError),
])  # fmt: skip
def test_openai_errors(
    client: openai.OpenAI, scheduler, code: str, error: type[openai.APIStatusError]
) -> None:
    scheduler.failure = RequestFailed(code, "why", 1)
    with pytest.raises(error) as raised:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert raised.value.code == code
    scheduler.fail_after = 3
    with pytest.raises(openai.APIError) as late:
        for _ in client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
            pass
    assert late.value.code == code


def test_openai_retries_what_is_full(url: str, scheduler) -> None:
    """Retry-After is honoured; the second try is served."""
    scheduler.failure = RequestFailed("overloaded", "full", 0.1)
    failures = []

    def once(*_: object) -> None:
        if scheduler.failure is not None:
            failures.append(scheduler.failure)
            if len(failures) > 1:
                scheduler.failure = None

    scheduler.on_submit = once
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=2)
    assert client.chat.completions.create(model="tiny", messages=MESSAGES).choices[0].message.content
    assert len(scheduler.submits) == 2


def test_openai_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert raised.value.param == "temperature" and raised.value.code == "invalid_value"
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)
    assert raised.value.param == "tools" and raised.value.code == "unsupported_parameter"


def test_openai_keys(make, served) -> None:
    with served(make(keys=(KEY,))) as port:
        base = f"http://127.0.0.1:{port}/v1"
        with pytest.raises(openai.AuthenticationError) as raised:
            openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
        assert raised.value.code == "invalid_api_key"
        assert openai.OpenAI(base_url=base, api_key=KEY, max_retries=0).models.list().data


@pytest.mark.anyio
async def test_openai_async(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        reply = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert reply.choices[0].message.content == "Hello, world!"


def test_ollama(url: str, scheduler) -> None:
    client = ollama.Client(host=url)
    name = client.list().models[0].model
    assert name == "tiny:latest" and client.ps().models[0].context_length == 4096
    assert client.show(name).capabilities == ["completion"]
    reply = client.chat(model=name, messages=MESSAGES, options={"temperature": 0}, keep_alive="5m")
    assert reply.message.content == "Hello, world!" and reply.done_reason == "stop" and reply.eval_count == 14
    parts = list(client.chat(model=name, messages=MESSAGES, stream=True))
    assert "".join(part.message.content for part in parts) == "Hello, world!" and parts[-1].done
    assert client.generate(model=name, prompt="x", system="s").response == "Hello, world!"
    parts = client.generate(model=name, prompt="x", stream=True)
    assert "".join(part.response for part in parts) == "Hello, world!"
    with pytest.raises(ollama.ResponseError) as raised:
        client.chat(model="other", messages=MESSAGES)
    assert raised.value.status_code == 404
    scheduler.failure, scheduler.fail_after = RequestFailed("engine_restarted", "gone"), 3
    with pytest.raises(ollama.ResponseError, match="gone"):
        list(client.chat(model=name, messages=MESSAGES, stream=True))


def test_ollama_options_of_the_client(url: str, scheduler) -> None:
    options = ollama.Options(seed=3, num_predict=4, temperature=0.5, top_k=9, stop=["zz"])
    ollama.Client(host=url).generate(model="tiny", prompt="x", options=options)
    sampling = scheduler.submits[0].sampling
    assert (sampling.seed, sampling.max_tokens, sampling.temperature, sampling.top_k) == (3, 4, 0.5, 9)
