"""A server under closed-loop traffic, beside the engine alone and other servers under the same."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ktransformers.server.bench.clients import Measured, ServerError, Target, Traffic
from ktransformers.server.bench.processes import Usage, usage

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


def footprint(target: Target, pid: int, begin: float) -> tuple[float, float]:
    """Seconds from the start to the first token, and CPUs used when idle afterwards."""
    asyncio.run(target.open())
    asyncio.run(target.first_token())
    first = time.monotonic() - begin
    time.sleep(_IDLE_SECONDS)  # what the first request left to do
    before, at = sum(usage(pid).cpu.values()), time.monotonic()
    time.sleep(_IDLE_SECONDS)
    return first, (sum(usage(pid).cpu.values()) - before) / (time.monotonic() - at)


def measure(
    traffic: Traffic,
    rounds: int,
    name: str,
    ours: tuple[Target, int],
    peers: Sequence[tuple[str, Target]],
    alone: Callable[[Traffic], float],
) -> Serving:
    """Each server once a round, and the engine alone; `ours` with its process number. Errors: ServerError."""
    serving = Serving(traffic)
    targets = [(name, ours[0]), *peers]
    for _, target in targets:
        asyncio.run(target.open())
        asyncio.run(target.calibrate(traffic.prompt))
    warm = replace(traffic, requests=1)
    alone(warm)
    for _, target in targets:
        asyncio.run(target.load(warm, -1))
    for turn in range(rounds):
        serving.alone.append(alone(traffic))
        for who, target in targets[:: 1 if turn % 2 else -1]:
            before = usage(ours[1])
            measured = asyncio.run(target.load(traffic, turn))
            serving.rounds.setdefault(who, []).append(measured)
            if target is ours[0]:
                _note_cpu(serving, before, usage(ours[1]), measured.output_tokens)
    return serving


def _note_cpu(serving: Serving, before: Usage, after: Usage, tokens: int) -> None:
    for role, seconds in after.cpu.items():
        spent = (seconds - before.cpu.get(role, 0.0)) / tokens * 1000
        serving.cpu.setdefault(role, []).append(spent)
