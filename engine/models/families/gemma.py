"""Gemma 1 to 3 (https://arxiv.org/abs/2403.08295, 2408.00118, 2503.19786)."""

import math
from dataclasses import replace

from ktransformers.engine.models.families.base import base, windows
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec, RopeSpec


def gemma(keys: Keys) -> ModelSpec:
    return _family("gemma", keys)


def _family(architecture: str, keys: Keys) -> ModelSpec:
    """Converters add 1 to gemma's norm weights, so that its norms are ordinary ones."""
    spec = base(architecture, keys, interleaved=False)
    return replace(spec, act="gelu_tanh", embed_scale=math.sqrt(spec.width))


def gemma2(keys: Keys) -> ModelSpec:
    spec = _family("gemma2", keys)
    return replace(
        spec,
        post_norms=True,
        windows=windows(keys, spec.layers, 2),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0, 1e6, 50.0),
        logit_softcap=keys.number("final_logit_softcapping", 0.0, 1e6, 30.0),
        attention_scale=_gemma_scale(keys, spec, layers_of_27b=46),
    )


def gemma3(keys: Keys) -> ModelSpec:
    spec = _family("gemma3", keys)
    local_base = keys.number("rope.freq_base_swa", 1.001, 1e12, 10_000.0)
    return replace(
        spec,
        qk_norm="head",
        post_norms=True,
        windows=windows(keys, spec.layers, 6),
        local_rope=RopeSpec(local_base, spec.rope.dims, spec.rope.interleaved),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0, 1e6, 0.0),
        logit_softcap=keys.number("final_logit_softcapping", 0.0, 1e6, 0.0),
        attention_scale=_gemma_scale(keys, spec, layers_of_27b=62),
    )


def _gemma_scale(keys: Keys, spec: ModelSpec, layers_of_27b: int) -> float:
    """The 27B models divide the width by the heads, not the head size; their files do not say so."""
    if keys.get("attention.scale") is not None or spec.layers != layers_of_27b:
        return spec.attention_scale
    return float((spec.width / spec.heads) ** -0.5)
