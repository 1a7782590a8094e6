"""Qwen2, Qwen3 and Qwen3-Next, dense and with experts (https://arxiv.org/abs/2407.10671, 2505.09388)."""

from dataclasses import replace

from ktransformers.engine.models.families.base import base, moe
from ktransformers.engine.models.fields import (
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TAPS,
    MAX_WIDTH,
)
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import DeltaSpec, ModelSpec
from ktransformers.engine.weights import names


def qwen2(keys: Keys) -> ModelSpec:
    return replace(base("qwen2", keys, interleaved=False), qkv_bias=True)


def qwen3(keys: Keys) -> ModelSpec:
    return replace(base("qwen3", keys, interleaved=False), qk_norm="head")


def qwen2moe(keys: Keys) -> ModelSpec:
    """Weights of the chosen are not normalised; a shared expert has a gate of its own."""
    spec = base("qwen2moe", keys, interleaved=False, experts=True)
    experts = moe(keys, spec.layers)
    shared = keys.integer("expert_shared_feed_forward_length", 1, MAX_FFN)
    normalise = keys.flag("expert_weights_norm", default=False)
    experts = replace(experts, normalise=normalise, shared_ffn=shared, shared_gate=True)
    return replace(spec, qkv_bias=True, moe=experts)


def qwen3moe(keys: Keys) -> ModelSpec:
    spec = base("qwen3moe", keys, interleaved=False, experts=True)
    experts = moe(keys, spec.layers)
    return replace(spec, qk_norm="head", moe=experts)


def qwen3next(keys: Keys) -> ModelSpec:
    """Three of four layers have the gated delta rule, the fourth has gated attention, a part of whose heads
    is rotated; all have experts, and a shared one with a gate."""
    spec = base("qwen3next", keys, interleaved=False, experts=True)
    experts = moe(keys, spec.layers)
    shared = keys.integer("expert_shared_feed_forward_length", 1, MAX_FFN)
    every = keys.integer("full_attention_interval", 1, MAX_LAYERS, 4)
    return replace(
        spec,
        qk_norm="head",
        gated_attention=True,
        ffn_norm=names.ATTN_POST_NORM,
        delta=_delta(keys, tuple((layer + 1) % every != 0 for layer in range(spec.layers))),
        moe=replace(experts, shared_ffn=shared, shared_gate=True),
    )


def _delta(keys: Keys, layers: tuple[bool, ...]) -> DeltaSpec:
    if all(layers):
        raise keys.error("full_attention_interval", f"none of {len(layers)} layers has attention")
    k_heads = keys.integer("ssm.group_count", 1, MAX_HEADS)
    v_heads = keys.integer("ssm.time_step_rank", 1, MAX_HEADS)
    if v_heads % k_heads:
        raise keys.error("ssm.time_step_rank", f"{k_heads} heads of keys do not divide {v_heads} of values")
    values = keys.integer("ssm.inner_size", 1, MAX_WIDTH)
    if values % v_heads or values // v_heads > MAX_HEAD_DIM:
        raise keys.error("ssm.inner_size", f"{values} is not {v_heads} heads of at most {MAX_HEAD_DIM}")
    return DeltaSpec(
        layers=layers,
        k_heads=k_heads,
        v_heads=v_heads,
        k_dim=keys.integer("ssm.state_size", 1, MAX_HEAD_DIM),
        v_dim=values // v_heads,
        taps=keys.integer("ssm.conv_kernel", 2, MAX_TAPS),
    )
