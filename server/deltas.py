"""What an answer is made of: how to continue a prompt, and the deltas of its choices as they come."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ktransformers.scheduler.protocol import Sampling
from ktransformers.server.accounting import Account, Usage

MERGED_DELTAS = 64
"""Deltas of several choices that may lie unread before their producers wait."""


@dataclass(frozen=True)
class Parameters:
    """How to continue a prompt. Of `sampling`, seed, stop tokens of the model and the limit are filled in
    by the Generator."""

    sampling: Sampling
    max_tokens: int | None = None
    """None: as many as the context has room for."""
    seed: int | None = None
    """None: a random one. Choice i of a prompt draws with seed + i."""
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    context: int | None = None
    """A shorter context than the model's."""
    cache_salt: str = ""
    """Its KV is shared only with requests of the same tenant that have the same one."""
    limit_name: str = "max_tokens"
    """What the client's protocol calls max_tokens."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One drawn token, its log-probability, and the likeliest ones."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice has to add. `finish`: "" goes on; "stop" or "length" end it."""

    index: int
    text: str
    finish: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    """Of the tokens of `text`."""
    reasoning: str = ""
    """What the model thought before its answer."""


class Generation:
    """The deltas of all choices of one call, of which the first is there already or is waited for no longer.
    Close it when leaving early."""

    def __init__(
        self,
        first: asyncio.Future[Delta],
        rest: AsyncGenerator[Delta, None],
        usage: Usage,
        headers: Mapping[str, str],
    ) -> None:
        self.usage = usage
        self.headers = headers
        """How much the client's limits leave, for the answer."""
        self._first: asyncio.Future[Delta] | None = first
        self._rest = rest

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if (first := self._first) is not None:
            delta = await first
            self._first = None
            return delta
        return await self._rest.__anext__()

    async def aclose(self) -> None:
        """Cancel what has not ended."""
        if self._first is not None:
            await abandon(self._first)
            self._first = None
        await self._rest.aclose()


async def abandon(task: "asyncio.Future[Delta]") -> None:
    """End it, whatever it was about to say."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def accounted(deltas: AsyncGenerator[Delta, None], account: Account) -> AsyncGenerator[Delta, None]:
    """`deltas`, and the account closed behind them, whatever becomes of them."""
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta
    finally:
        account.close()


async def merged(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several choices as they come. The first that fails ends all; leaving early closes all."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(MERGED_DELTAS)

    async def forward(stream: AsyncGenerator[Delta, None]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(stream):
                async for delta in stream:
                    await queue.put(delta)
        except Exception as error:  # handed on to the reader, which raises it
            end = error
        await queue.put(end)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Delta):
                yield item
            elif item is not None:
                raise item
            else:
                left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
