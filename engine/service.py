"""The engine's side of its socket: one scheduler, its steps one after the other, in one thread.

The socket is read between two steps, and every few milliseconds in the middle of one: an urgent step is then
done at once and answered, whatever else has come waits its turn. ZeroMQ's own thread takes in what arrives
meanwhile, so that the next step, which the scheduler has sent ahead, starts a few microseconds after the
answer to this one. The
only other Python threads are the mover's, which hold the GIL for some microseconds a block; what they have
done is reported after the answer to a step, or when they wake a socket that waits.
"""

import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ktransformers.engine.batch import Executor
from ktransformers.engine.channel import Full, PeerGone, Server
from ktransformers.engine.moves import BlockMoves
from ktransformers.engine.protocol import (
    Fault,
    FromEngine,
    Hello,
    Loading,
    Moves,
    Ready,
    Shutdown,
    Step,
    Stored,
    StoredBlock,
    ToEngine,
)
from ktransformers.engine.runner import Limits, Runner
from ktransformers.kvcache.stores.memory import HostBlocks
from ktransformers.kvcache.stores.store import BlockStore

log = logging.getLogger(__name__)

_LOAD_POLL_SECONDS = 0.05
_STORED_BLOCKS = 4096
"""Blocks of one Stored."""
_COPY_END_SECONDS = 0.5
_DISK_CLOSE_SECONDS = 2.0
_NEWS_SECONDS = 0.002
"""Between two MovesDone: a thousand blocks may be copied in a second, and nobody waits for one alone."""
_OVERDUE_POLL_SECONDS = 5.0
_MOST_LATER = 1000
"""Messages that wait for the end of a step; beyond that they stay in ZeroMQ's queue, urgent ones too."""
_TICK_SECONDS = 0.001
"""What a poll can wait at least."""


@dataclass(frozen=True)
class Engine:
    """A loaded model."""

    executor: Executor
    limits: Limits
    fingerprint: bytes
    host: HostBlocks | None = None
    disk: BlockStore | None = None


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
        self._later: deque[tuple[bytes, ToEngine]] = deque()
        """Came in the middle of a step."""
        self._waiting = b""
        """Who said Hello last while the model was being loaded."""
        self.stopped = False
        """Whether `stop` was called."""

    def run(self, load: Load) -> None:
        """Load in a thread while answering Hello with Loading, then do steps until Shutdown.

        Raises what `load` raises.
        """
        try:
            engine = self._load(load)
            if engine is not None:
                moves = BlockMoves(engine.executor, engine.host, engine.disk, self._server.wake)
                try:
                    self._serve(engine, moves)
                finally:
                    _end(moves, engine.disk)
                engine.executor.close()
        finally:
            self._server.close()

    def stop(self) -> None:
        """End `run` after the step in hand: for a signal handler."""
        self.stopped = True
        self._server.wake()

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
            if self.stopped:
                return None
            if received is None:
                continue
            peer, message = received
            if isinstance(message, Shutdown):
                return None
            if isinstance(message, Step | Moves):
                number = message.n if isinstance(message, Step) else -1
                self._send(peer, Fault(number, "loading", "the model is being loaded"))
            else:
                self._waiting = peer
                self._send(peer, state)
        if failure:
            raise failure[0]
        return engine[0]

    def _serve(self, engine: Engine, moves: BlockMoves) -> None:
        runner = Runner(engine.executor, engine.limits, moves.arriving)
        # What was made while loading stays for good: no collection in mid-step need look at it again.
        gc.collect()
        gc.freeze()
        if self._waiting:
            # As if it asked again now: its next Hello may be a second away.
            self._hello(self._waiting, engine, runner, moves)
        runner.between = lambda: self._in_mid_step(runner)
        told_at = 0.0
        while not self.stopped:
            wait = None if moves.is_idle else _OVERDUE_POLL_SECONDS
            if self._scheduler and moves.has_news:
                left = told_at + _NEWS_SECONDS - time.monotonic()
                wait = max(left, _TICK_SECONDS) if left > 0 else 0.0
            received = self._later.popleft() if self._later else self._server.poll(wait)
            if received is not None and not self._answer(*received, engine, runner, moves):
                return
            moves.give_up_overdue()
            if not self._scheduler or not moves.has_news:
                continue
            if time.monotonic() >= told_at + _NEWS_SECONDS and (news := moves.news()) is not None:
                told_at = time.monotonic()
                self._send(self._scheduler, news)

    def _in_mid_step(self, runner: Runner) -> None:
        while len(self._later) < _MOST_LATER and (received := self._server.poll(0)) is not None:
            peer, message = received
            if isinstance(message, Step) and message.urgent and peer == self._scheduler:
                self._send(peer, runner.step(message))
            else:
                self._later.append(received)

    def _answer(
        self, peer: bytes, message: ToEngine, engine: Engine, runner: Runner, moves: BlockMoves
    ) -> bool:
        """False: it was Shutdown."""
        if isinstance(message, Hello) and peer not in self._replaced:
            self._hello(peer, engine, runner, moves)
        elif peer != self._scheduler:
            number = message.n if isinstance(message, Step) else -1
            self._send(peer, Fault(number, "not_yours", "say Hello first; or another scheduler has come"))
        elif isinstance(message, Step):
            self._send(peer, runner.step(message))
        elif isinstance(message, Moves):
            moves.start(message)
        else:
            return False
        return True

    def _hello(self, peer: bytes, engine: Engine, runner: Runner, moves: BlockMoves) -> None:
        """Answer Ready. For a scheduler that was not here before slots and blocks are emptied first."""
        is_new = peer != self._scheduler
        if is_new:
            if self._scheduler:
                self._replaced.add(self._scheduler)
                log.info("another scheduler: all slots are empty")
            self._scheduler = peer
            moves.abandon()
            runner.reset()
        self._send(peer, _ready(engine, runner.steps))
        if is_new and engine.disk is not None:
            for piece in stored(engine.disk):
                self._send(peer, piece)

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
        block_bytes=engine.executor.block_bytes,
        max_len=limits.max_len,
        max_sequences=limits.max_sequences,
        max_batch_tokens=limits.max_batch_tokens,
        vocab=limits.vocab,
        isa=engine.executor.isa,
        steps=steps,
        fingerprint=engine.fingerprint,
        host_blocks=engine.host.blocks if engine.host is not None else 0,
        disk_bytes=_disk_bytes(engine.disk),
        kept_states=limits.kept_states,
        urgent_tokens=engine.executor.urgent_tokens,
    )


def _disk_bytes(disk: BlockStore | None) -> int:
    if disk is None:
        return 0
    stats = disk.stats()
    return stats.cap if stats.state != "off" else 0


def stored(disk: BlockStore) -> Iterator[Stored]:
    """What the disk has, in messages of a bounded size; the last one may be empty."""
    entries = disk.entries()
    for begin in range(0, len(entries) + 1, _STORED_BLOCKS):
        piece = entries[begin : begin + _STORED_BLOCKS]
        blocks = [StoredBlock(e.key, e.parent, e.owner, e.size, e.hits, e.last_use) for e in piece]
        yield Stored(blocks, complete=begin + _STORED_BLOCKS > len(entries))


def _end(moves: BlockMoves, disk: BlockStore | None) -> None:
    """Let the disk seal and commit; a disk that does not answer is left to its fate, which it survives."""
    moves.close(_COPY_END_SECONDS)
    if disk is not None:
        thread = threading.Thread(target=disk.close, name="close the disk tier", daemon=True)
        thread.start()
        thread.join(_DISK_CLOSE_SECONDS)
        if thread.is_alive():
            log.warning("the disk tier is not closed after %.0f s", _DISK_CLOSE_SECONDS)
