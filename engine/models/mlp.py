"""Compiles what follows attention in a layer: a gated MLP, or experts with what every token shares."""

from ktransformers.engine.models.compiler import Compiler
from ktransformers.engine.models.spec import MoeSpec
from ktransformers.engine.program import Add, Experts, Gated, Linear, LinearPart, Route, ValueId
from ktransformers.engine.weights import names


def early_route(c: Compiler, layer: int, x: ValueId) -> ValueId | None:
    """The routes of a layer whose router reads x, what enters the layer; None: it is no such layer."""
    moe = c.spec.moe
    if moe is None or not moe.early or not c.spec.has_experts(layer):
        return None
    return _route(c, moe, layer, x)[0]


def mlp(c: Compiler, layer: int, h: ValueId, routed: ValueId | None) -> ValueId:
    """The result for the normed row h, which is overwritten. `routed`: the routes, if they are known."""
    if c.spec.moe is not None and c.spec.has_experts(layer):
        return _experts(c, c.spec.moe, layer, h, routed)
    gate, up = c.value("gate", c.spec.ffn), c.value("up", c.spec.ffn)
    c.linear(h, layer, (names.FFN_GATE, gate), (names.FFN_UP, up))
    c.ops.append(Gated(gate, up, gate, c.spec.act))
    c.linear(gate, layer, (names.FFN_DOWN, h))
    return h


def _experts(c: Compiler, moe: MoeSpec, layer: int, h: ValueId, routed: ValueId | None) -> ValueId:
    shared_gate = None
    if routed is None:
        routed, shared_gate = _route(c, moe, layer, h)
    width = c.spec.width
    out = c.value("experts", width)
    gate, up, down = names.FFN_GATE_EXPS, names.FFN_UP_EXPS, names.FFN_DOWN_EXPS
    shapes = ((gate, moe.ffn, width), (up, moe.ffn, width), (down, width, moe.ffn))
    weights = [c.tensors.experts(names.weight(layer, n), moe.experts, rows, cols) for n, rows, cols in shapes]
    biases = [
        c.tensors.expert_biases(names.bias(layer, n), moe.experts, rows) if moe.biases else None
        for n, rows, _ in shapes
    ]
    c.ops.append(
        Experts(
            x=h,
            route=routed,
            out=out,
            gate=weights[0],
            up=weights[1],
            down=weights[2],
            gate_bias=biases[0],
            up_bias=biases[1],
            down_bias=biases[2],
            experts=moe.experts,
            top=moe.top,
            act=moe.act,
            alpha=moe.alpha,
            limit=moe.limit,
            weigh_input=moe.weigh_input,
        )
    )
    if moe.shared_ffn:
        gate_value, up_value = c.value("gate", moe.shared_ffn), c.value("up", moe.shared_ffn)
        c.linear(h, layer, (names.FFN_GATE_SHEXP, gate_value), (names.FFN_UP_SHEXP, up_value))
        c.ops.append(Gated(gate_value, up_value, gate_value, c.spec.act))
        c.linear(gate_value, layer, (names.FFN_DOWN_SHEXP, h))
        if shared_gate is not None:
            c.ops.append(Gated(shared_gate, h, h, "sigmoid"))
        c.ops.append(Add(out, h, out))
    return out


def _route(c: Compiler, moe: MoeSpec, layer: int, h: ValueId) -> tuple[ValueId, ValueId | None]:
    """The routes, and the logit of the shared MLP's gate: both are linear in h."""
    logits, routed = c.value("router", moe.experts), c.value("route", 2 * moe.top)
    router = c.tensors.matrix(names.weight(layer, names.FFN_GATE_INP), moe.experts, c.spec.width)
    bias = c.tensors.vector(names.bias(layer, names.FFN_GATE_INP), moe.experts) if moe.biases else None
    parts = [LinearPart(router, bias, logits)]
    shared_gate = None
    if moe.shared_gate:
        shared_gate = c.value("shared_gate", 1)
        name = names.weight(layer, names.FFN_GATE_INP_SHEXP)
        parts.append(LinearPart(c.tensors.vector(name, c.spec.width), None, shared_gate))
    c.ops.append(Linear(h, tuple(parts)))
    correction = names.bias(layer, names.EXP_PROBS_B)
    c.ops.append(
        Route(
            logits=logits,
            bias=c.tensors.vector(correction, moe.experts) if moe.correction else None,
            out=routed,
            experts=moe.experts,
            top=moe.top,
            score=moe.score,
            groups=moe.groups,
            top_groups=moe.top_groups,
            group_score=moe.group_score,
            normalise=moe.normalise,
            scale=moe.scale,
        )
    )
    return routed, shared_gate
