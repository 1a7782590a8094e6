"""Qwen2 and Qwen3, dense and with experts (https://arxiv.org/abs/2407.10671, 2505.09388)."""

from dataclasses import replace

from ktransformers.engine.models.families.base import base, moe
from ktransformers.engine.models.fields import MAX_FFN
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec


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
