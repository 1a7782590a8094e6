"""A real model answers the official clients, unmodified."""

import httpx
import ollama
import openai
import pytest

QUESTIONS = [
    ("What is the capital of Japan?", "Tokyo"),
    ("What is 2+2?", "4"),
    ("How many days are in a week?", "7"),
]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize(("question", "answer"), QUESTIONS)
def test_openai_chat(client: openai.OpenAI, question: str, answer: str) -> None:
    model = client.models.list().data[0].id
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40
    )
    text = reply.choices[0].message.content
    assert text is not None and (answer in text or (answer == "7" and "seven" in text.lower())), text
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    ask = {
        "model": model,
        "messages": [{"role": "user", "content": "Name three fruits."}],
        "temperature": 0.7,
        "seed": 11,
        "max_tokens": 32,
    }
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert (
        chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    assert len(chunks) > 5
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert finishes == [whole.choices[0].finish_reason]


def test_completions_n_stop_and_logprobs(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    reply = client.completions.create(
        model=model, prompt="1, 2, 3, 4,", max_tokens=12, n=3, temperature=0, stop=["7"], logprobs=2
    )
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert len({c.text for c in reply.choices}) == 1
    assert "7" not in reply.choices[0].text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs.token_logprobs[0] <= 0


@pytest.mark.parametrize(("question", "answer"), QUESTIONS[:1])
def test_ollama_chat(server, question: str, answer: str) -> None:
    client = ollama.Client(host=server.url)
    model = client.list().models[0].model
    reply = client.chat(
        model=model,
        messages=[{"role": "user", "content": question}],
        options={"temperature": 0, "num_predict": 40},
    )
    assert answer in reply.message.content
    pieces = [
        part.message.content
        for part in client.chat(
            model=model,
            messages=[{"role": "user", "content": question}],
            options={"temperature": 0, "num_predict": 40},
            stream=True,
        )
    ]
    assert "".join(pieces) == reply.message.content
    assert (
        answer
        in client.generate(
            model=model, prompt=question, options={"temperature": 0, "num_predict": 40}
        ).response
    )


def test_the_page_and_the_banner(server) -> None:
    page = httpx.get(server.url, headers={"accept": "text/html"})
    assert page.status_code == 200 and "<div id=" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert httpx.get(server.url, headers={"accept": "*/*"}).text == "Ollama is running"


def test_each_process_shows_its_role(server) -> None:
    assert {role: server.role(role).is_running() for role in ("engine", "scheduler", "server")}
    loaded = server.role("engine").memory_maps()
    assert not any("libtorch" in m.path for m in loaded), "the CPU path loads torch"
