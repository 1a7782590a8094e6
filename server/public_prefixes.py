"""Keeps the KV of public prefixes in the cache: what administrators registered, and nothing else, is computed
in the scope that everybody reads.

Each is submitted like a prompt of one token's answer when the server starts, when the engine or the scheduler
was started anew, and once in a while, which also says that it is still wanted.
"""

import asyncio
import logging
import secrets
import time
from contextlib import aclosing

import msgspec

from ktransformers.engine.logs import frames
from ktransformers.scheduler.client import RequestFailed
from ktransformers.scheduler.protocol import PRIORITIES, PUBLIC_SCOPE, Sampling, Submit, Tenant
from ktransformers.server.errors import RequestError
from ktransformers.server.generation import Generator
from ktransformers.server.tenants.directory import Directory
from ktransformers.server.tenants.records import PublicPrefix

log = logging.getLogger("ktransformers.server.public_prefixes")

LOOK_SECONDS = 0.5
AGAIN_SECONDS = 60.0
_OWNER = Tenant("", weight=PRIORITIES["high"])


class PublicPrefixes:
    """Follows the directory."""

    def __init__(self, generator: Generator, directory: Directory) -> None:
        self._generator = generator
        self._directory = directory
        self._tokens: dict[str, list[int]] = {}
        """Of those that were computed, by id."""
        self._due = 0.0
        self._seen = (0, 0)
        """Engine restarts and steps at the last look."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            pause = LOOK_SECONDS
            try:
                await self.follow()
            except (RequestError, RequestFailed) as error:
                log.debug("public prefixes wait: %s", error)
            except Exception as error:  # of one of them, with which the others must not end
                log.error("public prefixes cannot be followed: %s", frames(error))
                pause = AGAIN_SECONDS
            await asyncio.sleep(pause)

    async def follow(self) -> None:
        """Withdraw what is registered no more, compute what is new or may be lost.

        Errors: RequestError while the engine is not ready; RequestFailed when some could not be computed.
        """
        wanted = {prefix.id: prefix for prefix in self._directory.view.prefixes}
        gone = [name for name in self._tokens if name not in wanted]
        for name in gone:
            self._generator.scheduler.withdraw(self._tokens.pop(name))
        if gone or self._is_another_engine() or time.monotonic() >= self._due:
            # What was withdrawn may have been the beginning of others, too.
            self._tokens.clear()
            self._due = time.monotonic() + AGAIN_SECONDS
        failure: RequestFailed | None = None
        for prefix in wanted.values():
            if prefix.id not in self._tokens:
                try:
                    self._tokens[prefix.id] = await self._compute(prefix)
                except RequestFailed as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def _is_another_engine(self) -> bool:
        status = self._generator.scheduler.status
        if status is None:
            return False
        (restarts, steps), self._seen = self._seen, (status.engine_restarts, status.steps)
        return status.engine_restarts != restarts or status.steps < steps

    async def _compute(self, prefix: PublicPrefix) -> list[int]:
        """Its tokens, once their KV is there. What cannot be a prompt is logged and left."""
        try:
            tokens = await tokens_of(self._generator, msgspec.json.decode(prefix.body))
        except RequestError as error:
            if error.code in ("not_ready", "draining"):
                raise
            log.warning("public prefix %s cannot be a prompt: %s", prefix.id, error)
            return []
        sampling = Sampling(temperature=0.0, max_tokens=1)
        submit = Submit(secrets.token_hex(16), _OWNER, tokens, sampling, 0.0, PUBLIC_SCOPE)
        async with aclosing(self._generator.scheduler.submit(submit)) as events:
            async for _ in events:
                pass
        return tokens


async def tokens_of(generator: Generator, body: dict[str, object]) -> list[int]:
    """What a prompt that begins with it begins with. Raises RequestError for what is neither."""
    text, messages = body.get("text"), body.get("messages")
    if isinstance(text, str) and messages is None:
        if tokens := await generator.text_prompt(text):
            return tokens
        raise RequestError("invalid_value", "a public prefix must not be empty")
    if isinstance(messages, list) and text is None:
        return await generator.chat_prompt(messages)
    raise RequestError("invalid_value", "a public prefix is either a text or a list of messages")
