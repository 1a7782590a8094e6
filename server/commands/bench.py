"""`ktransformers bench`: what this machine can do, and how much of it we and others make of a model."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ktransformers.engine.bench.bounds import bound, profile
from ktransformers.engine.bench.closed_loop import closed_loop
from ktransformers.engine.bench.loads import LOADS, Bench, Load
from ktransformers.engine.bench.synthetic import QUANTS, SHAPES, write
from ktransformers.engine.limits import measure
from ktransformers.engine.machine import cpus
from ktransformers.server.bench import serving
from ktransformers.server.bench.clients import ServerError, Target, Traffic
from ktransformers.server.bench.plots import draw
from ktransformers.server.bench.processes import usage
from ktransformers.server.bench.report import (
    OURS,
    Report,
    Row,
    cpu_name,
    headline,
    process_lines,
    profile_table,
    rows_table,
    serving_table,
)
from ktransformers.server.bench.serving import footprint, started
from ktransformers.server.bench.sides import Side, SideError
from ktransformers.server.config import ConfigError, cache_dir
from ktransformers.server.library import resolve

PeerOf = Callable[[Path, int], Side]
"""Makes a side of a model file and a number of threads."""

_PROFILED = (LOADS[0], *LOADS[2:])
_PROFILE_PROMPTS, _PROFILE_STEPS = 5, 30
_LIMIT_SECONDS = 0.05
"""Of each limit that is measured beside a figure."""
_LEAST_REQUESTS = 48
"""Of all clients in a round: enough that its beginning and end are a small part of it."""
_WIDTH = 160
"""Of the tables in a file or a pipe."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = ""
    random: str = ""
    """SHAPE:QUANT, a model made on the spot instead of `model`."""
    layers: int | None = None
    """Cut a random model to that many."""
    threads: int | None = None
    rounds: int = 5
    seconds: float = 0.5
    """Of one side in one round."""
    only: tuple[str, ...] = ()
    """Beginnings of the names of the loads to measure; () is all."""
    profile: bool = False
    peers: tuple[PeerOf, ...] = ()
    engine: bool = True
    """Whether to measure the loads."""
    clients: tuple[int, ...] = (1, 16)
    """Numbers of closed-loop clients of a server; () is no server."""
    peer_urls: tuple[str, ...] = ()
    """Other servers of the same model: URL or NAME=URL."""
    out: Path = Path("bench")
    """A folder for JSON and plots."""


def run(options: Options) -> int:
    """Measure, print and write; the exit code. Errors: OSError, ValueError."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    threads = options.threads or cpus()
    loads = [load for load in LOADS if not options.only or load.name.startswith(options.only)]
    if not loads:
        names = ", ".join(load.name for load in LOADS)
        raise ConfigError(f"--only {','.join(options.only)}: no such load; there are {names}")
    try:
        peers = [serving.peer(url) for url in options.peer_urls]
    except ServerError as error:
        raise ConfigError(f"--peer-url: {error}") from None
    options.out.mkdir(parents=True, exist_ok=True)
    with console.status("measuring the machine"):
        limits = measure(threads, scaling=True)
    model = _model(console, options)
    report = Report(
        cpu=cpu_name(),
        model=f"{model} ({model.stat().st_size / 1e6:.0f} MB)",
        limits=limits,
        load_average=os.getloadavg()[0],
    )
    console.print(headline(report), markup=False)
    code = 0
    try:
        with serving.asleep(peers):
            if options.profile:
                _profile(console, report, model, loads)
            elif options.engine:
                _compare(console, report, model, loads, options)
            if options.clients and not options.random and not options.profile:
                _serve(console, report, model, peers, options)
    except (ServerError, SideError) as error:
        console.print(str(error), markup=False)
        code = 1
    report.write(options.out / "bench.json")
    written = [options.out / "bench.json", *draw(report, options.out)]
    console.print(f"written: {', '.join(map(str, written))}", markup=False)
    return code


def _profile(console: Console, report: Report, model: Path, loads: list[Load]) -> None:
    threads = report.limits.threads
    with _loaded(console, model, threads, loads) as bench:
        for load in loads:
            if load in _PROFILED and bench.fits(load):
                steps = _PROFILE_PROMPTS if load.kind == "prefill" else _PROFILE_STEPS
                report.profiles.append(profile(bench, measure(threads), load, steps))
                console.print(profile_table(report.profiles[-1]))


def _compare(console: Console, report: Report, model: Path, loads: list[Load], options: Options) -> None:
    threads = report.limits.threads
    with _loaded(console, model, threads, loads) as bench, ExitStack() as stack:
        sides: list[Side] = [_Ours(bench)]
        for peer in options.peers:
            sides.append(peer(model, threads))
            stack.callback(sides[-1].close)
        for load in loads:
            if bench.fits(load):
                row = _measure(console, load, sides, threads, options)
                row.bounds = [bound(bench.program, limits, load) for limits in row.limits]
                report.rows.append(row)
                report.write(options.out / "bench.json")
    console.print(rows_table(report.rows))


def _serve(
    console: Console, report: Report, model: Path, peers: Sequence[serving.Peer], options: Options
) -> None:
    threads = report.limits.threads
    largest = Traffic(clients=max(options.clients))
    room = Load("decode", streams=largest.clients, context=largest.prompt + largest.output)
    with started(model, threads, options.out / "server.log") as (url, pid, begin):
        ours = Target(url)
        with console.status("the server starts, and idles"):
            first, idle = footprint(ours, pid, begin)
        with _loaded(console, model, threads, [room]) as bench:
            for clients in options.clients:
                traffic = Traffic(clients=clients, requests=max(1, _LEAST_REQUESTS // clients))
                with console.status(f"{clients} clients"):
                    alone = partial(_alone, bench)
                    measured = serving.measure(traffic, options.rounds, (OURS, ours, pid), peers, alone)
                    report.serving.append(measured)
        report.footprint = serving.Footprint(first, idle, usage(pid).peak_bytes)
    console.print(serving_table(report.serving))
    for line in process_lines(report):
        console.print(line, markup=False)


def _alone(bench: Bench, traffic: Traffic) -> float:
    return closed_loop(bench, traffic.clients, traffic.requests, traffic.prompt, traffic.output)


class _Ours:
    """The executor of this process."""

    name = OURS

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def rate(self, load: Mapping[str, Any], seconds: float) -> float | None:
        return self._bench.rate(Load(**load), seconds)

    def close(self) -> None:
        """Who made the bench closes it."""


def _measure(console: Console, load: Load, sides: list[Side], threads: int, options: Options) -> Row:
    """Every side once a round, another one first in each, and the limits just before ours.

    Before that every side once to warm up.
    """
    row, fields = Row(load.name), asdict(load)
    for turn in range(-1, options.rounds):
        for side in (*sides[turn % len(sides) :], *sides[: turn % len(sides)]):
            with console.status(f"{load.name}, round {turn + 1} of {options.rounds}: {side.name}"):
                if turn >= 0 and side.name == OURS:
                    row.limits.append(measure(threads, seconds=_LIMIT_SECONDS))
                try:
                    rate = side.rate(fields, options.seconds if turn >= 0 else 0.0)
                except SideError as error:
                    console.print(f"{side.name}, {load.name}: {error}", markup=False)
                    rate = None
            if turn >= 0:
                row.rates.setdefault(side.name, []).append(rate)
    return row


def _model(console: Console, options: Options) -> Path:
    """The file to measure; a random one is made once and kept in the cache folder."""
    if not options.random:
        return resolve(options.model)
    name, _, quant = options.random.partition(":")
    if name not in SHAPES or quant not in QUANTS:
        known = f"{'|'.join(SHAPES)}:{'|'.join(QUANTS)}"
        raise ConfigError(f"--random {options.random}: not of the form {known}")
    layers = options.layers or SHAPES[name].layers
    path = cache_dir() / "bench" / f"{name}-{quant}-{layers}-layers.gguf"
    if not path.exists():
        with console.status(f"making {path}"):
            write(path, SHAPES[name], quant, layers)
    return path


@contextmanager
def _loaded(console: Console, model: Path, threads: int, loads: list[Load]) -> Iterator[Bench]:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def loaded(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        bench = Bench(str(model), threads, tuple(loads), loaded)
    try:
        yield bench
    finally:
        bench.executor.close()
