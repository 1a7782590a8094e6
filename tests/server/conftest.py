"""The API process with its two neighbours faked: a model whose tokens are bytes, and a scheduler that plays a
script."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from ktransformers.engine.config import EngineConfig
from ktransformers.scheduler.client import RequestFailed
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.protocol import Logprobs, Status, Submit, TokenEvent
from ktransformers.server.app import make_app
from ktransformers.server.auth import Keys
from ktransformers.server.config import ServerConfig
from ktransformers.server.generation import Generator
from ktransformers.server.metrics import Metrics
from ktransformers.server.model import ModelCard
from ktransformers.server.routing import Service
from ktransformers.server.text.tokenizer import TooLongError

END = 256
VOCAB = 300
CONTEXT = 4096
REPLY = "Hello, world!"


class ByteTokenizer:
    """Every byte is a token; 256 ends an answer."""

    vocab_size = VOCAB
    eog_ids = frozenset({END})
    add_space_prefix = False

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b"<end>"

    def is_control(self, token: int) -> bool:
        return token >= 256


class ByteText:
    """A template of one line a turn."""

    tokenizer = ByteTokenizer()

    async def chat_ids_async(
        self, messages: Sequence[Mapping[str, object]], *, limit: int | None
    ) -> list[int]:
        return await self.prompt_ids_async("".join(f"{m['role']}: {m['content']}\n" for m in messages), limit)

    async def prompt_ids_async(self, text: str, limit: int | None) -> list[int]:
        if limit is not None and len(text) > limit:
            raise TooLongError
        return list(text.encode())


class ScriptedScheduler:
    """Answers every Submit with `reply`, a token an event, until told otherwise."""

    def __init__(self) -> None:
        self.reply = REPLY
        self.pause = 0.0
        self.failure: RequestFailed | None = None
        self.fail_after = 0
        self.cached = 0
        self.submits: list[Submit] = []
        self.left: list[str] = []
        self.cancelled: set[str] = set()
        self.drained = False
        self.status: Status | None = status_of()

    async def submit(self, submit: Submit) -> AsyncGenerator[TokenEvent, None]:
        self.submits.append(submit)
        ended = False
        try:
            async for event in self._events(submit):
                ended = bool(event.finish)
                yield event
        except RequestFailed:
            ended = True
            raise
        finally:
            if not ended:
                self.left.append(submit.id)

    async def _events(self, submit: Submit) -> AsyncIterator[TokenEvent]:
        sampling = submit.sampling
        tokens = [*self.reply.encode(), END][: sampling.max_tokens]
        for i, token in enumerate(tokens):
            await asyncio.sleep(self.pause)
            if self.failure is not None and i >= self.fail_after:
                raise self.failure
            if submit.id in self.cancelled:
                yield TokenEvent(submit.id, [], [], "cancelled")
                return
            finish = ""
            if token in sampling.stop_tokens:
                finish = "stop"
            elif i + 1 == sampling.max_tokens:
                finish = "length"
            logprobs = []
            if sampling.logprobs >= 0:
                logprobs = [Logprobs(-0.5, [(token, -0.5), (END, float("-inf"))][: sampling.logprobs])]
            yield TokenEvent(submit.id, [token], logprobs, finish, self.cached if i == 0 else 0, 0.001)

    def cancel(self, id: str) -> None:  # noqa: A002
        self.cancelled.add(id)

    def drain(self) -> None:
        self.drained = True


def status_of(**changes: Any) -> Status:
    values: dict[str, Any] = {
        "ready": True, "detail": "", "draining": False, "max_len": CONTEXT, "vocab": VOCAB, "isa": "avx2",
        "waiting": 2, "running": 3, "blocks_total": 100, "blocks_used": 25, "blocks_cached": 10, "steps": 7,
        "step_seconds": 1.5, "computed_tokens": 50, "recomputed_tokens": 1, "generated_tokens": 20,
        "prefix_hit_tokens": 16, "prefix_query_tokens": 64, "preemptions": 1, "engine_restarts": 0,
    }  # fmt: skip
    return Status(**(values | changes))


def make_config(**changes: Any) -> ServerConfig:
    return ServerConfig(scheduler=SchedulerConfig(engine=EngineConfig(model="/none/tiny.gguf")), **changes)


@pytest.fixture
def scheduler() -> ScriptedScheduler:
    return ScriptedScheduler()


@pytest.fixture
def make_status() -> Callable[..., Status]:
    """A status; keyword arguments are what differs from a ready engine's."""
    return status_of


@pytest.fixture
def anyio_backend() -> str:
    """Coroutine tests are marked `anyio` and run on asyncio."""
    return "asyncio"


AppMaker = Callable[..., FastAPI]


@pytest.fixture
def make(scheduler: ScriptedScheduler) -> AppMaker:
    """Builds the application; keyword arguments are settings."""

    def build(**changes: Any) -> FastAPI:
        config = make_config(**changes)
        metrics = Metrics("tiny", lambda: scheduler.status, config.vllm_metrics)
        generator = Generator("tiny", ByteText(), scheduler, metrics, config.request_timeout)
        card = ModelCard("tiny", 1_700_000_000, 1234, "0" * 64, "llama", "1M", "F16", "apache-2.0", "{{ x }}")
        return make_app(Service(config, Keys.load(config), metrics, generator, card))

    return build


@pytest.fixture
def app(make: AppMaker) -> FastAPI:
    return make()


@pytest.fixture
def connect() -> Callable[[FastAPI], httpx.AsyncClient]:
    """A client of an application in this process."""
    return lambda app: httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://localhost:8000"
    )
