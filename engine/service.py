"""The engine's side of its socket: one scheduler, its steps one after the other, in one thread.

The socket is read between two steps only. ZeroMQ's own thread takes in what arrives meanwhile, so that the
next step, which the scheduler has sent ahead, starts a few microseconds after the answer to this one. There
is no other Python thread that could hold the GIL just then.
"""

import gc
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ktransformers.engine.batch import Executor
from ktransformers.engine.channel import Full, PeerGone, Server
from ktransformers.engine.protocol import Fault, FromEngine, Hello, Loading, Ready, Shutdown, Step, ToEngine
from ktransformers.engine.runner import Limits, Runner

log = logging.getLogger(__name__)

_LOAD_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Engine:
    """A loaded model."""

    executor: Executor
    limits: Limits
    block_bytes: int
    fingerprint: bytes


Load = Callable[[Callable[[int, int], None]], Engine]
"""Loads the model; reports (bytes done, bytes in total) as it goes."""


class Service:
    """Serves one engine on one socket."""

    def __init__(self, path: str) -> None:
        """Bind the socket; see channel.Server for errors."""
        self._server: Server[ToEngine] = Server(path, ToEngine)
        self._scheduler = b""
        """Identity of the scheduler that said Hello last: the slots are its own."""
        self._replaced: set[bytes] = set()
        self._waiting = b""
        """Who said Hello last while the model was being loaded."""

    def run(self, load: Load) -> None:
        """Load in a thread while answering Hello with Loading, then do steps until Shutdown.

        Raises what `load` raises.
        """
        try:
            engine = self._load(load)
            if engine is not None:
                self._serve(engine)
                engine.executor.close()
        finally:
            self._server.close()

    def _load(self, load: Load) -> Engine | None:
        """None: shut down while loading."""
        state = Loading(0, 0)
        engine: list[Engine] = []
        failure: list[BaseException] = []

        def report(done: int, total: int) -> None:
            nonlocal state
            state = Loading(done, total)

        def work() -> None:
            try:
                engine.append(load(report))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, name="load", daemon=True)
        thread.start()
        while thread.is_alive():
            received = self._server.poll(_LOAD_POLL_SECONDS)
            if received is None:
                continue
            peer, message = received
            if isinstance(message, Shutdown):
                return None
            if isinstance(message, Step):
                self._send(peer, Fault(message.n, "loading", "the model is being loaded"))
            else:
                self._waiting = peer
                self._send(peer, state)
        if failure:
            raise failure[0]
        return engine[0]

    def _serve(self, engine: Engine) -> None:
        runner = Runner(engine.executor, engine.limits)
        # What was made while loading stays for good: no collection in mid-step need look at it again.
        gc.collect()
        gc.freeze()
        if self._waiting:
            # As if it asked again now: its next Hello may be a second away.
            self._takes_over(self._waiting, Hello(), runner)
            self._send(self._waiting, _ready(engine, runner.steps))
        while True:
            received = self._server.poll(None)
            if received is None:
                continue
            peer, message = received
            if peer != self._scheduler and not self._takes_over(peer, message, runner):
                number = message.n if isinstance(message, Step) else -1
                self._send(peer, Fault(number, "not_yours", "say Hello first; or another scheduler has come"))
            elif isinstance(message, Step):
                self._send(peer, runner.step(message))
            elif isinstance(message, Hello):
                self._send(peer, _ready(engine, runner.steps))
            else:
                return

    def _takes_over(self, peer: bytes, message: ToEngine, runner: Runner) -> bool:
        """A scheduler that was not here before says Hello: the slots of the last one are no use to anyone."""
        if not isinstance(message, Hello) or peer in self._replaced:
            return False
        if self._scheduler:
            self._replaced.add(self._scheduler)
            log.info("another scheduler: all slots are empty")
        self._scheduler = peer
        runner.reset()
        return True

    def _send(self, peer: bytes, answer: FromEngine) -> None:
        try:
            self._server.send(peer, answer)
        except (PeerGone, Full) as error:
            log.warning("%s not delivered: %s", type(answer).__name__, error)


def _ready(engine: Engine, steps: int) -> Ready:
    limits = engine.limits
    return Ready(
        pid=os.getpid(),
        blocks=limits.blocks,
        block_tokens=limits.block_tokens,
        block_bytes=engine.block_bytes,
        max_len=limits.max_len,
        max_sequences=limits.max_sequences,
        max_batch_tokens=limits.max_batch_tokens,
        vocab=limits.vocab,
        isa=engine.executor.isa,
        steps=steps,
        fingerprint=engine.fingerprint,
    )
