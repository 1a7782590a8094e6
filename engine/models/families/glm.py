"""GLM-4.5 and its Air, with experts (https://arxiv.org/abs/2508.06471)."""

from dataclasses import replace

from ktransformers.engine.models.families.base import base, moe
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec
from ktransformers.engine.weights import names


def glm4moe(keys: Keys) -> ModelSpec:
    """Half of each head is rotated; routing is DeepSeek-V3's. The large model norms queries and keys.

    The last block of a file predicts a second token."""
    spec = base("glm4moe", keys, interleaved=False, experts=True)
    experts = moe(keys, spec.layers)
    return replace(
        spec,
        qk_norm="head_if_there",
        ffn_norm=names.ATTN_POST_NORM,
        moe=replace(experts, score="sigmoid", group_score="top2", correction=True),
    )
