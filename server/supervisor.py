"""Starts engine, scheduler and API, restarts what dies, and takes them down in order.

What children say by their exit code: 0 clean; 1 the configuration cannot be used, which the child has said on
stderr (final before the first readiness: trying again would not help); 75 requests were cut off by the drain
timeout; anything else is a death.
"""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ktransformers.engine.child import SUPERVISOR_VARIABLE
from ktransformers.server.config import ConfigError, ServerConfig

log = logging.getLogger(__name__)

EXIT_OK, EXIT_CONFIG, EXIT_INTERNAL, EXIT_DRAIN_TIMEOUT = 0, 1, 70, 75

STOP_SECONDS = 5.0
"""What scheduler and engine may take to end, and the API beyond its drain timeout."""
SAME_SIGNAL_SECONDS = 0.25
"""A second signal so soon is the first again: `timeout` sends it to us and to our group."""
READY_POLL_SECONDS = 0.05
ANSWER_SECONDS = 2.0
PROBE_SECONDS = 5.0
HUNG_PROBES = 6
"""This many in a row without a word from a process, and it hangs."""
GRACE_SECONDS = 60.0
"""A process that was just started may be loading: it does not hang yet."""


@dataclass(frozen=True)
class Restarts:
    """When a child that died is started again."""

    first_seconds: float = 0.5
    """Doubled for each death within `settled_seconds` of the start before it."""
    most_seconds: float = 30.0
    settled_seconds: float = 10.0
    deaths: int = 5
    """This many within `window_seconds`, and there is no restart until the first of them is older."""
    window_seconds: float = 300.0

    def delay(self, child: "Child", now: float) -> float:
        """Seconds until the restart of a child that has just died."""
        child.quick_deaths = child.quick_deaths + 1 if now - child.started < self.settled_seconds else 1
        child.deaths.append(now)
        while now - child.deaths[0] > self.window_seconds:
            child.deaths.popleft()
        if len(child.deaths) >= self.deaths:
            return child.deaths[-self.deaths] + self.window_seconds - now
        return min(self.first_seconds * 2.0 ** (child.quick_deaths - 1), self.most_seconds)


DEFAULT_RESTARTS = Restarts()


@dataclass
class Child:
    """One role: what to run, and how it has fared."""

    role: str
    command: Sequence[str]
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0
    quick_deaths: int = 0
    deaths: deque[float] = field(default_factory=deque)


class Supervisor:
    """The processes of one server. `run` it once."""

    def __init__(
        self,
        config: ServerConfig,
        commands: Mapping[str, Sequence[str]],
        restarts: Restarts = DEFAULT_RESTARTS,
    ) -> None:
        """`commands` are those of the roles engine, scheduler and server; they are started in that order."""
        self._config = config
        self._restarts = restarts
        self._children = {role: Child(role, command) for role, command in commands.items()}
        self._ready = False
        self._starting = 0
        """Children that are being started: they run, and their numbers are not known yet."""
        self._stopping = False
        self._hurry = asyncio.Event()
        self._signalled = 0.0

    async def run(self, announce: Callable[[str], None]) -> int:
        """Until a signal or an error that restarting does not help; the exit code.

        `announce` is told the URL when the first request would be served.
        """
        loop = asyncio.get_running_loop()
        self._end: asyncio.Future[int | None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
                loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGCHLD, self._reap_orphans)
        tasks = [loop.create_task(self._keep(child)) for child in self._children.values()]
        tasks += [loop.create_task(work) for work in (self._wait_ready(announce), self._watch())]
        for task in tasks:
            task.add_done_callback(self._on_task_done)
        try:
            code = await self._end
            return await self._drain() if code is None else code
        finally:
            self._stopping = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for child in self._children.values():
                process = child.process
                if process is not None and process.returncode is None:
                    _kill_group(process.pid)
                    await process.wait()

    def _on_signal(self) -> None:
        now = time.monotonic()
        if not self._end.done():
            self._end.set_result(None)
            self._signalled = now
        elif now - self._signalled > SAME_SIGNAL_SECONDS:
            self._hurry.set()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """What a task cannot handle must end the server: nobody would restart that child any more."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error", exc_info=error)
            self._finish(EXIT_INTERNAL)

    def _finish(self, code: int) -> None:
        if not self._end.done():
            self._end.set_result(code)

    # ---- keeping a child

    async def _keep(self, child: Child) -> None:
        while not self._stopping:
            try:
                process = await self._start(child)
            except OSError as error:  # no memory or no process to be had: perhaps later
                code, how = EXIT_INTERNAL, f"cannot be started: {error.strerror}"
                if not self._ready:
                    log.error("%s %s", child.role, how)
                    self._finish(EXIT_INTERNAL)
                    return
            else:
                code = await process.wait()
                how = _how(code)
                _kill_group(process.pid)  # what it may have started
                self._reap_orphans()  # what ended while its own end was not yet taken
            if self._stopping:
                return
            if code == EXIT_CONFIG and not self._ready:
                self._finish(EXIT_CONFIG)
                return
            delay = self._restarts.delay(child, time.monotonic())
            if len(child.deaths) >= self._restarts.deaths and not self._ready:
                log.error("%s %s again and again: giving up", child.role, how)
                self._finish(EXIT_INTERNAL)
                return
            log.error("%s %s; restarting in %.1f s", child.role, how, delay)
            await asyncio.sleep(delay)

    async def _start(self, child: Child) -> asyncio.subprocess.Process:
        child.started = time.monotonic()
        self._starting += 1
        try:
            child.process = await asyncio.create_subprocess_exec(
                *child.command,
                stdin=asyncio.subprocess.DEVNULL,
                process_group=0,
                env=os.environ | {SUPERVISOR_VARIABLE: str(os.getpid())},
            )
        finally:
            self._starting -= 1
            self._reap_orphans()  # what ended meanwhile
        return child.process

    def _reap_orphans(self) -> None:
        """Take leave of what dead children left to us, as they do to process 1 of a container."""
        children = {child.process.pid for child in self._children.values() if child.process is not None}
        while not self._starting:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in children:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)

    # ---- beginning and end

    async def _wait_ready(self, announce: Callable[[str], None]) -> None:
        while not await _is_ready(self._config):
            await asyncio.sleep(READY_POLL_SECONDS)
        self._ready = True
        announce(f"http://{authority(self._config)}")

    async def _watch(self) -> None:
        """Kill the API or the scheduler when it hangs. (The scheduler sees to the engine.)"""
        silent = {"server": 0, "scheduler": 0}
        while not self._stopping:
            await asyncio.sleep(PROBE_SECONDS)
            mute = await _mute(self._config)
            for role in silent:
                silent[role] = silent[role] + 1 if role == mute else 0
            if not mute or silent[mute] < HUNG_PROBES or self._stopping:
                continue
            child = self._children[mute]
            process, age = child.process, time.monotonic() - child.started
            if process is not None and process.returncode is None and age > GRACE_SECONDS:
                log.error("%s hangs: it is killed", mute)
                _kill_group(process.pid)

    async def _drain(self) -> int:
        """End the API first, which lets its requests finish, then what they need."""
        self._stopping = True
        log.info("stopping; a second signal, or Ctrl-C, ends it at once")
        codes = [await self._stop("server", self._config.drain_timeout + STOP_SECONDS)]
        codes += [await self._stop(role, STOP_SECONDS) for role in ("scheduler", "engine")]
        if EXIT_DRAIN_TIMEOUT in codes:
            return EXIT_DRAIN_TIMEOUT
        # A child that was signalled before it could handle it (by us, or by Ctrl-C before it was in its own
        # group) has ended as cleanly as any.
        return EXIT_OK if set(codes) <= {EXIT_OK, -signal.SIGTERM, -signal.SIGINT} else EXIT_INTERNAL

    async def _stop(self, role: str, seconds: float) -> int:
        """SIGTERM, and SIGKILL when the time is up or a second signal comes; the child's exit code."""
        child = self._children[role]
        process = child.process
        if process is None or process.returncode is not None:
            return EXIT_OK
        # Not process.send_signal, which takes leave of a child that has just ended: its code would be lost.
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        ended, hurry = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait([ended, hurry], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not ended.done():
            log.warning("%s is killed", child.role)
            _kill_group(process.pid)
            await ended
            # Only the API has requests to cut off; of the others it is a fault not to end.
            return EXIT_DRAIN_TIMEOUT if role == "server" or self._hurry.is_set() else EXIT_INTERNAL
        return ended.result()


def _kill_group(pid: int) -> None:
    """Of a child that runs, or has ended just now: later its number may be another's."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _how(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


async def _is_ready(config: ServerConfig) -> bool:
    """Whether /readyz says 200, and soon."""
    return (await _get(config, "/readyz"))[0] == 200


async def _mute(config: ServerConfig) -> str:
    """Who does not answer: "server" (the API), "scheduler", or ""."""
    code, body = await _get(config, "/healthz")
    if code == 0:
        return "server"
    try:
        return "" if msgspec.json.decode(body, type=_Health).scheduler else "scheduler"
    except msgspec.MsgspecError:
        return ""


class _Health(msgspec.Struct):
    scheduler: bool = True


async def _get(config: ServerConfig, path: str) -> tuple[int, bytes]:
    """Status and body; 0 when there is no answer soon, -1 when there will be none (refused, or hung up on, as
    is whoever comes when all connections are taken)."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection(_reachable(config.host), config.port)
            try:
                head = f"GET {path} HTTP/1.1\r\nHost: {authority(config)}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
                answer, _, body = (await reader.read(65536)).partition(b"\r\n\r\n")
                return int(answer.split()[1]), body or await reader.read(65536)
            finally:
                writer.close()
    except TimeoutError:
        return 0, b""
    except (OSError, ValueError, IndexError):
        return -1, b""


def authority(config: ServerConfig) -> str:
    """host:port by which this machine reaches the server."""
    host = _reachable(config.host)
    return f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


# ---- before anything is started


def commands(folder: Path) -> dict[str, list[str]]:
    """How to start each role, with its configuration in `folder`."""
    # -P: not with the modules that happen to lie in the current folder.
    python = [sys.executable, "-P", "-m"]
    roles = ("engine", "scheduler", "server")
    return {role: [*python, f"ktransformers.{role}", str(folder / f"{role}.json")] for role in roles}


def check_listening(config: ServerConfig) -> ServerConfig:
    """Bind and let go, so that a port in use is known before a model is loaded; port 0 becomes a free one.

    Errors: ConfigError.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.create_server((config.host, config.port), family=family) as listener:
            return msgspec.structs.replace(config, port=listener.getsockname()[1])
    except OSError as error:
        hint = {
            errno.EADDRINUSE: "; stop what listens there, or take another --port",
            errno.EACCES: "; ports below 1024 need a privilege, take a higher --port",
        }.get(error.errno or 0, "")
        where = f"{config.host} port {config.port}"
        # A name that is not found has numbers of its own.
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen on {where}: {why}{hint}") from None
