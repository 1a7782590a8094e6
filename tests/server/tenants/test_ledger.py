"""The ledger: what it holds is what the answers said, however they ended."""

import asyncio
import random
import sqlite3
import time
from concurrent.futures import Future

import httpx
import pytest

from ktransformers.scheduler.client import RequestFailed
from ktransformers.server.tenants.ledger import Ledger

THINK, ANSWER = 257, 258
"""The faked model's marks."""
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}]}


Counts = tuple[int, int, int, int, int]


def sums(office) -> dict[str, Counts]:
    """(requests, input, cached, output, reasoning) by key, from the file: the same by minute and by day."""
    found = {}
    for by_day in (True, False):
        totals: dict[str, Counts] = {}
        for row in office.store.usage.between(0, 1 << 40, by_day):
            old = totals.get(row.key, (0,) * 5)
            new = (row.requests, row.input, row.cached, row.output, row.reasoning)
            totals[row.key] = tuple(a + b for a, b in zip(old, new, strict=True))
        found[by_day] = totals
    assert found[True] == found[False]
    return found[True]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.anyio
async def test_the_sum_over_the_ledger_is_the_sum_over_the_answers(office, connect, scheduler) -> None:
    keys = {}
    for name in "abc":
        project, value = office.tenant(name)
        keys[office.store.keys(project.id)[0].id] = value
    office.follow()
    scheduler.cached, scheduler.thought = 3, "Hmm, hm."
    rng, expected = random.Random(1), dict.fromkeys(keys, (0,) * 5)

    async def one(client, key: str) -> None:
        body = CHAT | {"n": rng.choice([1, 1, 2, 4]), "max_tokens": rng.randint(1, 20)}
        answer = await client.post("/v1/chat/completions", json=body, headers=bearer(keys[key]))
        usage = answer.json()["usage"]
        new = (
            1, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"],
            usage["completion_tokens"], usage["completion_tokens_details"]["reasoning_tokens"],
        )  # fmt: skip
        assert new[2] == 3 and new[4] == (body["n"] * min(8, body["max_tokens"] - 1))
        expected[key] = tuple(a + b for a, b in zip(expected[key], new, strict=True))

    async with connect(office.app()) as client:
        await asyncio.gather(*(one(client, rng.choice(list(keys))) for _ in range(150)))
        prompts = {"model": "tiny", "prompt": ["one", "second"], "n": 2, "max_tokens": 3}
        key = next(iter(keys))
        answer = await client.post("/v1/completions", json=prompts, headers=bearer(keys[key]))
        usage = answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (9, 12)
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 8}
        more = (1, 9, usage["prompt_tokens_details"]["cached_tokens"], 12, 8)
        expected[key] = tuple(a + b for a, b in zip(expected[key], more, strict=True))
    await office.ledger.close()
    assert sums(office) == expected


@pytest.mark.anyio
async def test_answers_that_are_cut_off_count_as_far_as_they_came(office, scheduler, served) -> None:
    """Clients that leave at random moments, streams or not: the ledger has what the scheduler had handed out
    and this process had read, and never more than it."""
    project, value = office.tenant("a")
    key = office.store.keys(project.id)[0].id
    office.follow()
    scheduler.pause, scheduler.thought = 0.002, "Well, "
    app = office.app()
    rng, read = random.Random(2), {"tokens": 0, "prompts": 0, "reasoning": 0}
    handed = scheduler._events

    async def counted(submit):
        first, thinks = True, False
        async for event in handed(submit):
            read["tokens"] += len(event.tokens)
            (token,) = event.tokens
            read["reasoning"] += thinks and token != ANSWER
            thinks = token == THINK or (thinks and token != ANSWER)
            read["prompts"] += len(submit.tokens) if first else 0
            first = False
            yield event

    scheduler._events = counted
    with served(app) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=bearer(value)) as client:

            async def one(number: int) -> None:
                said = f"number {number}."
                body = {"model": "tiny", "messages": [{"role": "user", "content": said}]}
                body["stream"] = rng.random() < 0.5
                request = asyncio.create_task(client.post("/v1/chat/completions", json=body))
                while not any(said.encode() in bytes(submit.tokens) for submit in scheduler.submits):
                    await asyncio.sleep(0.002)
                await asyncio.sleep(rng.random() * 0.1)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)

            await asyncio.gather(*(one(number) for number in range(100)))
            scheduler.failure, scheduler.fail_after = RequestFailed("engine_restarted", "gone"), 4
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 500
            scheduler.failure, scheduler.fail_after = RequestFailed("overloaded", "full"), 0
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 503
            end = time.monotonic() + 60
            while sum(row.output for row in office.store.usage.between(0, 1 << 40, True)) < read["tokens"]:
                assert time.monotonic() < end, "the ledger promises a second"
                await asyncio.sleep(0.05)
    requests, prompt, _, output, reasoning = sums(office)[key]
    assert (prompt, output, reasoning) == (read["prompts"], read["tokens"], read["reasoning"])
    assert 0 < reasoning < output
    print(f"{requests} requests, {output} tokens, {len(scheduler.left)} were left")
    assert 0 < requests <= 101 and output  # not the one that was refused; a slow machine leaves early
    assert len(scheduler.left) > 20
    subject = office.limiter._subjects[project.id]
    assert (subject.open, subject.reserved, subject.used) == (0, 0, prompt + output)


@pytest.mark.anyio
async def test_what_could_not_be_written_is_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktransformers.server.tenants.ledger.FLUSH_SECONDS", 0.01)
    monkeypatch.setattr("ktransformers.server.tenants.ledger.RETRY_SECONDS", 0.05)
    written, failures = [], 3

    def write(at, rows, used) -> Future[None]:
        nonlocal failures
        future: Future[None] = Future()
        if failures:
            failures -= 1
            future.set_exception(sqlite3.OperationalError("disk is full"))
        else:
            written.extend(rows)
            future.set_result(None)
        return future

    ledger = Ledger(write)
    for _ in range(100):
        ledger.add(("p", "k", "m"), requests=1, input=2, cached=1, output=3, reasoning=2)
        ledger.touch("k")
        await asyncio.sleep(0.002)
    while failures:
        await asyncio.sleep(0.002)
    await ledger.close()
    assert sum(row.requests for row in written) == 100
    assert (sum(row.input for row in written), sum(row.output for row in written)) == (200, 300)
    assert (sum(row.cached for row in written), sum(row.reasoning for row in written)) == (100, 200)


@pytest.mark.anyio
async def test_the_last_use_of_a_key_is_kept(office, connect) -> None:
    project, value = office.tenant("a")
    office.follow()
    async with connect(office.app()) as client:
        await client.get("/v1/models", headers=bearer(value))
    await office.ledger.close()
    (key,) = office.store.keys(project.id)
    assert key.last_used_at is not None and abs(key.last_used_at - time.time()) < 60
