"""What the families read alike from the keys of a GGUF file."""

from dataclasses import replace
from typing import Final, Literal

import numpy as np

from ktransformers.engine.models.fields import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    brief,
)
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec, MoeSpec, RopeSpec, Yarn, sharpening

_SCORES: Final[dict[int, Literal["softmax", "sigmoid", "softmax_top"]]] = {
    1: "softmax",
    2: "sigmoid",
    3: "softmax_top",
}
"""expert_gating_func"""


def base(architecture: str, keys: Keys, *, interleaved: bool, experts: bool = False) -> ModelSpec:
    """What all architectures have in common. `experts`: the caller reads the keys of experts."""
    layers, unused = layers_of(keys)
    width = keys.integer("embedding_length", 1, MAX_WIDTH)
    heads = keys.integer("attention.head_count", 1, MAX_HEADS)
    kv_heads = keys.integer("attention.head_count_kv", 1, heads, heads)
    if heads % kv_heads:
        raise keys.error("attention.head_count_kv", f"{kv_heads} does not divide {heads} heads")
    if width % heads and keys.get("attention.key_length") is None:
        raise keys.error("attention.head_count", f"{heads} does not divide the width {width}")
    head_dim = keys.integer("attention.key_length", 2, MAX_HEAD_DIM, width // heads)
    if keys.integer("attention.value_length", 2, MAX_HEAD_DIM, head_dim) != head_dim:
        raise keys.error("attention.value_length", f"differs from the key length {head_dim}: not supported")
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise keys.error("attention.head_count", f"heads of {head_dim} elements are not supported")
    keys.refuse("attention.causal", True)
    keys.refuse("rope.scaling.yarn_log_multiplier", 0.0)
    if not experts:
        keys.refuse("expert_count", 0)
        keys.refuse("expert_used_count", 0)
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=keys.integer("feed_forward_length", 1, MAX_FFN),
        context=keys.integer("context_length", 1, MAX_CONTEXT),
        eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        rope=rope_of(keys, head_dim, interleaved),
        attention_scale=keys.number("attention.scale", 1e-4, 10.0, head_dim**-0.5),
        windows=(0,) * layers,
        unused_layers=unused,
    )


def layers_of(keys: Keys) -> tuple[int, int]:
    """Layers of the model, and layers after them that predict further tokens."""
    blocks = keys.integer("block_count", 1, MAX_LAYERS)
    unused = keys.integer("nextn_predict_layers", 0, blocks - 1, 0)
    return blocks - unused, unused


def rope_of(keys: Keys, head_dim: int, interleaved: bool) -> RopeSpec:
    """The rope of heads of `head_dim` elements, with its context extension."""
    dims = keys.integer("rope.dimension_count", 2, head_dim, head_dim)
    if dims % 2:
        raise keys.error("rope.dimension_count", f"{dims} is odd")
    rope = RopeSpec(keys.number("rope.freq_base", 1.001, 1e12, 10_000.0), dims, interleaved)
    kind = keys.get("rope.scaling.type")
    if kind is not None and not isinstance(kind, str):
        raise keys.error("rope.scaling.type", f"{brief(kind)} is not a name")
    factor = keys.number("rope.scaling.factor", 1e-6, 1e6, 1.0)
    if kind is None or kind == "none" or kind == "linear":
        keys.refuse("rope.scaling.attn_factor", 1.0)
        keys.get("rope.scaling.original_context_length")
        if kind != "linear" and factor != 1.0:
            raise keys.error("rope.scaling.factor", f"{factor} without a scaling type")
        return replace(rope, factor=factor)
    if kind != "yarn":
        raise keys.error("rope.scaling.type", f"{brief(kind)} is not supported (none, linear and yarn are)")
    keys.refuse("rope.scaling.yarn_ext_factor", 1.0)
    attention = keys.number("rope.scaling.attn_factor", 1e-3, 1e3, 1.0)
    attention = keys.number("rope.scaling.yarn_attn_factor", 1e-3, 1e3, attention)
    return replace(
        rope,
        yarn=Yarn(
            factor=factor,
            original_context=keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT),
            attention_factor=attention * sharpening(factor),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 1e-3, 1e4, 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1e-3, 1e4, 1.0),
        ),
    )


def windows(keys: Keys, layers: int, pattern: int) -> tuple[int, ...]:
    """Every `pattern`-th layer sees all positions. A file may give another pattern, or a bool per layer."""
    window = keys.integer("attention.sliding_window", 1, MAX_CONTEXT)
    value = keys.get("attention.sliding_window_pattern")
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        if len(value) != layers:
            raise keys.error("attention.sliding_window_pattern", f"{len(value)} flags for {layers} layers")
        return tuple(window if flag else 0 for flag in value.tolist())
    pattern = keys.integer("attention.sliding_window_pattern", 1, MAX_LAYERS, pattern)
    return tuple(window if layer % pattern < pattern - 1 else 0 for layer in range(layers))


def moe(keys: Keys, layers: int, ffn: int | None = None) -> MoeSpec:
    """Experts in all layers but the first ones that the file names, chosen as Mixtral's unless the file says
    more. `ffn`: the width of an expert where the file has no key for it."""
    experts = keys.integer("expert_count", 1, MAX_EXPERTS)
    top = keys.integer("expert_used_count", 1, experts)
    dense = keys.integer("leading_dense_block_count", 0, layers, 0)
    score = keys.integer("expert_gating_func", 1, 3, 1)
    groups = keys.integer("expert_group_count", 0, experts, 1) or 1
    top_groups = keys.integer("expert_group_used_count", 0, groups, groups) or groups
    if experts % groups or top > experts // groups * top_groups:
        raise keys.error("expert_group_count", f"{groups} groups do not fit {top} of {experts} experts")
    if groups > 1 and experts == groups:
        raise keys.error("expert_group_count", "groups of one expert are not supported")
    width = keys.integer("expert_feed_forward_length", 1, MAX_FFN, ffn)
    return MoeSpec(
        layers=tuple(layer >= dense for layer in range(layers)),
        experts=experts,
        top=top,
        ffn=width,
        score=_SCORES[score],
        normalise=keys.flag("expert_weights_norm", default=True),
        scale=keys.number("expert_weights_scale", 0.0, 1e3, 1.0) or 1.0,
        groups=groups,
        top_groups=top_groups,
        group_score="top2" if _SCORES[score] == "sigmoid" else "max",
        shared_ffn=keys.integer("expert_shared_count", 0, MAX_EXPERTS, 0) * width,
    )
