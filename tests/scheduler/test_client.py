"""The client of the scheduler against a channel that the test plays."""

import asyncio
import contextlib
import time

import pytest

from ktransformers.engine.channel import Back, Full, Lost, PeerGone
from ktransformers.scheduler import client as client_module
from ktransformers.scheduler.client import RequestFailed, SchedulerClient
from ktransformers.scheduler.protocol import (
    Cancel,
    Failed,
    Hello,
    Sampling,
    Status,
    Submit,
    Tenant,
    TokenEvent,
    Tokens,
)

STATUS = Status(True, "", False, 100, 1000, "fake", *[0] * 14)


class Channel:
    def __init__(self):
        self.there = self.full = False
        self.sent = []
        self.news = asyncio.Queue()

    def send(self, message):
        if not self.there:
            raise PeerGone("not there")
        if self.full:
            raise Full("full")
        self.sent.append(message)

    async def recv(self):
        return await self.news.get()

    def close(self):
        self.there = False

    # ---- the test plays the scheduler

    async def say(self, *messages):
        for message in messages:
            if isinstance(message, Back | Lost):
                self.there = isinstance(message, Back)
            self.news.put_nowait(message)
        for _ in range(4):
            await asyncio.sleep(0)

    def of(self, kind):
        return [m for m in self.sent if isinstance(m, kind)]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def submit(id_="a", deadline=0.0):
    return Submit(id_, Tenant("t"), [1, 2], Sampling(max_tokens=9), deadline, b"")


def event(id_="a", token=5, finish=""):
    return TokenEvent(id_, [token], [], finish)


def world(test):
    """Runs an async test with a client that is connected."""

    def run():
        async def main():
            channel, clock = Channel(), Clock()
            client = SchedulerClient(channel, clock)
            client.start()
            await channel.say(Back())
            try:
                await asyncio.wait_for(test(client, channel, clock), 60)
            finally:
                await client.close()

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


async def collect(client, message):
    """Its events, and the code when it fails."""
    events = []
    try:
        async for each in client.submit(message):
            events.append(each)  # noqa: PERF401 - a comprehension would lose what came before a failure
    except RequestFailed as failure:
        events.append(failure.code)
    return events


async def begin(client, channel, message):
    task = asyncio.create_task(collect(client, message))
    await channel.say()
    return task


@world
async def test_events_up_to_the_end(client, channel, clock):
    task = await begin(client, channel, submit())
    await channel.say(Tokens([event(), event("other")]), Tokens([event(finish="stop")]), Tokens([event()]))
    assert [e.finish for e in await task] == ["", "stop"]
    assert client.open_requests == 0 and not channel.of(Cancel)


@world
async def test_failed_is_raised(client, channel, clock):
    with pytest.raises(RequestFailed) as caught:
        stream = client.submit(submit())
        await channel.say(Failed("unknown", "internal", "no"))
        channel.news.put_nowait(Failed("a", "overloaded", "busy", 7.0))
        await anext(stream)
    assert (caught.value.code, caught.value.retry_after) == ("overloaded", 7.0)


@world
async def test_leaving_cancels(client, channel, clock):
    async with contextlib.aclosing(client.submit(submit())) as stream:
        channel.news.put_nowait(Tokens([event()]))
        await anext(stream)
    assert [c.id for c in channel.of(Cancel)] == ["a"]
    await channel.say(Tokens([event()]))
    assert client.open_requests == 0


@world
async def test_a_cancelled_task_cancels(client, channel, clock):
    task = await begin(client, channel, submit())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [c.id for c in channel.of(Cancel)] == ["a"]


@world
async def test_cancel_is_answered_by_the_scheduler(client, channel, clock):
    task = await begin(client, channel, submit())
    client.cancel("a")
    client.cancel("unknown")
    assert [c.id for c in channel.of(Cancel)] == ["a"]
    await channel.say(Tokens([event(finish="cancelled")]))
    assert [e.finish for e in await task] == ["cancelled"]


@world
async def test_cancel_while_the_scheduler_is_away(client, channel, clock):
    await channel.say(Lost())
    task = await begin(client, channel, submit())
    client.cancel("a")
    assert [e.finish for e in await task] == ["cancelled"]
    await channel.say(Back())
    assert not channel.of(Submit)


@world
async def test_one_id_is_open_once(client, channel, clock):
    task = await begin(client, channel, submit())
    with pytest.raises(ValueError, match="open already"):
        await anext(client.submit(submit()))
    await channel.say(Tokens([event(finish="stop")]))
    assert len(await task) == 1


@world
async def test_the_death_of_the_scheduler(client, channel, clock):
    """What has begun ends; what has not is submitted again, with what is left of its deadline."""
    begun = await begin(client, channel, submit("begun"))
    waits = await begin(client, channel, submit("waits", deadline=10.0))
    late = await begin(client, channel, submit("late", deadline=2.0))
    await channel.say(Tokens([event("begun")]), Lost())
    assert (await begun)[-1] == "engine_restarted"
    assert client.status is None
    clock.now += 4.0
    channel.sent.clear()
    await channel.say(Back())
    assert isinstance(channel.sent[0], Hello)
    assert [(s.id, s.deadline) for s in channel.of(Submit)] == [("waits", 6.0)]
    assert await late == ["deadline"]
    await channel.say(Tokens([event("waits", finish="length")]))
    assert [e.finish for e in await waits] == ["length"]


@world
async def test_a_scheduler_that_stays_away(client, channel, clock):
    await channel.say(Lost())
    task = await begin(client, channel, submit())
    clock.now += 31.0
    assert await task == ["not_ready"]


@world
async def test_a_scheduler_that_does_not_read(client, channel, clock):
    channel.full = True
    assert await collect(client, submit()) == ["overloaded"]


@world
async def test_a_status_grows_old(client, channel, clock):
    await channel.say(STATUS)
    assert client.status == STATUS
    clock.now += 3.1
    assert client.status is None


@world
async def test_a_slow_reader_is_folded_then_cancelled(client, channel, clock):
    stream = client.submit(submit())
    channel.news.put_nowait(Tokens([event(token=0)]))
    first = await anext(stream)
    for token in range(1, 1000):
        channel.news.put_nowait(Tokens([event(token=token)]))
    await channel.say()
    while not channel.news.empty():
        await asyncio.sleep(0)
    assert not channel.of(Cancel), "being behind for a moment is no fault"
    clock.now += client_module.BEHIND_SECONDS + 1
    await channel.say(Tokens([event(token=1000)]))
    assert channel.of(Cancel)
    await channel.say(Tokens([event(token=1001, finish="cancelled")]))
    rest = [each async for each in stream]
    assert len(rest) == client_module.BEHIND_EVENTS
    assert first.tokens + [t for each in rest for t in each.tokens] == list(range(1002))
    assert rest[-1].finish == "cancelled"


@world
async def test_a_reader_that_catches_up_is_forgiven(client, channel, clock):
    stream = client.submit(submit())
    channel.news.put_nowait(Tokens([event()]))
    await anext(stream)
    for _ in range(2):
        await channel.say(*(Tokens([event()]) for _ in range(300)))
        while not channel.news.empty():
            await asyncio.sleep(0)
        for _ in range(200):
            await anext(stream)
        await channel.say(Tokens([event()]))
        clock.now += client_module.BEHIND_SECONDS + 1
    assert not channel.of(Cancel)
    await stream.aclose()


@world
async def test_a_step_of_many_leaves_room_for_others(client, channel, clock):
    """Whoever asks while the readers of a step's tokens work waits for a few of them, not for all."""
    read, in_a_turn = [], []

    async def reader(id_):
        nonlocal read
        async for _ in client.submit(submit(id_)):
            read += [id_]

    async def turns():
        while True:
            before = len(read)
            await asyncio.sleep(0)
            in_a_turn.append(len(read) - before)

    ids = [f"r{i}" for i in range(32)]
    tasks = [asyncio.create_task(reader(id_)) for id_ in ids]
    await asyncio.sleep(0)
    other = asyncio.create_task(turns())
    channel.news.put_nowait(Tokens([event(id_) for id_ in ids]))
    while len(read) < len(ids):
        await asyncio.sleep(0)
    channel.news.put_nowait(Tokens([event(id_, finish="stop") for id_ in ids]))
    await asyncio.gather(*tasks)
    other.cancel()
    assert read == ids + ids
    assert max(in_a_turn) <= 8


@world
async def test_hello_once_a_second(client, channel, clock):
    channel.sent.clear()
    begin = time.monotonic()
    while len(channel.of(Hello)) < 2:
        await asyncio.sleep(0.01)
    assert time.monotonic() - begin > 0.99  # no second one before; a busy machine may be later


def test_what_cannot_go_on_is_said():
    async def main():
        channel, failed = Channel(), asyncio.Event()
        client = SchedulerClient(channel, Clock())
        client.start(failed.set)
        channel.news.put_nowait(Tokens(None))
        await asyncio.wait_for(failed.wait(), 60)
        await client.close()

    asyncio.run(main())


def test_closing_ends_what_is_open():
    async def main():
        channel = Channel()
        client = SchedulerClient(channel, Clock())
        client.start()
        await channel.say(Back())
        task = await begin(client, channel, submit())
        await client.close()
        assert await task == ["internal"]

    asyncio.run(main())
