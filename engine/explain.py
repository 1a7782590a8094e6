"""What a program costs, op by op: the numbers that `ktransformers explain` prints."""

from dataclasses import dataclass

from ktransformers.engine import _kernels
from ktransformers.engine.limits import Dot, Limits
from ktransformers.engine.program import (
    Add,
    Attention,
    Embed,
    Gated,
    GatherRows,
    Linear,
    Logits,
    Op,
    Program,
    RmsNorm,
    Rope,
    ValueId,
    WeightId,
)
from ktransformers.engine.weights.formats import FORMATS


@dataclass(frozen=True)
class Row:
    """One op in one step."""

    index: int
    layer: int | None
    kind: str
    detail: str
    """Names of its weights with their shapes, or its sizes."""
    format: str
    weight_bytes: int
    """That the op reads once in a step, however many tokens it computes."""
    kv_bytes: int
    """Keys and values that the op reads in a step: the tokens of a sequence share them."""
    flops: int
    """Of one token (of one row, after rows that do not draw were dropped)."""
    dot: Dot
    """The instruction that does most of them on the measured table."""
    drawn: bool
    """Computed only for the rows that draw a token."""
    seconds: float
    """Predicted for one token of the step: its share of the longer of reading and computing."""


def explain(program: Program, limits: Limits, *, tokens: int = 1, context: int = 0) -> list[Row]:
    """One row for each op, for a step of `tokens` tokens of a sequence that has `context` tokens already."""
    rows: list[Row] = []
    layer: int | None = None
    drawn = False
    for index, op in enumerate(program.ops):
        layer = _layer(program, op, layer)
        drawn = drawn or isinstance(op, GatherRows)
        computed = 1 if drawn else tokens
        weights = _weights(op)
        weight_bytes = sum(_read_bytes(program, op, w) for w in weights)
        kv_bytes = _kv_bytes(op, context, tokens)
        # A token in the middle of the step sees half of the step's other tokens.
        flops = _flops(program, op, context + (tokens + 1) // 2)
        dot = _dot(program, op, limits.isa)
        formats = sorted({FORMATS[program.weights[w].format].name for w in weights})
        rows.append(
            Row(
                index=index,
                layer=layer,
                kind=type(op).__name__,
                detail=_detail(program, op),
                format=", ".join(formats),
                weight_bytes=weight_bytes,
                kv_bytes=kv_bytes,
                flops=flops,
                dot=dot,
                drawn=drawn,
                seconds=limits.seconds(weight_bytes + kv_bytes, flops * computed, dot) / tokens,
            )
        )
    return rows


def _weights(op: Op) -> list[WeightId]:
    match op:
        case Embed():
            return [op.table]
        case RmsNorm() | Logits():
            return [op.weight]
        case Linear():
            return [w for p in op.parts for w in (p.weight, p.bias) if w is not None]
        case Rope():
            return [op.inv_freq]
        case Attention() | Gated() | Add() | GatherRows():
            return []


def _dot(program: Program, op: Op, isa: str) -> Dot:
    """What a product's weights ask for; the parts of a Linear share their input, so the first speaks."""
    if isinstance(op, Linear | Logits):
        return _kernels.activation(isa, program.weights[_weights(op)[0]].format)
    return "f32"


def _read_bytes(program: Program, op: Op, weight: WeightId) -> int:
    """Bytes of a weight that a step reads: a token takes one row of the embedding, else all of it is read."""
    w = program.weights[weight]
    return w.data.nbytes // w.rows if isinstance(op, Embed) else w.data.nbytes


def _layer(program: Program, op: Op, previous: int | None) -> int | None:
    """From the name of a weight, blk.N.*; ops without one belong to the layer that they stand in."""
    if isinstance(op, Attention):
        return op.layer
    if isinstance(op, Embed | Logits):
        return None
    if isinstance(op, RmsNorm | Linear):
        parts = program.weights[_weights(op)[0]].name.split(".")
        return int(parts[1]) if parts[0] == "blk" else None
    return previous


def _kv_bytes(op: Op, context: int, tokens: int) -> int:
    """Float16 keys and values, each read once for the query heads that share them."""
    if not isinstance(op, Attention):
        return 0
    seen = tokens + (min(context, op.window - 1) if op.window else context)
    return 2 * 2 * op.kv_heads * op.head_dim * seen


def _flops(program: Program, op: Op, seen: int) -> int:
    """Multiplications and additions of one token; one exp, tanh or division counts as one."""

    def width(value: ValueId) -> int:
        return program.widths[value]

    match op:
        case Linear():
            return sum(2 * program.weights[p.weight].rows * program.weights[p.weight].cols for p in op.parts)
        case Logits():
            return 2 * program.weights[op.weight].rows * program.weights[op.weight].cols
        case Attention():
            positions = min(seen, op.window) if op.window else seen
            return 4 * op.heads * op.head_dim * positions
        case RmsNorm():
            return 4 * width(op.x)
        case Rope():
            return 6 * op.heads * program.weights[op.inv_freq].cols
        case Gated():
            return 5 * width(op.gate)
        case Add():
            return width(op.a)
        case Embed():
            return width(op.out)
        case GatherRows():
            return 0


def _detail(program: Program, op: Op) -> str:
    """What tells this op from others of its kind."""
    if isinstance(op, Attention):
        window = f", window {op.window}" if op.window else ""
        return f"{op.heads} heads, {op.kv_heads} kv heads of {op.head_dim}{window}"
    if isinstance(op, Gated):
        return op.act
    names = []
    for weight in _weights(op):
        w = program.weights[weight]
        name = w.name.split(".", 2)[2] if w.name.startswith("blk.") else w.name
        names.append(f"{name} {w.rows}x{w.cols}")
    return ", ".join(names)
