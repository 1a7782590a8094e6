"""`ktransformers bench`: what this machine can do, and how much of it we and others make of a model."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ktransformers.engine.bench.bounds import bound, profile
from ktransformers.engine.bench.loads import LOADS, Bench, Load
from ktransformers.engine.bench.synthetic import QUANTS, SHAPES, write
from ktransformers.engine.limits import measure
from ktransformers.engine.machine import cpus
from ktransformers.server.bench.report import (
    OURS,
    Report,
    Row,
    cpu_name,
    headline,
    profile_table,
    rows_table,
)
from ktransformers.server.bench.sides import Side, SideError
from ktransformers.server.config import ConfigError, cache_dir
from ktransformers.server.library import resolve

PeerOf = Callable[[Path, int], Side]
"""Makes a side of a model file and a number of threads."""

_PROFILED = (LOADS[0], *LOADS[2:])
_PROFILE_STEPS = 5
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
    with _loaded(console, model, threads, loads) as bench:
        loads = [load for load in loads if bench.fits(load)]
        if options.profile:
            for load in (load for load in _PROFILED if load in loads):
                report.profiles.append(profile(bench, limits, load, _PROFILE_STEPS))
                console.print(profile_table(report.profiles[-1]))
        else:
            with ExitStack() as stack:
                sides: list[Side] = [_Ours(bench)]
                for peer in options.peers:
                    sides.append(peer(model, threads))
                    stack.callback(sides[-1].close)
                for load in loads:
                    row = Row(load.name, bound(bench.program, limits, load))
                    _measure(console, row, load, sides, options)
                    report.rows.append(row)
            console.print(rows_table(report.rows))
    report.write(options.out / "bench.json")
    console.print(f"written to {options.out / 'bench.json'}", markup=False)
    return 0


class _Ours:
    """The executor of this process."""

    name = OURS

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def rate(self, load: Mapping[str, Any], seconds: float) -> float | None:
        return self._bench.rate(Load(**load), seconds)

    def close(self) -> None:
        """Who made the bench closes it."""


def _measure(console: Console, row: Row, load: Load, sides: list[Side], options: Options) -> None:
    """Every side once a round, and another one first in each round; before that once to warm up."""
    fields = asdict(load)
    for turn in range(-1, options.rounds):
        for side in (*sides[turn % len(sides) :], *sides[: turn % len(sides)]):
            with console.status(f"{load.name}, round {turn + 1} of {options.rounds}: {side.name}"):
                try:
                    rate = side.rate(fields, options.seconds if turn >= 0 else 0.0)
                except SideError as error:
                    console.print(f"{side.name}, {load.name}: {error}", markup=False)
                    rate = None
            if turn >= 0:
                row.rates.setdefault(side.name, []).append(rate)


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
