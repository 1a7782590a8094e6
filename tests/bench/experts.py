"""One mixture-of-experts layer against the machine's limits, and against PyPI's kt-kernel where it is.

    PYTHONPATH=build/ns python tests/bench/experts.py [--shapes qwen3] [--formats Q4_0,Q8_0] [--tokens 1,512]
    PYTHONPATH=build/ns python tests/bench/experts.py --kt-python VENV/bin/python   # a venv with kt-kernel

Router and experts are the ops of a step of the native executor, timed by its own profile (presenting the
input, both fork-joins). Tokens choose evenly at random, other ones in every step, so that the weights come
from memory. The best of many steps; the bound is the longer of reading the chosen experts once and computing.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ktransformers.engine import _kernels
from ktransformers.engine import limits as machine_limits
from ktransformers.engine.bench.loads import batch, greedy
from ktransformers.engine.bench.synthetic import Pools, noise
from ktransformers.engine.executors.native import NativeExecutor
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

NUMBERS = {fmt.name: number for number, fmt in FORMATS.items()}
VOCAB = 4096


@dataclass(frozen=True)
class Shape:
    """A layer; `experts` is cut where all of them would not fit."""

    hidden: int
    ffn: int
    experts: int
    top: int


SHAPES = {"qwen3": Shape(2048, 768, 128, 8), "deepseek": Shape(7168, 2048, 32, 8)}
CASE = ("layer", "format", "tokens", "ms", "bound", "share")
MEASURED = ("GB/s", "GOPS", "of peak", "router", "kt-kernel", "ratio")
ROW = "{:9} {:6} {:>6} {:>8} {:>7} {:>6} {:>6} {:>6} {:>8} {:>7} {:>10} {:>6}"
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


def measure(
    ex: NativeExecutor, program: Program, shape: Shape, n: int, steps: int
) -> tuple[float, float, int]:
    """Seconds of the router and of the experts in the best step, and the experts that it read."""
    best, route, read = float("inf"), 0.0, 0
    table = np.arange(-(-n // 16), dtype=np.int32)
    for step in range(steps):
        tokens = ((np.arange(n) + step * n) % VOCAB).astype(np.int32)
        ex.set_profiling(True)
        ex.step(batch([(tokens, 0, table)]), greedy(1))
        ex.set_profiling(False)
        seconds = ex.profile()[3][1]
        if seconds < best:
            best, route, read = seconds, ex.profile()[2][1], chosen(program, shape, tokens)
    return best, route, read


def peer(python: str, shape: Shape, kind: str, tokens: list[int]) -> dict[int, float]:
    """Milliseconds of kt-kernel, the better of one and two threads, by tokens."""
    script = str(Path(__file__).with_name("experts_ktkernel.py"))
    best: dict[int, float] = {}
    for threads in (1, 2):
        args = [shape.hidden, shape.ffn, shape.experts, shape.top, threads, ",".join(map(str, tokens))]
        done = subprocess.run(
            [python, script, PEER_FORMATS[kind], *map(str, args)], capture_output=True, text=True
        )
        if done.returncode:
            print(f"kt-kernel: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return {}
        for n, ms in json.loads(done.stdout[done.stdout.rindex("{") : done.stdout.rindex("}") + 1]).items():
            best[int(n)] = min(ms, best.get(int(n), float("inf")))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default="Q4_0,Q4_K,Q8_0,BF16")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=0, help="0: as many as a format needs")
    parser.add_argument("--isa")
    parser.add_argument("--pretended-nodes", type=int, default=0, help="cut experts for as many NUMA nodes")
    parser.add_argument("--kt-python", help="a python with kt-kernel")
    given = parser.parse_args()
    limits = machine_limits.measure(given.threads, isa=given.isa)
    rate, load = limits.bandwidth / 1e9, os.getloadavg()[0]
    print(f"{limits.isa}, {limits.threads} threads, {rate:.1f} GB/s, load {load:.1f}")
    print(ROW.format(*CASE, *MEASURED))
    counts = [int(n) for n in given.tokens.split(",")]
    for name in given.shapes.split(","):
        shape = SHAPES[name]
        for kind in given.formats.split(","):
            program = layer(shape, kind)
            ex = NativeExecutor(
                program,
                isa=given.isa,
                threads=given.threads,
                blocks=64,
                max_tokens=max(counts),
                max_rows=1,
                pretended_nodes=given.pretended_nodes,
            )
            others = peer(given.kt_python, shape, kind, counts) if given.kt_python else {}
            dot = _kernels.activation(limits.isa, NUMBERS[kind])
            for n in counts:
                steps = given.steps or max(4, min(60, 3000 // n))
                seconds, route, read = measure(ex, program, shape, n, steps)
                nbytes = sum(program.weights[w].data.nbytes for w in (3, 4, 5)) * read // shape.experts
                ops = 6 * n * shape.top * shape.hidden * shape.ffn
                bound = limits.seconds(nbytes, ops, dot)
                cells = [f"{seconds * 1e3:.2f}", f"{bound * 1e3:.2f}", f"{bound / seconds:.0%}"]
                cells += [f"{nbytes / seconds / 1e9:.1f}", f"{ops / seconds / 1e9:.0f}"]
                cells += [f"{ops / seconds / limits.peaks[dot]:.0%}", f"{route * 1e3:.3f}"]
                peer_ms = others.get(n)
                cells += [f"{peer_ms:.2f}", f"{peer_ms / seconds / 1e3:.2f}"] if peer_ms else ["", ""]
                print(ROW.format(name, kind, n, *cells), flush=True)
            ex.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
