"""Compiles a layer with the gated delta rule in place of attention (program.DeltaRule), and attention that is
gated.

Rows of projections that lie head by head of keys are put in order when they are read, so that queries, keys
and values are one value each executor can run along.
"""

import numpy as np
import numpy.typing as npt

from ktransformers.engine.models.compiler import Compiler
from ktransformers.engine.models.spec import DeltaSpec, ModelError
from ktransformers.engine.program import DeltaRule, Gated, Linear, LinearPart, ShortConv, ValueId, WeightId
from ktransformers.engine.weights import names

Rows = npt.NDArray[np.intp]


def heads_in_order(heads: int, *widths: int) -> list[Rows]:
    """Where the rows of each part are, when each of `heads` heads has parts of these widths, end to end."""
    total = sum(widths)
    rows = np.arange(heads * total, dtype=np.intp).reshape(heads, total)
    ends = np.cumsum(widths)
    return [rows[:, end - width : end].reshape(-1) for end, width in zip(ends, widths, strict=True)]


def delta_layer(c: Compiler, delta: DeltaSpec, layer: int, h: ValueId) -> ValueId:
    """What takes the place of attention's result, for the normed row h."""
    mixed = 2 * delta.keys + delta.values
    qkv, gate = c.value("qkv", mixed), c.value("delta_gate", delta.values)
    b, a = c.value("delta_b", delta.v_heads), c.value("delta_a", delta.v_heads)
    weights = (*_qkv_and_gate(c, delta, layer), *_b_and_a(c, delta, layer))
    parts = zip(weights, (qkv, gate, b, a), strict=True)
    c.ops.append(Linear(h, tuple(LinearPart(weight, None, out) for weight, out in parts)))
    convolved = c.value("qkv_convolved", mixed)
    nth = c.spec.nth_of_kind(layer)
    c.ops.append(ShortConv(qkv, _conv(c, delta, layer, mixed), convolved, nth))
    out = c.value("attention", delta.values)
    c.ops.append(
        DeltaRule(
            qkv=convolved,
            a=a,
            b=b,
            decay=_decay(c, delta, layer),
            bias=c.tensors.vector(names.bias(layer, names.SSM_DT), delta.v_heads),
            out=out,
            layer=nth,
            k_heads=delta.k_heads,
            v_heads=delta.v_heads,
            k_dim=delta.k_dim,
            v_dim=delta.v_dim,
        )
    )
    c.norm(out, names.weight(layer, names.SSM_NORM), out, delta.v_dim)
    c.ops.append(Gated(gate, out, out, "silu"))
    return out


def _qkv_and_gate(c: Compiler, delta: DeltaSpec, layer: int) -> tuple[WeightId, WeightId]:
    width, mixed = c.spec.width, 2 * delta.keys + delta.values
    qkv, gate = names.weight(layer, names.ATTN_QKV), names.weight(layer, names.ATTN_GATE)
    fused = names.weight(layer, names.SSM_IN)
    if not c.tensors.has(fused):
        return c.tensors.matrix(qkv, mixed, width), c.tensors.matrix(gate, delta.values, width)
    values = delta.values // delta.k_heads
    *heads, z = heads_in_order(delta.k_heads, delta.k_dim, delta.k_dim, values, values)
    total = mixed + delta.values
    return (
        c.tensors.picked(fused, total, width, np.concatenate(heads), qkv),
        c.tensors.picked(fused, total, width, z, gate),
    )


def _b_and_a(c: Compiler, delta: DeltaSpec, layer: int) -> tuple[WeightId, WeightId]:
    group = delta.v_heads // delta.k_heads
    name = names.weight(layer, names.SSM_BA)
    b, a = (
        c.tensors.picked(name, 2 * delta.v_heads, c.spec.width, rows, f"{name}[{part}]")
        for part, rows in zip("ba", heads_in_order(delta.k_heads, group, group), strict=True)
    )
    return b, a


def _decay(c: Compiler, delta: DeltaSpec, layer: int) -> WeightId:
    name = names.ssm_a(layer)
    values = c.tensors.floats(name, delta.v_heads)
    if not (np.isfinite(values) & (values <= 0)).all():
        raise ModelError(f"tensor '{name}' holds decays that are positive or not finite")
    return c.tensors.table(name, values)


def _conv(c: Compiler, delta: DeltaSpec, layer: int, mixed: int) -> WeightId:
    """Turned, so that a tap of neighbouring columns is a vector."""
    name = names.weight(layer, names.SSM_CONV)
    return c.tensors.table(name, c.tensors.floats(name, mixed, delta.taps).T)


def query_and_gate(c: Compiler, layer: int) -> tuple[WeightId, WeightId]:
    """Of attention whose heads are a query and then a gate."""
    s = c.spec
    name = names.weight(layer, names.ATTN_Q)
    total = 2 * s.heads * s.head_dim
    query, gate = (
        c.tensors.picked(name, total, s.width, rows, f"{name}[{part}]")
        for part, rows in zip(("q", "gate"), heads_in_order(s.heads, s.head_dim, s.head_dim), strict=True)
    )
    return query, gate
