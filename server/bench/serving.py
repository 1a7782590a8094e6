"""A server under closed-loop traffic, beside the engine alone and other servers under the same."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import uvloop

from ktransformers.server.bench.clients import Measured, ServerError, Target, Traffic
from ktransformers.server.bench.processes import Usage, listener, signal_tree, usage

_READY: Final = "Ready: "
_IDLE_SECONDS: Final = 3.0
_STOP_SECONDS: Final = 20.0


@dataclass
class Serving:
    """One number of clients; a list has one entry for each round."""

    traffic: Traffic
    rounds: dict[str, list[Measured]] = field(default_factory=dict)
    """Of each server, by its name or URL."""
    alone: list[float] = field(default_factory=list)
    """Output tokens per second of the engine without processes around it."""
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """CPU seconds of each of our processes for 1,000 output tokens."""


@dataclass(frozen=True)
class Footprint:
    """What our server takes apart from traffic."""

    first_token: float
    """Seconds from starting the command to the first token."""
    idle_cpu: float
    """CPUs used by all processes together while nothing is asked."""
    peak_bytes: dict[str, int]
    """Largest resident size of each process after the traffic."""


@contextmanager
def started(model: Path, threads: int, log: Path) -> Iterator[tuple[str, int, float]]:
    """Our server on a free port: its URL, its process, and when it was started. Errors: ServerError."""
    command = [sys.executable, "-P", "-m", "ktransformers.server.cli", "serve", str(model)]
    command += ["--port", "0", "--threads", str(threads), "--log-level", "warning"]
    with log.open("wb") as said:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            for line in process.stdout or ():
                if line.startswith(_READY):
                    yield line.removeprefix(_READY).split()[0], process.pid, begin
                    break
            else:
                raise ServerError(f"our server ended with {process.wait()}; see {log}")
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Peer:
    """Another server. Its processes stand still while others are measured, if they are on this machine."""

    name: str
    target: Target
    pid: int | None = None
    """None: it never stands still."""

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Its turn."""
        self.send(signal.SIGCONT)
        try:
            yield
        finally:
            self.send(signal.SIGSTOP)

    def send(self, number: signal.Signals) -> None:
        """To all of its processes."""
        if self.pid is not None:
            signal_tree(self.pid, number)


def peer(named: str) -> Peer:
    """The server at URL or NAME=URL. Errors: ServerError."""
    name, _, url = named.rpartition("=")
    target = Target(url)
    return Peer(name or url, target, listener(target.port) if target.local else None)


@contextmanager
def asleep(peers: Sequence[Peer]) -> Iterator[None]:
    """Peers stand still unless they are awake(): servers of one machine must not compete for its CPUs."""
    try:
        for other in peers:
            other.send(signal.SIGSTOP)
        yield
    finally:
        for other in peers:
            other.send(signal.SIGCONT)


def footprint(target: Target, pid: int, begin: float) -> tuple[float, float]:
    """Seconds from the start to the first token, and CPUs used when idle afterwards."""
    uvloop.run(target.open())
    uvloop.run(target.first_token())
    first = time.monotonic() - begin
    time.sleep(_IDLE_SECONDS)  # what the first request left to do
    before, at = sum(usage(pid).cpu.values()), time.monotonic()
    time.sleep(_IDLE_SECONDS)
    return first, (sum(usage(pid).cpu.values()) - before) / (time.monotonic() - at)


def measure(
    traffic: Traffic,
    rounds: int,
    ours: tuple[str, Target, int],
    peers: Sequence[Peer],
    alone: Callable[[Traffic], float],
) -> Serving:
    """Each server once a round, and the engine alone; `ours` with its process number. Errors: ServerError.

    Peers are asleep() meanwhile. Ours is idle in their turns; its supervisor would replace what stands still.
    """
    serving = Serving(traffic)
    name, target, pid = ours
    servers = [Peer(name, target), *peers]
    warm = replace(traffic, requests=1)
    alone(warm)
    for server in servers:
        with server.awake():
            uvloop.run(server.target.open())
            uvloop.run(server.target.calibrate(traffic.prompt))
            uvloop.run(server.target.load(warm, -1))
    for turn in range(rounds):
        serving.alone.append(alone(traffic))
        for server in servers[:: 1 if turn % 2 else -1]:
            before = usage(pid)
            with server.awake():
                measured = uvloop.run(server.target.load(traffic, turn))
            serving.rounds.setdefault(server.name, []).append(measured)
            if server.target is target:
                _note_cpu(serving, before, usage(pid), measured.output_tokens)
    return serving


def _note_cpu(serving: Serving, before: Usage, after: Usage, tokens: int) -> None:
    for role, seconds in after.cpu.items():
        spent = (seconds - before.cpu.get(role, 0.0)) / tokens * 1000
        serving.cpu.setdefault(role, []).append(spent)
