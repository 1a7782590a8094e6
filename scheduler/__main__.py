"""The scheduler process: `python -m ktransformers.scheduler CONFIG.json`.

The first SIGTERM or SIGINT drains: new requests are refused, the process exits when the open ones have
ended. The second ends those with code "draining". Exit codes: 0; 75 when requests were cut off; 1 when the
configuration or the socket cannot be used, which stderr says in a line; 70 for anything else.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
import time

import uvloop

from ktransformers.engine.channel import Full, PeerGone, Server
from ktransformers.engine.child import die_with_parent, read_configuration
from ktransformers.engine.client import EngineClient
from ktransformers.engine.logs import start_logging
from ktransformers.engine.protocol import ToEngine
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.protocol import FromScheduler, ToScheduler
from ktransformers.scheduler.scheduler import Scheduler

log = logging.getLogger("ktransformers.scheduler")

EXIT_CONFIG = 1
EXIT_INTERNAL = 70
EXIT_CUT_OFF = 75
TICK_SECONDS = 1.0
COLLECT_SECONDS, COLLECT_IDLE_SECONDS = 3600.0, 60.0
"""All objects are looked through for cycles no more often; the second where there are no requests."""


class Process:
    """The scheduler with its sockets. One loop for each source of news; each ends with `advance`."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Binds the socket. Errors: as engine.channel.Server."""
        self._server = Server[ToScheduler](config.socket, ToScheduler)
        self._engine = EngineClient(config.engine.socket)
        self._scheduler = Scheduler(config, self, time.monotonic())
        self._stopping = False
        self._stop = asyncio.Event()
        self._wake: asyncio.TimerHandle | None = None
        self._collected_at = time.monotonic()

    async def run(self) -> int:
        """Until told to stop; the exit code."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_stop_signal)
        work = [asyncio.create_task(each) for each in (self._fronts(), self._engine_news(), self._ticks())]
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([*work, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        cut_off = self._scheduler.open_requests
        self._scheduler.shut_down()
        self._server.close()
        self._engine.close()
        return EXIT_CUT_OFF if cut_off else 0

    # ---- what comes in

    async def _fronts(self) -> None:
        while True:
            peer, message = await self._server.recv()
            self._scheduler.front(peer, message, time.monotonic())
            # All that has come is considered before the next step is planned.
            while (received := self._server.poll(0)) is not None:
                self._scheduler.front(*received, time.monotonic())
            self._advance()

    async def _engine_news(self) -> None:
        while True:
            news = await self._engine.recv()
            self._scheduler.engine(news, time.monotonic())
            self._advance()

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._scheduler.tick(time.monotonic())
            self._advance()
            self._collect(time.monotonic())

    def _collect(self, now: float) -> None:
        """Python's collector looks for cycles between decisions, not in one. There is next to nothing to
        find: what is decided makes none."""
        gc.collect(0)
        idle = not self._scheduler.open_requests
        if now - self._collected_at > (COLLECT_IDLE_SECONDS if idle else COLLECT_SECONDS):
            gc.collect()
            self._collected_at = now

    def _advance(self) -> None:
        self._scheduler.advance(time.monotonic())
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        now = time.monotonic()
        if (at := self._scheduler.wake_at(now)) is not None:
            self._wake = asyncio.get_running_loop().call_later(at - now, self._advance)
        if self._stopping and self._scheduler.open_requests == 0:
            self._stop.set()

    def _on_stop_signal(self) -> None:
        if self._stopping:
            self._stop.set()
        self._stopping = True
        self._scheduler.drain()
        self._advance()

    # ---- what goes out: scheduler.Ports

    def to_engine(self, message: ToEngine) -> None:
        """As Ports."""
        try:
            self._engine.send(message)
        except PeerGone:
            log.info("the engine went away while a step was being sent")

    def to_front(self, peer: bytes, message: FromScheduler) -> bool:
        """As Ports."""
        try:
            self._server.send(peer, message)
        except PeerGone:
            return False
        except Full as error:
            log.warning("front end: %s", error)
            return False
        return True

    def signal_engine(self, pid: int, signum: signal.Signals) -> None:
        """As Ports."""
        try:
            os.kill(pid, signum)
            # A process that was stopped takes no other signal than SIGKILL before it goes on.
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            log.info("engine process %d is gone already", pid)


def main(arguments: list[str]) -> int:
    """Schedule as the file named by the one argument says; the exit code."""
    config = read_configuration("scheduler", arguments, SchedulerConfig)
    return EXIT_CONFIG if config is None else run(config)


def run(config: SchedulerConfig) -> int:
    """Schedule until told to stop; the exit code."""
    listener = start_logging("scheduler")
    die_with_parent()
    try:
        process = Process(config)
    except (OSError, ValueError) as error:
        print(f"scheduler: {config.socket}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    gc.collect()
    gc.freeze()
    gc.disable()  # see Process._collect
    try:
        return uvloop.run(process.run())
    except Exception:
        log.exception("internal error")
        return EXIT_INTERNAL
    finally:
        listener.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
