"""What a program costs, op by op: the numbers that `ktransformers explain` prints."""

from dataclasses import dataclass

from ktransformers.engine import _kernels
from ktransformers.engine.limits import Dot, Limits
from ktransformers.engine.program import (
    Add,
    Attention,
    DeltaRule,
    Embed,
    Experts,
    Gated,
    GatherRows,
    HeadLinear,
    Linear,
    Logits,
    MlaAttention,
    Op,
    PositionScale,
    Program,
    RmsNorm,
    Rope,
    Route,
    ShortConv,
    ValueId,
    WeightId,
)
from ktransformers.engine.weights.formats import BF16, FORMATS
from ktransformers.kvcache.config import KvFormat


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
    """That the op reads once in a step; of experts, those that are expected to be chosen by any token."""
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


def explain(
    program: Program, limits: Limits, *, tokens: int = 1, context: int = 0, kv_format: KvFormat = "bf16"
) -> list[Row]:
    """One row for each op, for a step of `tokens` tokens of a sequence that has `context` tokens already."""
    rows: list[Row] = []
    layer: int | None = None
    drawn = False
    for index, op in enumerate(program.ops):
        layer = _layer(program, op, layer)
        drawn = drawn or isinstance(op, GatherRows)
        computed = 1 if drawn else tokens
        weights = weights_of(op)
        weight_bytes = sum(_read_bytes(program, op, w, computed) for w in weights)
        kv_bytes = _kv_bytes(program, op, context, tokens, kv_format)
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


def weights_of(op: Op) -> list[WeightId]:
    match op:
        case Embed():
            return [op.table]
        case RmsNorm() | Logits() | HeadLinear():
            return [op.weight]
        case Linear():
            return [w for p in op.parts for w in (p.weight, p.bias) if w is not None]
        case Rope():
            return [op.inv_freq]
        case ShortConv():
            return [op.weight]
        case DeltaRule():
            return [op.decay, op.bias]
        case Attention():
            return [] if op.sinks is None else [op.sinks]
        case Route():
            return [] if op.bias is None else [op.bias]
        case Experts():
            biases = (op.gate_bias, op.up_bias, op.down_bias)
            return [op.gate, op.up, op.down, *(w for w in biases if w is not None)]
        case MlaAttention() | PositionScale() | Gated() | Add() | GatherRows():
            return []


def _dot(program: Program, op: Op, isa: str) -> Dot:
    """What a product's weights ask for; the parts of a Linear share their input, so the first speaks."""
    if isinstance(op, Linear | HeadLinear | Experts | Logits):
        return _kernels.activation(isa, program.weights[weights_of(op)[0]].format)
    # Attention multiplies bfloat16 where weights of that format are so multiplied.
    return "bf16" if isinstance(op, Attention) and _kernels.activation(isa, BF16) == "bf16" else "f32"


def _read_bytes(program: Program, op: Op, weight: WeightId, computed: int) -> int:
    """Bytes of a weight that a step reads: a token takes one row of the embedding and its experts, else all
    of it is read."""
    w = program.weights[weight]
    if isinstance(op, Embed):
        return w.data.nbytes // w.rows
    if isinstance(op, Experts):
        return round(w.data.nbytes * chosen_share(op, computed))
    return w.data.nbytes


def chosen_share(op: Experts, tokens: int) -> float:
    """Of the experts, the share that `tokens` tokens are expected to choose, were all equally likely."""
    return 1.0 - (1.0 - op.top / op.experts) ** tokens


def _layer(program: Program, op: Op, previous: int | None) -> int | None:
    """From the name of a weight, blk.N.*; ops without one belong to the layer that they stand in."""
    if isinstance(op, Attention | MlaAttention) and program.state is None:
        return op.layer
    if isinstance(op, Embed | Logits):
        return None
    if isinstance(op, RmsNorm | Linear | HeadLinear | ShortConv | DeltaRule | Experts):
        parts = program.weights[weights_of(op)[0]].name.split(".")
        return int(parts[1]) if parts[0] == "blk" else None
    return previous


def _kv_bytes(program: Program, op: Op, context: int, tokens: int, kv_format: KvFormat) -> int:
    """Keys and values, each read once for the query heads that share them; a state is read and
    written once."""
    if isinstance(op, DeltaRule):
        return 2 * 4 * op.v_heads * op.k_dim * op.v_dim
    if isinstance(op, MlaAttention):
        return 2 * (program.widths[op.latent] + program.widths[op.rope]) * (context + tokens)
    if not isinstance(op, Attention):
        return 0
    before = min(context, op.window - 1) if op.window else context
    if op.chunk:
        before = min(before, context % op.chunk)
    row = op.head_dim + 4 if kv_format == "int8" else 2 * op.head_dim  # a scale is a float32
    return 2 * op.kv_heads * row * (tokens + before)


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
            positions = min(seen, op.window or seen, op.chunk or seen)
            return 4 * op.heads * op.head_dim * positions
        case MlaAttention():
            return 2 * op.heads * (2 * width(op.latent) + width(op.rope)) * seen
        case ShortConv():
            return 2 * program.weights[op.weight].rows * width(op.x) + 5 * width(op.x)
        case DeltaRule():
            return 7 * op.v_heads * op.k_dim * op.v_dim
        case HeadLinear():
            return 2 * program.weights[op.weight].rows * program.weights[op.weight].cols
        case Route():
            return 5 * op.experts
        case Experts():
            parts = (program.weights[w] for w in (op.gate, op.up, op.down))
            return op.top * sum(2 * w.rows * w.cols // op.experts for w in parts)
        case RmsNorm():
            return 4 * width(op.x)
        case Rope():
            return 6 * op.heads * program.weights[op.inv_freq].cols
        case PositionScale():
            return width(op.x)
        case Gated():
            return 5 * width(op.up)
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
        chunk = f", chunks of {op.chunk}" if op.chunk else ""
        return f"{op.heads} heads, {op.kv_heads} kv heads of {op.head_dim}{window}{chunk}"
    if isinstance(op, DeltaRule):
        return f"{op.k_heads} heads of keys, {op.v_heads} of values, states {op.k_dim}x{op.v_dim}"
    if isinstance(op, MlaAttention):
        return f"{op.heads} heads, latent {program.widths[op.latent]} + {program.widths[op.rope]}"
    if isinstance(op, Gated):
        return op.act
    if isinstance(op, Route):
        groups = f", {op.top_groups} of {op.groups} groups" if op.groups > 1 else ""
        return f"{op.top} of {op.experts}, {op.score}{groups}"
    names = [f"{op.top} of {op.experts} experts"] if isinstance(op, Experts) else []
    for weight in weights_of(op):
        w = program.weights[weight]
        name = w.name.split(".", 2)[2] if w.name.startswith("blk.") else w.name
        names.append(f"{name} {w.rows}x{w.cols}")
    return ", ".join(names)
