"""Compiles multi-head latent attention in its absorbed form: one latent row is cached for each position.

The up-projections of keys and values are folded into queries and outputs: q_nope . (W_k c) is
(W_k' q_nope) . c, so all heads read the same row, and no key or value is ever made of it (DeepSeek-AI 2024,
https://arxiv.org/abs/2405.04434, section 2.1.2).
"""

from ktransformers.engine.models.compiler import Compiler
from ktransformers.engine.models.spec import MlaSpec
from ktransformers.engine.program import HeadLinear, Linear, LinearPart, MlaAttention, Rope, ValueId
from ktransformers.engine.weights import names


def mla_attention(c: Compiler, mla: MlaSpec, layer: int, h: ValueId) -> ValueId:
    """What attention gives for the normed row h: values of all heads."""
    s = c.spec
    q = c.value("q", s.heads * (mla.nope + mla.rope))
    latent, k_rope = c.value("latent", mla.latent), c.value("k_rope", mla.rope)
    _down(c, mla, layer, h, q, latent, k_rope)
    c.norm(latent, names.weight(layer, names.ATTN_KV_A_NORM), latent, mla.latent)
    freq = c.inv_freq(s.rope)
    interleaved, scale = s.rope.interleaved, s.rope.scale
    c.ops.append(Rope(q, s.heads, mla.nope + mla.rope, freq, interleaved, scale, offset=mla.nope))
    c.ops.append(Rope(k_rope, 1, mla.rope, freq, interleaved, scale))
    q_latent = c.value("q_latent", s.heads * mla.latent)
    k_b = c.tensors.experts(names.weight(layer, names.ATTN_K_B), s.heads, mla.latent, mla.nope)
    c.ops.append(HeadLinear(q, k_b, q_latent, s.heads))
    attended = c.value("attention_latent", s.heads * mla.latent)
    c.ops.append(
        MlaAttention(
            q_latent=q_latent,
            q=q,
            latent=latent,
            rope=k_rope,
            out=attended,
            layer=layer,
            heads=s.heads,
            scale=s.attention_scale,
        )
    )
    out = c.value("attention", s.heads * mla.value)
    v_b = c.tensors.experts(names.weight(layer, names.ATTN_V_B), s.heads, mla.value, mla.latent)
    c.ops.append(HeadLinear(attended, v_b, out, s.heads))
    return out


def _down(
    c: Compiler, mla: MlaSpec, layer: int, h: ValueId, q: ValueId, latent: ValueId, k_rope: ValueId
) -> None:
    """Everything that is linear in h, and queries if they are not."""
    first = c.value("q_a", mla.q_rank) if mla.q_rank else q
    name = names.weight(layer, names.ATTN_Q_A if mla.q_rank else names.ATTN_Q)
    parts = [LinearPart(c.tensors.matrix(name, c.widths[first], c.spec.width), None, first)]
    kv_a = names.weight(layer, names.ATTN_KV_A)
    total = mla.latent + mla.rope
    for out, begin, end in ((latent, 0, mla.latent), (k_rope, mla.latent, total)):
        parts.append(LinearPart(c.tensors.rows(kv_a, total, c.spec.width, begin, end), None, out))
    c.ops.append(Linear(h, tuple(parts), precise=True))
    if mla.q_rank:
        c.norm(first, names.weight(layer, names.ATTN_Q_A_NORM), first, mla.q_rank)
        c.linear(first, layer, (names.ATTN_Q_B, q))
