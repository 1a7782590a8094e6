"""gpt-oss (https://arxiv.org/abs/2508.10925)."""

from dataclasses import replace
from typing import Final

from ktransformers.engine.models.families.base import base, moe, windows
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec, MoeSpec, RopeSpec
from ktransformers.engine.weights import names

ALPHA: Final = 1.702
LIMIT: Final = 7.0
"""Of the clamped SwiGLU: files do not say."""


def gpt_oss(keys: Keys) -> ModelSpec:
    """Sinks, biases everywhere, a window in every other layer, experts with a clamped SwiGLU."""
    spec = base("gpt-oss", keys, interleaved=False, experts=True)
    return replace(
        spec,
        rope=exact_yarn(spec.rope),
        windows=windows(keys, spec.layers, 2),
        qkv_bias=True,
        sinks=True,
        ffn_norm=names.ATTN_POST_NORM,
        moe=clamped(moe(keys, spec.layers)),
    )


def exact_yarn(rope: RopeSpec) -> RopeSpec:
    """The model was trained with limits of YaRN that are no whole numbers."""
    return rope if rope.yarn is None else replace(rope, yarn=replace(rope.yarn, truncate=False))


def clamped(experts: MoeSpec) -> MoeSpec:
    """The softmax is over the chosen; experts have biases."""
    return replace(
        experts,
        score="softmax_top",
        normalise=False,
        biases=True,
        act="swiglu_oai",
        alpha=ALPHA,
        limit=LIMIT,
    )
