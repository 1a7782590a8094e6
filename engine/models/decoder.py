"""Compiles a ModelSpec and the tensors of a file into the program that executors run."""

from ktransformers.engine.models.compiler import Compiler
from ktransformers.engine.models.delta import delta_layer, query_and_gate
from ktransformers.engine.models.mla import mla_attention
from ktransformers.engine.models.mlp import early_route, mlp
from ktransformers.engine.models.spec import ModelSpec
from ktransformers.engine.program import (
    Add,
    Attention,
    CacheShape,
    Embed,
    Gated,
    Linear,
    LinearPart,
    Logits,
    PositionScale,
    Program,
    RmsNorm,
    Rope,
    StateShape,
    ValueId,
)
from ktransformers.engine.weights import names
from ktransformers.engine.weights.checkpoint import Checkpoint


def compile_program(spec: ModelSpec, file: Checkpoint) -> Program:
    """The program of a model over views of the mapped file; only norms and biases are copied.

    ModelError for a tensor that is missing, left over, of another shape, or in an unsupported format.
    """
    c = Compiler(spec, file)
    vocab = c.vocabulary()
    x, h = c.value("x", spec.width), c.value("h", spec.width)
    embed = c.tensors.matrix(names.EMBED, vocab, spec.width)
    c.ops.append(Embed(embed, x, spec.embed_scale))
    for layer in range(spec.layers):
        routed = early_route(c, layer, x)
        c.norm(x, names.weight(layer, names.ATTN_NORM), h, spec.width)
        attended = _attention(c, layer, h)
        if layer == spec.layers - 1:
            x, attended = c.gather("x", x), c.gather("attention", attended)
            h = c.value("h", spec.width)
            routed = None if routed is None else c.gather("route", routed)
        _after_attention(c, layer, x, h, attended, routed)
    c.norm(x, names.OUTPUT_NORM, h, spec.width)
    output = names.OUTPUT if c.tensors.has(names.OUTPUT) else names.EMBED
    weight = c.tensors.matrix(output, vocab, spec.width)
    c.ops.append(Logits(h, weight, c.value("logits", vocab), spec.logit_softcap, precise=True))
    for layer in range(spec.layers, spec.layers + spec.unused_layers):
        c.tensors.skip_layer(layer)
    c.tensors.refuse_unused(spec.architecture)
    return Program(
        ops=tuple(c.ops),
        widths=tuple(c.widths),
        weights=tuple(c.tensors.weights),
        cache=_cache(spec),
        vocab=vocab,
        state=_state(spec),
    )


def _cache(spec: ModelSpec) -> CacheShape:
    if spec.mla is not None:
        return CacheShape(spec.layers, 1, spec.mla.latent + spec.mla.rope, "latent")
    layers = sum(not spec.has_delta(layer) for layer in range(spec.layers))
    return CacheShape(layers, spec.kv_heads, spec.head_dim)


def _state(spec: ModelSpec) -> StateShape | None:
    d = spec.delta
    if d is None or not any(d.layers):
        return None
    return StateShape(sum(d.layers), d.taps - 1, 2 * d.keys + d.values, d.v_heads, d.k_dim, d.v_dim)


def _attention(c: Compiler, layer: int, h: ValueId) -> ValueId:
    """What attention gives for the normed row h."""
    s = c.spec
    if s.mla is not None:
        return mla_attention(c, s.mla, layer, h)
    if s.delta is not None and s.has_delta(layer):
        return delta_layer(c, s.delta, layer, h)
    kv_width = s.kv_heads * s.head_dim
    q = c.value("q", s.heads * s.head_dim)
    k, v = c.value("k", kv_width), c.value("v", kv_width)
    out = c.value("attention", s.heads * s.head_dim)
    gate = _qkv(c, layer, h, q, k, v)
    normed = s.qk_norm != "none"
    if s.qk_norm == "head_if_there":
        normed = c.tensors.has(names.weight(layer, names.ATTN_Q_NORM))
    if normed:
        for name, value in ((names.ATTN_Q_NORM, q), (names.ATTN_K_NORM, k)):
            group = c.widths[value] if s.qk_norm == "row" else s.head_dim
            c.norm(value, names.weight(layer, name), value, group)
    rope = s.rope_of(layer)
    if rope is not None:
        for value, heads in ((q, s.heads), (k, s.kv_heads)):
            c.ops.append(Rope(value, heads, s.head_dim, c.inv_freq(rope), rope.interleaved, rope.scale))
            if s.unit_qk:
                c.ops.append(RmsNorm(value, c.ones(s.head_dim), value, s.head_dim, s.eps))
    elif s.temperature is not None:
        c.ops.append(PositionScale(q, *s.temperature))
    sinks = c.tensors.vector(names.weight(layer, names.ATTN_SINKS), s.heads) if s.sinks else None
    c.ops.append(
        Attention(
            q=q,
            k=k,
            v=v,
            out=out,
            layer=s.nth_of_kind(layer),
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            scale=s.attention_scale,
            window=s.windows[layer],
            softcap=s.attention_softcap,
            sinks=sinks,
            chunk=0 if rope is None else s.chunk,
        )
    )
    if gate is not None:
        c.ops.append(Gated(gate, out, out, "sigmoid"))
    return out


def _qkv(c: Compiler, layer: int, h: ValueId, q: ValueId, k: ValueId, v: ValueId) -> ValueId | None:
    """Everything of attention that is linear in h. The value that gates its result, if one does."""
    s = c.spec
    kv = ((names.ATTN_K, k), (names.ATTN_V, v))
    if not s.gated_attention:
        c.linear(h, layer, (names.ATTN_Q, q), *kv, needs_bias=s.qkv_bias, precise=True)
        return None
    gate = c.value("attention_gate", c.widths[q])
    query_weight, gate_weight = query_and_gate(c, layer)
    parts = [LinearPart(query_weight, None, q), LinearPart(gate_weight, None, gate)]
    for name, out in kv:
        matrix = c.tensors.matrix(names.weight(layer, name), c.widths[out], s.width)
        parts.append(LinearPart(matrix, None, out))
    c.ops.append(Linear(h, tuple(parts), precise=True))
    return gate


def _after_attention(
    c: Compiler, layer: int, x: ValueId, h: ValueId, attended: ValueId, routed: ValueId | None
) -> None:
    """Output projection, residual, MLP or experts, residual."""
    s = c.spec
    c.linear(attended, layer, (names.SSM_OUT if s.has_delta(layer) else names.ATTN_OUT, h))
    if s.post_norms:
        c.norm(h, names.weight(layer, names.ATTN_POST_NORM), h, s.width)
    c.ops.append(Add(x, h, x))
    c.norm(x, names.weight(layer, s.ffn_norm), h, s.width)
    result = mlp(c, layer, h, routed)
    if s.post_norms:
        c.norm(result, names.weight(layer, names.FFN_POST_NORM), result, s.width)
    c.ops.append(Add(x, result, x))
