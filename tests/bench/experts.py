"""One mixture-of-experts layer against the machine's limits, and against PyPI's kt-kernel where it is.

    PYTHONPATH=build/ns python tests/bench/experts.py [--shapes qwen3] [--formats Q4_0,Q8_0] [--tokens 1,512]
    PYTHONPATH=build/ns python tests/bench/experts.py --kt-python VENV/bin/python   # a venv with kt-kernel

Router and experts are the ops of a step of the native executor, timed by its own profile (presenting the
input, both fork-joins). Tokens choose evenly at random, other ones in every step, so that the weights come
from memory: each chosen expert is read once. Each round measures the limits, us and kt-kernel (1 and 2
threads) in turns, each the best of a fraction of a second: what disturbs only makes it longer, and a limit of
another minute is another machine's. Figures are medians over the rounds, ratios those of each round's ratio.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ktransformers.engine import _kernels
from ktransformers.engine import limits as machine_limits
from ktransformers.engine.bench.loads import batch, greedy
from ktransformers.engine.bench.synthetic import Pools, noise
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.limits import Limits
from ktransformers.engine.program import (
    CacheShape,
    Embed,
    Experts,
    GatherRows,
    Logits,
    Program,
    Route,
    Tensor,
)
from ktransformers.engine.weights.formats import FORMATS
from ktransformers.server.bench.sides import WorkerSide

NUMBERS = {fmt.name: number for number, fmt in FORMATS.items()}
VOCAB = 4096
LIMIT_SECONDS = 0.1


@dataclass(frozen=True)
class Shape:
    """A layer; `experts` is cut where all of them would not fit."""

    hidden: int
    ffn: int
    experts: int
    top: int


SHAPES = {"qwen3": Shape(2048, 768, 128, 8), "deepseek": Shape(7168, 2048, 32, 8)}
COLUMNS = (
    "layer",
    "format",
    "tokens",
    "ms",
    "router",
    "GB/s",
    "of",
    "share",
    "GOPS",
    "of",
    "share",
    "kt-kernel",
    "ratio",
)
ROW = "{:9} {:6} {:>6} {:>8} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>10} {:>6}"
PEER_FORMATS = {"Q4_0": "int4", "Q4_K": "int4", "Q8_0": "int8", "BF16": "bf16"}


def layer(shape: Shape, kind: str) -> Program:
    """Token t has a random input and random router logits; the program has no attention."""
    rng = np.random.default_rng(1)
    pools: Pools = {}

    def floats(name: str, *size: int) -> Tensor:
        values = rng.standard_normal(size).astype(np.float32)
        return Tensor(name, NUMBERS["F32"], *size, values.reshape(-1).view(np.uint8))

    def weights(name: str, rows: int, cols: int) -> Tensor:
        rows *= shape.experts
        fmt = FORMATS[NUMBERS[kind]]
        data = noise(pools, kind, len(name), rows * cols // fmt.block * fmt.nbytes)
        return Tensor(name, NUMBERS[kind], rows, cols, data, shape.experts)

    h, f = shape.hidden, shape.ffn
    return Program(
        ops=(
            Embed(0, 0, 1.0),
            Embed(1, 1, 1.0),
            Route(1, None, 2, shape.experts, shape.top, "softmax", 1, 1, "max", True, 1.0),
            Experts(0, 2, 3, 3, 4, 5, None, None, None, shape.experts, shape.top, "silu", 0.0, 0.0, False),
            GatherRows(1, 4),
            Logits(4, 2, 5, 0.0),
        ),
        widths=(h, shape.experts, 2 * shape.top, h, shape.experts, VOCAB),
        weights=(
            floats("x", VOCAB, h),
            floats("logits", VOCAB, shape.experts),
            floats("head", VOCAB, shape.experts),
            weights("gate", f, h),
            weights("up", f, h),
            weights("down", h, f),
        ),
        cache=CacheShape(1, 1, 16),
        vocab=VOCAB,
    )


def chosen(program: Program, shape: Shape, tokens: npt.NDArray[np.int32]) -> int:
    """How many different experts these tokens go to."""
    logits = program.weights[1].read().view(np.float32).reshape(VOCAB, -1)[tokens]
    return len(np.unique(np.argsort(-logits, axis=1)[:, : shape.top]))


@dataclass(frozen=True)
class Step:
    """The best of some steps; all in seconds but `read`."""

    experts: float
    router: float
    read: int
    """Different experts that its tokens chose."""


@dataclass(frozen=True)
class Round:
    """What one round has measured."""

    step: Step
    limits: Limits
    peer: float | None
    """Seconds of kt-kernel's best forward, with one thread or two."""


class Layer:
    """A layer on the native executor."""

    def __init__(self, shape: Shape, kind: str, given: argparse.Namespace, most: int) -> None:
        self.shape, self.program, self._at = shape, layer(shape, kind), 0
        self.executor = NativeExecutor(
            self.program,
            isa=given.isa,
            threads=given.threads,
            blocks=64,
            max_tokens=most,
            max_rows=1,
            pretended_nodes=given.pretended_nodes,
        )

    def best(self, n: int, seconds: float) -> Step:
        """The best step of n tokens in so many seconds, of two at least."""
        table = np.arange(-(-n // 16), dtype=np.int32)
        best, begin, steps = Step(float("inf"), 0.0, 0), time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - begin < seconds:
            tokens = ((np.arange(n) + self._at) % VOCAB).astype(np.int32)
            self._at, steps = self._at + n, steps + 1
            self.executor.set_profiling(True)
            self.executor.step(batch([(tokens, 0, table)]), greedy(1))
            self.executor.set_profiling(False)
            profile = self.executor.profile()
            if profile[3][1] < best.experts:
                best = Step(profile[3][1], profile[2][1], chosen(self.program, self.shape, tokens))
        return best

    def nbytes(self, experts: int) -> int:
        """Of so many experts."""
        return sum(self.program.weights[w].data.nbytes for w in (3, 4, 5)) * experts // self.shape.experts

    def ops(self, n: int) -> int:
        """Operations for n tokens."""
        return 6 * n * self.shape.top * self.shape.hidden * self.shape.ffn


def peers(python: str, shape: Shape, kind: str) -> list[WorkerSide]:
    """kt-kernel with one thread and with two."""
    script = str(Path(__file__).with_name("experts_ktkernel.py").absolute())
    sizes = [str(n) for n in (shape.hidden, shape.ffn, shape.experts, shape.top)]
    return [WorkerSide([python, script, PEER_FORMATS[kind], *sizes, str(threads)]) for threads in (1, 2)]


def measure(own: Layer, others: list[WorkerSide], n: int, given: argparse.Namespace) -> list[Round]:
    """The rounds of n tokens, kt-kernel's turn before ours in every other one."""
    rounds = []
    for i in range(given.rounds):

        def peer() -> float | None:
            load = {"tokens": n}
            rates = [side.rate(load, given.seconds) for side in others]
            return min((n / rate for rate in rates if rate), default=None)

        before = peer() if i % 2 else None
        limits = machine_limits.measure(given.threads, isa=given.isa, seconds=LIMIT_SECONDS)
        step = own.best(n, given.seconds)
        rounds.append(Round(step, limits, before if i % 2 else peer()))
    return rounds


def cells(own: Layer, n: int, dot: machine_limits.Dot, rounds: list[Round]) -> list[str]:
    """The columns from ms on."""

    def middle(figure: Callable[[Round], float]) -> float:
        return statistics.median(map(figure, rounds))

    def reading(r: Round) -> float:
        return own.nbytes(r.step.read) / r.step.experts

    ops = own.ops(n)
    out = [f"{middle(lambda r: r.step.experts) * 1e3:.2f}", f"{middle(lambda r: r.step.router) * 1e3:.3f}"]
    out += [f"{middle(reading) / 1e9:.1f}", f"{middle(lambda r: r.limits.bandwidth) / 1e9:.1f}"]
    out.append(f"{middle(lambda r: reading(r) / r.limits.bandwidth):.0%}")
    out += [
        f"{middle(lambda r: ops / r.step.experts) / 1e9:.0f}",
        f"{middle(lambda r: r.limits.peaks[dot]) / 1e9:.0f}",
    ]
    out.append(f"{middle(lambda r: ops / r.step.experts / r.limits.peaks[dot]):.0%}")
    if any(r.peer is None for r in rounds):
        return [*out, "", ""]
    out.append(f"{middle(lambda r: r.peer or 0.0) * 1e3:.2f}")
    return [*out, f"{middle(lambda r: (r.peer or 0.0) / r.step.experts):.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default=",".join(PEER_FORMATS))
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each side in a round")
    parser.add_argument("--isa")
    parser.add_argument("--pretended-nodes", type=int, default=0, help="cut experts for as many NUMA nodes")
    parser.add_argument("--kt-python", help="a python with kt-kernel")
    given = parser.parse_args()
    isa = given.isa or _kernels.isas()[0]
    print(f"{isa}, {given.threads} threads, {given.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(ROW.format(*COLUMNS))
    counts = [int(n) for n in given.tokens.split(",")]
    for name in given.shapes.split(","):
        for kind in given.formats.split(","):
            others = peers(given.kt_python, SHAPES[name], kind) if given.kt_python else []
            own = Layer(SHAPES[name], kind, given, max(counts))
            dot = _kernels.activation(isa, NUMBERS[kind])
            for n in counts:
                rounds = measure(own, others, n, given)
                print(ROW.format(name, kind, n, *cells(own, n, dot, rounds)), flush=True)
            own.executor.close()
            for side in others:
                side.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
