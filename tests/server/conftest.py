"""The API process with its two neighbours faked: a model whose tokens are bytes, and a scheduler that plays a
script."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop
from fastapi import FastAPI

from ktransformers.engine.config import EngineConfig
from ktransformers.scheduler.client import RequestFailed
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.protocol import Logprobs, Status, Submit, TokenEvent
from ktransformers.server.app import make_app
from ktransformers.server.auth import Keys
from ktransformers.server.config import ServerConfig
from ktransformers.server.connections import BoundedProtocol
from ktransformers.server.generation import Generator
from ktransformers.server.metrics import Metrics
from ktransformers.server.model import ModelCard
from ktransformers.server.routing import Service
from ktransformers.server.tenants.directory import Directory
from ktransformers.server.tenants.ledger import Ledger
from ktransformers.server.tenants.limits import Limiter
from ktransformers.server.text.messages import template_arguments, thinking_arguments
from ktransformers.server.text.reasoning import Markers
from ktransformers.server.text.tokenizer import TooLongError

# A shell that runs us in the background has Ctrl-C ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

END = 256
THINK, ANSWER = 257, 258
"""Around what the model thinks."""
VOCAB = 300
CONTEXT = 4096
REPLY = "Hello, world!"


class ByteTokenizer:
    """Every byte is a token; 256 ends an answer, 257 and 258 are around reasoning."""

    vocab_size = VOCAB
    eog_ids = frozenset({END})
    add_space_prefix = False

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else {END: b"<end>"}.get(token, b"<mark>")

    def marker_id(self, text: str) -> int | None:
        return {"<think>": THINK, "</think>": ANSWER}.get(text)

    def is_control(self, token: int) -> bool:
        return token >= 256


class ByteText:
    """A template of one line a turn."""

    tokenizer = ByteTokenizer()
    markers = Markers(tokenizer)

    variables = frozenset({"enable_thinking"})

    async def chat_ids_async(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        arguments: Mapping[str, object] | None,
        limit: int | None,
        think: bool | str | None,
    ) -> list[int]:
        given = dict(template_arguments(arguments or {}))
        if think is not None:
            given = thinking_arguments(think, self.variables, True) | given
        messages = [*messages, *({"role": name, "content": value} for name, value in given.items())]
        return await self.prompt_ids_async("".join(f"{m['role']}: {m['content']}\n" for m in messages), limit)

    async def prompt_ids_async(self, text: str, limit: int | None) -> list[int]:
        if limit is not None and len(text) > limit:
            raise TooLongError
        return list(text.encode())


class ScriptedScheduler:
    """Answers every Submit with `reply`, a token an event, until told otherwise."""

    def __init__(self) -> None:
        self.reply = REPLY
        self.thought: str | None = None
        """What it thinks before."""
        self.pause = 0.0
        self.held = False
        """Nothing comes until it is let go."""
        self.failure: RequestFailed | None = None
        self.fail_after = 0
        self.cached = 0
        self.submits: list[Submit] = []
        self.on_submit: Callable[[Submit], object] = lambda submit: None
        self.left: list[str] = []
        self.cancelled: set[str] = set()
        self.drained = False
        self.status: Status | None = status_of()

    async def submit(self, submit: Submit) -> AsyncGenerator[TokenEvent, None]:
        self.submits.append(submit)
        self.on_submit(submit)
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
        thought = [] if self.thought is None else [THINK, *self.thought.encode(), ANSWER]
        tokens = [*thought, *self.reply.encode(), END][: sampling.max_tokens]
        for i, token in enumerate(tokens):
            await asyncio.sleep(self.pause)
            while self.held:
                await asyncio.sleep(0.01)
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

    def withdraw(self, tokens: list[int]) -> bool:
        return True


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


def _maker(scheduler: ScriptedScheduler) -> AppMaker:
    def build(
        directory: Directory | None = None,
        limiter: Limiter | None = None,
        ledger: Ledger | None = None,
        keys: tuple[str, ...] = (),
        **changes: Any,
    ) -> FastAPI:
        config = make_config(**changes)
        metrics = Metrics("tiny", lambda: scheduler.status)
        generator = Generator(
            "tiny", ByteText(), scheduler, metrics, config.request_timeout, limiter, ledger
        )
        directory = directory or Directory()
        card = ModelCard(
            "tiny", 1_700_000_000, 1234, "0" * 64, "llama", "1M", "F16", "apache-2.0", "{{ x }}"
        )  # fmt: skip
        known = Keys([("", key) for key in keys], directory) if keys else Keys.load(config, directory)
        return make_app(Service(config, known, metrics, generator, card, directory))

    return build


@pytest.fixture
def make(scheduler: ScriptedScheduler) -> AppMaker:
    """Builds the application; keyword arguments are settings, and `keys`, as a file of keys has them."""
    return _maker(scheduler)


@pytest.fixture(scope="module")
def make_once() -> AppMaker:
    """The same for a whole module, with a scheduler of its own."""
    return _maker(ScriptedScheduler())


@pytest.fixture
def app(make: AppMaker) -> FastAPI:
    return make()


@pytest.fixture
def connect() -> Callable[[FastAPI], httpx.AsyncClient]:
    """A client of an application in this process."""
    return lambda app: httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://localhost:8000"
    )


@contextmanager
def _served(app: FastAPI) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, access_log=False
        )
    )

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            # Not serve(), which takes over signals and so belongs in the main thread.
            runner.run(server._serve([listener]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture
def served() -> Callable[[FastAPI], AbstractContextManager[int]]:
    """Runs an application behind a real socket, in a thread; gives the port."""
    return _served


@pytest.fixture(scope="module")
def served_once() -> Callable[[FastAPI], AbstractContextManager[int]]:
    """The same for a whole module."""
    return _served
