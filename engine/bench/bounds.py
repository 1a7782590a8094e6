"""What a load could reach on the measured machine, and where its time went."""

from dataclasses import dataclass

from ktransformers.engine.bench.loads import STEP_TOKENS, Bench, Load
from ktransformers.engine.explain import Row, explain
from ktransformers.engine.limits import Limits
from ktransformers.engine.program import Program

_PRODUCTS = ("Linear", "HeadLinear", "Experts", "Logits")


def bound(program: Program, limits: Limits, load: Load) -> float:
    """Tokens per second if only the products took time, each reading its weights and computing at once.

    For one stream that is the bandwidth by the bytes of the weights; for a prompt the peak of the dot product
    by two operations for each active parameter.
    """
    if load.kind == "decode":
        rows = explain(program, limits, tokens=load.streams)
        return load.streams / _seconds(rows, limits, load.streams, load.streams)
    steps = [min(STEP_TOKENS, load.tokens - begin) for begin in range(0, load.tokens, STEP_TOKENS)]
    return load.tokens / sum(
        _seconds(explain(program, limits, tokens=tokens), limits, tokens, 1) for tokens in steps
    )


def _seconds(rows: list[Row], limits: Limits, tokens: int, drawn: int) -> float:
    """Of the products in a step of `tokens` tokens, `drawn` of which draw."""
    return sum(
        limits.seconds(row.weight_bytes, row.flops * (drawn if row.drawn else tokens), row.dot)
        for row in rows
        if row.kind in _PRODUCTS
    )


@dataclass(frozen=True)
class Spent:
    """One op of a profiled load: what a step of it took and could have taken."""

    row: Row
    seconds: float
    nbytes: int
    """Weights and KV that the step reads."""
    flops: int
    bound: float
    """Seconds: the longer of reading and computing."""


@dataclass(frozen=True)
class Profile:
    """A load op by op. Times are the shortest of several steps: what disturbs one only makes it longer."""

    load: Load
    limits: Limits
    """That the bounds are of."""
    ops: list[Spent]
    drawing: float
    """Seconds of a step spent in drawing tokens from logits."""
    step: float
    """Seconds of a step that was not profiled: row-wise ops are fused in it, and timed one by one above."""


def profile(bench: Bench, limits: Limits, load: Load, steps: int) -> Profile:
    """Time each op of `steps` steps. ValueError for a prompt that takes more than one step."""
    if load.tokens > STEP_TOKENS:
        raise ValueError(f"a profile is of one step, of at most {STEP_TOKENS} tokens")
    bench.fill(load)
    plain = min(bench.step(load) for _ in range(steps + 1))
    *ops, drawing = map(min, zip(*(_profiled(bench, load) for _ in range(steps)), strict=True))
    tokens, sequences = (load.tokens, 1) if load.kind == "prefill" else (load.streams, load.streams)
    spent = []
    rows = explain(bench.program, limits, tokens=tokens // sequences, context=load.context)
    # Sequences share what they read of weights, and choose experts of their own.
    weights = [row.weight_bytes for row in explain(bench.program, limits, tokens=tokens)]
    for row, weight_bytes, seconds in zip(rows, weights, ops, strict=True):
        nbytes = weight_bytes + row.kv_bytes * sequences
        flops = row.flops * (sequences if row.drawn else tokens)
        spent.append(Spent(row, seconds, nbytes, flops, limits.seconds(nbytes, flops, row.dot)))
    return Profile(load, limits, spent, drawing, plain)


def _profiled(bench: Bench, load: Load) -> list[float]:
    """Seconds of each op of one step, and of the draw."""
    bench.executor.set_profiling(True)
    bench.step(load)
    bench.executor.set_profiling(False)
    return [seconds for _, seconds in bench.executor.profile()]
